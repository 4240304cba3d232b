"""Optimizer, learning rate and averaged weights: timm's, set up from the settings."""

import copy
import difflib
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from vim.config.schema import OptimConfig, TrainConfig

_MILESTONE_FACTOR = 0.1
_FUSED = ("adam", "adamw", "sgd")  # PyTorch's own, in one kernel for all parameters
_HYBRID = ("muon", "nmuon", "adamuon", "nadamuon")  # orthogonal updates for matrices, Adam's for the rest


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Create the optimizer, at the peak learning rate.

    Three kinds of parameters have no weight decay: those with one axis, the model's `no_weight_decay()`, and matches of
    `optim.no_weight_decay`. Muon and its relatives update these with Adam: they are vectors and tables, not matrices.

    Raises:
        ValueError: timm knows no such optimizer; the message names the nearest.
    """
    optim = config.optim
    if optim.name not in list_optimizers():
        near = difflib.get_close_matches(optim.name, list_optimizers(), n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"optim.name must be an optimizer that timm knows, got {optim.name!r}{hint}")
    more: dict[str, Any] = {} if optim.betas is None else {"betas": optim.betas}
    if optim.name in _FUSED:
        more["fused"] = True
    return create_optimizer_v2(
        model,
        opt=optim.name,
        lr=config.peak_lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        eps=optim.eps,
        param_group_fn=_parameter_groups(optim),
        **more,
    )


def _parameter_groups(optim: OptimConfig) -> Callable[[nn.Module], list[dict[str, Any]]]:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        of_model: Callable[[], Any] = getattr(model, "no_weight_decay", tuple)
        lists: dict[str, Any] = {"no_weight_decay_list": [*of_model(), *optim.no_weight_decay]}
        if optim.name in _HYBRID:
            lists["fallback_no_weight_decay"] = True
        if optim.layer_decay is None:
            return param_groups_weight_decay(model, optim.weight_decay, **lists)
        found = param_groups_layer_decay(model, optim.weight_decay, layer_decay=optim.layer_decay, **lists)
        if optim.layer_decay_of == "stem":
            lowest = min(group["lr_scale"] for group in found)
            for group in found:
                group["lr_scale"] = lowest if group["lr_scale"] == lowest else 1.0
        return found

    return groups


class Schedule:
    """The learning rate, a function of the position in the run: resuming needs no further state.

    Args:
        optimizer: The optimizer; its current rate is the peak.
        config: The settings of the run.
        updates_per_epoch: Optimizer steps in one epoch.
    """

    def __init__(self, optimizer: Optimizer, config: TrainConfig, updates_per_epoch: int) -> None:
        schedule = config.schedule
        by_step = schedule.unit == "step"
        length = config.total_steps(updates_per_epoch) if by_step else config.epochs
        warmup = schedule.warmup_epochs * (updates_per_epoch if by_step else 1)
        self._optimizer = optimizer
        self._lag = schedule.lag_epochs
        self._scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=length,
            warmup_epochs=warmup if schedule.warmup_steps is None else schedule.warmup_steps,
            warmup_lr=schedule.warmup_lr,
            min_lr=schedule.min_lr,
            # timm counts milestones from 1, and calls the exponent of a polynomial a rate too.
            decay_milestones=[milestone + 1 for milestone in schedule.milestones],
            decay_rate=_MILESTONE_FACTOR if schedule.name == "multistep" else schedule.power,
            step_on_epochs=not by_step,
            updates_per_epoch=1,  # lengths are in the schedule's unit already
        )

    def set(self, epoch: int, step: int) -> float:
        """Set the rate for an optimizer step and return it; `optim.layer_decay` lowers it for some blocks.

        Args:
            epoch: Epochs before this one.
            step: Optimizer steps before this one, in the whole run.
        """
        self._scheduler.step(max(0, epoch - self._lag))  # one of the two does nothing, by the schedule's unit
        self._scheduler.step_update(step)
        group = self._optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)


def build_ema(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """Return averaged weights that start from the current ones, or `None` without a decay."""
    return None if decay is None else ModelEmaV3(model, decay=decay)


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the global norm of the gradients, a scalar on their device."""
    return torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in _trained(model)])


def clip_gradients(model: nn.Module, optim: OptimConfig, norm: Tensor) -> None:
    """Clip the gradients in place, as set by `optim.clip_grad` and `optim.clip_mode`.

    Args:
        model: The model with its gradients.
        optim: The settings of the optimizer.
        norm: The global norm of the gradients.
    """
    if optim.clip_grad is not None and optim.clip_mode == "norm":
        torch.nn.utils.clip_grads_with_norm_(_trained(model), optim.clip_grad, norm)
    elif optim.clip_grad is not None:
        dispatch_clip_grad(_trained(model), optim.clip_grad, mode=optim.clip_mode)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.grad is not None]


def check_optimizer_state(optimizer: Optimizer, model: nn.Module, config: TrainConfig) -> None:
    """Compare a loaded state with the state of a new optimizer after a step; if they differ, the next step would fail.

    Raises:
        ValueError: A setting or a tensor is missing or of another kind; the message names it.
    """
    probe = copy.deepcopy(model)
    fresh = build_optimizer(probe, config)
    for parameter in probe.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fresh.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    for wanted_group, group in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        for key, wanted in wanted_group.items():
            if key != "params" and _kind(group.get(key)) != _kind(wanted):
                raise ValueError(f"the optimizer's {key!r} must be like {wanted!r}, got {group.get(key)!r}")
        for new, parameter in zip(wanted_group["params"], group["params"], strict=True):
            state = optimizer.state.get(parameter)
            if state is None:  # the parameter was frozen
                continue
            for key, wanted in fresh.state.get(new, {}).items():
                found = state.get(key)
                if _kind(found) != _kind(wanted):
                    raise ValueError(
                        f"the optimizer's {key!r} of {names[parameter]} must be {_kind(wanted)}, got {_kind(found)}"
                    )


def _kind(value: object) -> str:
    """Return the kind of a value in words: a tensor with its shape, a number, or another type."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    return f"of type {type(value).__name__}"
