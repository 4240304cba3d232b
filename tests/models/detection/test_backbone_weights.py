"""A classification checkpoint with its class token in the middle starts a detector's backbone at any size."""

from __future__ import annotations

import pytest
import torch

import vim
from tests.tiny_runs import TINY_MODEL, change, tiny_config
from vim.checkpoints.io import save_weights
from vim.inference.detectors import build_run_detector
from vim.layers.pos_embed import resample_grid
from vim.layers.token_sequence import extract_tokens


@pytest.mark.parametrize("cls_position", ["none", "middle"])
@pytest.mark.parametrize("size", [32, (40, 24)])
def test_a_classifier_starts_the_backbone(tmp_path, cls_position, size):
    torch.manual_seed(0)
    classifier = vim.VisionMamba(img_size=32, num_classes=5, **TINY_MODEL)
    torch.nn.init.normal_(classifier.pos_embed)
    state = classifier.state_dict()
    save_weights(tmp_path / "classifier.safetensors", state, {})
    config = change(
        tiny_config(task="detection", model__in_chans=3, model__img_size=size),
        model__args=TINY_MODEL | {"cls_position": cls_position},
        model__checkpoint=str(tmp_path / "classifier.safetensors"),
    )
    model = build_run_detector(config, 3, starting_weights=True).backbone.model
    for name in ("layers.0.mixer.in_proj.weight", "patch_embed.proj.weight"):
        assert torch.equal(model.state_dict()[name], state[name])
    tokens, patches = extract_tokens(state["pos_embed"], (8,))  # 16 patches, the class token in their middle
    grid = (4, 4) if size == 32 else (5, 3)
    places = () if cls_position == "none" else (grid[0] * grid[1] // 2,)
    own_tokens, own_patches = extract_tokens(model.pos_embed, places)
    expected = patches if size == 32 else resample_grid(patches, (4, 4), grid)
    torch.testing.assert_close(own_patches, expected)
    if cls_position == "middle":
        assert torch.equal(own_tokens[0], tokens[0])


def test_without_starting_weights_no_file_is_read():
    config = tiny_config(task="detection", model__in_chans=3, model__img_size=32, model__checkpoint="missing")
    build_run_detector(config, 3)
    with pytest.raises(FileNotFoundError, match="missing"):
        build_run_detector(config, 3, starting_weights=True)
