"""Still pictures: the graph with its modules closed below some depth, laid out by graphviz, else by networkx."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from bypass_fx.passes.errors import BypassError

from .picture import ROOT, Edge, Node, Picture, Stage

if TYPE_CHECKING:
    import graphviz

MOST = 260  # nodes that a still picture bears
_COLORS = {"folded": "#2f6fd0", "augmented": "#7a3fb8", "zero": "#c76a00", "refused": "#8b8f98"}


def render(picture: Picture, form: str, stage: Stage = "before", depth: int | None = None) -> bytes:
    """The picture as "dot", "svg" or "png".

    Raises:
        BypassError: neither graphviz nor matplotlib is there to draw it.
    """
    from graphviz import ExecutableNotFound

    shown = closed(picture, stage, depth)
    graph = _dot(shown)
    try:
        content: bytes = graph.source.encode() if form == "dot" else graph.pipe(format=form)
    except ExecutableNotFound:
        return _by_networkx(shown, form)
    return content


def closed(picture: Picture, stage: Stage = "before", depth: int | None = None) -> Picture:
    """The picture at one stage, with every module that lies deeper than `depth` closed into a node.

    `depth` 1 shows the model's own children; None goes as deep as a still picture bears.

    Example:
        >>> nodes = Node("(model)", None, "module", "net"), Node("a", "(model)", "module", "a"), Node("a#x", "a", "op", "x")
        >>> [node.id for node in closed(Picture("net", nodes, ()), depth=1).nodes]
        ['(model)', 'a']
    """
    nodes = {node.id: node for node in picture.nodes if node.stage in ("both", stage)}
    chains: dict[str, tuple[str, ...]] = {}
    for node in nodes.values():
        chains[node.id] = (*chains[node.parent], node.id) if node.parent is not None else (node.id,)
    if depth is None:
        sizes = Counter(len(chain) - 1 for chain in chains.values())
        deepest = max(sizes)
        depth = max((d for d in range(1, deepest + 1) if sum(sizes[i] for i in range(d + 1)) <= MOST), default=1)
    within = {name: chain[: depth + 1][-1] for name, chain in chains.items()}
    inner = {chain[depth] for chain in chains.values() if len(chain) > depth + 1}
    held: dict[str, set[str]] = {}
    for node in nodes.values():
        held.setdefault(within[node.id], set()).add(node.kind)
    kept = [
        replace(node, role="call", kind=next((kind for kind in _COLORS if kind in held[name]), ""))
        if name in inner
        else node
        for name, node in nodes.items()
        if within[name] == name
    ]
    edges = {
        (within[edge.source], within[edge.target]): edge for edge in picture.edges if edge.stage in ("both", stage)
    }
    joined = tuple(Edge(a, b, seen=edge.seen) for (a, b), edge in edges.items() if a != b)
    return Picture(picture.name, tuple(kept), joined)


def _dot(picture: Picture) -> graphviz.Digraph:
    import graphviz

    inside: dict[str | None, list[Node]] = {}
    for node in picture.nodes:
        inside.setdefault(node.parent, []).append(node)
    numbers = {node.id: f"n{index}" for index, node in enumerate(picture.nodes)}  # ids hold colons and dots
    boxes = {"fontname": "sans-serif", "fontsize": "10"}

    def fill(graph: graphviz.Digraph, parent: str) -> None:
        for node in inside.get(parent, ()):
            if node.role == "module":
                with graph.subgraph(name=f"cluster_{numbers[node.id]}") as cluster:
                    cluster.attr(label=f"{node.label} · {node.type}", style="rounded", color="#8a93a3", **boxes)
                    fill(cluster, node.id)
                continue
            color = _COLORS.get(node.kind)
            style = {"style": "rounded,filled", "fillcolor": color, "fontcolor": "white"} if color else {}
            label = "\n".join(filter(None, (node.label, node.type)))
            graph.node(numbers[node.id], graphviz.escape(label), tooltip=graphviz.escape(node.id), **style)

    whole = graphviz.Digraph(picture.name)
    whole.attr("node", shape="box", style="rounded", color="#8a93a3", **boxes)
    whole.attr("edge", color="#8a93a3", arrowsize="0.6")
    fill(whole, ROOT)
    for edge in picture.edges:
        whole.edge(numbers[edge.source], numbers[edge.target], style="solid" if edge.seen else "dashed")
    return whole


def _by_networkx(picture: Picture, form: str) -> bytes:
    """In layers from the inputs down, drawn by matplotlib, where graphviz is not installed."""
    import networkx as nx

    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise BypassError(
            f"an {form} needs graphviz (apt install graphviz) or matplotlib (pip install 'bypass_fx[train]'); "
            "write .html instead, which needs neither"
        ) from error
    nodes = {node.id: node for node in picture.nodes if node.role != "module"}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((edge.source, edge.target) for edge in picture.edges)
    whole = nx.condensation(graph)
    for depth, layer in enumerate(nx.topological_generations(whole)):
        for component in layer:
            for name in whole.nodes[component]["members"]:
                graph.nodes[name]["subset"] = depth
    places = {name: (x, -y) for name, (x, y) in nx.multipartite_layout(graph, align="horizontal").items()}
    layers = Counter(graph.nodes[name]["subset"] for name in graph)
    figure = Figure(figsize=(max(6, 1.6 * max(layers.values(), default=1)), max(4, 0.8 * len(layers))))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    labels = {name: node.label for name, node in nodes.items()}
    colors = [_COLORS.get(nodes[name].kind, "#ffffff") for name in graph]
    nx.draw_networkx_nodes(
        graph, places, ax=axes, node_color=colors, edgecolors="#8a93a3", node_shape="s", node_size=900
    )
    nx.draw_networkx_labels(graph, places, labels, ax=axes, font_size=6)
    ahead = {edge: graph.nodes[edge[1]]["subset"] - graph.nodes[edge[0]]["subset"] == 1 for edge in graph.edges}
    for bend in (0.0, 0.4):  # an edge over several layers would hide behind the nodes between
        joined = [edge for edge, straight in ahead.items() if straight == (bend == 0)]
        nx.draw_networkx_edges(
            graph, places, joined, ax=axes, edge_color="#8a93a3", node_size=900, node_shape="s", arrowsize=6,
            connectionstyle=f"arc3,rad={bend}",
        )  # fmt: skip
    heights = [y for _, y in places.values()]
    room = 0.6 * (max(heights) - min(heights)) / len(layers) or 1
    axes.set_ylim(min(heights) - room, max(heights) + room)
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=100)
    return content.getvalue()
