"""The detector that the settings of a run describe."""

from vim.config.schema import TrainConfig
from vim.data.preprocessing import per_channel
from vim.models.build import build_model, without_weights
from vim.models.detection import Detector, build_detector


def build_run_detector(config: TrainConfig, num_classes: int, starting_weights: bool = False) -> Detector:
    """Build the detector of a run, on the CPU.

    Args:
        config: The settings of the run.
        num_classes: Classes, without the background.
        starting_weights: Load the pretrained weights of the backbone that the settings name.

    Raises:
        ValueError: The backbone or the scales of the pyramid do not fit.
        FileNotFoundError: The file `model.checkpoint` does not exist.
    """
    settings = config.model if starting_weights else without_weights(config.model)
    mean, std = (per_channel(values, settings.in_chans) for values in (config.data.mean, config.data.std))
    backbone = build_model(settings, num_classes=0)
    return build_detector(backbone, num_classes, config.detection, settings.image_shape, mean, std)
