"""D in the user's optimiser: a parameter group of its own for as long as the model is extended, and λ' in opt2."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from bypass_fx.passes.errors import BypassError

# What a learning-rate scheduler (torch's or timm's) keeps per group. Rates follow D's own rate, the rest is copied.
RATE_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr", "base_values", "warmup_steps")
OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")
# Some optimisers count steps per group; D's moments are new, so its count starts anew.
_OWN = ("params", "param_names", "step")
RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


def expect_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Check that an optimiser can take D beside the model's parameters.

    Raises:
        BypassError: it is no torch optimiser, holds none of the parameters, has no learning rate, or steps matrices only.
    """
    if not isinstance(optimizer, Optimizer):
        raise BypassError(f"{type(optimizer).__name__} is no torch.optim.Optimizer; pass the one that steps the model")
    if isinstance(unwrap(optimizer), torch.optim.Muon):
        raise BypassError("torch's Muon steps matrices only, D is a vector; pass the optimiser that holds the biases")
    ids = {id(parameter) for parameter in parameters}
    holding = [group for group in optimizer.param_groups if holds(group, ids)]
    if not holding:
        raise BypassError(
            "the optimizer holds none of the model's parameters; build it from this model's model.parameters()"
        )
    if any(group.get("lr") is None for group in holding):
        raise BypassError(
            f"{type(optimizer).__name__} goes by no learning rate, by which D must slow down on its way back; give it an lr "
            "(and relative_step=False, where it has one)"
        )


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The optimiser whose `step` moves the parameters, inside those of accelerate, of Lookahead, of SAM and their like."""
    passed = {id(optimizer)}
    while (inner := _inside(optimizer)) is not None and id(inner) not in passed:
        optimizer = inner
        passed.add(id(inner))
    return optimizer


def _inside(optimizer: Optimizer) -> Optimizer | None:
    """The one optimiser that this one holds for all of its own parameters, if it holds one."""
    found = {id(value): value for value in vars(optimizer).values() if isinstance(value, Optimizer)}
    if len(found) != 1:
        return None
    (inner,) = found.values()
    own, its = (
        {id(parameter) for group in one.param_groups for parameter in group["params"]} for one in (optimizer, inner)
    )
    return inner if own <= its else None


def base_lr(group: Mapping[str, Any]) -> Any:
    """The learning rate a group was given, before any LR scheduler changed it."""
    return group.get("max_lr", group.get("initial_lr", group.get("lr")))


def add(
    optimizer: Optimizer,
    deltas: Sequence[nn.Parameter],
    like: Iterable[nn.Parameter],
    lr: float | None = None,
    weight_decay: float = 0.0,
    names: Sequence[str] | None = None,
) -> None:
    """Give D a parameter group of its own, with the hyper-parameters of the first group that holds one of `like`.

    LR schedulers that drive the optimiser learn of the group, so their next `step()` works and D's rate follows.
    Parameters of D that the optimiser holds already move into the new group; a group that holds all of D and nothing
    else stays as it is. LBFGS has one group only: there D joins it, and the curvature memory of the smaller space
    goes.

    Args:
        optimizer: the user's optimiser.
        deltas: the coefficients δ, one parameter a site.
        like: parameters whose group is taken as the example.
        lr: D's learning rate, on the scale of the example's base rate; None takes the example's.
        weight_decay: D's weight decay, where the optimiser has one.
        names: names of the deltas, for an optimiser built from named parameters.

    Raises:
        BypassError: the learning rate can't be set.

    Example:
        >>> weight, delta = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1)
        >>> add(optimizer, [delta], like=[weight])
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.1, 0.01), (0.1, 0.0)]
        >>> remove(optimizer, [delta])
        >>> len(optimizer.param_groups)
        1
    """
    if isinstance(plain := unwrap(optimizer), LBFGS):
        _join(plain, deltas, lr)
        return
    ids = {id(delta) for delta in deltas}
    if any({id(parameter) for parameter in group["params"]} == ids for group in optimizer.param_groups):
        return
    wanted = {id(parameter) for parameter in like} - ids
    index, example = min(
        ((index, group) for index, group in enumerate(optimizer.param_groups) if holds(group, wanted)),
        key=lambda pair: bool(pair[1].get("use_muon")),  # Muon steps matrices, D is a vector
    )
    ratio = _ratio(lr, example)
    _withdraw(optimizer, ids)
    group = {key: deepcopy(value) for key, value in example.items() if key not in _OWN}
    group.update({key: _copy(group[key], ratio) for key in RATES if group.get(key) is not None})
    if "weight_decay" in group:
        group["weight_decay"] = weight_decay
    named = "param_names" in example and names is not None
    group["params"] = list(zip(names, deltas, strict=True)) if named and names else list(deltas)
    optimizer.add_param_group(group)
    _begin_state(plain, optimizer.param_groups[-1])
    _edit_schedulers(optimizer, len(optimizer.param_groups) - 1, lambda old, by: [*old, _copy(old[index], by)], ratio)


def remove(optimizer: Optimizer, deltas: Sequence[nn.Parameter]) -> None:
    """Take D out again: its group, its state and its gradients go, everything else stays the same object.

    An optimiser without D is left as it is.
    """
    ids = {id(delta) for delta in deltas}
    if isinstance(plain := unwrap(optimizer), LBFGS):
        _withdraw(plain, ids)
        _forget_curvature(plain)
    else:
        groups = optimizer.param_groups
        index = next((i for i, group in enumerate(groups) if holds(group, ids)), None)
        if index is not None:
            _edit_schedulers(optimizer, len(groups), lambda old, _: [*old[:index], *old[index + 1 :]])
            del groups[index]
    for delta in deltas:
        for holder in (optimizer, plain):
            holder.state.pop(delta, None)
        delta.grad = None


def current_lr(optimizer: Optimizer, delta: nn.Parameter) -> float | Tensor:
    """The learning rate with which the optimiser moves this parameter now.

    Raises:
        BypassError: its group has none any more.
    """
    group = next(group for group in reversed(optimizer.param_groups) if holds(group, {id(delta)}))
    rate: float | Tensor | None = group.get("lr")
    if rate is None:
        raise BypassError(f"{type(optimizer).__name__} sets no learning rate any more; give D's group an lr")
    return rate


def moved_by_hand(optimizer: Optimizer) -> None:
    """Parameters were changed between two steps: LBFGS forgets pairs of steps and gradients, which no longer fit."""
    if isinstance(plain := unwrap(optimizer), LBFGS):
        _forget_curvature(plain)


class ScaledRate:
    """Multiplies each group's learning rate by `factor(group)` while the optimiser steps, and only then.

    Between steps the groups hold what the user or an LR scheduler put there: λ' = factor · λ(t) composes with any
    scheduler, and nothing needs restoring at the end.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> scaled = ScaledRate(optimizer, lambda group: 0.25)
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step(); weight.item(), optimizer.param_groups[0]["lr"]
        (0.75, 1.0)
        >>> scaled.remove()
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[Mapping[str, Any]], float]) -> None:
        self._saved: list[tuple[dict[str, Any], Any]] = []
        self._factor = factor
        plain = unwrap(optimizer)
        self._handles = (plain.register_step_pre_hook(self._scale), plain.register_step_post_hook(self._restore))

    def remove(self) -> None:
        """Step with the groups' own rates from now on."""
        self._restore()
        for handle in self._handles:
            handle.remove()

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore()  # a step that raised midway has not restored its rates
        for group in optimizer.param_groups:
            rate, factor = group.get("lr"), self._factor(group)
            if rate is not None and factor != 1:
                self._saved.append((group, rate.clone() if isinstance(rate, Tensor) else rate))
                _set_rate(group, rate * factor)

    def _restore(self, *_: Any) -> None:
        for group, rate in self._saved:
            _set_rate(group, rate)
        self._saved.clear()


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):  # a captured or compiled step reads this very tensor
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate


def holds(group: Mapping[str, Any], ids: set[int]) -> bool:
    """Whether a group holds one of the parameters with these ids."""
    return any(id(parameter) in ids for parameter in group["params"])


def _ratio(lr: float | None, example: Mapping[str, Any]) -> float:
    if lr is None:
        return 1.0
    base = base_lr(example)
    if base is None or float(base) == 0:
        raise BypassError(
            f"delta_lr={lr} can't be set beside a learning rate of {base}; give the optimizer an lr above 0"
        )
    return lr / float(base)


def _copy(value: Any, by: float) -> Any:
    return value * by if by != 1 else value


def _begin_state(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """The state that an optimiser gives its parameters when it is made, as some do (Adagrad before torch 2.12)."""
    try:
        made = type(optimizer)([nn.Parameter(torch.zeros_like(p)) for p in group["params"]], **optimizer.defaults)
    except Exception:  # made from other arguments than its defaults: then nothing tells that it begins with a state
        return
    for delta, stand_in in zip(group["params"], list(made.state), strict=False):
        optimizer.state[delta] = made.state[stand_in]


def _withdraw(optimizer: Optimizer, ids: set[int]) -> None:
    for group in optimizer.param_groups:
        if holds(group, ids):
            kept = [i for i, parameter in enumerate(group["params"]) if id(parameter) not in ids]
            for key in {"params", "param_names"} & group.keys():
                group[key][:] = [group[key][i] for i in kept]  # in place: LBFGS keeps a second reference to the list


def _join(optimizer: LBFGS, deltas: Sequence[nn.Parameter], lr: float | None) -> None:
    if lr is not None:
        raise BypassError("LBFGS has one learning rate for all parameters; leave out delta_lr")
    _withdraw(optimizer, {id(delta) for delta in deltas})
    optimizer.param_groups[0]["params"].extend(deltas)
    _forget_curvature(optimizer)


def _forget_curvature(optimizer: LBFGS) -> None:
    # Its memory is flat vectors over all parameters: pairs of one space say nothing true about the other.
    optimizer._numel_cache = None
    optimizer.state.clear()


def _edit_schedulers(
    optimizer: Optimizer, length: int, edit: Callable[[list[Any], float], list[Any]], ratio: float = 1.0
) -> None:
    for scheduler in schedulers(optimizer):
        for key, by in [*((key, ratio) for key in RATE_LISTS), *((key, 1.0) for key in OTHER_LISTS)]:
            per_group = scheduler.get(key)
            if isinstance(per_group, list) and len(per_group) == length:
                scheduler[key] = edit(per_group, by)


def schedulers(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    """The attributes of every LR scheduler that drives the optimiser.

    An optimiser does not know its schedulers, but they hold it, and torch's refuse a group that they have not seen.
    """
    driven = (optimizer, unwrap(optimizer))
    seen: set[int] = set()
    for holder in gc.get_referrers(*driven):
        attributes = holder if isinstance(holder, dict) else getattr(holder, "__dict__", None)
        if not isinstance(attributes, dict) or id(attributes) in seen or "__builtins__" in attributes:
            continue  # "__builtins__" marks a script's global names
        seen.add(id(attributes))
        if any(attributes.get("optimizer") is one for one in driven):
            yield attributes


def rate_factor(optimizer: Optimizer, lr: float | None) -> float:
    """The factor from the first group's base rate to λ'.

    Raises:
        BypassError: the base rate is 0, or there is none.
    """
    if lr is None:
        return 1.0
    base = base_lr(optimizer.param_groups[0])
    if not base or float(base) <= 0:
        raise BypassError(f"lr={lr} can't be set beside a learning rate of {base}; set one above 0")
    return lr / float(base)
