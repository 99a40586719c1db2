"""Seeds of one model, trained side by side as one batched model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from bypass_fx import constraint, in_step, joint_step, readout, surgery
from bypass_fx.bypass import Bypass
from bypass_fx.course import expect
from bypass_fx.joint_step import JointStep
from bypass_fx.lookout import Seen
from bypass_fx.numeric import is_count
from bypass_fx.passes.matrices import tensor_named
from bypass_fx.passes.plan import Site
from bypass_fx.replica_groups import Call, Function, Group, Piece
from bypass_fx.schedule import BypassSchedule, NonFiniteError
from bypass_fx.stack import Stack, rows_of


class Replicas:
    """Several models built alike, each with an optimiser and perhaps a `BypassSchedule` of its own, stepped together.

    Models, optimisers and schedules stay ordinary objects and may be used as such at any time: parameters and the
    states of the optimisers are views of matrices with one replica a row, losses come from one `torch.func.vmap` over
    the rows, and one update moves all (for SGD, Adam and AdamW; others step in turn). Each schedule decides for its own
    replica: extended and contracted ones, in any phases, are evaluated in groups of the same sites. What a replica
    does is what it would do alone, up to rounding.

    All must be in one mode, training or evaluation. A parameter that the loss does not reach has the gradient 0, not
    None, so weight decay moves it. Dropout draws anew for each replica. `torch.save` of a view stores the
    whole matrix: save a deep copy.

    Args:
        models: seeds of one model, not extended.
        optimizers: one for each, over its parameters.
        at_once: how many replicas go through the model together; all, if None. Fewer take less memory; 1 makes each go
            and step in turn, which is fastest for models that keep the machine busy alone: convolutions on a CPU.

    Raises:
        BypassError: the models or optimisers do not fit together.

    Example:
        >>> import bypass_fx
        >>> def seed(number):
        ...     torch.manual_seed(number)
        ...     return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> models = [seed(number) for number in range(3)]
        >>> replicas = Replicas(models, [torch.optim.Adam(model.parameters()) for model in models])
        >>> def mse(model, batch):
        ...     return nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> batch = torch.randn(3, 16, 2), torch.randn(3, 16, 1)  # a minibatch for each
        >>> start = copy.deepcopy(replicas)
        >>> replicas.lead(lambda model, optimizer: bypass_fx.BypassSchedule(model, optimizer, opt1=2, opt2=3))
        >>> while replicas.walking:
        ...     losses = replicas.backward(mse, batch)
        ...     replicas.step(losses)
        >>> losses.shape, (replicas.values - start.values).norm(dim=1).shape
        (torch.Size([3]), torch.Size([3]))
    """

    def __init__(
        self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], at_once: int | None = None
    ) -> None:
        expect(len(models) > 0 and len(models) == len(optimizers), "give as many optimizers as models, one or more")
        self.models, self.optimizers = tuple(models), tuple(optimizers)
        self.schedules: list[BypassSchedule | None] = [None] * len(models)
        self.failures: dict[int, NonFiniteError] = {}
        expect(at_once is None or is_count(at_once, 1), f"at_once is {at_once!r}; give a number of replicas, 1 or more")
        self._at_once = at_once or len(models)
        expect(not any(map(surgery.is_extended, models)), "a model is extended; contract it, and extend by `lead`")
        kinds = [_trainable(model) for model in models]
        expect(
            all(kind == kinds[0] for kind in kinds) and any(kinds[0].values()),
            "the models differ in their parameters or buffers, or none can be trained; give seeds of one model",
        )
        moved = [name for name, trainable in kinds[0].items() if trainable]
        self._weights = Stack([[model.get_parameter(name) for name in moved] for model in models], moved)
        self._fixed = {name: _fix(models, name) for name, trainable in kinds[0].items() if not trainable}
        self._refresh()

    @property
    def values(self) -> Tensor:
        """The trainable parameters without D, [replicas, parameters]: a view, so writing to it moves the models."""
        return self._weights.values

    @property
    def gradients(self) -> Tensor:
        """The gradients of `values`, as the last `backward` left them."""
        return self._weights.gradients

    @property
    def walking(self) -> bool:
        """Whether a schedule has not ended."""
        return any(True for _ in self._led())

    def lead(self, begin: Callable[[nn.Module, Optimizer], BypassSchedule | None]) -> None:
        """Give each replica a schedule, made by `begin(model, optimizer)`; where that is None the replica just trains on.

        Raises:
            BypassError: two schedules share a return, a γ or a condition that remembers; make each anew in `begin`.
        """
        for row, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            self.schedules[row] = begin(model, optimizer)
        remembering = [id(part) for schedule in self.schedules if schedule for part in schedule.remembering]
        expect(
            len({*remembering}) == len(remembering),
            "two replicas share one return, γ or condition, which remembers what it saw; make each anew in `begin`",
        )
        self.failures = {}
        self._refresh()

    def __call__(self, function: Function, batch: Any, shared: bool = False) -> Any:
        """`function(model, batch)` for every replica, without gradients: tensors with one more axis in front, [replicas, …].

        Args:
            function: as for one model.
            batch: what it gets: tensors with an axis of replicas in front, nested in any way.
            shared: all replicas get the same batch, which has no such axis.
        """
        with torch.no_grad():
            parts = [(piece, self._mapped(piece, function, batch, shared)) for piece in self._pieces()]
        return _gathered(parts)

    def backward(self, loss_fn: Function, batch: Any, shared: bool = False) -> Tensor:
        """Fill in the gradients of every replica's loss, the penalty of its schedule included.

        Args:
            loss_fn: (model, batch) → loss, 0-dim.
            batch: a minibatch for each replica, [replicas, …] in every tensor.
            shared: one batch for all, without that axis.

        Returns:
            The losses without the penalties, [replicas], detached.

        Raises:
            BypassError: a loss is no 0-dim tensor.
        """
        for stack in self._stacks:
            stack.clear()
        parts = []
        for piece in self._pieces():
            losses = self._mapped(piece, loss_fn, batch, shared)
            expect(isinstance(losses, Tensor) and losses.dim() == 1, "loss_fn must return one number, a 0-dim tensor")
            self._differentiate(piece, losses.sum())
            parts.append((piece, losses.detach()))
        self._penalise()
        return cast(Tensor, _gathered(parts))

    @torch.no_grad()
    def step(self, losses: Tensor | None = None) -> None:
        """One step of every optimiser, then of every schedule.

        A replica that is not finite any more is noted in `failures`, and its schedule has ended.

        Args:
            losses: what `backward` returned, for the schedules to look at.
        """
        joint_step.step(self.optimizers, self._joints)
        if any(self.schedules):
            self._lead(losses)

    def train(self, mode: bool = True) -> Self:
        """Set all models to training, or to evaluation."""
        for model in self.models:
            model.train(mode)
        return self

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """‖ADW‖, or ‖D‖, of every site, [replicas]; 0 where a replica is not extended."""
        found: dict[str, Tensor] = {}
        for piece in self._pieces():
            if piece.sites:
                norms = self._mapped(piece, lambda model, _: constraint.norms(model), None, True)
                for name, each in norms.items():
                    found.setdefault(name, each.new_zeros(len(self.models)))[piece.rows] = each
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Models and optimisers once more; what drives them (LR schedulers) has to be made anew.

        Raises:
            BypassError: a schedule is under way.
        """
        expect(not self.walking, "a bypass is under way; copy the replicas before it begins, or after it has ended")
        models, optimizers = copy.deepcopy((self.models, self.optimizers), memo)
        twin = type(self)(models, optimizers, self._at_once)
        twin.values.copy_(self.values)
        return twin

    def _penalise(self) -> None:
        """Add the gradients of the penalties: those that are alike at once, the others one by one."""
        alike: dict[Hashable, list[int]] = {}
        terms = []
        for row, schedule in self._led():
            if (key := schedule.alike) is not None:
                alike.setdefault(key, []).append(row)
            elif (term := schedule.penalty()).requires_grad:
                terms.append(term)
        for rows in alike.values():
            gammas = self.values.new_zeros(len(self.models))
            gammas[rows] = torch.stack([self._schedule(row).gamma for row in rows]).to(gammas)
            for piece in self._pieces(rows):
                penalty = _penalty_of(self._schedule(piece.numbers[0]))  # of the model that goes through for the piece
                self._differentiate(piece, self._mapped(piece, penalty, gammas, False).sum())
        if terms:
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]

    def _schedule(self, row: int) -> BypassSchedule:
        schedule = self.schedules[row]
        assert schedule is not None, "it is under way"
        return schedule

    def _led(self) -> Iterator[tuple[int, BypassSchedule]]:
        for row, schedule in enumerate(self.schedules):
            if schedule is not None and schedule.phase != "done" and row not in self.failures:
                yield row, schedule

    def _lead(self, losses: Tensor | None) -> None:
        costs = [None] * len(self.models) if losses is None else self._costs(losses)
        seen = self._look()
        changed = False
        for row, schedule in list(self._led()):
            before = schedule.phase, len(schedule.reports)
            try:
                schedule.step(costs[row], seen.get(row))
            except NonFiniteError as error:
                self.failures[row] = error
            changed |= (schedule.phase, len(schedule.reports)) != before
        if changed:
            self._refresh()

    def _costs(self, losses: Tensor) -> Sequence[Tensor | float | None]:
        """The losses for the schedules to look at; on a GPU, which nobody waits for, they add up until the next look."""
        if not readout.delays(losses.device):
            return cast(list[float], losses.tolist())
        under_way = self._under_way()
        sums = [bypass.lookout.losses for bypass in under_way.values()]
        each = losses.unbind()
        if sums:
            torch._foreach_add_(sums, [each[row].to(sums[0]) for row in under_way])
        return [None if row in under_way else loss for row, loss in enumerate(each)]

    def _under_way(self) -> dict[int, Bypass]:
        return {row: bypass for row, schedule in self._led() if (bypass := schedule.under_way)}

    def _look(self) -> dict[int, Seen]:
        """What the schedules go by, for those that go by the same at once; those in step are led a part of it."""
        under_way = self._under_way()
        kinds: dict[str, list[int]] = {}
        for row, bypass in under_way.items():
            if bypass.watches:
                kinds.setdefault(bypass.watches, []).append(row)
        seen = dict[int, Seen]()
        if kinds:
            extents = torch.linalg.vector_norm(self.values, dim=1).unbind()
        for rows in kinds.values():
            for piece in self._pieces(rows):
                values = self._mapped(piece, _look_of(under_way[piece.numbers[0]]), None, True)
                seen |= {row: Seen(value, extents[row]) for row, value in zip(piece.numbers, values, strict=True)}
        for group in self._groups:
            if group.deltas and self._at_once > 1:
                seen |= in_step.lead(under_way, seen, group.deltas, group.rows)
        return seen

    def _refresh(self) -> None:
        """Find who is extended, and stack the D of those with the same sites."""
        members: dict[tuple[Site, ...], list[int]] = {}
        for row, model in enumerate(self.models):
            extended = surgery.sites(model) if surgery.is_extended(model) else ()
            sites = tuple(replace(site, moving=()) for site in extended)  # which move is the schedule's business
            members.setdefault(sites, []).append(row)
        self._groups = [
            Group(rows, sites, _stacked_deltas(self.models, rows, sites)) for sites, rows in members.items()
        ]
        held = [(self._weights, [*range(len(self.models))])]
        held += [(group.deltas, group.rows) for group in self._groups if group.deltas]
        self._stacks = [stack for stack, _ in held]
        joined = held if self._at_once > 1 else []
        self._joints = [JointStep(stack, [self.optimizers[row] for row in rows]) for stack, rows in joined]

    def _pieces(self, rows: Collection[int] | None = None) -> Iterator[Piece]:
        """The replicas (all, or these), in portions that go through the model together."""
        for group in self._groups:
            places = [place for place, row in enumerate(group.rows) if rows is None or row in rows]
            for first in range(0, len(places), self._at_once):
                yield self._piece(group, places[first : first + self._at_once])

    def _piece(self, group: Group, places: list[int]) -> Piece:
        numbers = [group.rows[place] for place in places]
        rows = rows_of(numbers, self.values.device)
        if len(numbers) == 1:
            return Piece(numbers, rows, group.sites, [], [], {})
        stacks = [(self._weights, rows)]
        if group.deltas:
            stacks.append((group.deltas, rows_of(places, self.values.device)))
        leaves = [stack.leaves(chosen) for stack, chosen in stacks]
        fixed = {name: each[rows] for name, each in self._fixed.items()}
        return Piece(numbers, rows, group.sites, stacks, leaves, fixed)

    def _differentiate(self, piece: Piece, loss: Tensor) -> None:
        if piece.alone:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        leaves = [leaf for each in piece.leaves for leaf in each]
        gradients = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
        for (stack, rows), each in zip(piece.stacks, piece.leaves, strict=True):
            stack.add_gradients(rows, list(islice(gradients, len(each))))

    def _mapped(self, piece: Piece, function: Function, batch: Any, shared: bool) -> Any:
        """The function of each model of a piece, [models, …]."""
        model = self.models[piece.numbers[0]]
        if not shared and len(piece.numbers) < len(self.models):
            batch = tree_map(lambda tensor: tensor[piece.rows], batch)
        if piece.alone:
            batch = batch if shared else tree_map(lambda tensor: tensor[0], batch)
            return tree_map(lambda tensor: tensor.unsqueeze(0), function(model, batch))
        call = Call(model, function)
        tensors = {f"model.{name}": tensor for name, tensor in piece.tensors()}

        def one(tensors: dict[str, Tensor], batch: Any) -> Any:
            return functional_call(call, tensors, (batch,))

        result = vmap(one, in_dims=(0, None if shared else 0), randomness="different")(tensors, batch)
        if not isinstance(piece.rows, slice):  # a forward may have moved copies of the buffers
            for name, tensor in piece.fixed.items():
                self._fixed[name][piece.rows] = tensor
        return result


def _look_of(bypass: Bypass) -> Function:
    return lambda model, nothing: bypass.look()


def _penalty_of(schedule: BypassSchedule) -> Function:
    return lambda model, gamma: schedule.penalty(gamma)


def _trainable(model: nn.Module) -> dict[str, bool]:
    """The parameters and buffers of a model, and whether they are trained."""
    parameters = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return parameters | {name: False for name, _ in model.named_buffers()}


def _fix(models: Sequence[nn.Module], name: str) -> Tensor:
    """Stack a buffer or a frozen parameter of the models, which become views."""
    own = [tensor_named(model, name) for model in models]
    stacked = torch.stack([tensor.detach() for tensor in own])
    for tensor, view in zip(own, stacked, strict=True):
        tensor.data = view
    return stacked


def _stacked_deltas(models: Sequence[nn.Module], rows: Sequence[int], sites: Sequence[Site]) -> Stack | None:
    if not sites:
        return None
    deltas = [[surgery.delta_of(models[row], site) for site in sites] for row in rows]
    return Stack(deltas, [site.parameter for site in sites])


def _gathered(parts: list[tuple[Piece, Any]]) -> Any:
    """What the pieces gave, in the order of the replicas."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.tensor([number for piece, _ in parts for number in piece.numbers]).argsort()
    return tree_map(lambda *each: torch.cat(each)[order.to(each[0].device)], *(result for _, result in parts))
