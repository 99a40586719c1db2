"""The value path of attention, W_V → token mixing → W_O: ψ(V) = Attn(V) + D V comes back where A D W_V = 0.

Attention stands here in the place of σ: A D W_V = 0 makes A's answer to D V vanish whatever is mixed with what, as long
as V and the result have one shape and each position that A reads holds values that W made at one position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .activation_calls import Calls
from .affine import Found, affine_at
from .channels import Channels
from .choices import step_of
from .elementwise import activation_input
from .flow import Flow, Origin, UnknownError, broadcast_shapes, numbered, origin_of, takes_shape
from .heads import with_heads_of
from .link import Linked
from .look_alike import likeness
from .matrices import tensor_named
from .mixing import FAR, is_product, weights_of
from .outcome import LEAVES, Match, Reason
from .plan import Constraint
from .strict import bias_is_free, in_both_modes, label, reads_nothing_else, reads_only_value, weights_are_replaced
from .units import Spot
from .unseen import may_be_called_otherwise, unknown_calls
from .wires import how_modes_differ, modes_agree

Answers = Mapping[Spot, bool]
Trial = Callable[[Answers], Flow]

_BRANCHES = 64  # ways through the branches of a forward that are tried

# The positions in a run: a batch of two, and then tokens; two runs must agree. A convolution's own axes come last.
_POSITIONS: dict[int, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    -1: (((2, 7), (2, 11)), ((2, 7, 5), (2, 5, 11)), ((7,), (11,))),
    -2: (((2, 7), (2, 11)),),
    -3: (((2, 7, 5), (2, 5, 11)),),
    -4: (((2, 7, 5, 3), (2, 5, 3, 11)),),
}


@dataclass(frozen=True, slots=True)
class Path:
    """How W's outputs reach V, and how the result reaches A: by V's channels.

    Attributes:
        rows: the output of W that each channel is.
        view: the shape of the channels against the last axes of V.
        second: A, and `use`, the spot that applies it.
        within: whether the owner's graph alone decides it, so that equal owners have equal paths.
    """

    rows: tuple[int, ...]
    view: tuple[int, ...]
    second: Found
    use: Spot
    noisy: bool
    within: bool


def value_path(calls: Calls, spot: Spot) -> Match | Reason:
    """W_V → attention → W_O, in whatever way the heads are split and joined."""
    linked, owned = calls.linked, calls.linked.graphs[spot.unit]
    if len(linked.variants(spot.unit.path)) > 1:
        return Reason("its owner is called in several ways")
    if may_be_called_otherwise(linked, spot.unit):
        return unknown_calls(linked)
    if (replaced := weights_are_replaced(linked, spot.unit.path)) is not None:
        return replaced
    found = _in_one_mode(calls, spot)
    if owned.in_eval is None or modes_agree(owned) or isinstance(found, Reason):
        return found
    if (in_eval := calls.in_eval(spot)) is None:
        return how_modes_differ(owned)
    with linked.in_eval(spot.unit):
        again = _in_one_mode(calls, in_eval)
    return found if found == again else Reason("its values go another way in eval mode than in training")


def _in_one_mode(calls: Calls, spot: Spot) -> Match | Reason:
    linked = calls.linked
    first = in_both_modes(linked, spot, lambda: _projection(linked, spot), "a forward in front of it")
    if isinstance(first, Reason):
        return first
    at, w = first
    path = _path(calls, spot, at, w)
    if isinstance(path, Reason):
        return path
    a, width, part = path.second, len(path.rows), _ranges(path.rows)
    if part == ((0, w.outputs),):
        part = ()
    elif w.affine.groups != 1:
        return Reason(f"its values are a part of a grouped map ({w.affine})")
    bias = w.affine.bias
    if w.biases:
        if part not in w.biases:
            return Reason(f"the bias of {w.affine} is computed")
        bias = w.biases[part]
    alone = reads_nothing_else(linked, a, path.use, spot)
    carried = not a.pads and alone and bias_is_free(linked, a.affine, calls.planned)
    constraint: Constraint = "folded" if carried or bias is None else "augmented"
    one_axis = sum(size > 1 for size in path.view) == 1
    return Match(
        "strict", constraint, Channels(width, -len(path.view) if one_axis else -1),
        replace(w.affine, bias=bias, part=part), a.affine, "eval" if path.noisy else "always",
        () if one_axis else path.view,
    )  # fmt: skip


def _projection(linked: Linked, spot: Spot) -> tuple[Spot, Found] | Reason:
    """W, the first affine map on the way back from V."""
    value = activation_input(spot.node)
    for here in linked.trail(Spot(spot.unit, value), 40) if value is not None else ():
        found = affine_at(linked, here)
        if found is not None:
            return here, found
    return Reason("no affine map makes its values")


def _path(calls: Calls, spot: Spot, at: Spot, w: Found) -> Path | Reason:
    """The path, found once for all owners with one graph and children of the same kinds and sizes."""
    linked, unit = calls.linked, spot.unit
    origin = origin_of(linked, calls.origins, Spot(at.unit, w.value)) if w.value is not None else None
    owner = linked.modules[unit.path]
    children = [owner.get_submodule(name) for name in linked.graphs[unit].children]
    read = {str(node.target) for node in spot.node.graph.nodes if node.op == "get_attr"}
    tensors = tuple(sorted((name, tuple(tensor_named(owner, name).shape)) for name in read))
    alike = tuple((type(child), likeness(child)) for child in children)  # a likeness of None is none
    key = spot.node, w.axis, origin is None or origin.channels is None, tensors, alike
    known = calls.paths.get(key)
    if isinstance(known, Path):
        use = Spot(unit, known.use.node)
        second = affine_at(linked, use)
        assert second is not None, "the owner is like the one in which A was found"
        return replace(known, second=second, use=use)
    found = _agreed(linked, origin, spot, at, w)
    if isinstance(found, Path) and found.within and at.unit == found.use.unit == unit and all(m for _, m in alike):
        calls.paths[key] = found
    return found


def _agreed(linked: Linked, origin: Origin | None, spot: Spot, at: Spot, w: Found) -> Path | Reason:
    """The path as two runs on inputs of different sizes show it; further axes are tried where it does not run on them."""
    reason = ""
    for sizes in _POSITIONS.get(w.axis, ()):
        flows = list[Flow]()

        def ran(positions: tuple[int, ...], flows: list[Flow] = flows) -> Path | Reason:
            flows.append(Flow(linked, origin, at, w, positions, spot.unit))
            return _run(flows[-1], spot, at, w)

        try:
            one, two = map(ran, sizes)
        except UnknownError as error:
            reason = reason or str(error)
            continue
        if isinstance(one, Reason):
            return one
        if one == two and not (flows[0].asked or flows[1].asked):
            return one
        if one == two:
            single = (*sizes[0][:1], *(1 for _ in sizes[0][1:]))
            trials = [partial(Flow, linked, origin, at, w, each, spot.unit) for each in (sizes[0], single)]
            return one if _in_every_branch(one, trials, spot, at, w) else OTHER_WAY
    return Reason(reason or f"its values are not seen to come from {w.affine} by reshapes alone")


OTHER_WAY = Reason("its forward branches on a size, and its values go another way in one branch")


class OtherQueries(Reason):
    """Queries and values differ in number: ψ raises an error in such a call."""


def _in_every_branch(path: Path, trials: Sequence[Trial], spot: Spot, at: Spot, w: Found) -> bool:
    """Whether the path is the same for all answers to the questions that the forward asks, each in one of the trials."""
    todo, count = list[Answers]([{}]), 0
    while todo:
        answers, count = todo.pop(), count + 1
        flow = next((flow for trial in trials if _same_way(path, flow := trial(answers), spot, at, w)), None)
        if flow is None or count > _BRANCHES:
            return False
        asked = [*flow.asked.items()]
        todo += [
            {**dict(asked[:place]), question: not answer}
            for place, (question, answer) in enumerate(asked)
            if question not in answers
        ]
    return True


def _same_way(path: Path, flow: Flow, spot: Spot, at: Spot, w: Found) -> bool:
    """Whether a run with other answers shows the same path, or values that ψ takes none of."""
    try:
        other = _run(flow, spot, at, w)
    except UnknownError:
        return False
    return isinstance(other, OtherQueries) or (isinstance(other, Path) and replace(other, within=path.within) == path)


def _run(flow: Flow, spot: Spot, at: Spot, w: Found) -> Path | Reason:
    linked = flow.linked
    value = activation_input(spot.node)
    assert value is not None, "W was found behind it"
    v = flow.tensor(Spot(spot.unit, value))
    if v.is_meta or flow.overwritten(Spot(spot.unit, value), spot.node):
        return Reason(f"between {w.affine} and it the values are not only moved")
    try:
        result = _result_shape(flow, spot, v)
    except UnknownError as error:
        raise UnknownError("how many queries it has is not known") from error
    v = _spread(flow, spot, v, result)
    if result != v.shape:
        return OtherQueries(
            f"it has other queries than values (shapes {tuple(result)} and {tuple(v.shape)} in a trial)"
        )
    flow.known[spot] = numbered(tuple(v.shape))
    ends = _ends(linked, flow, spot)
    if isinstance(ends, Reason):
        return ends
    paths = [_read_by(flow, v, w, *end) for end in ends]
    refused = next((path for path in paths if isinstance(path, Reason)), None)
    if refused is None and len({(path.rows, path.view) for path in paths if isinstance(path, Path)}) > 1:
        return Reason(f"A ({ends[0][0].affine}) reads the values in several orders")
    return refused or paths[0]


def _read_by(flow: Flow, v: Tensor, w: Found, a: Found, use: Spot) -> Path | Reason:
    """The path to one use of A."""
    assert a.value is not None
    read = flow.tensor(Spot(use.unit, a.value))
    if read.shape[a.axis] != a.inputs:  # A would not run on them: the owner is given inputs of another rank
        raise UnknownError(f"A ({a.affine}) reads {a.inputs} channels, attention makes {read.shape[a.axis]}")
    by_position = read.movedim(a.axis, -1).reshape(-1, a.inputs)
    made = v.flatten()[by_position]
    rows, positions = made % w.outputs, made // w.outputs
    if not torch.equal(positions, positions[:, :1].expand_as(made)) or not torch.equal(rows, rows[:1].expand_as(made)):
        return Reason(f"A ({a.affine}) reads the values of several positions at once")
    column = torch.full((v.numel(),), -1, device="cpu")
    column[by_position] = torch.arange(a.inputs, device="cpu").expand_as(by_position)
    view = _view(column.view(v.shape))
    if view is None:
        return Reason(f"A ({a.affine}) reads the heads in another order than they stand in")
    return Path(tuple(rows[0].tolist()), view, a, use, flow.noisy, flow.within)


def _view(column: Tensor) -> tuple[int, ...] | None:
    """The shape of δ against V, whose elements are read as these columns of A; None where no shape is in their order."""
    for axis in range(column.dim()):
        if axis == 0 and len(column) % 2 == 0 and torch.equal(*column.chunk(2)):
            column = column[: len(column) // 2]  # a batch of two, merged with the heads or not
        if (column == column.narrow(axis, 0, 1)).all():
            column = column.narrow(axis, 0, 1)
    if not torch.equal(column.flatten(), torch.arange(column.numel(), device="cpu")):
        return None
    shape = tuple(column.shape)
    return shape[next((i for i, size in enumerate(shape) if size > 1), len(shape) - 1) :]


def _ranges(rows: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    starts = [0, *(i for i, (one, two) in enumerate(pairwise(rows), 1) if two != one + 1), len(rows)]
    return tuple((rows[start], rows[stop - 1] + 1) for start, stop in pairwise(starts))


def _ends(linked: Linked, flow: Flow, spot: Spot) -> list[tuple[Found, Spot]] | Reason:
    """The uses of A, found by following every use of the result; uses that only ask for its shape do not count."""
    todo, found = [spot], list[tuple[Found, Spot]]()
    while todo:
        here = todo.pop()
        if flow.overwritten(here, here.node):
            return Reason("its result is overwritten in place")
        if any(user.op == "output" for user in here.node.users):
            flow.within = False  # who calls the owner has a say
        uses: list[Spot | None] | Reason = in_both_modes(linked, spot, partial(list, linked.uses(here)))
        if isinstance(uses, Reason):
            return uses
        for use in uses:
            if use is None:
                return LEAVES
            if use.unit != spot.unit:
                flow.within = False
            made = affine_at(linked, use)
            if made is not None and reads_only_value(use, made):
                found.append((made, use))
                continue
            taken = f"its result goes into {label(linked, use)}, which is no affine map"
            try:
                leaves = tree_leaves(flow.value(use))
            except UnknownError as error:
                raise UnknownError(taken) from error
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if any(not tensor.is_meta for tensor in tensors):
                todo.append(use)
            elif leaves == [None] and step_of(use.node).conditions:
                continue  # the other branch runs here; this one does in a run with the other answer
            elif (tensors and not takes_shape(use.node)) or any(leaf is None for leaf in leaves):
                return Reason(taken)
    if len({made.affine.weight for made, _ in found}) != 1:
        return Reason("its result goes into several maps" if found else "its result is not used")
    return found


def _spread(flow: Flow, spot: Spot, v: Tensor, result: torch.Size) -> Tensor:
    """The values with their heads repeated for the queries', where the attention does that (enable_gqa)."""
    grouped = spot.node.kwargs.get("enable_gqa", False)
    if not (flow.value(Spot(spot.unit, grouped)) if isinstance(grouped, fx.Node) else grouped):
        return v
    return with_heads_of(v, result)


def _result_shape(flow: Flow, spot: Spot, v: Tensor) -> torch.Size:
    """The shape of the attention's result."""
    node = spot.node
    if node.target is F.scaled_dot_product_attention:
        q = node.args[0] if node.args else node.kwargs.get("query")
        queries = flow.tensor(Spot(spot.unit, q)) if isinstance(q, fx.Node) else v
        return torch.Size((*queries.shape[:-1], v.shape[-1]))
    weights = _weights_shape(flow, Spot(spot.unit, weights_of(node)))
    if node.target is torch.einsum:
        try:
            operands = [torch.empty(shape, device="meta") for shape in (weights, v.shape)]
            return torch.Size(torch.einsum(str(node.args[0]), *operands).shape)
        except RuntimeError as error:
            raise UnknownError from error
    if len(weights) < 2 or weights[-1] != v.shape[-2]:
        raise UnknownError
    try:
        return torch.Size((*broadcast_shapes(weights[:-2], v.shape[:-2]), weights[-2], v.shape[-1]))
    except RuntimeError as error:
        raise UnknownError from error


def _weights_shape(flow: Flow, spot: Spot) -> torch.Size:
    """The shape of the weights: that of the product of queries and keys behind them, where it can be seen.

    What comes in between, masks and tables of biases for other numbers of positions than the trial's, tells less.
    """
    product = next((here for here in flow.linked.trail(spot, FAR + 1) if is_product(here.node)), spot)
    try:
        return flow.tensor(product).shape
    except UnknownError:
        return flow.tensor(spot).shape
