"""Train segmentation with Vim as the encoder of segmentation-models-pytorch.

    pip install "vimamba[dense]"
    python examples/segmentation.py

The images are discs on noise. Models with `pyramid` in their names give UPerNet, Unet, FPN and the like the four levels
that they expect; put images and masks of your own in the place of `make_batch`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

import vim  # noqa: F401  (registers the models)


def make_batch(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images, (count, 3, side, side), and masks of their discs, (count, 1, side, side)."""
    rows = torch.arange(side)[:, None]
    columns = torch.arange(side)[None, :]
    centre = torch.rand(count, 2, 1, 1, generator=generator) * side
    radius = side * (0.15 + 0.15 * torch.rand(count, 1, 1, generator=generator))
    masks = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < radius**2)[:, None].float()
    return masks + 0.5 * torch.randn(count, 3, side, side, generator=generator), masks


def intersection_over_union(logits: Tensor, masks: Tensor) -> float:
    """Return the overlap of predicted and true discs, between 0 and 1."""
    predicted, true = logits > 0, masks > 0.5
    return float((predicted & true).sum() / (predicted | true).sum())


def train(model: nn.Module, steps: int, batch_size: int, side: int) -> float:
    """Train on discs that are never seen twice; return the overlap on new ones."""
    generator = torch.Generator().manual_seed(0)
    loss_fn = nn.BCEWithLogitsLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        images, masks = make_batch(batch_size, side, generator)
        loss = loss_fn(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    with torch.inference_mode():
        images, masks = make_batch(32, side, generator)
        return intersection_over_union(model(images), masks)


def main(argv: Sequence[str] | None = None) -> float:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="tu-vim_tiny_pyramid_patch16_224")
    parser.add_argument("--width", type=int, default=64, help="width of the encoder's tokens; the tiny model has 192")
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    # Arguments that segmentation-models-pytorch does not know go to the encoder.
    model = smp.UPerNet(args.encoder, encoder_weights=None, classes=1, embed_dim=args.width)
    overlap = train(model, args.steps, args.batch_size, args.side)
    print(f"intersection over union on new images: {overlap:.2f}")
    return overlap


if __name__ == "__main__":
    main()
