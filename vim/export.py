"""`python -m vim.export RUN_OR_MODEL OUT`: export a model to another runtime, and check it there against PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_DESCRIPTION = """Export a model; the file appears only after its own runtime has given PyTorch's outputs.

The model is a run folder of vim.train, a checkpoint in it, or a name that timm knows, such as vim_tiny_patch16_224.
Of a detection run the backbone with its pyramid is exported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and export.

    Args:
        argv: The arguments, without the name of the program; `None` is `sys.argv`.

    Returns:
        The exit code: 0, 1 if the export failed, or 2 for arguments that cannot be used.
    """
    options = _make_parser().parse_args(argv)

    from vim.inference.export import export_model
    from vim.runtime.preemption import exits_on_sigterm

    try:
        with exits_on_sigterm():  # so that partial files are removed
            export_model(**vars(options))
    except (ValueError, TypeError, OSError) as error:
        return _fail(str(error), 2)
    except RuntimeError as error:
        return _fail(str(error), 1)
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vim.export",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="run folder, checkpoint in it, or model of timm")
    endings = "file to write: .onnx, .xml (openvino, with a .bin beside it), .pte (executorch) or .pt2 (aoti)"
    parser.add_argument("out", metavar="OUT", help=endings)
    formats = "onnx, onnx-unrolled (without loops), openvino, executorch or aoti (default: onnx)"
    parser.add_argument("--format", default="onnx", help=formats)
    parser.add_argument("--img_size", type=int, metavar="N", help="side of a named model's images (default: 224)")
    parser.add_argument("--num_classes", type=int, metavar="N", help="outputs of a named model's head (default: 1000)")
    parser.add_argument("--in_chans", type=int, metavar="N", help="channels of a named model's images (default: 3)")
    parser.add_argument("--checkpoint_path", default="", metavar="FILE", help="weights for a named model")
    parser.add_argument("--pretrained", action="store_true", help="use the published weights of a named model")
    parser.add_argument("--dtype", default="float32", help="float32, or float16 for ONNX; states stay in float32")
    parser.add_argument("--quantize", default="none", help="none, or int8 for ONNX: linear layers with int8 weights")
    return parser


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"vim.export: {message}\n")
    return code


if __name__ == "__main__":
    from vim.runtime.command import run_command

    run_command("vim.export", main, files_matter=True)
