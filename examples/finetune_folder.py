"""Fine-tune a Vim on a folder of images, in a training loop of your own.

    python examples/finetune_folder.py IMAGES --checkpoint vim_t_midclstok_76p1acc.pth

IMAGES holds `train/` and `val/`, each with a folder for each class. `python -m vim.train --config
configs/finetune_folder.yaml --data.path IMAGES` does the same with resuming, averaging, logs and pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import vim  # noqa: F401  (registers the models)


def make_loaders(folder: str, model: nn.Module, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Return batches of training images, augmented, and of held-out images, prepared as the model expects them."""
    settings = resolve_data_config(model=model)
    shape = {"input_size": (3, *model.patch_embed.img_size), "mean": settings["mean"], "std": settings["std"]}
    train = ImageFolder(f"{folder}/train", create_transform(**shape, is_training=True))
    held_out = ImageFolder(f"{folder}/val", create_transform(**shape, crop_pct=settings["crop_pct"]))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(held_out, batch_size)


def finetune(model: nn.Module, train: DataLoader, held_out: DataLoader, epochs: int, lr: float) -> float:
    """Train all blocks, the early ones more slowly, and return the percentage of held-out images that are right."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=0.05, layer_decay=0.75)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] * group["lr_scale"] for group in optimizer.param_groups], epochs * len(train)
    )
    accuracy = 0.0
    for epoch in range(epochs):
        model.train()
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        accuracy = evaluate(model, held_out)
        print(f"epoch {epoch + 1}/{epochs}: last loss {loss.item():.3f}, held-out accuracy {accuracy:.1f} %")
    return accuracy


@torch.inference_mode()
def evaluate(model: nn.Module, held_out: DataLoader) -> float:
    """Return the percentage of held-out images whose class is the model's first guess."""
    model.eval()
    hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in held_out)
    return 100 * hits / len(held_out.dataset)


def main(argv: Sequence[str] | None = None, **model_args: object) -> float:
    """Run the command line; `model_args` change the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder with train/ and val/")
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    parser.add_argument("--checkpoint", help="weights to start from; without them the model learns from scratch")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parser.parse_args(argv)

    classes = len(ImageFolder(f"{args.images}/train").classes)
    # A head for another number of classes is drawn anew; every other weight must fit.
    start = {"pretrained": True, "pretrained_cfg_overlay": {"file": args.checkpoint}} if args.checkpoint else {}
    model = timm.create_model(args.model, num_classes=classes, **start, **model_args)
    return finetune(model, *make_loaders(args.images, model, args.batch_size), args.epochs, args.lr)


if __name__ == "__main__":
    main()
