"""The attention that is hidden in a model's scans.

A scan is linear in its input u. With the gate it is a matrix for each channel:

    y[i]        = silu(z[i]) (sum_j alpha[i, j] u[j] + D u[i])
    alpha[i, j] = <C[i], exp(A (delta[j+1] + ... + delta[i])) delta[j] B[j]>

The columns of alpha are the scan's answers to unit impulses, so the kernels that run the model also compute it: exactly
the operands of the mixer, in time and memory that grow with one matrix of all channels, never with the states. An
impulse reaches only the tokens that the scan visits after it, so the scan is not run over the others.

Source: Ali et al. 2024, arXiv:2403.01590, section 4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vim.explain.checks import check_images, check_layers, check_vision_mamba, mixers_of
from vim.explain.modes import in_evaluation, of_this_thread
from vim.layers import Mamba
from vim.layers.checks import check_kind
from vim.layers.token_sequence import TokenSequence
from vim.models.vision_mamba import VisionMamba
from vim.ops import selective_scan

Direction = Literal["forward", "backward", "both"]

# Numbers of the impulses, and of the answers to them, that are held at a time: 64 MiB each.
_MOST_NUMBERS = 2**24
# The columns come in at least as many parts: with eight, seven sixteenths of the matrices are left out as zeros.
_LEAST_PARTS = 8


@dataclass(frozen=True)
class HiddenAttention:
    """Hidden attention of some layers.

    Attributes:
        matrices: (layers, batch, len, len), float32, or float64 of a model in float64: how much the token of a row
            takes from the token of a column, a mean over channels. Tokens stand as `forward_features` returns them:
            class tokens first, then patches row by row.
        layers: Numbers of the layers, counted from 0.
        grid: Rows and columns of patches.
        num_prefix_tokens: Number of class tokens.
        pairwise: True if the layers 2i and 2i + 1 read the same tokens, and what both of them take is added.
    """

    matrices: Tensor
    layers: tuple[int, ...]
    grid: tuple[int, int]
    num_prefix_tokens: int
    pairwise: bool = False

    def maps(self) -> Tensor:
        """Return how much the read-out takes from each patch in each layer, (layers, batch, rows, columns).

        The read-out is the class token, the mean of two class tokens, or the mean of all patches without one.
        """
        return read_out_map(self.matrices, self.grid, self.num_prefix_tokens)


def read_out_map(matrices: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Return what the read-out takes from each patch, (..., rows, columns).

    Args:
        matrices: (..., len, len), class tokens first.
        grid: Rows and columns of patches.
        num_prefix_tokens: Number of class tokens; with 0 all patches are read out.
    """
    rows = matrices[..., : num_prefix_tokens or matrices.shape[-2], num_prefix_tokens:]
    return rows.mean(-2).unflatten(-1, grid)


@torch.no_grad()
def hidden_attention(
    model: nn.Module,
    images: Tensor,
    layers: int | Sequence[int] | None = None,
    direction: Direction = "both",
    *,
    gate: bool = True,
    absolute: bool = False,
) -> HiddenAttention:
    """Compute the matrices that the scans of a model apply, as means over the channels of a layer.

    Args:
        model: A `vim.VisionMamba`; it is run in evaluation mode and left in the mode it was in.
        images: Normalised images, (batch, in_chans, height, width).
        layers: Numbers of layers, negative ones from the end, in the order of the result; `None` is all that run.
        direction: "forward", "backward", or "both" merged as the mixer merges its directions.
        gate: Weigh the rows of a channel by silu(z), as the mixer weighs the scan's output.
        absolute: Average absolute values, so that channels of opposite sign do not cancel.

    Raises:
        TypeError: The model is not a VisionMamba, a mixer is not a Mamba, or an argument has the wrong type.
        ValueError: A layer is out of range, the layers have no such direction, or the images do not fit the model.
    """
    vision = check_vision_mamba(model)
    check_images(images, vision.in_chans)
    run = vision.depth - vision.depth % 2 if vision.pairwise_layers else vision.depth
    chosen = check_layers(range(run) if layers is None else layers, vision.depth)
    mixers = mixers_of(vision, chosen)
    check_kind("direction", direction, ("forward", "backward", "both"))
    inputs, sequence = _inputs_of_mixers(vision, images, mixers)
    index = _places(sequence, next(iter(inputs.values())).shape[1])
    matrices = []
    for i in chosen:
        mixer = mixers[i]
        scans = [s for s in mixer.scan_inputs(inputs[i]) if direction in ("both", _name(s))]
        if not scans:
            raise ValueError(f"direction must be 'forward' or 'both' for layer {i}, whose mixer has no backward scan")
        weight = 1 / len(scans) if mixer.merge == "mean" else 1.0
        total = torch.stack([_mean_over_channels(s, gate, absolute) for s in scans]).sum(0) * weight
        if vision.pairwise_layers and i % 2 == 1:  # it read the sequence from its end
            total = total.flip(1, 2)
        matrices.append(total[:, index][:, :, index])
    return HiddenAttention(
        torch.stack(matrices), chosen, sequence.grid, vision.num_prefix_tokens, vision.pairwise_layers
    )


def scan_matrices(scan: dict[str, Any], channels: slice = slice(None)) -> Tensor:
    """Return the matrices that a scan applies to its input u, one for each channel, without D and without gate.

    Args:
        scan: Arguments of `vim.ops.selective_scan`, as `vim.Mamba.scan_inputs` returns them for each direction.
        channels: The channels to compute, since all of them take batch x d_inner x len x len numbers.

    Returns:
        (batch, channels, len, len), float32 (float64 for float64): out = matrices @ u for each channel.
    """
    scan = _of_channels(scan, channels)
    batch, dim, length = scan["u"].shape
    matrices = scan["u"].new_zeros(batch, dim, length, length)
    for b in range(batch):
        for columns, reached, answers in _answers(scan, b):
            matrices[b, :, reached, columns] = answers.permute(1, 2, 0)
    return matrices


def attention_rollout(attention: HiddenAttention) -> Tensor:
    """Multiply the attention of all layers, with the residual connection between them.

    Absolute values are taken and rows are normalised to 1, half of which is the residual connection's. The layers of a
    pair are one step, since they read the same tokens: their mean is taken.

    Args:
        attention: Of consecutive layers, the first one first; of whole pairs, if layers work in pairs.

    Returns:
        (batch, len, len): how much each token of the last layer takes from each token of the first; rows sum to 1.

    Raises:
        ValueError: The layers are not consecutive, or a pair is incomplete.

    Source: Abnar and Zuidema 2020, arXiv:2005.00928, section 3.
    """
    first, count, step = attention.layers[0], len(attention.layers), 2 if attention.pairwise else 1
    if attention.layers != tuple(range(first, first + count)) or first % step or count % step:
        pairs = "" if step == 1 else " in whole pairs (0 and 1, 2 and 3, ...)"
        raise ValueError(f"attention must be of consecutive layers{pairs}, got layers {list(attention.layers)}")
    matrices = attention.matrices.abs()
    matrices = matrices / matrices.sum(-1, keepdim=True).clamp_min(torch.finfo(matrices.dtype).tiny)
    matrices = matrices.unflatten(0, (-1, step)).mean(1)
    rollout = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device).expand(matrices.shape[1:])
    for layer in matrices:
        rollout = (rollout + layer @ rollout) / 2
    return rollout


def _inputs_of_mixers(
    model: VisionMamba, images: Tensor, mixers: dict[int, Mamba]
) -> tuple[dict[int, Tensor], TokenSequence]:
    """Return what the mixers of the layers receive, (batch, len, d_model) each, and how the tokens stand in it."""
    inputs: dict[int, Tensor] = {}

    def take(i: int) -> Any:
        hook = of_this_thread(lambda _, args: inputs.__setitem__(i, args[0]))
        return mixers[i].register_forward_pre_hook(hook)

    with in_evaluation(model), contextlib.ExitStack() as hooks:
        for i in mixers:
            hooks.callback(take(i).remove)
        x, sequence = model._embed(images, None, None)
        model._run_layers(x, sequence, model.depth)
    missing = sorted(set(mixers) - set(inputs))
    if missing:
        raise ValueError(f"layers must be ones that the model runs, and layer {missing[0]} has no partner")
    return inputs, sequence


def _places(sequence: TokenSequence, length: int) -> Tensor:
    """Return where in scan order the class tokens and then the patches stand, (len,)."""
    scanned = sequence.undo(torch.arange(length)[None, :, None])[0, :, 0]
    is_patch = torch.ones(length, dtype=torch.bool)
    is_patch[list(sequence.places)] = False
    return torch.cat([torch.tensor(sequence.read_out(), dtype=torch.long), scanned[is_patch]])


def _name(scan: dict[str, Any]) -> str:
    return "backward" if scan["reverse"] else "forward"


def _of_channels(scan: dict[str, Any], channels: slice) -> dict[str, Any]:
    """Return the scan without D and gate, of some channels, in the precision of its states."""
    dtype = torch.promote_types(torch.float32, scan["u"].dtype)
    part = dict(scan, D=None, z=None)
    for name in ("u", "delta", "B", "C"):
        part[name] = scan[name].to(dtype)
    for name in ("u", "delta"):
        part[name] = part[name][:, channels]
    for name in ("A", "delta_bias"):
        part[name] = None if scan[name] is None else scan[name][channels]
    return part


def _answers(scan: dict[str, Any], b: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield some columns of the matrices of image `b`: their numbers, the rows they reach, and their values there.

    Values are (columns, dim, rows); the columns are 0 in all other rows.
    """
    dim, length = scan["u"].shape[1:]
    at_a_time = max(1, min(_MOST_NUMBERS // (dim * length), -(-length // _LEAST_PARTS)))
    for start in range(0, length, at_a_time):
        columns = slice(start, min(start + at_a_time, length))
        reached = slice(0, columns.stop) if scan["reverse"] else slice(start, length)
        count = columns.stop - start
        impulses = scan["u"].new_zeros(count, dim, reached.stop - reached.start)
        impulses[torch.arange(count), :, torch.arange(start, columns.stop) - reached.start] = 1
        many = {name: scan[name][b : b + 1, ..., reached] for name in ("delta", "B", "C")}
        many = {name: x.expand(count, *x.shape[1:]) for name, x in many.items()}
        answers: Any = selective_scan(**(scan | many | {"u": impulses}))
        yield columns, reached, answers


def _mean_over_channels(scan: dict[str, Any], gate: bool, absolute: bool) -> Tensor:
    """Return the mean of a scan's matrices over channels, (batch, len, len)."""
    batch, dim, length = scan["u"].shape
    part = _of_channels(scan, slice(None))
    mean = part["u"].new_zeros(batch, length, length)
    ones = part["u"].new_ones(dim, length)
    for b in range(batch):
        weight = nn.functional.silu(scan["z"][b].to(ones.dtype)) if gate and scan["z"] is not None else ones
        for columns, reached, answers in _answers(part, b):
            values = answers.mul_(weight[:, reached])
            mean[b, reached, columns] = (values.abs_() if absolute else values).mean(1).mT
    return mean
