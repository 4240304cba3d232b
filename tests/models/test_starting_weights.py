"""A training starts from the weights of another one, and what does not fit is refused."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.models.test_pretrained import make_original_checkpoint
from tests.tiny_runs import TINY_MODEL, change, tiny_config
from vim.checkpoints.io import CheckpointError, save_weights
from vim.layers.pos_embed import resample_pos_embed
from vim.models.build import build_model, describe_model
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

SMALL = {"embed_dim": 16, "depth": 1, "d_state": 4, "patch_size": 8}


def model_config(**changes):
    changes = {"in_chans": 3, "img_size": 32, "args": SMALL, **changes}
    return change(tiny_config(), **{f"model__{name}": value for name, value in changes.items()}).model


@pytest.fixture
def released(tmp_path):
    """A checkpoint like the original's, of a small model, and that model."""
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", img_size=32, num_classes=7, **SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save(make_original_checkpoint(model), tmp_path / "released.pth")
    return tmp_path / "released.pth", model


def assert_same(model, expected, but=()):
    state = model.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        if name not in but:
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(("weights", "added"), [("best", 0), ("raw", 0), ("ema", 1)])
def test_a_file_of_the_original_gives_the_weights_asked_for(released, weights, added):
    path, source = released
    config = model_config(checkpoint=str(path), pretrained_weights=weights)
    assert_same(build_model(config, 7), {name: tensor + added for name, tensor in source.state_dict().items()})
    assert describe_model(source, config).endswith(f"M parameters, weights of {path}")


def test_another_number_of_classes_gets_a_new_head_and_keeps_the_rest(released):
    path, source = released
    torch.manual_seed(3)
    model = build_model(model_config(checkpoint=str(path)), 5)
    torch.manual_seed(3)
    fresh = build_model(model_config(), 5).head
    assert torch.equal(model.head.weight, fresh.weight)
    assert_same(model, {**source.state_dict(), **{f"head.{n}": t for n, t in fresh.state_dict().items()}})


@pytest.mark.parametrize("name", ["best.pth", "best.safetensors"])
def test_as_many_classes_of_other_names_get_a_new_head(tmp_path, name):
    trainer = Trainer(tiny_config(ema_decay=None), RunFolder(tmp_path / "run"))
    trainer.fit()
    config = tiny_config(model__checkpoint=str(tmp_path / "run" / name)).model
    names = trainer.task.class_names
    assert_same(build_model(config, 10, names), trainer.model.state_dict())
    assert_same(build_model(config, 10), trainer.model.state_dict())
    for others in (names[::-1], (*names[:-1], "ten")):
        model = build_model(config, 10, others)
        assert_same(model, trainer.model.state_dict(), but=("head.weight", "head.bias"))
        assert not torch.equal(model.head.weight, trainer.model.head.weight)


def test_a_finer_stride_resamples_the_position_embedding_as_asked(released):
    path, source = released
    args = {**SMALL, "patch_stride": 4}
    model = build_model(model_config(checkpoint=str(path), args=args), 7)
    expected = resample_pos_embed(source.pos_embed, (4, 4), (7, 7), "middle")
    assert_same(model, {**source.state_dict(), "pos_embed": expected})
    reference = build_model(model_config(checkpoint=str(path), args=args, pretrained_resampling="reference"), 7)
    assert torch.equal(reference.pos_embed[:, 0], source.pos_embed[:, 0])  # a patch's, taken for the class token's
    assert not torch.equal(reference.pos_embed, model.pos_embed)


@pytest.mark.parametrize("channels", [1, 4])
def test_another_number_of_channels_adapts_the_first_convolution(released, channels):
    path, source = released
    weight = build_model(model_config(checkpoint=str(path), in_chans=channels), 7).patch_embed.proj.weight
    assert weight.shape[1] == channels
    if channels == 1:
        torch.testing.assert_close(weight, source.patch_embed.proj.weight.sum(dim=1, keepdim=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs on images of 16 x 24 pixels, one channel."""
    config = tiny_config(epochs=2, ema_decay=0.5, model__img_size=(16, 24))
    trainer = Trainer(config, RunFolder(tmp_path_factory.mktemp("start") / "run"))
    trainer.fit()
    return trainer


def test_a_run_of_ours_gives_its_best_weights_by_its_folder_or_its_files(run):
    grey = {"in_chans": 1, "img_size": (16, 24), "args": TINY_MODEL}
    expected = timm.models.load_state_dict(str(run.folder.best_weights))
    for place in (run.folder.path, run.folder.best, run.folder.best_weights):
        assert_same(build_model(model_config(checkpoint=str(place), **grey), 10), expected)
    averaged = model_config(checkpoint=str(run.folder.last), pretrained_weights="ema", **grey)
    assert_same(build_model(averaged, 10), run.state.ema.module.state_dict())


def test_a_run_on_oblong_grey_images_starts_one_on_larger_colour_images(run):
    config = model_config(in_chans=3, img_size=(32, 48), args=TINY_MODEL, checkpoint=str(run.folder.path))
    model = build_model(config, 4)
    source = timm.models.load_state_dict(str(run.folder.best_weights))
    expected = resample_pos_embed(source["pos_embed"], (2, 3), (4, 6), "middle")
    torch.testing.assert_close(model.pos_embed, expected)
    torch.testing.assert_close(
        model.patch_embed.proj.weight.sum(dim=1, keepdim=True), source["patch_embed.proj.weight"]
    )


def test_a_run_starts_from_a_checkpoint_and_resumes_without_it(run, tmp_path):
    start = tmp_path / "start.safetensors"
    start.write_bytes(run.folder.best_weights.read_bytes())
    config = tiny_config(model__img_size=(16, 24), model__checkpoint=str(start), epochs=1)
    trainer = Trainer(config, RunFolder(tmp_path / "next"))
    assert_same(trainer.model, timm.models.load_state_dict(str(start)))
    trainer.fit()
    start.unlink()
    resumed = Trainer(config, trainer.folder)
    resumed.resume()
    assert_same(resumed.model, trainer.model.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "there is no checkpoint"),
        ("cut", "is damaged or not a PyTorch checkpoint|is truncated"),
        ("flipped", "is damaged: the checksum of"),
        ("name", r"does not fit .*it lacks 'layers.0.mixer.D'"),
        ("extra", r"does not fit .*it has 'layers.0.mixer.E', which the model lacks"),
        ("depth", "does not fit vim_tiny_patch16_224: the checkpoint has 1 blocks, the model has depth=2"),
        ("weights", "cannot be used: the checkpoint has no 'ema' weights|must be 'best' or 'raw' for"),
        ("model", "model.checkpoint is for Vision Mamba, and model.name is 'resnet10t'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(run, tmp_path, damage, message):
    path, changes = tmp_path / "start.safetensors", {}
    state = timm.models.load_state_dict(str(run.folder.best_weights))
    if damage == "name":
        del state["layers.0.mixer.D"]
    if damage == "extra":
        state["layers.0.mixer.E"] = torch.zeros(1)
    if damage == "depth":
        changes["args"] = {**TINY_MODEL, "depth": 2}
    if damage == "weights":
        changes["pretrained_weights"] = "ema"
    if damage == "model":
        changes |= {"name": "resnet10t", "args": {}}
    if damage != "missing":
        save_weights(path, state, {})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "flipped":
        path = tmp_path / "start.pth"
        data = bytearray(run.folder.best.read_bytes())
        data[data.index(torch.load(run.folder.best, weights_only=True)["model"]["pos_embed"].numpy().tobytes())] ^= 1
        path.write_bytes(bytes(data))
    config = model_config(in_chans=1, img_size=(16, 24), **{"args": TINY_MODEL, **changes}, checkpoint=str(path))
    with pytest.raises((CheckpointError, FileNotFoundError, ValueError), match=message):
        build_model(config, 10)


def test_a_checkpoint_goes_before_published_weights(released):
    path, source = released
    config = model_config(pretrained=True, checkpoint=str(path))
    assert_same(build_model(config, 7), source.state_dict())
    assert describe_model(source, config).endswith(f"M parameters, weights of {path}")
    assert describe_model(source, model_config(pretrained=True)).endswith("M parameters, published weights")
    assert describe_model(source, model_config()).endswith("M parameters")
