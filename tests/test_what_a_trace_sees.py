"""What a traced value would answer wrongly, and what a trace would leave behind: refused, and put back."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import re
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bypass_fx
from bypass_fx.passes.errors import UntraceableError
from bypass_fx.passes.trace import Tracing
from bypass_fx.surgery import delta_of

LOG: list[Any] = []
CACHE: dict[str, Any] = {}
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """W and A, and things that forwards reach."""

    log: list[Any] = []  # noqa: RUF012 - what is tested

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        self.state, self.seen = SimpleNamespace(h=None), {"h": []}
        self.scale = torch.tensor(2.0)


def net(body: Any) -> Net:
    return type("Own", (Net,), {"forward": body})()  # type: ignore[no-any-return]


def matches(self: Any, x: Any) -> Any:
    match x:
        case Tensor():
            return self.a(x)


def with_seed(x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return x + torch.randn(3, 4)


def swallows(self: Any, x: Any) -> Any:
    try:
        n = int(x.shape[0])
    except Exception:
        n = 1
    return self.a(x) * n


def counts(self: Any, x: Any) -> Any:
    global COUNT  # noqa: PLW0603 - what is tested
    COUNT += 1
    return self.a(x)


COUNT = 0


def tags(self: Any, x: Any) -> Any:
    h = self.a(x)
    h.tag = 1
    return h


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda s, x: s.a(x * 2) if type(x) is Tensor else x, "same object"),
        (lambda s, x: s.a(x * 2) if type(x) == Tensor else x, "exact type"),  # noqa: E721 - what is tested
        (matches, "by its type"),
        (lambda s, x: s.a(x) * (2 if s.scale else 1), "takes the number of a tensor"),
        (lambda s, x: s.a(x) * s.scale.item(), "takes the number of a tensor"),
        (lambda s, x: s.a(x) * s.scale.tolist(), "takes the number of a tensor"),
        (lambda s, x: s.a(x) if x.dtype is torch.float32 else x, "same object"),
        (lambda s, x: s.a(x) if x.dtype in (torch.float16, torch.bfloat16) else x, "other modules in one branch"),
        (lambda s, x: s.a(x) if torch.float32 in {x.dtype} else x, "as a key"),
        (lambda s, x: s.a(x) * {3: 2.0}.get(x.shape[0], 1.0), "as a key"),
        (lambda s, x: s.a(x) * {"3": 2.0}.get(f"{x.shape[0]}", 1.0), "makes a text"),
        (lambda s, x: s.a(x) if isinstance(x.shape, tuple) else x, "Python type"),
        (lambda s, x: s.a(with_seed(x)), "context manager"),
        (lambda s, x: F.relu(copy.copy(s.a(x))), "copies"),
        (swallows, "goes on where that fails"),
        (counts, "global variable `COUNT`"),
        (tags, "`tag` of a traced value"),
        (lambda s, x: torch.func.functional_call(s.a, {"weight": s.a.weight * 2}, (x,)), "functional_call"),
    ],
)
def test_a_question_that_a_traced_value_would_answer_wrongly_is_refused(body: Any, why: str) -> None:
    with pytest.raises(UntraceableError, match=why):
        Tracing(net(body)).trace("")


def keeps_in(s: Any, x: Any, where: str) -> Any:
    h = s.a(x)
    if where == "object":
        s.state.h = h
    elif where == "dict":
        CACHE["h"] = h
    else:
        {"global": LOG, "nested": s.seen["h"], "class": s.log, "type": type(s).log}[where].append(h)
    return F.relu(h)


@pytest.mark.parametrize("where", ["object", "dict", "global", "nested", "class", "type"])
def test_what_outlives_the_call_keeps_nothing_of_a_trace_or_of_a_run_on_examples(where: str) -> None:
    model = net(lambda s, x: keeps_in(s, x, where))
    plan = bypass_fx.plan(model, mode="all", example_inputs=(X,))
    assert not plan.sites and "outlives the call" in plan.refusals[0].reason
    assert (LOG, CACHE, model.state.h, model.seen, model.log) == ([], {}, None, {"h": []}, [])


def test_texts_for_people_are_no_obstacle() -> None:
    def forward(self: Any, x: Any) -> Any:
        torch._assert(x.dim() == 2, f"two axes, not {x.dim()}")
        return self.b(F.relu(self.a(x)))

    assert bypass_fx.plan(net(forward), mode="strict").sites


class Checkpointing(Net):
    """Wraps the forwards of its subclasses, to run them under activation checkpointing where it is switched on."""

    checkpointing = False

    def __init_subclass__(cls) -> None:
        forward = cls.forward

        @functools.wraps(forward)
        def wrapped(self: Checkpointing, *args: Any) -> Any:
            outermost = type(self).forward is wrapped
            if self.checkpointing and self.training and outermost:
                return checkpoint(functools.partial(forward, self), *args, use_reentrant=False)
            return forward(self, *args)

        cls.forward = wrapped  # type: ignore[method-assign]


def test_a_forward_may_ask_whether_it_is_the_one_of_its_own_class() -> None:
    class Block(Checkpointing):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x)))

    class Upper(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    for model in (Block(), Upper()):
        before = model(X)
        assert torch.equal(bypass_fx.extend(model)(X), before)
        assert [site.kind for site in bypass_fx.sites(model)] == ["strict"]
        with pytest.raises(bypass_fx.SurgeryError, match="rewritten for the present value of `checkpointing`"):
            model.checkpointing = True
        bypass_fx.contract(model)
        model.checkpointing = True
        with pytest.raises(UntraceableError, match=r"checkpointing|autograd function"):  # torch 2.11 has one
            Tracing(model).trace("")


def test_a_call_that_a_child_does_not_take_fails_in_a_trace_too() -> None:
    def forward(self: Any, x: Any) -> Any:
        for layer in (self.a, self.act, self.b):
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x

    model = net(forward)
    model.act = nn.ReLU()
    before = model(X)
    assert torch.equal(bypass_fx.extend(model)(X), before)
    assert [site.kind for site in bypass_fx.sites(model)] == ["strict"]


def test_functions_of_einops_and_math_take_traced_values() -> None:
    def forward(self: Any, x: Any) -> Any:
        h = F.relu(self.a(einops.rearrange(x, "(b c) d -> b c d", c=3))) / math.sqrt(x.shape[-1])
        return self.b(h)

    model = net(forward)
    before = model(X)
    assert torch.equal(bypass_fx.extend(model, mode="all")(X), before)


def test_factories_take_traced_sizes() -> None:
    model = net(lambda s, x: s.b(F.relu(s.a(x) + torch.zeros(x.shape[0], 8, dtype=x.dtype))))
    assert bypass_fx.plan(model, mode="all").sites


def test_a_child_that_says_otherwise_after_extend_is_noticed() -> None:
    model = net(lambda s, x: s.b(s.act(s.a(s.kid(x)) * s.kid.p)))
    model.kid, model.act = nn.Dropout(0.25), nn.ReLU()
    bypass_fx.extend(model.eval(), mode="all")
    model(X)
    for child, name, value in ((model.kid, "p", 0.5), (model.act, "inplace", True)):
        before = getattr(child, name)
        setattr(child, name, value)
        with pytest.raises(bypass_fx.SurgeryError, match="its children said of themselves"):
            model(X)
        setattr(child, name, before)
    model(X)


def test_a_class_that_wants_arguments_of_its_subclasses_hears_of_none() -> None:
    register: list[str] = []

    class Registered(Net):
        def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            register.append(tag)

    class Tagged(Registered, tag="mine"):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))  # type: ignore[no-any-return]

    model = bypass_fx.extend(Tagged())
    assert register == ["mine"] and isinstance(model, Tagged)
    bypass_fx.contract(model)
    with pytest.raises(TypeError):
        type("Untagged", (Registered,), {})


def test_a_shallow_copy_is_refused_and_a_deep_one_is_not() -> None:
    model = bypass_fx.extend(net(lambda s, x: s.b(F.relu(s.a(x)))))
    with pytest.raises(bypass_fx.SurgeryError, match=r"copy\.deepcopy"):
        copy.copy(model)
    assert torch.equal(copy.deepcopy(model)(X), model(X))


class Scaled(nn.Module):
    """Takes its value and its options in one dict or list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, given: Any) -> Tensor:
        x, on, scale = (given["x"], given["on"], given["scale"]) if isinstance(given, dict) else given
        return self.b(F.relu(self.a(x))) * scale if on else x  # type: ignore[no-any-return]


def test_dicts_and_lists_that_mix_constants_and_tensors_are_traced_item_by_item() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Scaled(), Scaled()

        def forward(self, x: Tensor) -> Tensor:
            y = self.one({"x": x, "on": True, "scale": 2.0})
            return self.two([y, True, 3.0]) + self.two([y, False, 3.0])  # type: ignore[no-any-return]

    model = Outer()
    before = model(X)
    bypass_fx.extend(model, mode="all")
    assert [site.name for site in bypass_fx.sites(model)] == ["one.relu"] or len(bypass_fx.sites(model)) == 2
    assert torch.equal(model(X), before)
    assert torch.equal(model.one({"x": X, "on": True, "scale": 5.0}), model.one({"x": X, "on": True, "scale": 1.0}) * 5)


def test_an_activation_that_a_graph_calls_is_one_site_also_where_other_code_may_call_it() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.steps = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), 1

        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 1e9 else self.mlp(x)

    model = bypass_fx.extend(Outer(), mode="all", example_inputs=(X,))
    assert [site.name for site in bypass_fx.sites(model)] == ["mlp.1"]
    with torch.no_grad():
        delta_of(model, bypass_fx.sites(model)[0]).fill_(0.5)
    z = model.mlp[0](X)
    assert torch.allclose(model(X), model.mlp[2](z.relu() + 0.5 * z))


def test_a_run_on_values_settles_what_fakes_can_not_and_leaves_buffers_alone() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return self.act(x) if float(x.sum()) < 1e9 else x  # type: ignore[no-any-return]

    model = Asks()
    dice = torch.get_rng_state()
    plan = bypass_fx.plan(model, mode="all", example_inputs=(X,))
    assert [site.width for site in plan] == [4]
    assert model.steps == 0 and model.training and torch.equal(dice, torch.get_rng_state())


def test_parametrised_weights_are_read_without_a_training_step() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)))
    before = {name: value.clone() for name, value in model.named_buffers()}
    bypass_fx.norms(bypass_fx.extend(model))
    assert before and all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_sparse_values_are_one_clear_error() -> None:
    model = net(lambda s, x: torch.relu(x).to_dense() @ s.a.weight)
    bypass_fx.extend(model, mode="all", example_inputs=(torch.eye(8)[:3],))
    with pytest.raises(bypass_fx.BypassError, match="sparse_coo"):
        model(torch.eye(8).to_sparse())


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    yield
    LOG.clear()
    CACHE.clear()


def deprecated(name: str) -> None:
    """Warns as libraries do: by the line of the caller, and through a good part of the standard library."""
    calling = inspect.getouterframes(inspect.currentframe())[1]
    warnings.warn(re.sub("old", name, f"old, in {calling.filename}"), stacklevel=2)


def test_what_a_warning_reaches_is_no_obstacle() -> None:
    def forward(self: Any, x: Any, scale: Any = None) -> Any:
        if scale is not None:
            deprecated("scale")
        return self.b(F.relu(self.a(x)) * np.sqrt(np.median([4.0])))

    assert bypass_fx.plan(net(forward), mode="all").sites
