"""The dataflow of the whole model."""

from __future__ import annotations

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bypass_fx.passes.link import Linked
from bypass_fx.passes.units import Spot, Unit


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x), y


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Inner(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.inner(x, y=x + 1)
        return self.head(F.relu(first)) + second.sum()


def spot(linked: Linked, path: str, name: str) -> Spot:
    unit = Unit(path)
    return Spot(unit, next(node for node in linked.graphs[unit].graph.nodes if node.name == name))


def test_a_value_is_followed_back_into_the_callee_that_returns_it() -> None:
    linked = Linked(Outer())
    relu = spot(linked, "", "relu")
    z = relu.node.args[0]
    assert isinstance(z, torch.fx.Node)
    assert linked.source(Spot(relu.unit, z)) == spot(linked, "inner", "fc")


def test_a_value_is_followed_out_of_the_callee_into_its_readers() -> None:
    linked = Linked(Outer())
    assert list(linked.uses(spot(linked, "inner", "fc"))) == [spot(linked, "", "relu")]
    assert [use and use.node.name for use in linked.uses(spot(linked, "", "relu"))] == ["head"]


def test_an_argument_is_followed_back_to_the_caller() -> None:
    linked = Linked(Outer())
    assert linked.source(spot(linked, "inner", "y")) == spot(linked, "", "add")


def test_a_module_called_in_several_places_merges_its_callers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))  # type: ignore[no-any-return]

    linked = Linked(Twice())
    assert len(linked.callers["block"]) == 2 and len(linked.callers["block.0"]) == 1
    entry = spot(linked, "block", "input_1")
    assert linked.source(entry) == entry


def test_the_models_result_escapes() -> None:
    linked = Linked(Outer())
    assert list(linked.uses(spot(linked, "", "add_1"))) == [None]


def test_children_of_a_forward_without_a_graph_have_unseen_callers() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) if float(x.sum()) > 0 else x

    linked = Linked(Dynamic())
    assert "block" in linked.unseen and "" in linked.failures
    assert list(linked.uses(spot(linked, "block", "_1"))) == [None]


def test_the_whole_model_is_one_acyclic_networkx_graph() -> None:
    graph = Linked(Outer()).digraph
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.has_path(graph, ("", 0, "forward", "x"), ("inner", 0, "forward", "fc")) and nx.has_path(
        graph, ("inner", 0, "forward", "fc"), ("", 0, "forward", "head")
    )
    assert not nx.has_path(graph, ("", 0, "forward", "add"), ("inner", 0, "forward", "fc"))
