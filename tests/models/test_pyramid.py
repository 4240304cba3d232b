"""The feature pyramid: shapes, choices, and the packages that are built on such maps."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

import vim
from tests.helpers import assert_close
from vim.inference.export import write_checked
from vim.inference.export_formats import FORMATS
from vim.models import VimPyramid, variants

NAME = "vim_tiny_pyramid_patch16_224"
SMALL = {"patch_size": 16, "embed_dim": 16, "depth": 4, "d_state": 4, "dynamic_img_size": True, "img_size": 64}


def small(**kwargs) -> vim.VisionMamba:
    """A model small enough for tests."""
    torch.manual_seed(0)
    return vim.VisionMamba(**{**SMALL, **kwargs})


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_four_resolutions_whatever_the_step_between_patches(stride):
    pyramid = VimPyramid(small(patch_size=stride, patch_stride=stride))
    maps = pyramid(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 64 // r, 96 // r) for r in (4, 8, 16, 32)]
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    assert pyramid.feature_info.channels() == [16] * 4


def test_levels_read_the_blocks_they_should():
    model = small().eval()
    x = torch.randn(1, 3, 64, 64)
    taps = model.forward_intermediates(x, intermediates_only=True)
    pyramid = VimPyramid(model, blocks=(0, 1, 1, 3)).eval()
    maps = pyramid(x)
    for level, block in enumerate((0, 1, 1, 3)):
        assert torch.allclose(maps[level], pyramid.resize[level](taps[block]), atol=1e-6)


def test_levels_that_are_left_out_cost_nothing():
    pyramid = VimPyramid(small(), out_indices=(0, 1))
    assert len(pyramid.model.layers) == 2
    assert len(pyramid.resize) == 2
    assert pyramid.feature_info.reduction() == [4, 8]
    assert VimPyramid(small(), out_indices=2).levels == [2, 3]
    assert isinstance(pyramid.model.head, nn.Identity)


def test_every_parameter_learns_with_checkpointing_too():
    pyramid = VimPyramid(small(drop_path_rate=0.0))
    pyramid.set_grad_checkpointing()
    sum(m.square().mean() for m in pyramid(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in pyramid.parameters())


def test_in_timm():
    with torch.device("meta"):
        features = timm.create_model(NAME, features_only=True)
    assert isinstance(features, VimPyramid)
    assert features.blocks == [5, 11, 17, 23]
    chosen = timm.create_model(
        "vim_tiny_patch16_224",
        features_only=True,
        feature_cls=VimPyramid,
        out_indices=(1, 2),
        depth=4,
        img_size=64,
        in_chans=1,
    )
    assert [m.shape[-1] for m in chosen(torch.randn(1, 1, 64, 64))] == [8, 4]
    assert timm.create_model(NAME, depth=1, num_classes=3, img_size=(48, 80))(torch.randn(1, 3, 48, 80)).shape == (1, 3)


def test_exports():
    pyramid = VimPyramid(small()).eval()
    x = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(pyramid, (x,)).module()
    for actual, expected in zip(exported(x), pyramid(x), strict=True):
        assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "arguments", "message"),
    [
        ({"patch_stride": 12}, {}, r"patch_stride must be a power of two up to 32 .*\(12, 12\)"),
        ({"patch_stride": (8, 16)}, {}, "patch_stride must be a power of two"),
        ({}, {"blocks": (0, 1, 2, 4)}, r"blocks must be four of 0 to 3, got \[0, 1, 2, 4\]"),
        ({}, {"blocks": (0, 1)}, "blocks must be four of"),
    ],
    ids=str,
)
def test_what_is_refused(kwargs, arguments, message):
    with pytest.raises(ValueError, match=message):
        VimPyramid(small(**kwargs), **arguments)


@timm.models.register_model
def vim_small_pyramid_of_tests(pretrained: bool = False, **kwargs) -> VimPyramid:
    """The published pyramid with few small blocks: other packages pass no sizes on."""
    return variants.vim_tiny_pyramid_patch16_224(pretrained, **{"depth": 4, "embed_dim": 32, **kwargs})


@timm.models.register_model
def vim_small_model_of_tests(pretrained: bool = False, **kwargs) -> vim.VisionMamba:
    return variants.vim_tiny_patch16_224(pretrained, **{"depth": 4, "embed_dim": 32, **kwargs})


def segmentation(head: str, **kwargs) -> nn.Module:
    """A small model of segmentation-models-pytorch."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason='needs pip install "vimamba[dense]"')
    torch.manual_seed(0)
    # DPT makes the levels itself, of the tokens of a plain model.
    name, plain = ("model", {"dynamic_img_size": True}) if head == "DPT" else ("pyramid", {})
    return getattr(smp, head)(f"tu-vim_small_{name}_of_tests", encoder_weights=None, classes=5, **plain, **kwargs)


@pytest.mark.parametrize(
    "head", ["FPN", *(pytest.param(head, marks=pytest.mark.slow) for head in ("UPerNet", "Unet", "Segformer", "DPT"))]
)
def test_segmentation_models_pytorch_trains_a_step(head):
    net = segmentation(head)
    logits = net(torch.randn(2, 3, 64, 96))
    assert logits.shape == (2, 5, 64, 96)
    nn.functional.cross_entropy(logits, torch.zeros(2, 64, 96, dtype=torch.long)).backward()
    grads = [p.grad for name, p in net.named_parameters() if name.endswith("patch_embed.proj.weight")]
    assert grads[0].abs().sum() > 0
    with torch.no_grad():
        assert net.eval()(torch.randn(1, 3, 128, 64)).shape == (1, 5, 128, 64)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["UPerNet", "DPT"])
@torch.no_grad()
def test_segmentation_models_pytorch_exports(head):
    net, x = segmentation(head).eval(), torch.randn(2, 3, 64, 96)
    assert_close(torch.export.export(net, (x,)).module()(x), net(x), 1e-4)


@pytest.mark.slow
def test_a_segmentation_head_in_onnxruntime(tmp_path):
    net = segmentation("FPN", decoder_pyramid_channels=32, decoder_segmentation_channels=32).eval()
    checked = write_checked(net, tmp_path / "fpn.onnx", FORMATS["onnx"], torch.randn(4, 3, 64, 64), tolerance=1e-4)
    assert checked.difference < 1e-5


@pytest.mark.slow
def test_upernet_of_transformers_trains_a_step():
    transformers = pytest.importorskip("transformers", reason='needs pip install "vimamba[dense]"')
    backbone = transformers.TimmBackboneConfig(backbone=NAME, out_indices=[0, 1, 2, 3], use_pretrained_backbone=False)
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=5, use_auxiliary_head=False
    )
    net = transformers.UperNetForSemanticSegmentation(config)
    out = net(pixel_values=torch.randn(2, 3, 64, 64), labels=torch.zeros(2, 64, 64, dtype=torch.long))
    assert out.logits.shape == (2, 5, 64, 64)
    out.loss.backward()
    grads = [p.grad for name, p in net.named_parameters() if name.endswith("patch_embed.proj.weight")]
    assert grads[0].abs().sum() > 0


class DetectorBackbone(nn.Module):
    """What torchvision's detectors ask of a backbone: named maps of one width."""

    def __init__(self, pyramid: VimPyramid, width: int) -> None:
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body, self.out_channels = pyramid, width
        self.fpn = FeaturePyramidNetwork(pyramid.feature_info.channels(), width)

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(x))))


@pytest.mark.parametrize(
    "masks", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["Faster R-CNN", "Mask R-CNN"]
)
def test_detectors_of_torchvision_train_a_step(masks):
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    names = ["0", "1", "2", "3"]
    pools = {"box_roi_pool": MultiScaleRoIAlign(names, output_size=3, sampling_ratio=1)}
    if masks:
        pools["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=4, sampling_ratio=1)
    net = (MaskRCNN if masks else FasterRCNN)(
        DetectorBackbone(VimPyramid(small()), 16),
        num_classes=3,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(tuple((8 * 2**i,) for i in range(4)), ((1.0,),) * 4),
        **pools,
    )
    images = [torch.rand(3, 64, 80), torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])} for _ in images]
    for image, target in zip(images, targets, strict=True):
        target["masks"] = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        target["masks"][:, 8:40, 8:40] = 1
    losses = net(images, targets)
    assert ("loss_mask" in losses) == masks
    sum(losses.values()).backward()
    assert net.backbone.body.model.patch_embed.proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert {"boxes", "labels", "scores", *(["masks"] if masks else [])} <= set(net.eval()(images)[0])


@pytest.mark.slow
@torch.no_grad()
def test_the_backbone_of_a_detector_exports():
    """A detector of torchvision does not, with any backbone: how many boxes it keeps depends on the image."""
    backbone, x = DetectorBackbone(VimPyramid(small()), 16).eval(), torch.randn(2, 3, 64, 96)
    exported = torch.export.export(backbone, (x,)).module()(x)
    for name, expected in backbone(x).items():
        assert_close(exported[name], expected, 1e-5, name)
