"""Pictures of what a model looks at: hidden attention, class activation, gradients of pixels, receptive fields.

The command line, `python -m vim.explain`, goes without the names below, so that its `--help` does not wait for PyTorch.
"""

from typing import TYPE_CHECKING

from vim.runtime.command import starts_command

if TYPE_CHECKING or not starts_command():
    from vim.explain.attention import HiddenAttention, attention_rollout, hidden_attention, read_out_map, scan_matrices
    from vim.explain.class_activation import class_activation
    from vim.explain.dense_activation import DenseActivation, box_activation, segment_activation
    from vim.explain.pixel_gradients import pixel_gradients
    from vim.explain.receptive_field import ReceptiveField, receptive_field

__all__ = [
    "DenseActivation",
    "HiddenAttention",
    "ReceptiveField",
    "attention_rollout",
    "box_activation",
    "class_activation",
    "hidden_attention",
    "pixel_gradients",
    "read_out_map",
    "receptive_field",
    "scan_matrices",
    "segment_activation",
]
