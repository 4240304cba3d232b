"""Compile every Triton kernel as the models launch it, for any target, and report registers and spills.

    python scripts/check_triton_compiles.py sm_80 sm_90 gfx942 --dtypes bfloat16 float32

prints a table, and writes its rows with `--json FILE`. No GPU is needed: the ops run on CPU tensors of Vim-Ti's shapes,
and each launch only compiles. NVIDIA's targets use the ptxas in Triton's wheel.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import vim  # noqa: F401  defines the ops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Vim-Ti at 224 pixels: tokens, d_inner, d_state, dt_rank, width of the convolution, d_model.
TOKENS, DIM, STATES, RANK, WIDTH, MODEL = 197, 384, 16, 12, 4, 192


class _NoDriver:
    """The part of a Triton driver that compilation needs, for a GPU that is not present."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton caches compiled kernels by device, so each target is a device.
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_all(name: str, dtype: torch.dtype, ops: list[str]) -> list[dict[str, Any]]:
    """Compile every kernel of these ops for one target and dtype; return a row for each."""
    target, rows = TARGETS[name], []
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        rows.append({"kernel": self.__name__, "target": name, "dtype": str(dtype).removeprefix("torch.")})
        rows[-1].update(_report(kernel), shared=kernel.metadata.shared)
        return kernel

    triton.runtime.driver.set_active(_NoDriver(target))
    for op in ("selective_scan", "bidirectional_scan"):
        importlib.import_module(f"vim.ops.{op}.triton").lanes = lambda device: target.warp_size
    JITFunction.run = compile_only
    try:
        for op in ops:
            LAUNCHES[op](dtype)
    finally:
        JITFunction.run = launch
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


# Calls as in inference and training of a model; their results are meaningless.


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return both halves of xz, a dense tensor of their shape, and the output of x_proj."""
    x, z = torch.zeros(2, TOKENS, 2 * DIM, dtype=dtype).chunk(2, -1)
    return x, z, torch.zeros(2, TOKENS, DIM, dtype=dtype), torch.zeros(2, TOKENS, RANK + 2 * STATES, dtype=dtype)


def _bidirectional_scan(dtype: torch.dtype) -> None:
    _, z, dense, x_dbl = _operands(dtype)
    channel = torch.zeros(DIM)
    direction = (dense, x_dbl, torch.zeros(DIM, RANK), channel, torch.zeros(DIM, STATES), channel)
    torch.ops.vim.bidirectional_scan_triton(*direction, *direction, z, 0.5, 0)
    _, entry = torch.ops.vim.bidirectional_scan_triton(*direction, *direction, z, 0.5, 64)
    torch.ops.vim.bidirectional_scan_backward_triton(dense, *direction, *direction, z, entry, 0.5, 64)


def _selective_scan(dtype: torch.dtype) -> None:
    _, z, dense, x_dbl = _operands(dtype)
    _, B, C = x_dbl.mT.split([RANK, STATES, STATES], 1)
    inputs = (dense.mT, dense.mT, torch.zeros(DIM, STATES), B, C, torch.zeros(DIM), z.mT, torch.zeros(DIM))
    _, _, entry = torch.ops.vim.selective_scan_triton(*inputs, True, True, 64)
    torch.ops.vim.selective_scan_backward_triton(dense.mT, None, *inputs, entry, True, True, 64)


def _segmented_scan(dtype: torch.dtype) -> None:
    _, z, dense, x_dbl = _operands(dtype)
    _, B, C = x_dbl.mT.split([RANK, STATES, STATES], 1)
    inputs = (dense.mT, dense.mT, torch.zeros(DIM, STATES), B, C, torch.zeros(DIM), z.mT, torch.zeros(DIM))
    inputs += (torch.zeros(2, DIM, STATES), torch.zeros(2, TOKENS, dtype=torch.int32))
    _, _, entry = torch.ops.vim.segmented_scan_triton(*inputs, True, True, 64)
    torch.ops.vim.segmented_scan_backward_triton(dense.mT, None, *inputs, entry, True, True, 64)


def _bidirectional_conv1d(dtype: torch.dtype) -> None:
    x, _, dense, _ = _operands(dtype)
    weights = (torch.zeros(DIM, WIDTH), torch.zeros(DIM)) * 2
    torch.ops.vim.bidirectional_conv1d_triton(x, *weights)
    torch.ops.vim.bidirectional_conv1d_backward_triton(dense, dense, x, *weights)


def _causal_conv1d(dtype: torch.dtype) -> None:
    x, _, dense, _ = _operands(dtype)
    weights = (torch.zeros(DIM, WIDTH), torch.zeros(DIM))
    torch.ops.vim.causal_conv1d_triton(x.mT, *weights, True, False)
    torch.ops.vim.causal_conv1d_backward_triton(dense.mT, x.mT, *weights, True, False)


def _segmented_conv1d(dtype: torch.dtype) -> None:
    x, _, dense, _ = _operands(dtype)
    arguments = (torch.zeros(DIM, WIDTH), torch.zeros(DIM), torch.zeros(2, TOKENS, dtype=torch.int32), True, False)
    torch.ops.vim.segmented_conv1d_triton(x.mT, *arguments)
    torch.ops.vim.segmented_conv1d_backward_triton(dense.mT, x.mT, *arguments)


def _add_rms_norm(dtype: torch.dtype) -> None:
    hidden, weight = torch.zeros(2, TOKENS, MODEL, dtype=dtype), torch.zeros(MODEL)
    residual = torch.zeros(hidden.shape)
    _, r = torch.ops.vim.add_rms_norm_triton(hidden, residual, weight, 1e-5)
    torch.ops.vim.add_rms_norm_backward_triton(hidden, r, r, weight, 1e-5)


LAUNCHES = {
    "bidirectional_scan": _bidirectional_scan,
    "selective_scan": _selective_scan,
    "segmented_scan": _segmented_scan,
    "bidirectional_conv1d": _bidirectional_conv1d,
    "causal_conv1d": _causal_conv1d,
    "segmented_conv1d": _segmented_conv1d,
    "add_rms_norm": _add_rms_norm,
}


def _report(kernel: Any) -> dict[str, int]:
    """Return registers and spilled bytes per thread, and the number of shuffles, from the compiled code."""
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        counts = {key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": counts["vgpr_count"], "spilled": 4 * counts["vgpr_spill_count"]}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        shuffles = len(re.findall(r"\bSHFL\b", _output(tools / "nvdisasm", "-c", file.name)))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shuffles": shuffles,
    }


def _output(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"some of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--ops", nargs="+", default=list(LAUNCHES), choices=list(LAUNCHES))
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    rows = []
    for target in arguments.targets or TARGETS:
        for dtype in arguments.dtypes:
            rows += compile_all(target, getattr(torch, dtype), arguments.ops)
    keys = ("kernel", "target", "dtype", "registers", "spilled", "shuffles", "shared")
    print(f"triton {triton.__version__}\n")
    for line in (keys, ("---",) * len(keys), *([row.get(key, "") for key in keys] for row in rows)):
        print("| " + " | ".join(map(str, line)) + " |")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
