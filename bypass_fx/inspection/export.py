"""A picture as a file: JSON and GraphML for networkx, DOT, SVG and PNG for the eye, HTML to look around in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bypass_fx.passes.errors import BypassError

from .drawn import render
from .inspection import Inspection
from .page import as_html
from .picture import Picture, Stage, draw
from .residuals import Residuals

if TYPE_CHECKING:
    import networkx as nx


class ExportError(BypassError):
    """A picture can't be written in the form, or to the place, that was asked for."""


def as_networkx(picture: Picture) -> nx.DiGraph[str]:
    """The picture as a networkx.DiGraph: nodes by id, with their parent, role, site and shape; edges carry their stage.

    Example:
        >>> import torch, bypass_fx.inspection as inspection
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = as_networkx(draw(inspection.inspect(net)))
        >>> sorted(graph.predecessors("(model)#_1")), graph.nodes["(model)#_1"]["site"]
        (['(model)#_0'], '1')
    """
    import networkx as nx  # slow to import

    graph: nx.DiGraph[str] = nx.DiGraph(name=picture.name)
    for node in picture.nodes:
        entry = {**asdict(node), "parent": node.parent or ""}
        graph.add_node(entry.pop("id"), **entry)
    for edge in picture.edges:
        graph.add_edge(edge.source, edge.target, stage=edge.stage, seen=edge.seen)
    return graph


def _json(picture: Picture) -> str:
    import networkx as nx

    return json.dumps(nx.node_link_data(as_networkx(picture), edges="edges"), indent=1, ensure_ascii=False)


def _graphml(picture: Picture) -> str:
    import networkx as nx

    return "\n".join(nx.generate_graphml(as_networkx(picture)))


def write(
    inspection: Inspection,
    path: Path,
    *,
    run: Residuals | None = None,
    stage: Stage = "before",
    depth: int | None = None,
) -> None:
    """Write the picture of an inspected model in the form that the file's ending names.

    Args:
        path: ends in .html, .json, .graphml, .dot, .svg or .png.
        run: residual norms that colour the page.
        stage: whether DOT, SVG and PNG show the model "before" or "after" the surgery; the other forms hold both.
        depth: how many levels of modules DOT, SVG and PNG show; as many as a picture bears, if None.

    Raises:
        ExportError: there is no such form, or the file can't be written.
    """
    picture = draw(inspection)
    forms: dict[str, Callable[[], str | bytes]] = {
        ".html": partial(as_html, inspection, picture, run),
        ".json": partial(_json, picture),
        ".graphml": partial(_graphml, picture),
        **{f".{form}": partial(render, picture, form, stage, depth) for form in ("dot", "svg", "png")},
    }
    if path.suffix not in forms:
        raise ExportError(f"{path.name!r} has no ending that names a form; take one of {', '.join(forms)}")
    content: Any = forms[path.suffix]()
    try:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise ExportError(f"{str(path)!r} can't be written ({error}); give --out another place") from error
