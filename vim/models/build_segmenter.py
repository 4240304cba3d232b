"""Build the segmentation model that the settings name."""

from torch import nn

from vim.config.schema import TrainConfig
from vim.models import VisionMamba
from vim.models.build import build_model, without_weights
from vim.models.segmentation import Segmenter


def build_segmenter(config: TrainConfig, num_classes: int, starting_weights: bool = True) -> nn.Module:
    """Create the backbone through timm, and the heads on it.

    Args:
        config: The settings; `model` describes the backbone, which starts from the weights that it names.
        num_classes: Number of classes.
        starting_weights: Load the pretrained weights of the backbone.

    Returns:
        The model, on the CPU, in training mode.

    Raises:
        ValueError: The backbone is not a Vision Mamba, or refuses an argument; the message names it.
        ModuleNotFoundError: transformers is not installed.
    """
    model, own = config.model, config.segmentation
    backbone = build_model(model if starting_weights else without_weights(model), 0)
    if not isinstance(backbone, VisionMamba):
        raise ValueError(f"model.name must be a Vision Mamba for task 'segmentation', got {model.name!r}")
    try:
        return Segmenter(
            backbone,
            num_classes,
            blocks=own.blocks or None,
            tap=own.tap,
            norm=own.norm,
            channels=own.channels,
            dropout=own.dropout,
            aux_channels=own.aux_channels if own.aux_weight > 0 else None,
        )
    except ValueError as error:
        raise ValueError(f"model {model.name!r} does not fit task 'segmentation': {error}") from error
