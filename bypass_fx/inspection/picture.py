"""The graph of a model as plain data: nested modules, values, and the edges between them, before and after the surgery."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from bypass_fx.activation import psi
from bypass_fx.passes.link import Linked
from bypass_fx.passes.multihead import is_multihead
from bypass_fx.passes.plan import Site
from bypass_fx.passes.rewrite import rewrite
from bypass_fx.passes.units import Spot, Unit

from .inspection import Inspection

Role = Literal["module", "input", "output", "call", "op", "parameter", "opaque"]
Stage = Literal["both", "before", "after"]


@dataclass(frozen=True, slots=True)
class Node:
    """A module (others lie in it) or a value; `parent` is the module it lies in.

    `site` and `refusal` name what the plan says of an activation call, and `kind` is the site's constraint, or "refused".
    `shape` is "" where it is not known.
    """

    id: str
    parent: str | None
    role: Role
    label: str
    type: str = ""
    detail: str = ""
    shape: str = ""
    site: str = ""
    refusal: str = ""
    kind: str = ""
    stage: Stage = "both"


@dataclass(frozen=True, slots=True)
class Edge:
    """A value that one node hands to another; `seen` is False for a call that code without a graph may make."""

    source: str
    target: str
    stage: Stage = "both"
    seen: bool = True


@dataclass(frozen=True, slots=True)
class Picture:
    """The graph of a model; every parent stands before the nodes in it."""

    name: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


ROOT = "(model)"


@dataclass(frozen=True, slots=True)
class _Attention:
    """The ids of what is drawn inside a torch.nn.MultiheadAttention: its values, their mixing, and its output projection."""

    values: str
    mixed: str
    result: str


def draw(inspection: Inspection) -> Picture:
    """The picture of an inspected model."""
    drawing = _Drawing(inspection)
    return Picture(inspection.name, tuple(drawing.in_order()), tuple(drawing.edges.values()))


class _Drawing:
    def __init__(self, inspection: Inspection) -> None:
        self.inspection, self.linked = inspection, inspection.linked
        self.nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str, Stage], Edge] = {}
        self.calls: dict[str, str] = {}  # the first call of each module that is a node, by its path
        self.read_by: dict[str, list[Edge]] = {}
        self.attentions: dict[str, _Attention] = {}  # of each torch.nn.MultiheadAttention, by its path
        self.units = [unit for unit in self.linked.graphs if _is_drawn(self.linked, unit)]
        for unit in self.units:
            for node in self.linked.graphs[unit].graph.nodes:
                self.value(unit, node)
        for path in self.linked.failures:
            self.opaque(path)
        for unit in self.units:
            if unit.method != "forward":
                self.helper(unit)
        for path in sorted(self.linked.unseen):
            self.unseen(path)
        for path in self.linked.failures:
            if is_multihead(self.linked.modules[path]):
                self.attention(path)
        self.connect()
        self.mark()
        for unit in self.units:
            self.bypass(unit)
        for site in self.inspection.plan.sites:
            inside = self.attentions.get(site.owner)
            if inside is not None:
                self.insert_psi(site, inside.mixed, inside.values, f"{site.owner}#psi", f"{site.owner}#{site.delta}")
        joined = {end for edge in self.edges.values() for end in (edge.source, edge.target)}
        for node in list(self.nodes.values()):  # what no code calls, such as a dropout that a fused function took over
            if node.role != "module" and node.id not in joined and not (node.site or node.refusal):
                del self.nodes[node.id]
        if all(node.role == "module" for node in self.nodes.values()):
            self.whole()

    def in_order(self) -> Iterator[Node]:
        """The nodes, modules that hold any first, outer ones before inner ones."""
        around: set[str] = set()
        for node in self.nodes.values():
            parent = node.parent if node.role != "module" else None
            while parent is not None and parent not in around:
                around.add(parent)
                parent = self.nodes[parent].parent
        modules = [self.nodes[name] for name in around]
        yield from sorted(modules, key=lambda node: (node.id != ROOT, node.id.count("."), node.id))
        yield from (node for node in self.nodes.values() if node.role != "module")

    def module(self, path: str) -> str:
        """The box of a module, inside those of the modules around it."""
        name = path or ROOT
        if name not in self.nodes:
            module = self.linked.modules[path]
            parent = self.module(path.rpartition(".")[0]) if path else None
            label = path.rpartition(".")[2] or self.inspection.name
            self.nodes[name] = Node(name, parent, "module", label, type(module).__name__)
        return name

    def value(self, unit: Unit, node: fx.Node) -> None:
        """One value of a unit; calls of modules with a graph are those modules' boxes."""
        if self.stands_for(unit, node) != _name(unit, node) or (node.op == "placeholder" and not node.users):
            return
        shape = self.inspection.shape(Spot(unit, node))
        text = " × ".join(map(str, shape)) if shape is not None else ""
        made = Node(_name(unit, node), self.module(unit.path), "op", str(node.target), shape=text)
        if node.op == "call_module":
            path = self.linked.child(unit, node)
            self.calls.setdefault(path, made.id)
            module = self.linked.modules[path]
            made = replace(made, role="call", type=type(module).__name__, detail=module.extra_repr())
        elif node.op == "get_attr":
            made = replace(made, role="parameter")
        elif node.op == "placeholder":
            made = replace(made, role="input")
        elif node.op == "output":
            made = replace(made, role="output", label="result")
        elif node.op == "call_function":
            made = replace(made, label=getattr(node.target, "__name__", made.label), detail=_arguments(node))
        else:
            made = replace(made, label=f".{node.target}", detail=_arguments(node))
        self.nodes[made.id] = made

    def stands_for(self, unit: Unit, node: fx.Node) -> str:
        """The id of the node that shows the value: for a module's call, what stands inside that module's box."""
        if node.op == "call_module":
            callee = self.linked.callee(Spot(unit, node))
            if callee is not None:
                output = next(iter(reversed(self.linked.graphs[callee].graph.nodes)))
                return _name(callee, output)
            child = self.linked.child(unit, node)
            if child in self.attentions:
                return self.attentions[child].result
            if child in self.linked.failures:
                return f"{child}#forward"
        return _name(unit, node)

    def taken_by(self, unit: Unit, node: fx.Node) -> str:
        """The id of the node that takes what a value is computed from."""
        child = self.linked.child(unit, node) if node.op == "call_module" else None
        return f"{child}#forward" if child in self.attentions else self.stands_for(unit, node)

    def opaque(self, path: str) -> None:
        """A forward without a graph."""
        reason = str(self.linked.failures[path])
        name = f"{path or ROOT}#forward"
        self.nodes[name] = Node(name, self.module(path), "opaque", "forward", "no graph", reason)

    def helper(self, unit: Unit) -> None:
        """A helper method of a forward without a graph, which calls it."""
        for node in self.linked.graphs[unit].graph.nodes:
            if node.op == "placeholder":
                self.join(f"{unit.path or ROOT}#forward", _name(unit, node), seen=False)

    def unseen(self, path: str) -> None:
        """A module that code without a graph may call: an edge from the nearest such code, and a node if it has none."""
        caller = next((above for above in _above(path) if above in self.linked.failures), None)
        module = self.linked.modules[path]
        targets = [
            node.id
            for unit in self.linked.variants(path)
            if unit in self.units
            for node in self.nodes.values()
            if node.role == "input" and node.id.startswith(_prefix(unit))
        ]
        if path in self.linked.failures:
            targets = [f"{path}#forward"]
        elif not self.linked.variants(path) and not module._modules:
            targets = [self.called(path)]
        if caller is not None:
            for target in targets:
                self.join(f"{caller or ROOT}#forward", target, seen=False)

    def whole(self) -> None:
        """A model of one piece, such as a torch.nn.GRU."""
        module = self.linked.model
        made = Node(
            f"{ROOT}#call", self.module(""), "call", self.inspection.name, type(module).__name__, module.extra_repr()
        )
        self.nodes[made.id] = made

    def called(self, path: str) -> str:
        """A node for a module that no graph is seen to call; its id."""
        module, (above, _, label) = self.linked.modules[path], path.rpartition(".")
        made = Node(f"{path}#call", self.module(above), "call", label, type(module).__name__, module.extra_repr())
        self.nodes[made.id] = made
        self.calls.setdefault(path, made.id)
        return made.id

    def attention(self, path: str) -> None:
        """What the source text of torch.nn.MultiheadAttention shows: values, their mixing, and the projection behind it."""
        module, forward = self.linked.modules[path], f"{path or ROOT}#forward"
        out = f"{path}.out_proj".lstrip(".")
        values, mixed = f"{path or ROOT}#V", f"{path or ROOT}#attention"
        result = self.calls.get(out) or self.called(out)
        parent = self.module(path)
        fused = module._parameters.get("in_proj_weight") is not None
        weight = "the last third of in_proj_weight" if fused else "v_proj_weight"
        self.nodes[forward] = Node(forward, parent, "input", "query, key, value")
        self.nodes[values] = Node(values, parent, "op", "V", "W_V", f"values, projected by {weight}")
        self.nodes[mixed] = Node(mixed, parent, "op", "attention", "", "softmax(Q Kᵀ / √d) V, head by head")
        self.edges.pop((forward, result, "both"), None)
        for source, target in ((forward, values), (forward, mixed), (values, mixed), (mixed, result)):
            self.join(source, target)
        self.attentions[path] = _Attention(values, mixed, result)

    def join(self, source: str, target: str, stage: Stage = "both", seen: bool = True) -> None:
        known = source in self.nodes and target in self.nodes and source != target
        if known and (source, target, stage) not in self.edges:
            self.edges[source, target, stage] = edge = Edge(source, target, stage, seen)
            self.read_by.setdefault(source, []).append(edge)

    def connect(self) -> None:
        """The edges of the linked dataflow, with each call of a traced module replaced by what stands in its box."""
        ends: dict[tuple[str, int, str, str], tuple[str, str]] = {}
        for unit in self.units:
            for node in self.linked.graphs[unit].graph.nodes:
                ends[*unit, node.name] = self.stands_for(unit, node), self.taken_by(unit, node)
        for source, target in self.linked.digraph.edges:
            if source in ends and target in ends:
                self.join(ends[source][0], ends[target][1])

    def mark(self) -> None:
        """Note the plan's sites and refusals on their nodes."""
        plan = self.inspection.plan
        for site in plan.sites:
            name = self.spot_of(site.name, site.owner, site.activation)
            self.nodes[name] = replace(self.nodes[name], site=site.name, kind=site.constraint)
        for refusal in plan.refusals:
            name = self.spot_of(refusal.name, refusal.owner, refusal.activation)
            self.nodes[name] = replace(self.nodes[name], refusal=refusal.name, kind="refused")

    def spot_of(self, call: str, owner: str, activation: str) -> str:
        """The id of an activation call; where no graph shows it, of a node made for it beside its owner's code."""
        spot, inside = self.inspection.spots.get(call), self.attentions.get(owner)
        likely = inside and inside.mixed, spot and _name(*spot), self.calls.get(owner)
        for name in likely:
            if name in self.nodes:
                return name
        made = Node(f"{owner or ROOT}#forward.{call}", self.module(owner), "op", activation)
        self.nodes[made.id] = made
        self.join(f"{owner or ROOT}#forward", made.id, seen=False)
        return made.id

    def bypass(self, unit: Unit) -> None:
        """What the surgery adds to a unit: ψ with its δ behind every σ, read off the rewritten graph."""
        sites = [site for site in self.inspection.plan.sites if (site.owner, site.method) == (unit.path, unit.method)]
        if not sites:
            return
        owned = self.linked.graphs[unit]
        graph = rewrite(self.linked, unit, owned, sites, psi)
        at = {owned.names[site.call].name: site for site in sites}
        for node in [node for node in graph.nodes if node.target is psi]:
            self.write_psi(unit, node, at[node.args[0].name])

    def write_psi(self, unit: Unit, node: fx.Node, site: Site) -> None:
        sigma, kept, delta = (value for value in node.args[:3] if isinstance(value, fx.Node))
        z = self.names_of(unit, kept)
        if kept.name not in {other.name for other in self.linked.graphs[unit].graph.nodes}:
            copy, before = _name(unit, kept), kept.all_input_nodes[0]
            self.nodes[copy] = Node(copy, self.module(unit.path), "op", "clone", "", "σ overwrites z", stage="after")
            self.join(self.names_of(unit, before), copy, "after")
            z = copy
        self.insert_psi(site, _name(unit, sigma), z, _name(unit, node), _name(unit, delta))

    def insert_psi(self, site: Site, sigma: str, z: str, name: str, delta: str) -> None:
        """ψ and its δ behind σ: after the surgery, what read σ reads ψ."""
        parent = self.nodes[sigma].parent
        detail, shape = f"ψ(z) = σ(z) + D z, σ = {site.activation}", self.nodes[sigma].shape
        self.nodes[name] = Node(
            name, parent, "op", "ψ", "D-activation", detail, shape, site.name, kind=site.constraint, stage="after"
        )
        about = f"D = diag(δ), {site.width} coefficients, 0 at first"
        self.nodes[delta] = Node(delta, parent, "parameter", site.delta, "δ", about, str(site.width), stage="after")
        for edge in self.read_by.pop(sigma, []):
            del self.edges[sigma, edge.target, edge.stage]
            self.join(sigma, edge.target, "before", edge.seen)
            self.join(name, edge.target, "after", edge.seen)
        for value in (sigma, z, delta):
            self.join(value, name, "after")

    def names_of(self, unit: Unit, copied: fx.Node) -> str:
        """The id of a value of the rewritten graph, which names values as the original does."""
        original = next((node for node in self.linked.graphs[unit].graph.nodes if node.name == copied.name), None)
        return self.stands_for(unit, original) if original is not None else _name(unit, copied)


def _is_drawn(linked: Linked, unit: Unit) -> bool:
    """Whether a unit's inside is shown: activations and affine look-alikes are nodes, unless no graph calls them, and a
    helper method is shown where it calls a module or an activation.
    """
    if unit.method != "forward":
        calls_module = any(node.op == "call_module" for node in linked.graphs[unit].graph.nodes)
        return calls_module or bool(linked.activations_in(unit))
    leaf = linked.activation_module(unit.path) or linked.look_alike(unit.path)
    return not leaf or not unit.path or unit.path in linked.unseen


def _prefix(unit: Unit) -> str:
    variant = f"@{unit.variant}" if unit.variant else ""
    method = f".{unit.method}" if unit.method != "forward" else ""
    return f"{unit.path or ROOT}{method}{variant}#"


def _name(unit: Unit, node: fx.Node) -> str:
    return _prefix(unit) + node.name


def _above(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _arguments(node: fx.Node) -> str:
    """The plain arguments of a call."""
    given = [repr(value) for value in node.args if not isinstance(value, fx.Node)]
    given += [f"{key}={value!r}" for key, value in node.kwargs.items() if not isinstance(value, fx.Node)]
    return ", ".join(given)[:200]
