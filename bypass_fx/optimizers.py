"""Optimisers and LR schedules from the settings, by timm's factories."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from bypass_fx.nearest import did_you_mean
from bypass_fx.settings import Settings, SettingsError


def make_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """The optimiser that timm's factory makes of the settings.

    Raises:
        SettingsError: timm knows no optimiser of that name (the nearest names are offered), or can't make it, or nothing
            of the model is to be trained.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    name = settings.optimizer
    known = [str(entry) for entry in list_optimizers()]
    around, _, own = name.lower().rpartition("_")
    if own not in known or around not in ("", "lookahead"):  # timm passes over what else stands before the "_"
        raise SettingsError(f"unknown optimizer {name!r}; {did_you_mean(name.lower(), known, 'take adam, say')}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SettingsError("no parameter of the model is to be trained; call requires_grad_() on some")
    extra: dict[str, Any] = {"fused": True} if settings.fused else {}
    try:
        return create_optimizer_v2(
            model, opt=name, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum, **extra
        )
    except Exception as error:
        fix = "set fused to no" if settings.fused else "try adam"
        raise SettingsError(f"optimizer {name!r} can't be made: {type(error).__name__}: {error}; {fix}") from error


def make_lr_schedule(optimizer: Optimizer, settings: Settings, total_steps: int, epoch_steps: int) -> Any:
    """timm's LR schedule over the whole run, stepped by `step_update(step)`; None where the rate stays as it is.

    Raises:
        SettingsError: timm can't make it.
    """
    if settings.lr_schedule == "none":
        return None
    from timm.scheduler import create_scheduler_v2

    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=settings.lr_schedule,
            num_epochs=max(1, round(total_steps / epoch_steps)),
            warmup_epochs=settings.warmup,
            step_on_epochs=False,
            updates_per_epoch=epoch_steps,
        )
    except Exception as error:
        raise SettingsError(
            f"lr_schedule {settings.lr_schedule!r} can't be made: {error}; take cosine or none"
        ) from error
    if schedule is None:
        raise SettingsError(f"this timm has no lr_schedule {settings.lr_schedule!r}; update timm, or take cosine")
    return schedule
