"""Detectors: shapes, parameters, a step of training, padding, and images without objects."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import vim
from vim.config.detection import DetectionConfig
from vim.models.detection import SimpleFeaturePyramid, build_detector

TINY = DetectionConfig(
    channels=16,
    proposals=50,
    box_samples=32,
    anchor_samples=32,
    head_convolutions=1,
    head_features=16,
    anchor_scale=4.0,
)
CASCADE = replace(TINY, heads="cascade")


def tiny(settings=TINY, classes=3, image_shape=(64, 96), **arguments):
    torch.manual_seed(0)
    backbone = vim.VisionMamba(
        **{"img_size": image_shape, "embed_dim": 16, "depth": 2, "d_state": 4, "drop_path_rate": 0.0} | arguments
    )
    return build_detector(backbone, classes, settings, image_shape, (0.5,) * 3, (0.25,) * 3)


def scene(boxes, shape=(64, 96)):
    """Return an image with bright boxes, and its target."""
    image, masks = torch.zeros(3, *shape), torch.zeros(len(boxes), *shape, dtype=torch.uint8)
    for index, (left, top, right, bottom) in enumerate(boxes):
        image[index % 3, top:bottom, left:right] = 1.0
        masks[index, top:bottom, left:right] = 1
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(len(boxes)) % 3 + 1,
        "masks": masks,
    }
    return image, target


def batch():
    scenes = [scene([(4, 4, 28, 28), (40, 20, 90, 60)]), scene([(50, 10, 80, 40)])]
    return torch.stack([image for image, _ in scenes]), [target for _, target in scenes]


@pytest.mark.parametrize("cls_position", ["none", "middle", "double"])
def test_levels_of_the_pyramid(cls_position):
    torch.manual_seed(0)
    backbone = vim.VisionMamba(img_size=(64, 96), embed_dim=16, depth=2, d_state=4, cls_position=cls_position)
    pyramid = SimpleFeaturePyramid(backbone, channels=8)
    maps = pyramid(torch.randn(2, 3, 64, 96))
    shapes = {name: tuple(level.shape) for name, level in maps.items()}
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert shapes == {name: (2, 8, *size) for name, size in zip(["0", "1", "2", "3", "pool"], sizes, strict=True)}
    assert pyramid.strides == [4, 8, 16, 32, 64]
    torch.testing.assert_close(maps["pool"], maps["3"][:, :, ::2, ::2])


def test_the_pyramid_reads_residual_plus_hidden_state_without_class_token_and_norm():
    torch.manual_seed(0)
    backbone = vim.VisionMamba(img_size=32, embed_dim=16, depth=2, d_state=4).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = backbone.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    seen = []
    pyramid = SimpleFeaturePyramid(backbone, channels=8).eval()
    pyramid.levels[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pyramid(x)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(
    ("scales", "words"),
    [((3.0, 1.5), "powers of two"), ((4.0, 1.0), "halve"), ((), "powers of two"), ((32.0, 16.0), "powers of two")],
)
def test_scales_that_the_pyramid_cannot_have_are_refused(scales, words):
    with pytest.raises(ValueError, match=words):
        SimpleFeaturePyramid(vim.VisionMamba(img_size=32, embed_dim=64, depth=1), scales=scales)


def test_parameters_of_the_paper_s_detector():
    backbone = timm.create_model("vim_tiny_patch16_224", img_size=1024, cls_position="none", num_classes=0)
    without_norm = sum(p.numel() for name, p in backbone.named_parameters() if not name.startswith("norm_f"))
    settings = DetectionConfig(heads="cascade")
    detector = build_detector(backbone, 80, settings, (1024, 1024), (0.5,) * 3, (0.25,) * 3)

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    def level(enlarging, width):  # two convolutions without bias, with two norms
        return enlarging + width * 256 + 9 * 256 * 256 + 4 * 256

    enlarge_twice = 192 * 96 * 4 + 96 + 2 * 96 + 96 * 48 * 4 + 48
    levels = [level(enlarge_twice, 48), level(192 * 96 * 4 + 96, 96), level(0, 192), level(0, 192)]
    proposals = 2 * (9 * 256 * 256 + 256) + 257 * 3 + 257 * 12
    convolutions = 4 * (9 * 256 * 256 + 2 * 256)
    stage = convolutions + (256 * 49 + 1) * 1024 + 1025 * 81 + 1025 * 4
    mask = convolutions + 256 * 256 * 4 + 256 + 257 * 81
    assert count(detector.backbone) == without_norm + sum(levels)
    assert count(detector.rpn) == proposals
    assert count(detector.roi_heads) == 3 * stage + mask
    assert count(detector) == 60_080_335


@pytest.mark.parametrize("settings", [TINY, CASCADE], ids=["mask_rcnn", "cascade"])
@pytest.mark.parametrize("cls_position", ["none", "middle"])
def test_steps_reduce_the_loss(settings, cls_position):
    detector = tiny(settings, cls_position=cls_position).train()
    images, targets = batch()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)

    def loss():
        torch.manual_seed(1)  # the same samples of anchors and proposals
        losses = detector(images, targets)
        stages = 3 if settings.heads == "cascade" else 1
        assert len(losses) == 2 + 2 * stages + 1
        return sum(losses.values())

    first = loss()
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        missing = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
        assert missing == []
        optimizer.step()
    assert loss() < 0.9 * first


@pytest.mark.parametrize("settings", [TINY, CASCADE], ids=["mask_rcnn", "cascade"])
def test_images_without_objects_train_and_every_parameter_has_a_gradient(settings):
    detector = tiny(settings).train()
    image, target = scene([])
    losses = detector(torch.stack([image, image]), [target, target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == 0
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in detector.parameters())


@pytest.mark.parametrize("settings", [TINY, CASCADE], ids=["mask_rcnn", "cascade"])
def test_boxes_without_area_are_refused_by_name(settings):
    image, target = scene([(4, 4, 28, 28), (10, 10, 10, 30)])
    with pytest.raises(AssertionError, match="positive height and width"):
        tiny(settings).train()(image[None], [target])


@pytest.mark.parametrize("settings", [TINY, CASCADE], ids=["mask_rcnn", "cascade"])
@pytest.mark.parametrize("image_shape", [(64, 96), (80, 48)])
def test_detections_of_images_of_any_size(settings, image_shape):
    settings = replace(settings, score_threshold=0.0)
    detector = tiny(settings, image_shape=image_shape).eval()
    images = [torch.rand(3, 50, 200), torch.rand(3, 33, 20), torch.rand(3, 1, 1)]
    with torch.no_grad():
        results = detector(images)
    for image, result in zip(images, results, strict=True):
        height, width = image.shape[1:]
        count = len(result["boxes"])
        assert result["masks"].shape == (count, 1, height, width)
        assert result["scores"].shape == result["labels"].shape == (count,)
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
        assert set(result["labels"].tolist()) <= {1, 2, 3}
    assert len(results[0]["boxes"]) > 0


@pytest.mark.parametrize("settings", [TINY, CASCADE], ids=["mask_rcnn", "cascade"])
def test_detections_do_not_depend_on_the_other_images_of_a_batch(settings):
    settings = replace(settings, score_threshold=0.0)
    detector = tiny(settings).eval()
    wide, small = torch.rand(3, 20, 200), torch.rand(3, 30, 20)
    with torch.no_grad():
        alone, together = detector([small])[0], detector([wide, small])[1]
    assert len(alone["boxes"]) > 0
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, msg=name)


def test_masks_can_be_left_out():
    for heads in ("mask_rcnn", "cascade"):
        settings = replace(TINY, heads=heads, masks=False)
        detector = tiny(settings).train()
        images, targets = batch()
        boxes_only = [{name: target[name] for name in ("boxes", "labels")} for target in targets]
        assert "loss_mask" not in detector(images, boxes_only)
        assert "masks" not in detector.eval()([images[0]])[0]


def test_heads_compute_in_float32_under_autocast():
    detector = tiny(CASCADE).train()
    images, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, targets)
        detections = detector.eval()(images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {result[name].dtype for result in detections for name in ("boxes", "scores", "masks")} == {torch.float32}


def test_training_without_targets_detects_and_keeps_the_modes_of_modules():
    detector = tiny().train()
    detector.rpn.eval()  # as frozen modules are
    modes = [module.training for module in detector.modules()]
    assert isinstance(detector(batch()[0]), list)
    assert [module.training for module in detector.modules()] == modes


def test_the_optimizer_knows_layers_and_what_does_not_decay():
    detector = tiny(depth=4)
    groups = param_groups_layer_decay(
        detector, weight_decay=0.1, no_weight_decay_list=detector.no_weight_decay(), layer_decay=0.5
    )
    names = {parameter: name for name, parameter in detector.named_parameters()}
    scale = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(scale) == len(names)
    assert scale["backbone.model.patch_embed.proj.weight"] == scale["backbone.model.pos_embed"] == 0.5**5
    blocks = [scale[f"backbone.model.layers.{i}.mixer.in_proj.weight"] for i in range(4)]
    assert blocks == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert {scale[name] for name in names.values() if not name.startswith("backbone.model.")} == {1.0}
    assert decay["backbone.model.pos_embed"] == decay["backbone.model.cls_token"] == 0


def test_a_vit_of_timm_is_a_backbone_too():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    detector = build_detector(model, 3, TINY, (64, 64), (0.5,) * 3, (0.25,) * 3)
    assert not isinstance(detector.backbone.model.head, nn.Linear)
    assert len(detector.eval()([torch.rand(3, 40, 40)])) == 1
