"""Functions that are not torch's in a forward: of sizes they make numbers, which a graph computes again in every call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.surgery import delta_of


class Mix(nn.Module):
    """The feed-forward net of a vision transformer: tokens to an image and back, of a side that the forward computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        side = self.side(x)
        image = self.fc1(x).transpose(1, 2).reshape(len(x), -1, side, side)
        y: Tensor = x + self.fc2(F.gelu(self.depthwise(image).flatten(2).transpose(1, 2)))
        return y

    def side(self, x: Tensor) -> int:
        raise NotImplementedError


SIDES = {
    "int of a square root": lambda self, x: int(math.sqrt(x.shape[1])),
    "int of a power": lambda self, x: int(x.size(1) ** 0.5),
    "round": lambda self, x: round(x.shape[1] ** 0.5),
    "float and int": lambda self, x: int(float(x.shape[1]) ** 0.5),
    "NumPy's square root": lambda self, x: int(np.sqrt(x.shape[1])),
    "the larger and the smaller": lambda self, x: max(2, min(int(x.shape[1] ** 0.5), 4)),
    "the larger in many places": lambda self, x: 4 if sum(max(x.shape[1] - i, 0) for i in range(10)) > 60 else 3,
    "in a comprehension": lambda self, x: next(int(size**0.5) for size in [x.shape[1]]),
    "of a value": lambda self, x: int(x.detach()[:1].square().mul(0).sum() + 4) if x.shape[1] == 16 else 3,
}


@pytest.mark.parametrize("name", SIDES)
def test_a_number_made_of_a_size_is_made_again_for_another(name: str) -> None:
    model = type("Own", (Mix,), {"side": SIDES[name]})()
    small, large = torch.randn(2, 9, 4), torch.randn(3, 16, 4)
    expected = [model(x) for x in (small, large)]
    (site,) = bypass_fx.plan(model)
    assert site.width == 8
    bypass_fx.extend(model)
    for x, y in zip((small, large), expected, strict=True):
        assert torch.equal(model(x), y)
    with torch.no_grad():
        delta_of(model, site).fill_(0.5)
    assert not torch.equal(model(small), expected[0])
    assert "int" not in globals() and "round" not in globals()


def twice(self: Any, x: Tensor) -> Tensor:
    import numpy

    y: Tensor = self.b(torch.relu(self.a(x.reshape(-1, int(numpy.prod(x.shape[1:]))))))
    return y


BODIES = {
    "len": lambda self, x: self.b(torch.relu(self.a(x.reshape(len(x), -1)))) / len(x),
    "len of a size": lambda self, x: self.b(torch.relu(self.a(x if len(x.shape) == 2 else x[0]))),
    "len of a list": lambda self, x: self.b(torch.relu(self.a(sum([x, x]) / len([x, x])))),
    "len of parts": lambda self, x: self.b(torch.relu(self.a(x))) * len(range(len(x.chunk(2, 1)))),
    "len of a parameter": lambda self, x: self.b(torch.relu(self.a(x))) * len(self.b.bias),
    "a library that the forward imports": twice,
    "bool as a dtype": lambda self, x: self.b(torch.relu(self.a(x))) * torch.ones(len(x), 1, dtype=bool),
    "float as a dtype": lambda self, x: self.b(torch.relu(self.a(x.to(float).to(x.dtype)))),
    "what a ufunc has beside": lambda self, x: self.b(torch.relu(self.a(x))) * np.add.reduce([1, 2]),
    "int as a dtype": lambda self, x: self.b(torch.relu(self.a(x + x.new_zeros(4, dtype=int)))),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_a_forward_calls_beside_torch_s_functions_is_called_in_every_run(name: str) -> None:
    model: Any = type("Own", (nn.Module,), {"forward": BODIES[name]})()
    model.a, model.b = nn.Linear(4, 8), nn.Linear(8, 4)
    inputs = torch.randn(3, 4), torch.randn(5, 4)
    inputs += (torch.randn(2, 3, 4),) if name == "len of a size" else ()
    expected = [model(x) for x in inputs]
    assert [site.constraint for site in bypass_fx.plan(model)] == ["folded"]
    bypass_fx.extend(model)
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(model(x), y)


def test_what_numpy_would_ask_of_a_traced_value_is_no_step_of_the_forward() -> None:
    prod = [np.prod]
    model: Any = type("Own", (nn.Module,), {"forward": lambda self, x: self.b(F.relu(self.a(x))) * prod[0](x.shape)})()
    model.a, model.b = nn.Linear(4, 8), nn.Linear(8, 4)
    assert "hands a traced value to NumPy" in bypass_fx.plan(model).refusals[0].reason


def test_python_s_own_names_as_types_stay_what_they_are() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, times: Any = 2.0) -> Tensor:
            shift = 0 if isinstance(times, int) else 1
            y: Tensor = self.b(torch.relu(self.a(x + shift))) * int(times)
            return y

    model, x = Own(), torch.randn(3, 4)
    expected = model(x)
    assert len(bypass_fx.plan(model)) == 1
    assert torch.equal(bypass_fx.extend(model)(x), expected)


def kind(value: Any) -> bool:
    return isinstance(value, int)


def equal_kind(value: Any) -> bool:
    return type(value) == int and {int: True}.get(type(value), False)  # noqa: E721


KINDS = {
    "kind": [kind],
    "equal kind": [equal_kind],
    "from bytes": [lambda value: int.from_bytes(b"\x03", "big") == value],
}


@pytest.mark.parametrize("name", KINDS)
def test_code_that_a_forward_reaches_unseen_may_ask_for_them_as_types(name: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        known = KINDS[name][0](3)
        y: Tensor = self.b(torch.relu(self.a(x))) * int(x.shape[0] if known else 0)
        return y

    model: Any = type("Own", (nn.Module,), {"forward": forward})()
    model.a, model.b = nn.Linear(4, 8), nn.Linear(8, 4)
    x = torch.randn(3, 4)
    expected = model(x)
    assert torch.equal(bypass_fx.extend(model)(x), expected) and expected.any()


class Odd:
    """What calls itself one of NumPy's functions, and does not tell all that it has."""

    __module__ = "numpy.odd"

    def __call__(self, value: int) -> int:
        return value

    @property
    def secret(self) -> int:
        raise ValueError("secret")


def test_all_names_are_back_where_one_could_not_be_replaced() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x))) * oddly(int(x.shape[0])) * round(x.shape[1])
        return y

    model: Any = type("Own", (nn.Module,), {"forward": forward})()
    model.a, model.b = nn.Linear(4, 8), nn.Linear(8, 4)
    assert not bypass_fx.plan(model).sites
    assert not {"int", "round"} & globals().keys() and isinstance(odd, Odd)


def oddly(value: int) -> int:
    return odd(value)


odd = Odd()


def test_a_type_that_other_code_compares_by_identity_stays_what_it_is() -> None:
    space: dict[str, Any] = {"torch": torch, "__name__": "own"}
    exec(_WITH_IDENTITY, space)
    for forward in (space["of_a_number"], space["of_a_size"]):
        model: Any = type("Own", (nn.Module,), {"forward": forward})()
        model.a, model.b = nn.Linear(4, 8), nn.Linear(8, 4)
        x = torch.randn(3, 4)
        expected = model(x)
        plan = bypass_fx.plan(model)
        assert len(plan) == (forward is space["of_a_number"])
        assert torch.equal(bypass_fx.extend(model, plan)(x) if len(plan) else model(x), expected)


_WITH_IDENTITY = """
class Kinds:
    def whole(self, value):
        return type(value) is int

KINDS = Kinds()

def of_a_number(self, x):
    return self.b(torch.relu(self.a(x))) * (int(3.0) if KINDS.whole(3) else 2)

def of_a_size(self, x):
    return self.b(torch.relu(self.a(x))) * (int(x.shape[0]) if KINDS.whole(3) else 2)
"""


def test_a_name_of_the_forward_s_module_comes_before_python_s() -> None:
    space: dict[str, Any] = {"torch": torch, "int": lambda value: value // 2}
    exec("def forward(self, x):\n    return self.b(torch.relu(self.a(x[: int(x.shape[0])])))", space)
    own, forward = space["int"], space["forward"]
    model: Any = type("Own", (nn.Module,), {"forward": forward})()
    model.a, model.b = nn.Linear(4, 8), nn.Linear(8, 4)
    x = torch.randn(6, 4)
    expected = model(x)
    assert len(expected) == 3 and len(bypass_fx.plan(model)) == 1
    assert torch.equal(bypass_fx.extend(model)(x), expected) and space["int"] is own


def test_len_is_the_size_of_the_first_axis_and_of_no_other() -> None:
    def mixes(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        z: Tensor = self.b(torch.relu(y.view(-1, len(y))))
        return z

    model: Any = type("Own", (nn.Module,), {"forward": mixes})()
    model.a, model.b = nn.Linear(4, 8), nn.Linear(8, 4)
    model(torch.randn(8, 4))  # as many rows as channels: what runs into b are columns of both
    assert not bypass_fx.plan(model, mode="strict")
