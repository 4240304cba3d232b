"""What tests share: golden files, tolerances, random inputs, refusals."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open

import vim
from vim.checkpoints.upstream import translate_mixer_args

GOLDEN = Path(__file__).parent / "golden"


class Tolerance(NamedTuple):
    """Largest differences from the reference, relative to the largest magnitude.

    Attributes:
        value: Of results.
        gradient: Of gradients through autograd, against float32 where the inputs are half.
        backward: Of results of a backward op, from the same inputs.
        gpu: Of either on a GPU, whose exponentials and sums are other ones.
    """

    value: float
    gradient: float
    backward: float
    gpu: float


# Half precision: inputs and result are rounded to 8 (bfloat16) or 11 (float16) bits, arithmetic is float32.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-11, 1e-12, 1e-12),
    torch.float32: Tolerance(2e-6, 2e-5, 1e-5, 2e-5),
    torch.bfloat16: Tolerance(2**-7, 1.6e-2, 2**-7, 2e-2),
    torch.float16: Tolerance(2**-10, 2e-3, 2**-10, 4e-3),
}


def golden_names(kind: str) -> list[str]:
    """Names of the golden files of a kind, without the shared weights."""
    return sorted(path.stem for path in (GOLDEN / kind).glob("*.safetensors") if path.stem != "base_weights")


def load_golden(kind: str, name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a golden file; (re, im) pairs of tensors are joined."""
    with safe_open(GOLDEN / kind / f"{name}.safetensors", "pt") as file:
        metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key in [key.removesuffix(".real") for key in tensors if key.endswith(".real")]:
        tensors[key] = torch.complex(tensors.pop(f"{key}.real"), tensors.pop(f"{key}.imag"))
    return metadata, tensors


def golden_mixer(case: str) -> tuple[vim.Mamba, dict[str, torch.Tensor]]:
    """A mixer with the weights of a golden file, and the file's tensors."""
    metadata, tensors = load_golden("mixer", case)
    mixer = vim.Mamba(int(metadata["d_model"]), **translate_mixer_args(**json.loads(metadata["config"])))
    mixer.load_state_dict({k.removeprefix("param."): t for k, t in tensors.items() if k.startswith("param.")})
    return mixer, tensors


def golden_tolerances(case: str) -> dict[str, list[float]]:
    """Per tensor [largest difference between the original's float32 and float64 runs, largest magnitude]."""
    return json.loads((GOLDEN / "tolerances.json").read_text())[case]


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, listed: list[float], what: str) -> None:
    """The rule of golden/README.md for a float32 implementation."""
    bound = 10 * listed[0] + 1e-6 * listed[1]
    error = (actual - expected).abs().max().item()
    assert error <= bound, f"{what}: error {error:.3g} > {bound:.3g}"


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rtol: float, what: str = "") -> None:
    """Largest difference relative to the largest magnitude."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    wide = torch.promote_types(actual.dtype, expected.dtype)
    error = (actual.to(wide) - expected.to(wide)).abs().max().item() if actual.numel() else 0.0
    scale = expected.abs().max().item() if expected.numel() else 0.0
    assert error <= rtol * scale + 1e-30, f"{what}: error {error:.3g} > {rtol:.1g} * {scale:.3g}"


def make_scan_inputs(
    batch: int, dim: int, seqlen: int, d_state: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs of a selective scan, as leaves that require gradients."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int, wide: bool = False) -> torch.Tensor:
        values = torch.randn(*shape, generator=rng, dtype=torch.float64)
        return values.to(torch.promote_types(dtype, torch.float32) if wide else dtype).requires_grad_()

    A = -torch.exp(torch.randn(dim, d_state, generator=rng, dtype=torch.float64) * 0.5)
    return {
        "u": normal(batch, dim, seqlen),
        "delta": normal(batch, dim, seqlen),
        "A": A.to(torch.promote_types(dtype, torch.float32)).requires_grad_(),
        "B": normal(batch, d_state, seqlen),
        "C": normal(batch, d_state, seqlen),
        "D": normal(dim, wide=True),
        "z": normal(batch, dim, seqlen),
        "delta_bias": normal(dim, wide=True),
    }


def make_bidirectional_inputs(
    batch: int,
    seqlen: int,
    dim: int,
    d_state: int,
    dt_rank: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Random operands of a bidirectional scan, forward, backward, z, as leaves that require gradients."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, to: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale).to(to).requires_grad_()

    tensors = []
    for _ in range(2):
        tensors += [
            normal(batch, seqlen, dim),
            normal(batch, seqlen, dt_rank + 2 * d_state),
            normal(dim, dt_rank, to=wide, scale=dt_rank**-0.5),
            normal(dim, to=wide),
            normal(dim, d_state, to=wide, scale=0.5),
            normal(dim, to=wide),
        ]
    return [*tensors, normal(batch, seqlen, dim)]


def gradients(outputs: torch.Tensor, inputs: list[torch.Tensor], seed: int = 1) -> list[torch.Tensor]:
    """Gradients of <outputs, random>, one for each input."""
    rng = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(outputs.shape, generator=rng, dtype=torch.float64).to(outputs.dtype)
    return list(torch.autograd.grad(outputs, inputs, cotangent))


def assert_refused(
    command: ModuleType, arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command ends with code 2, in one line that says what is wrong."""
    capsys.readouterr()
    assert command.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{command.__name__}: ")
    assert error.count("\n") == 1
    assert message in error


def assert_same_gradients(
    actual: torch.Tensor, expected: torch.Tensor, leaves: list[torch.Tensor], rtol: float, names: Sequence[str] = ()
) -> None:
    """Compare the gradients of two results with respect to the same leaves."""
    found = zip(gradients(actual, leaves), gradients(expected, leaves), strict=True)
    for i, (got, wanted) in enumerate(found):
        assert_close(got, wanted, rtol, names[i] if names else str(i))


def recipe_tensor(name: str, shape: list[int], salt: str = "") -> np.ndarray:
    """A tensor of golden/recipe, made again by the rule of golden/README.md; float64."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32((salt + name).encode())))
    uniform = 2 * rng.random(size=shape) - 1

    def values(std: float) -> np.ndarray:
        return np.sqrt(3) * std * uniform

    if name in ("input", "cotangent") or name.startswith("probe:"):
        return values(1)
    if name.endswith((".A_log", ".A_b_log")):
        return np.log(np.arange(1, shape[1] + 1)) + values(0.1)
    if name.endswith((".D", ".D_b")) or ("norm" in name and name.endswith(".weight")):
        return 1 + values(0.1)
    if name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        dt = np.exp(np.log(1e-3) + (uniform + 1) / 2 * (np.log(1e-1) - np.log(1e-3)))
        return dt + np.log(-np.expm1(-dt))
    if name.endswith(("dt_proj.weight", "dt_proj_b.weight")):
        return uniform / np.sqrt(shape[1])
    if name.endswith(".bias"):
        return values(0.1)
    if name.startswith("cls_token") or name == "pos_embed":
        return values(0.2)
    return values(float(np.prod(shape[1:])) ** -0.5)
