"""Frozen parameters: linear probes, and backbones that are frozen for some epochs."""

from fnmatch import fnmatch

from torch import nn

from vim.config.schema import OptimConfig


class Freezer:
    """Freezes the parameters that match no pattern of `optim.trainable`, for the whole run or its first epochs.

    A module whose parameters are all frozen is in evaluation mode: it has no dropout and no stochastic depth, and the
    running averages of its batch normalisation stay unchanged.

    Args:
        model: The model.
        optim: The settings of the optimizer.

    Raises:
        ValueError: A pattern matches no parameter.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig) -> None:
        self._model, self._unfreeze_after = model, optim.unfreeze_after
        names = [name for name, _ in model.named_parameters()]
        for pattern in optim.trainable:
            if not any(fnmatch(name, pattern) for name in names):
                raise ValueError(
                    f"optim.trainable must name parameters of the model, such as {names[-1]!r}, got {pattern!r}"
                )
        self._frozen = [
            parameter
            for name, parameter in model.named_parameters()
            if not any(fnmatch(name, pattern) for pattern in optim.trainable)
        ]

    def learning(self, epoch: int) -> int:
        """Return the number of trained parameters in an epoch, counted from 0."""
        parameters = sum(parameter.numel() for parameter in self._model.parameters())
        return parameters - (sum(p.numel() for p in self._frozen) if self._is_frozen(epoch) else 0)

    def begin_epoch(self, epoch: int) -> bool:
        """Put the model into training mode, and freeze or unfreeze its parameters.

        Args:
            epoch: The epoch, counted from 0.

        Returns:
            True if the set of trained parameters has changed.
        """
        self._model.train()
        frozen = self._is_frozen(epoch)
        changed = any(parameter.requires_grad == frozen for parameter in self._frozen)
        for parameter in self._frozen:
            parameter.requires_grad_(not frozen)
        for module in self._model.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return changed

    def _is_frozen(self, epoch: int) -> bool:
        return bool(self._frozen) and (self._unfreeze_after is None or epoch < self._unfreeze_after)
