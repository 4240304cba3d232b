"""The formats that models are exported to: how a file is written, opened and described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vim.inference.onnx import describe_onnx, save_onnx
from vim.ops import exportable_ops

# Maps images to the outputs.
Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One format. Models are in eval mode, on the CPU."""

    suffix: str
    """Ending of its files."""
    packages: tuple[str, ...]
    """What must be installed, by the names that are imported."""
    hint: str
    """How to install it."""
    any_batch: bool
    """The file takes any number of images; otherwise one."""
    write: Callable[[nn.Module, Tensor, Path, Sequence[str]], None]
    """Write a model to a path, from two example images, with the names of its outputs where files have such."""
    open: Callable[[Path], Run]
    describe: Callable[[Path], str]


def _write_unrolled(model: nn.Module, images: Tensor, path: Path, names: Sequence[str]) -> None:
    save_onnx(model, images, path, names, scan=False)


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()}))


def _write_openvino(model: nn.Module, images: Tensor, path: Path, names: Sequence[str]) -> None:
    import openvino

    draft = path.with_suffix(".onnx")
    _write_unrolled(model, images, draft, names)
    openvino.save_model(openvino.convert_model(draft), path, compress_to_fp16=False)
    draft.unlink()


def _open_openvino(path: Path) -> Run:
    import openvino

    # Without the hint, processors with bfloat16 round every product to it.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: tuple(torch.from_numpy(out.copy()) for out in compiled(images.numpy()).to_tuple())


def _write_executorch(model: nn.Module, images: Tensor, path: Path, names: Sequence[str]) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad(), exportable_ops():
        program = torch.export.export(model, (images[:1],))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def _open_executorch(path: Path) -> Run:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    return lambda images: tuple(out.clone() for out in method.execute([images.contiguous()]))


def _write_aoti(model: nn.Module, images: Tensor, path: Path, names: Sequence[str]) -> None:
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    with torch.no_grad(), exportable_ops():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _open_aoti(path: Path) -> Run:
    package = torch._inductor.aoti_load_package(str(path))

    def run(images: Tensor) -> tuple[Tensor, ...]:
        outputs = package(images)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return run


def _describe_files(path: Path) -> str:
    files = {path, path.with_suffix(".bin")} if path.suffix == ".xml" else {path}
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


_ONNX = ("onnx", "onnxruntime", "onnxscript")
_EXPORT = 'pip install "vimamba[export]"'
FORMATS = {
    "onnx": Format(
        suffix=".onnx",
        packages=_ONNX,
        hint=_EXPORT,
        any_batch=True,
        write=save_onnx,
        open=_open_onnx,
        describe=describe_onnx,
    ),
    "onnx-unrolled": Format(
        suffix=".onnx",
        packages=_ONNX,
        hint=_EXPORT,
        any_batch=True,
        write=_write_unrolled,
        open=_open_onnx,
        describe=describe_onnx,
    ),
    "openvino": Format(
        suffix=".xml",
        packages=(*_ONNX, "openvino"),
        hint='pip install "vimamba[openvino]"',
        any_batch=True,
        write=_write_openvino,
        open=_open_openvino,
        describe=_describe_files,
    ),
    "executorch": Format(
        suffix=".pte",
        packages=("executorch",),
        hint="pip install executorch",
        any_batch=False,
        write=_write_executorch,
        open=_open_executorch,
        describe=_describe_files,
    ),
    "aoti": Format(
        suffix=".pt2",
        packages=(),
        hint="",
        any_batch=True,
        write=_write_aoti,
        open=_open_aoti,
        describe=_describe_files,
    ),
}
