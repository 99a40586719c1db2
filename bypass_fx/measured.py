"""Selections of sites that look at the loss, "stuck" and "probe", and the loss as they are given it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

from torch import Tensor, nn

from .nearest import did_you_mean
from .passes.errors import BypassError, PlanError
from .passes.plan import Plan

LossFn = Callable[[nn.Module, Any], Tensor]
MEASURED = ("stuck", "probe")


def expect_measuring(select: object, measuring: Mapping[str, Any]) -> None:
    """Check the arguments that a call of `plan` or `extend` has beside its own.

    Raises:
        PlanError: one is unknown, missing, or for a selection that was not asked for.
    """
    if select in MEASURED and not {"loss_fn", "batches"} <= measuring.keys():
        raise PlanError(
            f"select={select!r} looks at gradients to choose the sites: pass loss_fn=(model, batch) → loss, and batches="
        )
    if not measuring:
        return
    expect_known(select, measuring)
    if select not in MEASURED:
        raise PlanError(
            f"{', '.join(measuring)}: for select='stuck' or 'probe' only; pass one of these too, or leave them out"
        )


def expect_known(select: object, names: Iterable[str], beside: Sequence[str] = ()) -> None:
    """Check the names of arguments of `plan`.

    Args:
        select: what it is given as such.
        names: of the arguments.
        beside: those of who hands them on to `plan`, which one may be a slip of.

    Raises:
        PlanError: one is unknown.
    """
    known = ["mode", "select", "example_inputs", *_arguments(select)]
    for name in names:
        if name not in known:
            taken = [*dict.fromkeys([*beside, *known])]
            hint = f"give {', '.join(taken)}"
            raise PlanError(f"{name!r} is no known argument; {did_you_mean(name, taken, hint)}")


def _arguments(select: object) -> dict[str, None]:
    """The names of what the selection takes beside the arguments of `plan`; of what either takes, where it is neither."""
    from .probe import probe  # both are made of what imports this
    from .stuck import stuck

    ways: list[Callable[..., Any]] = [stuck] if select == "stuck" else [probe] if select == "probe" else [stuck, probe]
    names = dict.fromkeys(name for way in ways for name in signature(way).parameters)
    return {name: None for name in names if name not in ("model", "mode", "example_inputs")}


def measured_plan(model: nn.Module, select: object, **arguments: Any) -> Plan:
    """The plan that a selection by the loss comes to.

    Raises:
        PlanError: no channel is stuck, or no set of sites gained anything in the probe.
    """
    from .probe import probe
    from .stuck import stuck

    if select == "stuck":
        flow = stuck(model, **arguments)
        if not flow.plan.sites:
            raise PlanError(
                f"none of the {flow.channels} channels is stuck, so there is nothing to bypass here: train on, or choose the "
                "sites yourself"
            )
        return flow.plan
    report = probe(model, **arguments)
    if not report.worth:
        raise PlanError(
            f"the probe found no sites with which {report.steps} steps gain more than plain training does: train on, or "
            "choose the sites yourself"
        )
    return report.best


def expect_loss(loss_fn: object, batches: object) -> None:
    """Check what the loss is to be taken with.

    Raises:
        BypassError: it is no function, or there are no batches to go through.
    """
    if not callable(loss_fn):
        raise BypassError(f"loss_fn is {loss_fn!r}; give a function (model, batch) → loss")
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise BypassError(f"batches is {batches!r}; give a list of batches, or a loader of them")


def loss_of(loss_fn: LossFn, model: nn.Module, batch: Any) -> Tensor:
    """The loss on a batch.

    Raises:
        BypassError: it is no tensor of one number.
    """
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise BypassError("loss_fn must return one number, a 0-dim tensor")
    return loss
