"""What an extended model carries: its plan, and with it its sites and their δ."""

from __future__ import annotations

from torch import nn

from .passes.errors import PlanError, SurgeryError
from .passes.plan import Plan, Site

_MARK = "_bypass_plan"


def mark(model: nn.Module, plan: Plan) -> None:
    """Note on a model that it is extended by this plan."""
    model.__dict__[_MARK] = plan


def unmark(model: nn.Module) -> None:
    """Take the note off a model that is contracted."""
    del model.__dict__[_MARK]


def is_marked(module: nn.Module) -> bool:
    """Whether the module itself is what `extend` was called on."""
    return _MARK in module.__dict__


def is_extended(model: nn.Module) -> bool:
    """Whether the model, or the model inside a wrapper, is extended."""
    return any(_MARK in module.__dict__ for module in model.modules())


def expect_module(model: object) -> None:
    """Check that a model is one.

    Raises:
        PlanError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"a torch.nn.Module is needed, this is a {type(model).__name__}")


def root_of(model: nn.Module) -> nn.Module:
    """The module that `extend` was called on: the model itself, or the one inside a wrapper.

    Raises:
        SurgeryError: the model is not extended.
        PlanError: it is no model.
    """
    expect_module(model)
    if _MARK in model.__dict__:
        return model
    marked = [module for module in model.modules() if _MARK in module.__dict__]
    if len(marked) > 1:
        raise SurgeryError(f"{len(marked)} parts of this model were extended one by one: call this on each of them")
    if marked:
        return marked[0]
    raise SurgeryError("this model is not extended: call bypass_fx.extend(model) first")


def sites(model: nn.Module) -> list[Site]:
    """The sites of an extended model, in order.

    Raises:
        SurgeryError: the model is not extended.
    """
    found: Plan = root_of(model).__dict__[_MARK]
    return list(found.sites)


def delta_of(model: nn.Module, site: Site) -> nn.Parameter:
    """The coefficients δ of a site, shape (width,)."""
    return root_of(model).get_parameter(site.parameter)
