"""Write models as ONNX, with the recurrence as Scan or without loops, and with int8 weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vim.ops import exportable_ops

# Numbers in the largest tensor that is computed when a file is written.
_FOLDED = 2**26


def save_onnx(model: nn.Module, images: Tensor, path: Path, names: Sequence[str], scan: bool = True) -> None:
    """Write a model to an ONNX file, with a dynamic batch size.

    Args:
        model: The model, in eval mode, on the CPU. It returns a tensor, or a tuple of several.
        images: At least two images, (batch, channels, height, width).
        path: File to write.
        names: Name of each output.
        scan: Write the recurrence as ONNX's Scan. Otherwise the graph has no loops.
    """
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    from vim.inference.onnx_unrolled import TRANSLATION

    with torch.no_grad(), exportable_ops("scan" if scan else "operator"):
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=list(names),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            custom_translation_table=None if scan else TRANSLATION,
            optimize=scan,  # its search for patterns takes time with the square of the nodes
        )
    assert program is not None
    # Weights are transposed once, here: int8 is for products with constants.
    fold_constants(program.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    remove_unused_nodes(program.model)
    program.save(path)


def quantize_onnx(path: Path) -> None:
    """Replace the weights of an ONNX file's linear layers by int8; activations are quantised in each call.

    The recurrence, the convolutions and the norms stay in float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = ["MatMul", "Gemm"]
    quantize_dynamic(path, path, op_types_to_quantize=kinds, per_channel=True, weight_type=QuantType.QInt8)


def describe_onnx(path: Path) -> str:
    """Return size, opset and number of nodes, in words."""
    import onnx

    proto = onnx.load(path)
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    return f"{path.stat().st_size / 2**20:.1f} MiB, opset {opset}, {len(proto.graph.node)} nodes"
