"""What the steps of a bypass move: D and, beside it, what the optimiser holds of the model; and whether it is finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from bypass_fx.passes.matrices import placed_like, whole
from bypass_fx.passes.plan import Site


class Moving:
    """D and the parameters beside it.

    What is not finite when the bypass begins, such as −∞ in a mask, is left out.

    Args:
        model: the extended model.
        optimizer: what moves it.
        deltas: D, by site.
        like: a number of the dtype and on the device that sizes are given in.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, deltas: Mapping[str, nn.Parameter], like: Tensor
    ) -> None:
        self._deltas, self._like = list[Tensor](deltas.values()), like
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        held -= set(map(id, deltas.values()))
        found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in held}
        all_finite = not found or bool(whole(get_total_norm(found.values())).isfinite())
        self._beside: dict[str, Tensor] = {
            name: parameter
            for name, parameter in found.items()
            if all_finite or bool(whole(parameter).isfinite().all())
        }
        every = [*self._deltas, *self._beside.values()]
        plain = all(type(each) in (Tensor, nn.Parameter) and each.device == every[0].device for each in every)
        self._at_once = plain and len(self._beside) > 0

    def sizes(self, with_d: bool) -> Tensor:
        """Norms that are not finite where a parameter is not: of each site's D first, if asked for; shape (k,)."""
        chosen = self._deltas if with_d else []
        if self._at_once:
            return self._stacked(torch._foreach_norm([*chosen, *self._beside.values()]))
        norms = [torch.linalg.vector_norm(whole(delta)) for delta in chosen]
        return self._stacked([*norms, whole(get_total_norm(self._beside.values()))])

    def _stacked(self, norms: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        return torch.stack([norm.to(self._like) for norm in norms])

    def broken(self) -> str | None:
        """The name of a parameter beside D that is not finite; a norm may overflow where no number does."""
        return next((name for name, each in self._beside.items() if not bool(whole(each).isfinite().all())), None)


def mask(site: Site, delta: nn.Parameter) -> Tensor:
    """1 for the coefficients that move and 0 for the others, in δ's placement."""
    moving = torch.zeros(site.width)
    moving[list(site.moving)] = 1
    return placed_like(delta.detach(), moving)
