"""Branches on traced values: both are traced, and one graph holds both; or the forward is refused."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bypass_fx
from bypass_fx.passes.choices import raising, step_of
from bypass_fx.passes.errors import UntraceableError
from bypass_fx.passes.facts import is_fact, is_size
from bypass_fx.passes.trace import Tracing
from bypass_fx.surgery import delta_of
from tests.branching import INPUTS, Body, Two, equal, net


def padded(s: Two, x: Tensor) -> Tensor:
    over = x.shape[0] % 2
    if over > 0:
        x = F.pad(x, (0, 0, 0, 2 - over))
    y = s.b(F.relu(s.a(x)))
    return y[:-1] if over else y  # type: ignore[no-any-return]


def of_rank(s: Two, x: Tensor) -> Tensor:
    single = x.dim() == 1
    if single:
        x = x.unsqueeze(0)
    y = s.b(F.relu(s.a(x)))
    return y.squeeze(0) if single else y  # type: ignore[no-any-return]


def cast_to_weight(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x.to(s.a.weight.dtype)))
    if h.dtype != x.dtype and x.dtype.is_floating_point:
        h = h * 0.5
    return s.b(h)  # type: ignore[no-any-return]


def nested(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    if x.shape[0] > 2:
        if x.shape[-1] == 4 and x.dim() > 2:
            h = h.flip(0)
        elif x.dim() == 2:
            return s.b(h[:2]) + 1  # type: ignore[no-any-return]
    return s.b(h)  # type: ignore[no-any-return]


def by_values(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    if x.sum() > 0:
        h = h * 2
    return s.b(h) if not (x > 100).any() else s.b(-h)  # type: ignore[no-any-return]


def asked_again(s: Two, x: Tensor) -> Tensor:
    k = 3 if x.shape[0] > 2 else 5
    h = F.relu(s.a(x)) * k
    return s.b(h * 2 if x.shape[0] > 2 else h - 1)  # type: ignore[no-any-return]


def asked_of_changed(s: Two, x: Tensor) -> Tensor:
    y = x.clone()
    k = 3 if y.shape[0] > 2 else 5
    y.unsqueeze_(0)
    return s.b(F.relu(s.a(y)) * k) * (7 if y.shape[0] > 2 else 11)  # type: ignore[no-any-return]


def reshaped(s: Two, x: Tensor) -> Tensor:
    y = x.clone()
    k = 3 if y.dim() > 2 else 5
    torch.as_strided_(y, (1, 1, 4), (4, 4, 1))
    return s.b(F.relu(s.a(y)) * k) * (7 if y.dim() > 2 else 11)  # type: ignore[no-any-return]


def asked_before(s: Two, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    axes, trained = y.ndim, y.requires_grad
    y.add_(s.b.bias)
    late = y.requires_grad
    y.unsqueeze_(0)
    return s.b(F.relu(s.a(x + y)) * axes) * (2 if trained else 3) * (5 if late else 7)  # type: ignore[no-any-return]


def signed(s: Two, x: Tensor) -> Tensor:
    y = s.b(F.relu(s.a(x)))
    return torch.copysign(y, torch.full_like(y, 0.0 if x.shape[0] > 2 else -0.0))


def containers(s: Two, x: Tensor) -> Any:
    h = F.relu(s.a(x))
    parts = (h, h + 1) if x.shape[0] > 2 else (h - 1, h)
    return {"y": s.b(parts[0]), "z": [s.norm(s.b(parts[1])), x.shape[0] if x.dim() > 2 else None]}


def other_results(s: Two, x: Tensor) -> Any:
    y = s.b(F.relu(s.a(x)))
    return (y, x) if x.shape[0] > 2 else y


def swallowing(s: Two, x: Tensor) -> Tensor:
    n = x.shape[0]
    try:
        k = 2 if n == 3 else 1
    except Exception:
        k = 30
    return s.b(F.relu(s.a(x))) * k  # type: ignore[no-any-return]


def largest(s: Two, x: Tensor) -> Tensor:
    return s.b(F.relu(s.a(x))) * max(x.shape[0], x.shape[-2] if x.dim() > 1 else 1, 2)  # type: ignore[no-any-return]


def looked_up(s: Two, x: Tensor) -> Tensor:
    return s.b(F.relu(s.a(x))) * (2 if x.shape[0] in (1, 3) else 1)  # type: ignore[no-any-return]


def smallest(s: Two, x: Tensor) -> Tensor:
    limit = torch.finfo(x.dtype).min
    return s.b(F.relu(s.a(x)).clamp(min=limit / 2))  # type: ignore[no-any-return]


BODIES: list[Body] = [
    padded, of_rank, cast_to_weight, nested, by_values, asked_again, asked_of_changed, containers, other_results,
    swallowing, largest, looked_up, smallest, reshaped, asked_before, signed,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_the_extended_model_takes_the_branch_that_the_model_takes(body: Body) -> None:
    model = net(body)
    expected = [model(x) for x in INPUTS]
    gradients = [torch.autograd.grad(_sum(model(x)), model.a.weight)[0] for x in INPUTS]  # type: ignore[arg-type, union-attr]
    bypass_fx.extend(model, mode="all")
    assert [site.activation for site in bypass_fx.sites(model)] == ["relu"]
    assert all(equal(model(x), y) for x, y in zip(INPUTS, expected, strict=True))
    found = [torch.autograd.grad(_sum(model(x)), model.a.weight)[0] for x in INPUTS]  # type: ignore[arg-type, union-attr]
    assert all(map(equal, found, gradients))
    bypass_fx.contract(model)
    assert equal(model(INPUTS[2]), expected[2])


def _sum(value: Any) -> Tensor:
    if isinstance(value, dict):
        return _sum(list(value.values()))
    if isinstance(value, list | tuple):
        return torch.stack([_sum(item) for item in value if not isinstance(item, int | None)]).sum()
    assert isinstance(value, Tensor)
    return value.square().sum()


@pytest.mark.parametrize("body", [padded, nested, asked_again, of_rank])
def test_psi_stands_in_every_branch(body: Body) -> None:
    """With D ≠ 0 the extended model is the model with ψ in the place of its activation."""
    model = net(body)
    bypass_fx.extend(model, mode="all")
    (site,) = bypass_fx.sites(model)
    delta = delta_of(model, site)
    with torch.no_grad():
        delta.normal_()
    found = [model(x) for x in INPUTS]
    plain = copy.deepcopy(net(body))

    class Bent(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(args[0]) + delta * args[0] if func is F.relu else func(*args, **(kwargs or {}))

    with Bent():
        expected = [plain(x) for x in INPUTS]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("body", [padded, of_rank, nested, asked_again, containers])
def test_branches_on_sizes_compile_in_one_graph(body: Body) -> None:
    model = bypass_fx.extend(net(body), mode="all")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for x in INPUTS:
        torch.testing.assert_close(compiled(x), model(x))


def checked(s: Two, x: Tensor) -> Tensor:
    if x.shape[-1] != 4:
        raise ValueError(f"four features are needed, not {x.shape[-1]}")
    if not x.dim() < 4:
        raise AssertionError("too many axes", [x.shape, 1])  # as an assert does, which pytest writes anew
    return s.b(F.relu(s.a(x)))  # type: ignore[no-any-return]


def test_the_errors_of_a_forward_stay_its_own() -> None:
    model = bypass_fx.extend(net(checked))
    assert [site.kind for site in bypass_fx.sites(model)] == ["strict"]
    with pytest.raises(ValueError, match="four features are needed"):
        model(torch.randn(2, 5))
    with pytest.raises(AssertionError, match=r"too many axes.*, 1\)"):
        model(torch.randn(1, 1, 2, 4))
    assert model(torch.randn(2, 4)).shape == (2, 4)


class OddError(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")
        self.one = one


class HaltError(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


def test_an_error_is_raised_as_it_was_whatever_it_is_made_of() -> None:
    with pytest.raises(OddError, match="1 and 2") as raised:
        raising(OddError(1, 2))(True, True)
    assert raised.value.one == 1
    with pytest.raises(KeyError, match=r"^'a'$"):
        raising(KeyError("a"))(False, False)
    assert raising(OddError(1, 2))(True, False) is None
    assert raising(OddError(1, 2)) is raising(OddError(1, 2))


def halts(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    if x.shape[0] > 2:
        raise HaltError(h)
    return s.b(h)  # type: ignore[no-any-return]


def always(s: Two, x: Tensor) -> Tensor:
    if x.shape[0] > 2:
        raise ValueError("many")
    raise ValueError("few")


def deep(s: Two, x: Tensor) -> Tensor:
    while x.shape[0] > 1:
        x = x[1:]
    return s.b(F.relu(s.a(x)))  # type: ignore[no-any-return]


def many(s: Two, x: Tensor) -> Tensor:
    for i in range(7):
        x = x + 1 if x.sum() > i else x - 1
    return s.b(F.relu(s.a(x)))  # type: ignore[no-any-return]


def breaks(s: Two, x: Tensor) -> Tensor:
    k = len(range(int(x.sum()))) if x.shape[0] > 2 else 1.0
    return s.b(F.relu(s.a(x))) * k  # type: ignore[no-any-return]


def tries(s: Two, x: Tensor) -> Tensor:
    return s.b(F.relu(s.a(x))) * (torch.stack(2).sum() if x.shape[0] > 2 else 1)  # type: ignore[arg-type, no-any-return]


def catches(s: Two, x: Tensor) -> Tensor:
    try:
        n = x.shape[2]
    except IndexError:
        n = 1
    return s.b(F.relu(s.a(x))) * n  # type: ignore[no-any-return]


def catches_in_helper(s: Two, x: Tensor) -> Tensor:
    def cut() -> Tensor:
        return x.view(2, 4)

    try:
        x = cut()
    except RuntimeError as error:
        x = x * len(error.args)
    return s.b(F.relu(s.a(x)))  # type: ignore[no-any-return]


def catches_further_out(s: Two, x: Tensor) -> Tensor:
    for wanted in ((2, 4), (1, 4), (-1, 4)):
        try:
            try:
                x = x.view(wanted)
            except RuntimeError as error:
                raise ValueError("no") from error
            break
        except ValueError:
            continue
    return s.b(F.relu(s.a(x)))  # type: ignore[no-any-return]


def matches(s: Two, x: Tensor) -> Tensor:
    match x.shape:
        case [n, 4]:
            k = n
        case _:
            k = 3
    return s.b(F.relu(s.a(x))) * k  # type: ignore[no-any-return]


def hands_on(s: Two, x: Tensor) -> Tensor:
    k = 1
    try:
        x = x + 1
    except RuntimeError as error:
        raise ValueError("no") from error
    finally:
        k += 1
    return s.b(F.relu(s.a(x))) * k  # type: ignore[no-any-return]


@pytest.mark.parametrize("body", [hands_on, swallowing])
def test_a_try_that_drops_no_error_of_a_call_is_traced(body: Body) -> None:
    assert Tracing(net(body)).trace("").names["relu"]


REFUSED: list[tuple[Body, str]] = [
    (lambda s, x: s.b(F.relu(s.a(x))) if x.shape[0] > 2 else x, "other activations|other modules"),
    (lambda s, x: s.b(F.relu(s.a(x)) if x.shape[0] > 2 else s.a(x)), "other activations"),
    (lambda s, x: s.b(F.relu(s.a(x)) if x.shape[0] > 2 else F.relu(s.a(x).add_(1))), "writes in place"),
    (always, "ValueError: (many|few)"),
    (deep, "again and again"),
    (many, "in too many ways"),
    (breaks, "needs the number"),
    (tries, "TypeError"),
    (halts, "raises a HaltError that holds a value"),
    (catches, "goes on where a call fails"),
    (catches_in_helper, "goes on where a call fails"),
    (catches_further_out, "goes on where a call fails"),
    (matches, "matches a value by its type"),
]


@pytest.mark.parametrize(("body", "why"), REFUSED)
def test_what_one_graph_can_not_hold_is_refused(body: Body, why: str) -> None:
    model = net(body)
    with pytest.raises(UntraceableError, match=why):
        Tracing(model).trace("")
    assert bypass_fx.plan(model, mode="all").sites == ()


def other_forms_of_one_function(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    if x.shape[0] > 2:
        return s.b(h) + torch.std(x, dim=1, unbiased=False, keepdim=True)  # type: ignore[no-any-return]
    return s.b(h) + torch.std(x, dim=1, correction=0, keepdim=True)  # type: ignore[no-any-return]


def test_two_calls_whose_arguments_no_form_of_the_function_has_together_stay_two() -> None:
    model, inputs = net(other_forms_of_one_function), [torch.randn(2, 4), torch.randn(3, 4)]
    expected = [model(x) for x in inputs]
    bypass_fx.extend(model, mode="all")
    assert all(equal(model(x), before) for x, before in zip(inputs, expected, strict=True))


def nodes_of(body: Body) -> dict[str, fx.Node]:
    return {node.name: node for node in Tracing(net(body)).trace("").graph.nodes}


def test_equal_blocks_share_the_graph_of_a_branching_forward() -> None:
    class Own(Two):
        def forward(self, x: Tensor) -> Tensor:
            return padded(self, x)

    tracing = Tracing(nn.ModuleDict({"one": Own(padded), "other": Own(padded)}))
    assert tracing.trace("one") is tracing.trace("other")


def test_one_fact_is_asked_for_once() -> None:
    def questions(body: Body) -> int:
        return sum("truth" in str(step_of(node).target) for node in nodes_of(body).values())

    assert questions(asked_again) == 1
    assert questions(asked_of_changed) == 2


def test_facts_and_sizes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    shape, dtype = (graph.call_function(getattr, (x, name)) for name in ("shape", "dtype"))
    dim = graph.call_method("dim", (x,))
    assert [is_fact(node) for node in (x, shape, dtype, dim)] == [False, True, True, True]
    assert [is_size(node) for node in (x, shape, dtype, dim)] == [False, True, False, True]


def test_modes_and_branches_together() -> None:
    def body(s: Two, x: Tensor) -> Tensor:
        h = F.relu(s.a(x))
        if s.training and x.shape[0] > 2:
            h = h * 2
        return s.b(h)  # type: ignore[no-any-return]

    model = net(body)
    runs = list(itertools.product([True, False], INPUTS[:3]))
    expected = [model.train(mode)(x) for mode, x in runs]
    bypass_fx.extend(model, mode="all")
    assert all(equal(model.train(mode)(x), y) for (mode, x), y in zip(runs, expected, strict=True))
