#!/usr/bin/env python3
"""Receptive fields before and after training, of runs side by side: the picture and the table of docs/explain.md.

    python -m vim.train --output runs/vim
    python -m vim.train --output runs/deit --recipe digits_deit --model.name deit_tiny_patch16_224 \
        --model.args '{patch_size: 8, embed_dim: 64, depth: 4, num_heads: 2}'
    python scripts/explain_pictures.py Vim=runs/vim DeiT=runs/deit --output docs/explain

A model before training is built from the settings and the seed of its run.
"""

import argparse
import csv
import io
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from vim.checkpoints.io import write_text
from vim.config.schema import TrainConfig
from vim.data.loaders import build_eval_loader
from vim.data.sources import open_eval_set
from vim.explain import ReceptiveField, receptive_field
from vim.explain.pictures import draw_receptive_fields
from vim.inference.trained_model import load_trained_model
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

SHARES = (0.2, 0.3, 0.5, 0.99)  # shares in Ding et al. 2022, Table 7
TOKENS = ("center", "class")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="name of a model, and the folder of its run")
    parser.add_argument("--images", type=int, default=64, help="held-out images to average over (default: 64)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the picture and the table")
    options = parser.parse_args()
    fields: list[tuple[str, ReceptiveField]] = []
    table: list[list[object]] = [["model", "weights", "token", *(f"area of {share:.0%}" for share in SHARES)]]
    for name, run in (text.split("=", 1) for text in options.runs):
        before, after, config = load_both(run)
        images = held_out(config, options.images)
        for token in TOKENS:
            for weights, model in (("before training", before), ("trained", after)):
                field = receptive_field(model, images, token, batch_size=16)
                fields.append((f"{name}, {token}, {weights}", field))
                table.append([name, weights, token, *(f"{field.area(share):.3f}" for share in SHARES)])
    draw_receptive_fields(fields, options.output / "digits-receptive-fields.png", columns=2 * len(TOKENS))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    write_text(options.output / "digits-receptive-fields.csv", text.getvalue())


def load_both(run: str) -> tuple[nn.Module, nn.Module, TrainConfig]:
    """Return the model with the weights that the run began with, with its best weights, and the settings."""
    trained = load_trained_model(run)
    assert trained.config is not None, f"{run} is not the folder of a run"
    with tempfile.TemporaryDirectory() as folder:
        before = Trainer(trained.config, RunFolder(Path(folder))).model.cpu()
    return before, trained.model, trained.config


def held_out(config: TrainConfig, count: int) -> Tensor:
    """Return the first held-out images, normalised, (count, in_chans, height, width)."""
    dataset, _ = open_eval_set(config, config.data.val_split, None)
    batches, _ = build_eval_loader(dataset, config, torch.device("cpu"))
    found: list[Tensor] = []
    for images, _ in batches:
        found.append(images)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


if __name__ == "__main__":
    main()
