"""Following every element of a map's output through reshapes: one run on small numbered tensors tells where each goes.

Between a value projection and attention, and between attention and the output projection, a forward splits, reshapes and
permutes as it likes, with sizes that it reads from its inputs. Nothing of that is interpreted here: W's output is a
tensor that numbers its own elements, and the graph's own calls move it. All other values are tensors without data
(meta), whose shapes alone matter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map_only

from .activations import call_activation, module_activation
from .affine import Found, affine_at
from .casts import may_round
from .channels import Channels, Provenance
from .choices import Step, pick, step_of, truth, value_inputs
from .facts import is_size
from .link import Linked
from .units import Spot, Unit
from .wires import Layout, always_drops, is_cast, modes_agree, still
from .writes import overwritten

_MOVING = (
    "reshape", "permute", "transpose", "flatten", "unflatten", "unbind", "chunk", "split", "tensor_split", "squeeze",
    "unsqueeze", "movedim", "swapaxes", "swapdims", "clone", "repeat_interleave", "narrow", "select",
)  # fmt: skip
_MOVES: set[Any] = {
    *_MOVING, *(getattr(torch, name) for name in _MOVING),
    "view", "view_as", "contiguous", "expand", "t", "split_with_sizes", operator.getitem, getattr,
}  # fmt: skip
_SAME_SHAPE: set[Any] = {
    F.softmax, torch.softmax, "softmax", F.dropout, F.layer_norm, F.rms_norm, F.group_norm, F.batch_norm, F.normalize,
    "to", "type_as", "float", "half", "masked_fill", "masked_fill_", "type", "detach",
}  # fmt: skip
_SAME_SHAPE_MODULES = (
    nn.Identity, nn.Dropout, nn.Softmax, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase,
)  # fmt: skip
_BROADCASTS: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.imul, operator.isub,
    operator.itruediv, torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div", "add_", "mul_", "sub_", "div_",
}  # fmt: skip
_LIKE: set[Any] = {
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
}  # fmt: skip


CALLS = 150  # how many values one run may compute: what decides is near


class UnknownError(Exception):
    """The graphs do not tell this value's shape, or do more to the elements than to move them."""


class Origin(NamedTuple):
    """Where W's input comes from: the values of one shape back from it, and the one that the last of them is a reshape of."""

    same: list[Spot]
    root: Spot
    channels: Channels | None  # of the root, where it is another value and they are known
    entry: fx.Node  # where these values enter the graph that reads them


def origin_of(linked: Linked, origins: Provenance, read: Spot) -> Origin:
    """Where the value at a spot comes from."""

    def keeps(spot: Spot) -> bool:
        return _keeps_shape(spot.node, linked.module(spot))

    same = _back(linked, read, keeps)
    root = _back(linked, same[-1], lambda spot: _moves(spot.node))[-1]
    entry = read.node
    while entry.all_input_nodes and keeps(Spot(read.unit, entry)):
        entry = entry.all_input_nodes[0]
    return Origin(same, root, origins.value(root) if root != same[-1] else None, entry)


def _back(linked: Linked, spot: Spot, passes: Callable[[Spot], bool]) -> list[Spot]:
    """The spots from here back to the first that does not pass its first input on."""
    found = [linked.source(spot)]
    while len(found) < CALLS and passes(found[-1]) and (inputs := found[-1].node.all_input_nodes):
        found.append(linked.source(Spot(found[-1].unit, inputs[0])))
    return found


class Flow:
    """One run of the calls behind W, on an input of a few positions.

    Attributes:
        made: the shape of W's output.
        noisy: whether a dropout that is active in training mode stood on the way.
        within: whether all that was asked for is computed in the home unit, from what W's input enters it by.
        asked: the answers to questions about sizes: those that were given, else as the sizes of the run have them.
    """

    def __init__(
        self,
        linked: Linked,
        origin: Origin | None,
        first: Spot,
        found: Found,
        positions: tuple[int, ...],
        home: Unit,
        answers: Mapping[Spot, bool] | None = None,
    ) -> None:
        self.linked, self.noisy, self.home, self.within = linked, False, home, True
        self.asked, self.answers = dict[Spot, bool](), answers or {}
        self.entry = origin.entry if origin is not None else None
        self.known: dict[Spot, Any] = {}
        self.budget = CALLS
        read = _shape(positions, found.axis, found.inputs)
        if origin is not None:
            read = self._assume(origin, read, positions, found)
        made = list(read)
        made[found.axis] = found.outputs
        self.made = tuple(made)
        self.known[first] = numbered(self.made, found.axis)

    def _assume(
        self, origin: Origin, shape: tuple[int, ...], positions: tuple[int, ...], found: Found
    ) -> tuple[int, ...]:
        """Give shapes to W's input and to the values that it comes from; the shape of W's input is returned.

        A value that W's input is a reshape of, as a map of features is of tokens, has the axes that its channels tell,
        where W would run then.
        """
        known = origin.channels
        if known is not None:
            self.within = False
            axis = known.axis - (len(positions) + 1) * (known.axis > 0)  # a BatchNorm's is counted from the front
            if -1 - len(positions) <= axis:
                self.known[origin.root] = torch.empty(_shape(positions, axis, known.width), device="meta")
            try:
                read = tuple(self.tensor(origin.same[-1]).shape)
                if len(read) >= -found.axis and read[found.axis] == found.inputs:
                    return read
            except UnknownError:
                pass
            self.known.clear()
        self.known |= dict.fromkeys(origin.same, torch.empty(shape, device="meta"))
        return shape

    def value(self, spot: Spot) -> Any:
        """The value at a spot: a numbered tensor, a tensor without data, or a size.

        Raises:
            UnknownError: it is not known.
        """
        here = self.linked.source(spot)
        inside = here.unit == self.home and here.node.op != "placeholder"
        self.within = self.within and (inside or spot.node is self.entry)
        if here in self.known:
            return self.known[here]
        if not self.budget:
            raise UnknownError
        self.budget -= 1
        found = self.known[here] = self._compute(here)
        return found

    def tensor(self, spot: Spot) -> Tensor:
        """The tensor at a spot."""
        found = self.value(spot)
        if not isinstance(found, Tensor):
            raise UnknownError
        return found

    def _compute(self, spot: Spot) -> Any:
        node, module = spot.node, self.linked.module(spot)
        if node.op == "get_attr":
            stored = self.linked.stored(spot)
            if stored is None:
                raise UnknownError
            return torch.empty_like(stored, device="meta")
        made = affine_at(self.linked, spot)
        if made is not None and made.value is not None:
            before = self.tensor(Spot(spot.unit, made.value))
            shape = list(before.shape)
            shape[made.axis] = made.outputs
            return torch.empty(shape, device="meta")
        step = step_of(node)
        if not all(self._holds(Spot(spot.unit, condition), answer) for condition, answer in step.conditions):
            return None
        if step.target is truth:
            return self._answer(spot, step.args[0])
        if step.target is pick:
            return self._picked(spot.unit, *step.args)
        if _keeps_shape(step, module):
            return self._passed(spot, module)
        if step.op not in ("call_function", "call_method"):
            raise UnknownError
        return self._broadcast(spot, step) if step.target in _BROADCASTS else self._called(spot, step)

    def _answer(self, spot: Spot, asked: Any) -> bool:
        """The answer to a question about sizes, in this run."""
        if not is_size(asked):
            raise UnknownError
        if spot not in self.answers:
            self.asked[spot] = bool(self.value(Spot(spot.unit, asked)))
        return self.asked.setdefault(spot, self.answers.get(spot, True))

    def _holds(self, condition: Spot, answer: bool) -> bool:
        """Whether a question has the answer; what is not known is taken to have it: where it matters, a pick follows."""
        try:
            return bool(self.value(condition)) == answer
        except UnknownError:
            return True

    def _picked(self, unit: Unit, condition: fx.Node, yes: Any, no: Any) -> Any:
        """The value that is picked: where the question has no answer here, both must be one."""
        try:
            answer = self.value(Spot(unit, condition))
        except UnknownError:
            one, other = self._given(unit, yes), self._given(unit, no)
            if not _alike(one, other):
                raise
            return one
        return self._given(unit, yes if answer else no)

    def _given(self, unit: Unit, argument: Any) -> Any:
        return fx.map_arg(argument, lambda inner: self.value(Spot(unit, inner)))

    def _passed(self, spot: Spot, module: nn.Module | None) -> Tensor:
        before = self.tensor(Spot(spot.unit, value_inputs(spot.node)[0]))
        wire = still(Layout(axis=-1), spot.node, module)
        if (
            wire is None
            or not self._alike_in_eval(spot)
            or (is_cast(step_of(spot.node)) and may_round(self.linked, spot))
        ):
            return _emptied(before)
        self.noisy = self.noisy or (wire.noisy and not before.is_meta)
        return before

    def _broadcast(self, spot: Spot, step: Step) -> Any:
        """An element-wise sum or product; an operand of unknown shape is taken to be no larger than the other."""
        shapes: list[torch.Size] = []
        kinds: list[torch.dtype] = []
        for operand in step.args:
            if isinstance(operand, fx.Node):
                try:
                    known = self.value(Spot(spot.unit, operand))
                except UnknownError:
                    continue
                if not isinstance(known, Tensor):
                    return self._called(spot, step)  # arithmetic of sizes
                shapes.append(known.shape)
                kinds.append(known.dtype)
        if not shapes:
            raise UnknownError
        try:
            together = broadcast_shapes(*shapes)
        except RuntimeError:  # a table for another number of positions, such as relative position biases
            together = shapes[0]
        return torch.empty(together, dtype=_kind(*kinds), device="meta")

    def _part(self, unit: Unit, of: Any, key: Any) -> Tensor | None:
        """A part `x[..., a:b]`: up to an unknown bound all of the axis, from there on nothing; None for any other.

        So the parts that a rotary embedding turns and leaves (`x[..., :n]` and `x[..., n:]`) are the whole together.
        """
        first, cut = key if isinstance(key, tuple) and len(key) == 2 else (None, None)
        if first is not Ellipsis or not isinstance(cut, slice) or cut.step is not None or not isinstance(of, fx.Node):
            return None
        whole = self.value(Spot(unit, of))
        if not isinstance(whole, Tensor):
            return None
        unknown = list[Any]()

        def bound(given: Any, otherwise: int | None) -> Any:
            try:
                return self._given(unit, given)
            except UnknownError:
                unknown.append(given)
                return otherwise

        part = whole[..., bound(cut.start, whole.shape[-1]) : bound(cut.stop, None)]
        return _emptied(part) if unknown else None

    def _called(self, spot: Spot, step: Step) -> Any:
        node = spot.node
        part = self._part(spot.unit, *step.args) if step.target is operator.getitem else None
        if part is not None:
            return part

        def given(inner: fx.Node) -> Any:
            value = self.value(Spot(spot.unit, inner))
            return value if moves else tree_map_only(Tensor, _emptied, value)

        moves = _moves(step) and self._alike_in_eval(spot)
        moves = moves and not any(self.overwritten(Spot(spot.unit, value), node) for value in node.all_input_nodes)
        args, kwargs = fx.map_arg(step.args, given), fx.map_arg(step.kwargs, given)
        try:
            if step.op == "call_method":
                return getattr(args[0], str(step.target))(*args[1:], **kwargs)
            return step.target(*args, **kwargs)
        except Exception as error:  # a user's call on tensors of the wrong size may raise anything
            raise UnknownError from error

    def overwritten(self, spot: Spot, except_by: fx.Node) -> bool:
        """Whether something writes into the value, where it is read or where it comes from."""
        return any(overwritten(self.linked, at, except_by) for at in (spot, self.linked.source(spot)))

    def _alike_in_eval(self, spot: Spot) -> bool:
        """Whether eval mode does the same here, but for dropout: at home, where it has a graph of its own, it is run too."""
        owned = self.linked.graphs[spot.unit]
        if spot.unit != self.home:
            return modes_agree(owned)
        return (owned.in_eval is not None and spot.node.graph is owned.graph) or not always_drops(spot.node)


def takes_shape(node: fx.Node) -> bool:
    """Whether the call that makes a tensor without numbers takes no more than the shape of a numbered one."""
    step = step_of(node)
    return step.target in _LIKE or _moves(step)


def _moves(node: fx.Node | Step) -> bool:
    """Whether the call moves the elements of a tensor, or repeats them, and does nothing else to them."""
    if node.target in ("squeeze", torch.squeeze) and len(node.args) + len(node.kwargs) == 1:
        return False  # which axes go depends on the sizes
    library = str(getattr(node.target, "__module__", "")).partition(".")[0]
    return node.target in _MOVES or (
        library == "einops" and getattr(node.target, "__name__", "") in ("rearrange", "repeat")
    )


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are one, as far as a run can tell."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.is_meta == other.is_meta and (one.is_meta or torch.equal(one, other))
    return type(one) is type(other) and not isinstance(one, tuple | list | dict) and bool(one == other)


def _emptied(value: Tensor) -> Tensor:
    """The tensor without its numbers: something else than a move was done to it."""
    return torch.empty(value.shape, dtype=_kind(value.dtype), device="meta")


def _kind(*dtypes: torch.dtype) -> torch.dtype | None:
    """The dtype of what is made of values of these, where it matters: steps such as `view_as_real` take no other."""
    return torch.complex64 if any(dtype.is_complex for dtype in dtypes) else None


def broadcast_shapes(*shapes: torch.Size) -> torch.Size:
    """torch.broadcast_shapes, with types."""
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _shape(positions: tuple[int, ...], axis: int, channels: int) -> tuple[int, ...]:
    """A shape with these positions, and the channels along an axis counted from the end."""
    before = len(positions) + 1 + axis
    return (*positions[:before], channels, *positions[before:])


def numbered(shape: tuple[int, ...], axis: int = -1) -> Tensor:
    """A tensor whose elements are their own numbers, counted along an axis first."""
    *positions, channels = (*shape[:axis], *shape[axis % len(shape) + 1 :], shape[axis])
    numbers = torch.arange(torch.Size(shape).numel(), device="cpu").view(*positions, channels)
    return numbers.movedim(-1, axis)


def _keeps_shape(node: fx.Node | Step, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, _SAME_SHAPE_MODULES) or module_activation(module) is not None
    return node.target in _SAME_SHAPE or call_activation(node) is not None
