"""What timm's own code does with a model: taps, pruning, features, and its training and validation scripts."""

from __future__ import annotations

import copy
import importlib

import pytest
import timm
import torch

import vim
from tests.helpers import assert_close
from tests.models.small import images
from tests.models.small import small as small_model

NAME = "vim_tiny_patch16_224"
VARIANTS = {
    "plain": {},
    "double": {"cls_position": "double"},
    "none": {"cls_position": "none"},
    "rotary": {"rotary": "residual", "cls_position": "head", "merge": "sum"},
    "pairwise": {"pairwise_layers": True, "directions": "none"},
    "layer norm": {"norm": "layer", "layer_scale": 0.5},
}


def small(**kwargs) -> vim.VisionMamba:
    return small_model(**{"depth": 4, **kwargs}).eval()


def tiny_features(**kwargs):
    """Feature maps of six blocks of the tiny model."""
    torch.manual_seed(0)
    sizes = {"depth": 6, "img_size": 32, "drop_path_rate": 0.0}
    return timm.create_model(NAME, features_only=True, **sizes, **kwargs)


@pytest.mark.parametrize("variant", list(VARIANTS))
@torch.no_grad()
def test_pruned_models_and_early_stops_give_the_same_taps(variant):
    model = small(**VARIANTS[variant])
    taps = model.forward_intermediates(images(), intermediates_only=True)
    last = copy.deepcopy(model)
    last.prune_intermediate_layers([3], prune_head=False)
    assert torch.equal(last(images()), model(images()))
    for i in range(4):
        early = model.forward_intermediates(images(), indices=[i], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], taps[i])
        for prune_norm in (False, True):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([i], prune_norm=prune_norm) == [i]
            found = pruned.forward_intermediates(images(), indices=[i], intermediates_only=True)
            assert torch.equal(found[0], taps[i])
        # Without norm and head, what the blocks put out is what is left.
        tokens = pruned.forward_features(images())[:, pruned.num_prefix_tokens :]
        if variant != "pairwise" or i % 2:
            assert torch.equal(tokens, taps[i].flatten(2).mT)


def test_a_pruned_model_uses_all_that_it_keeps():
    model = small(drop_path_rate=0.0).train()
    model.prune_intermediate_layers([1])
    (tap,) = model.forward_intermediates(images(), indices=[1], intermediates_only=True)
    (tap.sum() + model.forward_features(images()).square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_pruned_model_takes_another_size():
    model = small()
    model.prune_intermediate_layers([1])
    model.set_input_size((48, 64))
    assert model.forward_intermediates(images(48, 64), intermediates_only=True)[-1].shape == (2, 32, 6, 8)


@pytest.mark.parametrize(
    ("out_indices", "blocks"),
    [((0, 5), (0, 5)), ((2,), (2,)), ((-1,), (5,)), ((-6, -2), (0, 4)), (2, (4, 5)), (range(6), range(6))],
    ids=str,
)
@torch.no_grad()
def test_features_of_any_blocks(out_indices, blocks):
    plain = timm.create_model(NAME, depth=6, img_size=32).eval()
    features = tiny_features(out_indices=out_indices).eval()
    missing, _ = plain.load_state_dict(features.model.state_dict(), strict=False)
    taps = plain.forward_intermediates(images(), intermediates_only=True)
    maps = features(images())
    assert features.feature_info.out_indices == tuple(blocks)
    assert features.feature_info.channels() == [192] * len(blocks)
    assert features.feature_info.reduction() == [16] * len(blocks)
    assert len(maps) == len(blocks)
    for found, block in zip(maps, blocks, strict=True):
        assert torch.equal(found, taps[block])
    assert len(features.model.layers) == max(blocks) + 1
    assert not any(name.startswith("layers.0") for name in missing)


def test_features_with_size_changes_and_checkpointing():
    features = tiny_features(out_indices=(1, 3))
    features.model.set_grad_checkpointing()
    features.model.set_input_size((48, 64))
    maps = features(images(48, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 192, 3, 4)] * 2
    sum(m.square().mean() for m in maps).backward()
    assert features.model.layers[0].mixer.A_log.grad.abs().sum() > 0


def test_the_last_blocks_as_dino_asks_for_them():
    model = small()
    taps = model.forward_intermediates(images(), indices=2, norm=True, intermediates_only=True)
    tokens = model.get_intermediate_layers(images(), 2, norm=True)
    for found, tap in zip(tokens, taps, strict=True):
        assert torch.equal(found, tap.flatten(2).mT)
    (pair,) = model.get_intermediate_layers(images(), [1], reshape=True, return_prefix_tokens=True)
    assert (pair[0].shape, pair[1].shape) == ((2, 32, 4, 4), (2, 1, 32))


def test_a_checkpoint_without_a_head_comes_back(tmp_path):
    model = small(num_classes=0)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "headless.pth")
    other = small(num_classes=0)
    torch.nn.init.zeros_(other.pos_embed)
    timm.models.load_checkpoint(other, str(tmp_path / "headless.pth"))
    assert torch.equal(other(images()), model(images()))


def test_the_way_of_timms_training_and_validation_scripts(tmp_path):
    """The calls of timm's train.py and validate.py, in their order, with the arguments they pass on."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, ModelEmaV3, accuracy

    importlib.import_module("vim")  # --device-modules vim
    torch.manual_seed(0)
    small = {"depth": 2, "img_size": 32}  # --model-kwargs
    model = timm.create_model(
        NAME,
        pretrained=False,
        in_chans=3,
        num_classes=4,
        drop_rate=0.0,
        drop_path_rate=None,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        checkpoint_path="",
        **small,
    )
    model.set_grad_checkpointing(enable=True)
    model.to(device="cpu", memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.75)
    schedule, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=2, cooldown_epochs=0, warmup_epochs=0)
    ema = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    x, target = images().repeat(4, 1, 1, 1), torch.arange(8) % 4
    losses = []
    for epoch in range(epochs):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward(create_graph=False)
            timm.utils.dispatch_clip_grad(
                timm.models.model_parameters(model, exclude_head=True), value=0.02, mode="agc"
            )
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        saver.save_checkpoint(epoch, metric=-losses[-1])
        schedule.step(epoch + 1, losses[-1])
    assert losses[-1] < losses[0]

    resumed = timm.create_model(NAME, num_classes=4, **small)
    fresh = create_optimizer_v2(resumed, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.75)
    start = timm.models.resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), fresh, log_info=False)
    assert start == epochs
    assert_close(resumed.eval()(x), model.eval()(x), 1e-6)
    for use_ema, source in ((False, model), (True, ema.module)):
        validated = timm.create_model(NAME, num_classes=4, global_pool=None, scriptable=False, **small)
        timm.models.load_checkpoint(validated, str(tmp_path / "last.pth.tar"), use_ema=use_ema)
        validated, test_pool = timm.layers.apply_test_time_pool(validated.eval(), validated.pretrained_cfg)
        assert not test_pool
        with torch.no_grad():
            assert_close(validated(x), source.eval()(x), 1e-6)
            top1, _ = accuracy(validated(x), target, topk=(1, 4))
    assert 0 <= float(top1) <= 100
