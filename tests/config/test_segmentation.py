"""Settings of segmentation: each wrong value is refused by its name."""

from __future__ import annotations

import pytest

from vim.config.load import parse_command_line
from vim.config.segmentation import SegmentationConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": (1, 2)}, r"segmentation.blocks must be four blocks or none, got \(1, 2\)"),
        ({"tap": "both"}, "segmentation.tap must be one of 'sum', 'mixer', got 'both'"),
        ({"norm": "layer"}, "segmentation.norm must be one of 'group', 'batch', got 'layer'"),
        ({"channels": 0}, "segmentation.channels must be > 0, got 0"),
        ({"repeats": 0}, "segmentation.repeats must be > 0, got 0"),
        ({"aux_weight": -1.0}, "segmentation.aux_weight must be >= 0, got -1.0"),
        ({"dropout": 1.5}, "segmentation.dropout must be between 0 and 1, got 1.5"),
        ({"scale": (2.0, 0.5)}, r"segmentation.scale must be two numbers, 0 < low <= high"),
        ({"scene_digits": 0}, "segmentation.scene_digits must be > 0, got 0"),
        ({"scene_overlap": 1.5}, "segmentation.scene_overlap must be between 0 and 1, got 1.5"),
        ({"scene_sides": (0.6, 0.5)}, "segmentation.scene_sides must be two numbers that rise, from 0.1 to 1, got"),
        ({"test_scales": ()}, "segmentation.test_scales must be at least one number"),
        ({"classes": ("a",)}, "segmentation.classes must be .* not a single one"),
        ({"classes": ("a", "a")}, "segmentation.classes must be at most 254 different ones"),
        ({"mask_values": (0, 70000)}, "segmentation.mask_values must be from 0 to 65535"),
        ({"mask_values": (0, 1), "classes": ("a", "b", "c")}, "must have a value for each of 3 classes, got 2"),
        ({"mask_values": (0, 255)}, "segmentation.ignore_value must be null or none of .*mask_values, got 255"),
    ],
)
def test_a_wrong_value_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SegmentationConfig(**settings)


def test_lists_come_from_the_command_line():
    words = [
        "--task",
        "segmentation",
        "--segmentation.classes",
        "[ground, road]",
        "--segmentation.ignore_value",
        "null",
    ]
    own = parse_command_line([*words, "--segmentation.mask_values", "[0, 255]"]).config.segmentation
    assert (own.classes, own.mask_values, own.ignore_value) == (("ground", "road"), (0, 255), None)
