"""How many axes a value has, where its graph tells."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bypass_fx
from bypass_fx.passes.ranks import rank_of


def gathered(points: Tensor, index: Tensor) -> Tensor:
    """The points of an index that has any number of axes, as PointNet++ takes them."""
    view, repeat = [*index.shape], [*index.shape]
    view[1:], repeat[0] = [1] * (len(view) - 1), 1
    batch = torch.arange(points.shape[0]).view(view).repeat(repeat)
    return points[batch, index, :]


INDICES: dict[str, Any] = {
    "of a factory": lambda x: torch.zeros(x.shape[0], 5, dtype=torch.long),
    "of sizes": lambda x: torch.arange(x.shape[1]).view(1, 1, x.shape[1]).repeat([x.shape[0], 2, 1])[:, :, :3],
    "of a product": lambda x: (x.permute(0, 1, 2) @ x.permute(0, 2, 1)).sort(dim=-1)[1][:, :2],
    "of a distance": lambda x: (-2 * torch.matmul(x.permute(0, 1, 2), x.permute(0, 2, 1)) + 1.0).topk(3)[1],
    "in place": lambda x: operator.iadd(x.permute(0, 1, 2) @ x.permute(0, 2, 1), 1.0).sort()[1][:, :3],
}


@pytest.mark.parametrize("name", INDICES)
def test_where_the_graph_tells_how_many_axes_a_value_has_a_forward_may_go_by_it(name: str) -> None:
    class Gathers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(gathered(x, INDICES[name](x)))))  # type: ignore[no-any-return]

    model = Gathers()
    inputs = torch.randn(2, 6, 4), torch.randn(3, 7, 4)
    before = [model(x) for x in inputs]
    plan = bypass_fx.plan(model)
    assert [site.kind for site in plan] == ["strict"], plan.refusals
    bypass_fx.extend(model, plan)
    assert all(torch.equal(model(x), y) for x, y in zip(inputs, before, strict=True))


OPEN: dict[str, Any] = {
    "a view by a shape": lambda x: x.view(x.shape),
    "a view as another dtype": lambda x: x.view(torch.int32),
    "a view as a dtype by its name": lambda x: x.view(dtype=torch.int32),
    "an item": lambda x: x[0],
    "a mask": lambda x: x[x > 0],
    "the sum of two": lambda x: x + x.mean(-1, keepdim=True),
    "a product with a vector": lambda x: x @ x[0, 0],
    "a linear map that may be a vector": lambda x: F.linear(x.view(2, 2, 4), x.view(-1)),
    "what is given an axis in place": lambda x: (y := x.view(2, 4), y.unsqueeze_(0))[0],
}


@pytest.mark.parametrize("name", OPEN)
def test_where_the_graph_does_not_tell_it_is_open(name: str) -> None:
    *_, output = fx.symbolic_trace(OPEN[name]).graph.nodes
    assert not isinstance(rank_of(output.args[0], nn.Module()), int)  # type: ignore[arg-type]  # it is a node


def test_a_linear_map_keeps_the_axes_where_its_weight_is_a_matrix() -> None:
    class Maps(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(sizes))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.view(2, 2, 4), self.weight.float())

    for sizes, rank in [((3, 4), 3), ((4,), None)]:
        model = Maps(*sizes)
        *_, output = fx.symbolic_trace(model).graph.nodes
        found = rank_of(output.args[0], model)  # type: ignore[arg-type]  # it is a node
        assert (found if isinstance(found, int) else None) == rank


def test_a_child_with_a_hook_or_a_forward_of_its_own_may_give_other_axes() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.child(x.view(2, 4))  # type: ignore[no-any-return]

    def rank(model: Calls) -> Any:
        *_, output = fx.symbolic_trace(model).graph.nodes
        return rank_of(output.args[0], model)  # type: ignore[arg-type]  # it is a node

    plain, hooked, held = Calls(), Calls(), Calls()
    hooked.child.register_forward_hook(lambda module, args, out: out[None])
    held.child.forward = lambda x: x[None]  # type: ignore[method-assign]
    assert rank(plain) == 2
    assert isinstance(rank(hooked), fx.Node) and isinstance(rank(held), fx.Node)
