"""A step of several ordinary optimisers of one kind at once, on the rows of a stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bypass_fx.stack import Stack

Numbers = Mapping[str, Any]  # a group's hyper-parameters; those that differ between the rows as tensors, [rows, 1]
State = Mapping[str, Tensor]  # by torch's own names, [rows, columns]


def _sgd(values: Tensor, gradients: Tensor, state: State, steps: Tensor, h: Numbers) -> None:
    g = _descent(gradients, h)
    g = g + h["weight_decay"] * values if _is_on(h["weight_decay"]) else g
    if h["momentum"]:
        buffer = state["momentum_buffer"].mul_(h["momentum"]).add_(g)
        g = g + h["momentum"] * buffer if h["nesterov"] else buffer
    values.sub_(h["lr"] * g)


def _adam(values: Tensor, gradients: Tensor, state: State, steps: Tensor, h: Numbers) -> None:
    g, (beta1, beta2) = _descent(gradients, h), h["betas"]
    if _is_on(h["weight_decay"]):
        if h["decoupled_weight_decay"]:
            values.mul_(1 - h["lr"] * h["weight_decay"])
        else:
            g = g + h["weight_decay"] * values
    mean = state["exp_avg"].lerp_(g, 1 - beta1)
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    steps = steps.double().unsqueeze(1)
    first, second = ((1 - beta**steps).to(values) for beta in (beta1, beta2))
    values.sub_(h["lr"] / first * (mean / (square / second).sqrt_().add_(h["eps"])))


def _descent(gradients: Tensor, h: Numbers) -> Tensor:
    return -gradients if h["maximize"] else gradients


def _is_on(number: Any) -> bool:
    return isinstance(number, Tensor) or number != 0


@dataclass(frozen=True, slots=True)
class Rule:
    """How an optimiser of torch.optim steps a matrix, with the state that it keeps for each parameter.

    `plain` names the hyper-parameters that must be off: forms of the optimiser that are not written here.
    """

    step: Callable[[Tensor, Tensor, State, Tensor, Numbers], None]
    state: Callable[[Numbers], tuple[str, ...]]
    counts: bool
    numbers: tuple[str, ...]
    plain: tuple[str, ...]


_SGD = Rule(
    _sgd,
    lambda h: ("momentum_buffer",) if h["momentum"] else (),
    counts=False,
    numbers=("momentum", "nesterov", "maximize"),
    plain=("dampening", "differentiable"),
)
_ADAM = Rule(
    _adam,
    lambda h: ("exp_avg", "exp_avg_sq"),
    counts=True,
    numbers=("betas", "eps", "maximize", "decoupled_weight_decay"),
    plain=("amsgrad", "differentiable"),
)
RULES: dict[type[Optimizer], Rule] = {torch.optim.SGD: _SGD, torch.optim.Adam: _ADAM, torch.optim.AdamW: _ADAM}
_FREE = ("lr", "weight_decay")  # these may differ between the rows


class JointStep:
    """Steps a stack's parameters as their optimisers would, each row by its own; in one go where `RULES` has a rule.

    The optimisers stay ordinary: their states become views of what all share, and what anyone else puts there
    (`load_state_dict`, a rollback) is taken over. Learning rate, weight decay and step count may differ between rows.
    """

    def __init__(self, stack: Stack, optimizers: Sequence[Optimizer]) -> None:
        self._stack, self._optimizers = stack, optimizers
        self._segments = _segments(stack, optimizers)

    @property
    def joint(self) -> bool:
        """Whether the rows can step in one go as their optimisers stand now."""
        return self._segments is not None and all(segment.agrees() for segment in self._segments)

    def step(self) -> None:
        """Step in one go; the hooks of the optimisers are the caller's business."""
        assert self._segments is not None, "asked for in `joint`"
        for segment in self._segments:
            segment.step()


@torch.no_grad()
def step(optimizers: Sequence[Optimizer], joints: Sequence[JointStep]) -> None:
    """One step of each optimiser, its hooks included; the joints, if there are any, cover all that they move."""
    if not joints or not all(joint.joint for joint in joints):
        for optimizer in optimizers:
            optimizer.step()
        return
    for optimizer in optimizers:
        for hook in optimizer._optimizer_step_pre_hooks.values():
            hook(optimizer, (), {})
    for joint in joints:
        joint.step()
    for optimizer in optimizers:
        for hook in optimizer._optimizer_step_post_hooks.values():
            hook(optimizer, (), {})
        optimizer._opt_called = True  # type: ignore[attr-defined]  # or LR schedulers warn that it was not


class _Segment:
    """Neighbouring columns that lie in one parameter group, of each optimiser."""

    def __init__(
        self, stack: Stack, optimizers: Sequence[Optimizer], rule: Rule, groups: Sequence[int], first: int, last: int
    ) -> None:
        self._stack, self._optimizers, self._rule = stack, optimizers, rule
        self._groups, self._first, self._last = groups, first, last
        columns = slice(stack.ends[first], stack.ends[last])
        self._values, self._gradients = stack.values[:, columns], stack.gradients[:, columns]
        group = optimizers[0].param_groups[groups[0]]
        on_device = bool(group.get("fused") or group.get("capturable"))
        self._steps = torch.zeros(len(optimizers), last - first, device=stack.values.device if on_device else "cpu")
        self._matrices = {name: torch.zeros_like(stack.values) for name in rule.state(group)}
        self._state = {name: matrix[:, columns] for name, matrix in self._matrices.items()}
        self._bound: list[Any] = [None] * len(optimizers)
        self._uneven = False  # parameters of one row have taken different numbers of steps

    def agrees(self) -> bool:
        """Whether the rows have in common what a rule can't tell apart."""
        groups = self._held()
        first, rule = groups[0], self._rule
        in_common = itemgetter(*rule.numbers, *rule.plain)
        expected = in_common(first)
        return (
            not any(first[name] for name in rule.plain)
            and all(in_common(group) == expected for group in groups)
            and {*rule.state(first)} == self._matrices.keys()
            and self._take_over()
        )

    def step(self) -> None:
        groups = self._held()
        numbers = {name: groups[0][name] for name in self._rule.numbers}
        numbers |= {name: self._each([float(group[name]) for group in groups]) for name in _FREE}
        self._steps += 1
        self._rule.step(self._values, self._gradients, self._state, self._steps[:, 0], numbers)

    def _held(self) -> list[dict[str, Any]]:
        return [optimizer.param_groups[i] for optimizer, i in zip(self._optimizers, self._groups, strict=True)]

    def _each(self, numbers: list[float]) -> float | Tensor:
        if all(number == numbers[0] for number in numbers):
            return numbers[0]
        return torch.tensor(numbers, dtype=self._values.dtype, device=self._values.device).unsqueeze(1)

    def _take_over(self) -> bool:
        """Make the states of the optimisers views of this one's, with what they hold; whether one count a row is enough."""
        for row, optimizer in enumerate(self._optimizers):
            parameters = self._stack.rows[row]
            if self._bound[row] is not None and optimizer.state.get(parameters[self._first]) is self._bound[row]:
                continue
            parameters = parameters[self._first : self._last]
            parts = {
                name: self._stack.row(matrix, row)[self._first : self._last] for name, matrix in self._matrices.items()
            }
            for index, parameter in enumerate(parameters):
                views = {name: views[index] for name, views in parts.items()}
                if self._rule.counts:
                    views = {"step": self._steps[row, index], **views}
                held = optimizer.state.get(parameter, {})
                for name, view in views.items():
                    value = held.get(name)
                    view.zero_() if value is None else view.copy_(value)
                optimizer.state[parameter] = views
            self._bound[row] = optimizer.state[parameters[0]]
            self._uneven = bool((self._steps != self._steps[:, :1]).any())
        return not self._uneven


def _segments(stack: Stack, optimizers: Sequence[Optimizer]) -> list[_Segment] | None:
    """The segments of a stack; None where its rows have no rule, or not the same one."""
    kind = type(optimizers[0])
    if kind not in RULES or any(type(optimizer) is not kind for optimizer in optimizers):
        return None
    by_row = [_group_indices(optimizer, row) for optimizer, row in zip(optimizers, stack.rows, strict=True)]
    columns = list(zip(*by_row, strict=True))  # for each parameter its group in every row
    segments, first = [], 0
    for groups, members in groupby(columns):
        last = first + len(list(members))
        held = [group for group in groups if group is not None]
        if len(held) == len(groups):
            segments.append(_Segment(stack, optimizers, RULES[kind], held, first, last))
        elif held:
            return None  # one replica steps what another leaves alone
        first = last
    return segments


def _group_indices(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[int | None]:
    index = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    return [index.get(id(parameter)) for parameter in parameters]
