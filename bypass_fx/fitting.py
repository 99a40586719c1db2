"""Whether a plan fits the model that it is applied to."""

from __future__ import annotations

from torch import nn

from .passes import matrices
from .passes.errors import PlanError
from .passes.matrices import tensor_named
from .passes.plan import Site


def check_fit(model: nn.Module, site: Site) -> None:
    """Check that the model has the site's W and A, of the site's width.

    Raises:
        PlanError: it has not.
    """
    for affine in filter(None, (site.first, site.second)):
        for name in filter(None, (affine.weight, affine.bias, affine.norm and f"{affine.norm}.running_var")):
            try:
                tensor_named(model, name)
            except AttributeError:
                raise PlanError(f"{site.name}: the model has no {name} as in the plan; plan this model anew") from None
    strange = [channel for channel in site.moving if not 0 <= channel < site.width]
    if strange:
        raise PlanError(f"{site.name}: moving names channel {strange[0]}; give numbers from 0 to {site.width - 1}")
    if list(site.moving) != sorted({*site.moving}):
        raise PlanError(f"{site.name}: moving is {site.moving}; give each channel once, in ascending order")
    if site.first is None or site.second is None:
        return
    try:
        made = matrices.rows(model, site.first).shape[:2].numel()
        groups, _, each = matrices.columns(model, site.second, site.width).shape
    except RuntimeError as error:
        raise PlanError(
            f"{site.name}: {site.first} and {site.second} have other shapes than in the plan; plan this model anew"
        ) from error
    for affine, verb, count in ((site.first, "makes", made), (site.second, "reads", groups * each)):
        if count != site.width:
            raise PlanError(
                f"{site.name}: {affine} {verb} {count} channels, the plan has {site.width}; plan this model anew"
            )
