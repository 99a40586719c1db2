"""Owner-local tracing."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bypass_fx
from bypass_fx.passes.calls import call_of
from bypass_fx.passes.errors import UntraceableError
from bypass_fx.passes.trace import Tracing


def targets(model: nn.Module, path: str = "") -> list[str]:
    graph = Tracing(model).trace(path).graph
    return [getattr(node.target, "__name__", str(node.target)) for node in graph.nodes]


class Owner(nn.Module):
    """A base for small owners: a Linear called `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.scale = 2.0


def test_children_are_leaves_and_parameters_are_named() -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc(x), self.fc.weight) * self.scale

    assert targets(Net()) == ["x", "fc", "fc.weight", "linear", "mul", "output"]


def test_equal_modules_share_a_graph_and_different_ones_do_not() -> None:
    class Block(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.scale

    net = nn.ModuleList([Block(), Block(), Block()])
    net[2].scale = 3.0
    tracing = Tracing(net)
    assert tracing.trace("0") is tracing.trace("1")
    assert tracing.trace("0") is not tracing.trace("2")


def test_both_training_modes_are_traced_where_they_differ() -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), 0.5, self.training)

    net = Net()
    graph = Tracing(net).trace("")
    assert graph.in_eval is not None and net.training
    assert [owned.names["dropout"].kwargs["training"] for owned in (graph, graph.in_eval)] == [True, False]
    assert Tracing(nn.Sequential(nn.Linear(1, 1))).trace("").in_eval is None


def test_optional_arguments_are_the_constants_that_the_caller_passes() -> None:
    class Net(Owner):
        def forward(self, x: Tensor, mask: Tensor | None = None, negate: bool = False) -> Tensor:
            y = self.fc(x)
            if mask is not None:
                y = y * mask
            return -y if negate else y

    net = Net()
    tracing = Tracing(net)
    signature = tracing.signature("")
    assert signature is not None
    plain = tracing.trace("")
    masked = tracing.trace("", call_of(signature, (torch.ones(1), torch.ones(1)), {"negate": True}))
    assert [node.name for node in plain.graph.nodes] == ["x", "fc", "output"]
    assert [node.name for node in masked.graph.nodes] == ["x", "mask", "fc", "mul", "neg", "output"]


def test_star_arguments_are_traced_for_the_number_that_is_passed() -> None:
    class Net(Owner):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return self.fc(args[0]) + args[1] + kwargs["bias"]

    tracing = Tracing(Net())
    signature = tracing.signature("")
    assert signature is not None
    x = torch.ones(1)
    graph = tracing.trace("", call_of(signature, (x, x), {"bias": x})).graph
    assert [node.target for node in graph.nodes if node.op == "placeholder"] == ["args_0", "args_1", "kwargs_bias"]


def test_tensors_made_in_forward_are_made_anew_at_every_call() -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + torch.rand(3) + torch.arange(3)

    net = Net()
    before = torch.get_rng_state()
    assert {"rand", "arange"} <= set(targets(net))
    assert torch.equal(before, torch.get_rng_state())


def test_augmented_assignment_stays_in_place() -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            y += x
            y[:, 0] = 0.0
            return y

    assert targets(Net())[2:4] == ["iadd", "setitem"]


class Branches(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Writes(Owner):
    def forward(self, x: Tensor) -> Tensor:
        self.fc.last = x
        return self.fc(x)


class Dice(Owner):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * random.random()


class NoGrad(Owner):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.fc(x)


class TypeOfResult(Owner):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if isinstance(y.size(0), int) else y[0]


class Foreign(Owner):
    elsewhere: Any = (nn.Linear(3, 3),)

    def forward(self, x: Tensor) -> Tensor:
        return self.elsewhere[0](x)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Branches, "branches on a traced value"),
        (Writes, "sets the attribute `last`"),
        (Dice, "draws random numbers"),
        (NoGrad, "`with` block"),
        (TypeOfResult, "Python type"),
        (Foreign, "not its child"),
    ],
)
def test_what_a_graph_can_not_hold_is_refused_and_nothing_is_changed(cls: type[Owner], why: str) -> None:
    net = cls()
    before = dict(net.__dict__)
    with pytest.raises(UntraceableError, match=why):
        Tracing(net).trace("")
    assert net.__dict__ == before and net.training
    assert "__getattribute__" not in nn.Module.__dict__ and isinstance.__module__ == "builtins"


def test_the_type_of_an_argument_is_what_the_caller_passes() -> None:
    class Net(Owner):
        def forward(self, x: Tensor | list[Tensor]) -> Tensor:
            return self.fc(torch.cat(x) if not isinstance(x, Tensor) else x)

    tracing = Tracing(Net())
    signature = tracing.signature("")
    assert signature is not None
    assert [node.name for node in tracing.trace("").graph.nodes] == ["x", "fc", "output"]
    listed = tracing.trace("", call_of(signature, ([torch.ones(1)],), {}))
    assert [node.name for node in listed.graph.nodes] == ["x", "getitem", "cat", "fc", "output"]


class Remembers(Owner):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.fc(x)  # type: ignore[no-any-return]


def test_a_module_that_keeps_its_inputs_is_refused_and_keeps_nothing_of_the_trace() -> None:
    net = Remembers()
    with pytest.raises(UntraceableError, match="list or dict"):
        Tracing(net).trace("")
    assert net.seen == []


def test_a_cache_of_values_from_parameters_is_computed_anew() -> None:
    class Caches(Remembers):
        def forward(self, x: Tensor) -> Tensor:
            if "w" not in self.cache:
                self.cache["w"] = self.fc.weight.t()
            return x @ self.cache["w"]

    net = Caches()
    assert "t" in targets(net) and net.cache == {}


def test_is_tensor_is_answered_for_arguments_and_c_functions_get_no_false_tensors() -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x) if torch.is_tensor(x) else x
            return torch.tanh(0.5 * (y + 0.044715 * torch.pow(y, 3.0)))

    assert "pow" in targets(Net())


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: all(map(isinstance, (x,), (Tensor,))),
        lambda x: functools.partial(isinstance, x)(Tensor),
        lambda x: [ask for ask in (isinstance,) if ask(x, Tensor)],
        lambda x: not isinstance(x, fx.Proxy),
        lambda x: not isinstance(x, Callable),
        lambda x: not isinstance(x, int) or torch.pow(x, 2),
    ],
)
def test_a_question_for_the_type_in_whatever_form_is_answered_as_for_the_callers_value(asks: Any) -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if asks(x) else x.tanh()

    assert targets(Net()) == ["x", "fc", "output"]


def test_the_compiler_finds_python_as_it_is_also_where_a_forward_is_the_first_to_import_it() -> None:
    program = """
import torch
import bypass_fx

class Net(torch.nn.Module):
    def forward(self, x):
        import torch._dynamo
        return torch.relu(x)

bypass_fx.plan(Net())
ask = torch.compile(lambda x: x + 1 if isinstance(x, torch.Tensor) else x, backend="eager", fullgraph=True)
assert ask(torch.zeros(1)) == 1
limits = torch.compile(
    lambda x: torch.ones(1) + 0 * x.clamp(max=torch.finfo(x.dtype).max) if torch.is_grad_enabled() else x,
    backend="eager", fullgraph=True,
)
assert limits(torch.zeros(1)) == 1
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_plan_of_compiled_modules_compiles_nothing_and_leaves_the_compiler_as_it_was() -> None:
    program = """
import torch
import bypass_fx

net = torch.nn.Sequential(
    torch.compile(torch.nn.Linear(4, 4), backend="eager"), torch.nn.ReLU(), torch.nn.Linear(4, 4)
)
assert len(bypass_fx.plan(net, mode="all")) == 1
assert not torch._dynamo.utils.counters["stats"]
ask = torch.compile(lambda x: x + 1 if torch.is_grad_enabled() else x, backend="eager", fullgraph=True)
assert ask(torch.zeros(1)) == 1
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_forward_that_asks_for_the_class_of_its_argument_gets_the_callers() -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.__class__ == Tensor else x.tanh()

    assert targets(Net()) == ["x", "fc", "output"]


def test_a_forward_that_ran_often_asks_for_types_as_one_that_never_ran() -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if isinstance(x, Tensor) else x.tanh()

    model = Net()
    for _ in range(100):  # Python writes code that runs often anew
        model(torch.zeros(1, 3))
    assert targets(model) == ["x", "fc", "output"]


def test_blocks_in_which_one_name_stands_for_another_have_graphs_of_their_own() -> None:
    class Block(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a if shared else nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    for kinds in ([False, True, False], [True, False], [False, True]):
        model = nn.Sequential(*map(Block, kinds))
        before = model(torch.ones(2, 4))
        assert torch.equal(bypass_fx.extend(model)(torch.ones(2, 4)), before)


class Curve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * 2


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * self.factor


class DropsInAHelper(nn.Module):
    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropped(F.silu(x))


class DropsAbove(DropsInAHelper):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class AsksByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * (2 if getattr(self, "training") else 1)  # noqa: B009 - as some forwards do


RELU, CURVE, SCALED, DROPOUT, HOOKED = nn.ReLU(inplace=True), Curve(), Scaled(), nn.Dropout(), nn.ReLU()
HOOKED.register_forward_hook(lambda module, args, result: result + 1)


def made(x: Tensor) -> Any:
    return Curve()(x)


@pytest.mark.parametrize("activated", [RELU, CURVE, made])
def test_a_module_that_is_no_more_than_a_function_may_stand_anywhere(activated: Any) -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return x + activated(self.fc(x))  # type: ignore[no-any-return]

    net, x = Net(), torch.randn(2, 3)
    expected = net(x)
    bypass_fx.extend(net)
    (site,) = bypass_fx.sites(net)
    assert site.activation in ("relu", "silu") and torch.equal(net(x), expected)


ASK_THE_MODE = [DropsInAHelper(), DropsAbove(), AsksByName(), nn.RReLU()]


@pytest.mark.parametrize("foreign", [SCALED, DROPOUT, HOOKED, nn.Linear(3, 3), nn.BatchNorm1d(3), *ASK_THE_MODE])
def test_one_that_holds_something_may_not(foreign: nn.Module) -> None:
    class Net(Owner):
        def forward(self, x: Tensor) -> Tensor:
            return x + foreign(self.fc(x))  # type: ignore[no-any-return]

    with pytest.raises(UntraceableError, match="not its child"):
        Tracing(Net()).trace("")
