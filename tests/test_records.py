"""Outputs of kinds that are more than plain containers come out as what they are, or their forwards are refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

import bypass_fx
from bypass_fx.passes.errors import UntraceableError
from bypass_fx.passes.trace import Tracing


@dataclass(frozen=True)
class Pair:
    y: Any
    other: Any = None


class Named(NamedTuple):
    y: Any
    other: Any = None


@dataclass
class Doubling:
    y: Any

    def __post_init__(self) -> None:
        self.y = self.y * 2


@dataclass
class Counting:
    y: Any
    count: int = field(init=False, default=3)


class Open(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Several(list[Any]):
    pass


class Few(tuple[Any, ...]):
    pass


def with_more(y: Any) -> MaskedLMOutput:
    found = MaskedLMOutput(logits=y, loss=y.sum())  # type: ignore[no-untyped-call]
    found["more"] = y
    return found


Make = Callable[[Any], Any]


def net(make: Make) -> nn.Module:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.act, self.last = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Any:
            return make(self.last(self.act(self.first(x))))

    return Own()


@pytest.mark.parametrize(
    "make",
    [
        Pair,
        Named,
        lambda y: MaskedLMOutput(logits=y, loss=y.sum()),  # type: ignore[no-untyped-call]
        lambda y: MaskedLMOutput(logits=y),  # type: ignore[no-untyped-call]
        lambda y: [MaskedLMOutput(logits=y), Pair(y)],  # type: ignore[no-untyped-call]
    ],
)
def test_an_output_is_of_its_own_kind(make: Make) -> None:
    model, x = net(make), torch.randn(3, 4)
    before = model(x)
    bypass_fx.extend(model, mode="all")
    after = model(x)
    assert type(after) is type(before)
    if isinstance(before, dict):
        assert list(after) == list(before)
        assert torch.equal(after.logits, before.logits)


@pytest.mark.parametrize(
    "make", [Doubling, Counting, with_more, lambda y: Open(y=y), lambda y: Several([y]), lambda y: Few((y,)),
             lambda y: defaultdict(list, y=y)],
)  # fmt: skip
def test_an_output_that_a_graph_would_hold_as_another_is_refused(make: Make) -> None:
    with pytest.raises(UntraceableError, match="its forward makes a"):
        Tracing(net(make)).trace("")
