"""ONNX: the same numbers in onnxruntime, any batch, states in float32."""

from __future__ import annotations

import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch

import vim
from tests.helpers import assert_close, make_bidirectional_inputs, make_scan_inputs
from tests.tiny_runs import TINY_MODEL, change
from vim.checkpoints.io import save_weights
from vim.config.schema import TrainConfig
from vim.inference.detectors import build_run_detector
from vim.inference.onnx import describe_onnx, export_onnx, write_onnx
from vim.inference.trained_model import weights_metadata
from vim.models.build import build_model
from vim.ops import (
    ScanOperands,
    add_rms_norm,
    bidirectional_conv1d,
    bidirectional_scan,
    causal_conv1d,
    exportable_ops,
    selective_scan,
)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_classes": 10, "d_state": 4}


def test_gradients_of_exportable_operators():
    torch.manual_seed(0)
    model = vim.VisionMamba(img_size=32, embed_dim=24, depth=1, d_state=4, num_classes=3).eval()
    images, weights = torch.randn(1, 3, 32, 32), list(model.parameters())
    expected = torch.autograd.grad(model(images).square().sum(), weights)
    with exportable_ops():
        actual = torch.autograd.grad(model(images).square().sum(), weights)
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 1e-4)


@pytest.mark.parametrize("kind", ["plain", "grouped", "constant", "bare"])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_of_exportable_operators_equals_the_op(kind, reverse):
    inputs = {name: t.detach() for name, t in make_scan_inputs(2, 4, 9, 3).items()}
    changes = {
        "plain": {},
        "grouped": {"B": torch.randn(2, 2, 3, 9), "C": torch.randn(2, 4, 3, 9)},
        "constant": {"B": torch.randn(4, 3), "C": torch.randn(4, 3)},
        "bare": {"D": None, "z": None, "delta_bias": None},
    }
    inputs |= changes[kind]
    expected, state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, reverse=reverse)
    with exportable_ops():
        actual, actual_state = selective_scan(**inputs, delta_softplus=True, return_last_state=True, reverse=reverse)
    assert_close(actual, expected, 1e-6)
    assert_close(actual_state, state, 1e-6)


def test_the_other_ops_of_exportable_operators():
    tensors = [t.detach() for t in make_bidirectional_inputs(2, 9, 6, 4, 3)]
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, 4), torch.randn(6)
    calls = (
        lambda: bidirectional_scan(ScanOperands(*tensors[:6]), ScanOperands(*tensors[6:12]), tensors[12]),
        lambda: torch.stack(bidirectional_conv1d(x, weight, bias, weight.flip(0), None)),
        lambda: causal_conv1d(x.mT, weight, bias, reverse=True),
        lambda: torch.stack(add_rms_norm(x, x.flip(1), bias)),
    )
    for call in calls:
        expected = call()
        with exportable_ops():
            assert_close(call(), expected, 1e-6)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"directions": "v1", "cls_position": "double"}, {"directions": "none", "rotary": "residual", "norm": "layer"}],
    ids=str,
)
def test_models_in_onnxruntime(kwargs, tmp_path):
    torch.manual_seed(0)
    model = vim.VisionMamba(**SMALL, **kwargs).eval()
    error = write_onnx(model, tmp_path / "m.onnx", 3, (32, 32), tolerance=1e-4)
    assert error < 1e-5
    proto = onnx.load(tmp_path / "m.onnx")
    assert {"Scan"} <= {node.op_type for node in proto.graph.node}
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the batch is dynamic"
    assert "opset" in describe_onnx(tmp_path / "m.onnx")


def test_a_run_is_exported_with_its_size_channels_and_classes_in_float16(tmp_path):
    config = change(TrainConfig(), model__img_size=(16, 24), model__in_chans=1, model__args=TINY_MODEL)
    config = change(config, schedule__warmup_epochs=0, epochs=1)
    names = [str(label) for label in range(7)]
    model = build_model(config.model, len(names)).eval()
    save_weights(tmp_path / "best.safetensors", model.state_dict(), weights_metadata(config, names))
    export_onnx(str(tmp_path / "best.safetensors"), str(tmp_path / "m.onnx"), dtype="float16")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    images = torch.randn(3, 1, 16, 24)
    (logits,) = session.run(None, {"images": images.half().numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(logits).float(), model(images), 1e-2)


def test_of_a_detector_the_levels_of_its_backbone_are_exported(tmp_path):
    model = {"model__img_size": 32, "model__in_chans": 3, "model__args": {**TINY_MODEL, "cls_position": "middle"}}
    heads = {"detection__channels": 8, "detection__head_features": 8, "detection__scales": (2.0, 1.0)}
    config = change(TrainConfig(), task="detection", **model, **heads)
    detector = build_run_detector(config, 2).eval()
    save_weights(tmp_path / "best.safetensors", detector.state_dict(), weights_metadata(config, ["ant", "bee"]))
    export_onnx(str(tmp_path / "best.safetensors"), str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [output.name for output in session.get_outputs()] == ["stride_4", "stride_8", "stride_16"]
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = detector.backbone(images)
    for found, wanted in zip(session.run(None, {"images": images.numpy()}), expected.values(), strict=True):
        assert_close(torch.from_numpy(found), wanted, 1e-4)


@pytest.mark.parametrize(
    ("sample", "gradients"),
    [((72, 80), False), ((72, 80), True), pytest.param((24, 40), True, marks=pytest.mark.slow)],
    ids=str,
)
def test_torch_export_with_any_batch_and_resolution(sample, gradients):
    """Whether the image that is traced has fewer tokens than lie between two states saved for gradients, or more."""
    torch.manual_seed(0)
    model = vim.VisionMamba(**SMALL, dynamic_img_size=True, drop_path_rate=0.0).eval()
    side = {name: 8 * torch.export.Dim(name, min=2, max=64) for name in ("rows", "columns")}
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64), 2: side["rows"], 3: side["columns"]},)
    with torch.set_grad_enabled(gradients):
        exported = torch.export.export(model, (torch.randn(2, 3, *sample),), dynamic_shapes=dynamic).module()
        for shape in ((3, 3, 64, 24), (2, 3, 32, 32), (1, 3, 128, 96)):
            images = torch.randn(shape)
            actual, expected = exported(images), model(images)
            assert_close(actual, expected, 1e-5, str(shape))
            if gradients:
                weight = model.layers[0].mixer.in_proj.weight
                (wanted,) = torch.autograd.grad(expected.square().sum(), weight)
                weight = exported.get_parameter("layers.0.mixer.in_proj.weight")
                (found,) = torch.autograd.grad(actual.square().sum(), weight)
                assert_close(found, wanted, 1e-5, str(shape))


@pytest.mark.slow
def test_a_compiled_package_takes_any_batch_and_needs_none_of_our_operators(tmp_path):
    torch.manual_seed(0)
    model = vim.VisionMamba(**{**SMALL, "img_size": 16}).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad(), exportable_ops():
        program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    assert not any("vim" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    run = (
        "import sys, torch; assert 'vim' not in sys.modules\n"
        "package = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "for images, expected in torch.load(sys.argv[2]):\n"
        "    torch.testing.assert_close(package(images), expected, rtol=1e-4, atol=1e-5)\n"
        "assert 'vim' not in sys.modules"
    )
    with torch.no_grad():
        inputs = [torch.randn(size, 3, 16, 16) for size in (2, 1, 5)]
        torch.save([(images, model(images)) for images in inputs], tmp_path / "io.pt")
    subprocess.run([sys.executable, "-c", run, package, str(tmp_path / "io.pt")], check=True, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.xfail(reason="torch._inductor gives a loop no length that is computed from several sizes", strict=True)
def test_torch_cannot_compile_a_loop_over_rows_times_columns(tmp_path):
    """When this passes, packages can have a dynamic resolution: docs/export.md says they cannot."""
    from torch._higher_order_ops.scan import scan

    class Sum(torch.nn.Module):
        def forward(self, x):  # (rows, columns)
            steps = x.flatten()[:, None]
            return scan(lambda total, step: (total + step, total + step), steps[0] * 0, steps, dim=0)[1]

    sides = {0: torch.export.Dim("rows", min=2, max=64), 1: torch.export.Dim("columns", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(Sum(), (torch.randn(3, 4),), dynamic_shapes=(sides,))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))


def test_a_wrong_file_is_not_left_behind(tmp_path):
    model = vim.VisionMamba(**SMALL, directions="none").eval()
    with pytest.raises(RuntimeError, match="differs from PyTorch by"):
        write_onnx(model, tmp_path / "m.onnx", 3, (32, 32), tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"out": "m.pt"}, "out must end in .onnx"),
        ({"model": __file__, "in_chans": 3}, "in_chans must be left out for .*test_onnx.py.* got 3"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(**{"model": "vim_tiny_patch16_224", "out": "m.onnx", **kwargs})
