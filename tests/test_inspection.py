"""Inspection: shapes and costs of sites, the graph as a picture, its files, and the code before and after."""

from __future__ import annotations

import json
import math
import re
from inspect import signature
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bypass_fx
from bypass_fx import models
from bypass_fx.constraint import residual_entries
from bypass_fx.inspection import Residuals, RunError, as_networkx, draw, inspect, read_residuals, rewritten, write
from bypass_fx.inspection.drawn import closed
from bypass_fx.inspection.export import ExportError
from bypass_fx.inspection.page import as_html
from bypass_fx.inspection.panel import panel
from tests.attentions import Attention
from tests.browser import data_of


class Net(nn.Module):
    """Two blocks, one strict site in each, and an activation that overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


INPUT = (torch.zeros(5, 7, 4),)


def test_shapes_are_those_that_a_real_run_has() -> None:
    found = inspect(net(), example_inputs=INPUT)
    assert [(name, fact.z, fact.w, fact.a) for name, fact in found.facts.items()] == [
        ("blocks.0.1", (5, 7, 8), (8, 4), (4, 8)),
        ("blocks.1.1", (5, 7, 8), (8, 4), (4, 8)),
        ("head.1", (5, 7, 6), (6, 4), (2, 6)),
    ]


def test_shapes_inside_helper_methods_and_without_an_input() -> None:
    inputs = (torch.zeros(1, 3, 16), torch.zeros(1, 2, 16))
    transformer = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    found = inspect(transformer, example_inputs=inputs, select="*relu")
    assert {name: fact.z for name, fact in found.facts.items()} == {
        "encoder.layers.0._ff_block.relu": (1, 3, 32),
        "decoder.layers.0.relu": (1, 2, 32),
    }
    blind = inspect(net())
    assert {fact.z for fact in blind.facts.values()} == {None} and blind.costs.psi_flops is None


def test_shapes_and_flops_survive_parameters_as_arguments_and_code_that_asks_for_signatures() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 4))
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

        def chunk(self, x: Tensor) -> Any:
            return self.second(F.relu(self.first(x)))

        def forward(self, x: Tensor) -> Any:
            assert list(signature(self.chunk).parameters) == ["x"]
            return self.chunk(x) + self.second(self.first(self.token.expand(3, -1))) if x.shape[0] > 2 else x

    for device in ("cpu", "meta"):
        found = inspect(Takes().to(device), mode="all", example_inputs=(torch.zeros(3, 4, device=device),))
        assert found.run_to_sites and found.run_to_sites.failure == ""
        assert [fact.z for fact in found.facts.values()] == [(3, 8)]
        assert found.run_to_sites.flops == 2 * (3 + 3) * (4 * 8 + 8 * 4)


def test_looking_leaves_the_model_as_it_was() -> None:
    model = net()
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    found = inspect(model, example_inputs=INPUT)
    as_html(found, draw(found))
    rewritten(found.linked, found.plan)
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == before


class Holding(nn.Module):
    """Holds its activation as a function; its forward has no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 8), F.relu, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x - x.mean()
        result: Tensor = self.last(self.act(self.first(x)))
        return result


def test_looking_leaves_a_held_activation_in_its_place() -> None:
    model = Holding()
    before = dict(vars(model))
    found = inspect(model, mode="all", example_inputs=(torch.zeros(3, 4),))
    assert found.facts["act.relu"].z == (3, 8)
    assert list(vars(model).items()) == list(before.items())


def test_the_costs_count_what_they_say() -> None:
    costs = inspect(net(), example_inputs=INPUT).costs
    elements = 7 * (8 + 8 + 6)
    assert (costs.coefficients, costs.psi_flops, costs.kept_bytes) == (22, 2 * elements, 4 * elements)
    assert costs.coefficient_bytes == 22 * 4 * 4
    assert costs.forward_flops == 2 * 7 * (2 * (4 * 8 + 8 * 4) + 4 * 6 + 6 * 2)
    assert costs.share == 22 / sum(p.numel() for p in net().parameters())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)),
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2)),
        nn.Sequential(nn.Conv2d(6, 12, 1, groups=2), nn.ReLU(), nn.Conv2d(12, 6, 1, groups=3)),
    ],
    ids=["linear", "augmented convolution", "groups", "groups that cut through each other"],
)
def test_the_flops_of_the_constraint_are_those_of_its_products(model: nn.Module) -> None:
    """The counter knows matrix products alone: the scaling of A by D is left out of the comparison."""
    found = inspect(model, mode="strict")
    (site,) = found.plan.sites
    fact = found.facts[site.name]
    bypass_fx.extend(model, found.plan)
    with FlopCounterMode(display=False) as counter:
        residual_entries(model, site)
    assert site.first and site.second
    rows = bypass_fx.passes.matrices.columns(model, site.second, site.width)
    dense = len({site.first.groups, site.second.groups}) == 2 and min(site.first.groups, site.second.groups) > 1
    scaled = (
        site.width
        * rows.shape[1]
        * (
            rows.shape[0]
            if dense and max(site.first.groups, site.second.groups) % min(site.first.groups, site.second.groups)
            else 1
        )
    )
    assert fact.product_flops - scaled == counter.get_total_flops()


def test_every_edge_joins_nodes_and_every_site_has_one_node() -> None:
    picture = draw(inspect(net(), example_inputs=INPUT))
    ids = [node.id for node in picture.nodes]
    assert len(set(ids)) == len(ids)
    for node in picture.nodes:
        assert node.parent is None or ids.index(node.parent) < ids.index(node.id)
    assert {end for edge in picture.edges for end in (edge.source, edge.target)} <= set(ids)
    assert [node.site for node in picture.nodes if node.site and node.stage == "both"] == [
        "blocks.0.1",
        "blocks.1.1",
        "head.1",
    ]
    assert next(node.shape for node in picture.nodes if node.site == "head.1") == "5 × 7 × 6"


def edges(picture: Any, stage: str) -> nx.DiGraph:
    shown = {node.id for node in picture.nodes if node.stage in ("both", stage) and node.role != "module"}
    graph = nx.DiGraph((edge.source, edge.target) for edge in picture.edges if edge.stage in ("both", stage))
    assert set(graph) == shown
    return graph


def test_before_and_after_differ_by_psi_and_its_delta_and_a_copy_of_what_is_overwritten() -> None:
    picture = draw(inspect(net(), example_inputs=INPUT))
    before, after = edges(picture, "before"), edges(picture, "after")
    assert set(before) < set(after)
    assert sorted(set(after) - set(before)) == sorted(
        [f"blocks.{i}#{name}" for i in (0, 1) for name in ("delta_1", "psi")]
        + ["head#clone", "head#delta_1", "head#psi"]
    )
    assert set(after.successors("blocks.0#_1")) == {"blocks.0#psi"} != set(before.successors("blocks.0#_1"))
    assert set(after.successors("blocks.0#psi")) == set(before.successors("blocks.0#_1")) == {"blocks.0#_2"}
    assert set(after.predecessors("head#psi")) == {"head#_1", "head#clone", "head#delta_1"}
    assert nx.is_directed_acyclic_graph(after) and nx.has_path(after, "(model)#x", "(model)#output")


def test_multihead_attention_is_drawn_as_its_source_says_and_psi_stands_before_the_projection() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    found = inspect(nn.TransformerEncoder(layer, 1), example_inputs=(torch.zeros(3, 5, 16),))
    picture, at = draw(found), "layers.0.self_attn"
    before, after = edges(picture, "before"), edges(picture, "after")
    assert set(before.predecessors(f"{at}#attention")) == {f"{at}#V", f"{at}#forward"}
    assert set(before.successors(f"{at}#attention")) == {f"{at}.out_proj#call"}
    assert set(after.successors(f"{at}#attention")) == {f"{at}#psi"}
    assert set(after.predecessors(f"{at}#psi")) == {f"{at}#attention", f"{at}#V", f"{at}#delta_attention"}
    assert set(after.successors(f"{at}#psi")) == {f"{at}.out_proj#call"}
    assert not before.has_edge(f"{at}#forward", f"{at}.out_proj#call")
    assert nx.has_path(before, f"{at}.out_proj#call", "layers.0._sa_block#output")
    assert next(node.site for node in picture.nodes if node.id == f"{at}#attention") == f"{at}.attention"
    assert found.facts[f"{at}.attention"].z == (3, 5, 16)


def test_a_model_of_one_piece_is_drawn(tmp_path: Path) -> None:
    found = inspect(nn.GRU(4, 4), "gru")
    assert [(node.id, node.type) for node in draw(found).nodes] == [("(model)", "GRU"), ("(model)#call", "GRU")]
    for form in ("svg", "html", "graphml"):
        write(found, tmp_path / f"gru.{form}")
    relu = draw(inspect(nn.ReLU(), mode="all", example_inputs=(torch.zeros(2, 3),)))
    assert [node.site for node in relu.nodes if node.site] == ["relu", "relu"]


def test_activations_that_no_graph_shows_have_a_node_each() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return F.relu(x) if x.sum() > 0 else torch.tanh(x)

    found = inspect(nn.Sequential(Branching(), nn.Linear(2, 2)))
    picture = draw(found)
    assert {node.refusal for node in picture.nodes if node.refusal} == {refusal.name for refusal in found.plan.refusals}
    assert len(found.plan.refusals) == 2
    assert {edge.source for edge in picture.edges if edge.target.startswith("0#forward.")} == {"0#forward"}


def test_code_without_a_graph_is_shown_with_the_calls_that_it_may_make() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = net(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x) if x.sum() > 0 else self.other(x)

    picture = draw(inspect(Branching()))
    unseen = {(edge.source, edge.target) for edge in picture.edges if not edge.seen}
    assert unseen == {("(model)#forward", "inner#x"), ("(model)#forward", "other#call")}
    opaque = next(node for node in picture.nodes if node.role == "opaque")
    assert "Branching" in opaque.detail and "its forward" in opaque.detail


def test_a_module_called_twice_is_drawn_once_with_the_edges_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.inner(self.inner(x)))

    graph = edges(draw(inspect(Twice(), mode="all")), "before")
    entry = next(name for name in graph if name.startswith("inner#input"))
    assert set(graph.predecessors(entry)) == {"(model)#x", "inner#output"}


def test_json_and_graphml_are_read_back_by_networkx(tmp_path: Path) -> None:
    found = inspect(net(), "net", example_inputs=INPUT)
    graph = as_networkx(draw(found))
    for ending in ("json", "graphml"):
        write(found, tmp_path / f"net.{ending}")
    from_json = nx.node_link_graph(json.loads((tmp_path / "net.json").read_text()), edges="edges")
    from_graphml = nx.read_graphml(tmp_path / "net.graphml")
    for again in (from_json, from_graphml):
        assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
        assert set(again.edges) == set(graph.edges)


def test_still_pictures_with_and_without_graphviz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspect(net(), "net", example_inputs=INPUT)
    write(found, tmp_path / "net.dot", depth=9)
    dot = (tmp_path / "net.dot").read_text()
    assert dot.count("subgraph cluster_") == 4 and dot.count("fillcolor") == 3
    monkeypatch.setenv("PATH", str(tmp_path))  # no graphviz here
    for ending, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        write(found, tmp_path / f"net.{ending}", stage="after")
        assert (tmp_path / f"net.{ending}").read_bytes().startswith(start)


def test_a_still_picture_closes_modules_below_a_depth() -> None:
    picture = draw(inspect(net()))
    shown = closed(picture, depth=1)
    assert {node.id for node in shown.nodes if node.role == "call"} == {"blocks", "head"}
    assert {node.id: node.kind for node in shown.nodes if node.kind} == {"blocks": "folded", "head": "augmented"}
    assert ("(model)#x", "blocks") in {(edge.source, edge.target) for edge in shown.edges}
    assert len(closed(picture).nodes) == sum(node.stage == "both" for node in picture.nodes)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"\.html, \.json"):
        write(inspect(net()), tmp_path / "net.pdf")
    with pytest.raises(ExportError, match="can't be written"):
        write(inspect(net()), tmp_path / "no" / "net.json")


def test_the_page_loads_nothing_and_holds_no_markup_of_the_models(tmp_path: Path) -> None:
    found = inspect(net(), "</script><script>alert(1)</script>", example_inputs=INPUT)
    page = as_html(found, draw(found))
    assert not re.search(r'(src|href)\s*=\s*["\']|@import|url\(', page.partition("<body>")[0])
    assert "<script>alert" not in page and not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert data_of(page)["name"] == "</script><script>alert(1)</script>"
    assert "The Cytoscape Consortium" in page and "Chris Pettitt" in page  # the libraries' licences


@pytest.mark.parametrize(
    ("model", "mode", "says"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), "auto", "A's bias can take"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)), "auto", "can't take"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Softmax(-1)), "all", "Not strict: its result goes into"),
        (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), "strict", "eval mode only"),
        (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), "all", "eval mode only"),
    ],
)
def test_a_panel_says_why_a_site_is_of_its_kind(model: nn.Module, mode: Any, says: str) -> None:
    found = inspect(model, mode=mode)
    assert says in panel(found, found.plan.sites[0]).reason


def test_the_diff_shows_what_the_surgery_writes_and_that_is_what_runs() -> None:
    model = net()
    found = inspect(model)
    blocks, head = rewritten(found.linked, found.plan)
    assert blocks.title == "blocks.{0-1} ×2 (Sequential)"
    added = [line[1:].strip() for line in blocks.diff() if line.startswith("+ ")]
    assert (
        added[0].startswith('_1 = getattr(self, "1")') and "bypass_fx_activation_psi(_1, _0, delta_1, -1)" in added[2]
    )
    bypass_fx.extend(model)
    text = bypass_fx.print_readable(model, print_output=False)
    assert blocks.after.strip() in text and head.after.strip() in text
    bypass_fx.contract(model)
    with pytest.raises(bypass_fx.SurgeryError):
        bypass_fx.print_readable(model)


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(bypass_fx.PlanError, match=r"no activation call 'blocks\.0\.1'"):
        inspect(models.build("mlp"), plan=bypass_fx.plan(net()))


def test_residuals_of_a_run_are_read_back(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "phase": "train1", "residual": None, "residuals": None},
        {"step": 2, "phase": "opt1", "residual": 3.0, "residuals": {"a": 1.0, "b": 2.0}},
        {"step": 3, "phase": "opt2", "residual": 1.0, "residuals": {"a": 1.0}},
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_residuals(tmp_path) == Residuals((2, 3), ("opt1", "opt2"), {"a": (1.0, 1.0), "b": (2.0, None)})
    (tmp_path / "history.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(RunError, match="no residual norms of single sites"):
        read_residuals(tmp_path)
    with pytest.raises(RunError, match="give the folder of a run"):
        read_residuals(tmp_path / "nowhere")


def test_a_plan_prints_as_a_table_for_eyes_and_for_notebooks() -> None:
    plan = bypass_fx.plan(nn.Sequential(net(), nn.Softmax(-1), nn.Tanh()))
    text, page = repr(plan), plan._repr_html_()
    assert re.search(r"^0\.blocks\.\{0-1\}\.1 +×2 +strict +A D W = 0 +gelu +8 +\.0 +\.2 +always$", text, re.MULTILINE)
    assert re.search(r"^refused 1: it stands in no residual block \(mode='all' takes it\): 2$", text, re.MULTILINE)
    assert "<td>0.blocks.{0-1}.1</td><td>×2</td>" in page and "<code>2</code>" in page
    assert math.isclose(len(repr(bypass_fx.Plan(()))), 60, abs_tol=30)


def test_the_panel_of_attention_names_the_values_and_their_part_of_the_projection() -> None:
    found = inspect(Attention(), example_inputs=(torch.zeros(2, 5, 8),))
    (text,) = [panel(found, site) for site in found.plan if site.activation == "attention"]
    assert text.formula[0] == "ψ(V) = attention(Q, K, V) + D V"
    assert text.shapes[0] == ("V", "2 × 2 × 5 × 4", "heads and their channels: δ as 2 × 1 × 4")
    assert text.shapes[2][2] == "qkv (linear, outputs 16 to 23)"
