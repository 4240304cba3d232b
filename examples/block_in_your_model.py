"""Use Vim's blocks in a model of your own: a classifier of sequences, here of sensor readings.

    python examples/block_in_your_model.py

A block takes tokens, (batch, length, width), and the residual of the block before it; any length will do. Its output is
added to the residual by the next norm, so a stack ends with a norm.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim


class SequenceClassifier(nn.Module):
    """Bidirectional Mamba blocks over a sequence of vectors, the mean over time, a linear head.

    Args:
        channels: Numbers in a vector of the sequence.
        classes: Outputs.
        width: Width of the tokens.
        depth: Number of blocks.
    """

    def __init__(self, channels: int, classes: int, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(vim.Block(vim.Mamba(width), vim.RMSNorm(width)) for _ in range(depth))
        self.norm = vim.RMSNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify (batch, length, channels) as (batch, classes)."""
        x, residual = self.embed(x), None
        for block in self.blocks:
            x, residual = block(x, residual)
        x, _ = self.norm(x, residual)
        return self.head(x.mean(1))


def make_batch(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy waves of three kinds, (count, length, 2), and their kinds, (count,)."""
    labels = torch.randint(3, (count,), generator=generator)
    phase = 2 * torch.pi * torch.rand(count, 1, generator=generator)
    time = torch.linspace(0, 2 * torch.pi, length)
    angle = time * (2 + 2 * labels[:, None]) + phase
    clean = torch.stack([angle.sin(), angle.cos()], dim=-1)
    return clean + 0.5 * torch.randn(count, length, 2, generator=generator), labels


def main(argv: Sequence[str] | None = None) -> float:
    """Run the command line; return the percentage of new sequences that are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=100)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = SequenceClassifier(channels=2, classes=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(args.steps):
        sequences, labels = make_batch(32, args.length, generator)
        loss = F.cross_entropy(model(sequences), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    with torch.inference_mode():
        sequences, labels = make_batch(300, args.length, generator)
        accuracy = 100 * float((model(sequences).argmax(1) == labels).float().mean())
    print(f"new sequences right: {accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
