"""`python -m vim.export MODEL OUT.onnx`: a model for any ONNX runtime, checked against PyTorch."""

from __future__ import annotations

import sys


def main() -> None:
    """Parse the command line and export."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        from jsonargparse import CLI
    except ImportError as error:
        sys.exit(f'python -m vim.export needs {error.name}: pip install "vimamba[export]"')
    from vim.engine.export import export_onnx

    try:
        CLI(export_onnx, prog="python -m vim.export")
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        sys.exit(f"vim.export: {error}")


if __name__ == "__main__":
    main()
