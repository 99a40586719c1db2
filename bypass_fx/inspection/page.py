"""One HTML file that shows a model's graph: nested, searchable, before and after the surgery; it opens offline."""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from bypass_fx.passes.folding import summary

from .inspection import Inspection
from .panel import panel
from .picture import Picture
from .residuals import Residuals
from .totals import in_words

_LIBRARIES = ("cytoscape", "dagre")
_SCRIPTS = ("parts.js", "graph.js", "view.js", "page.js")


def as_html(inspection: Inspection, picture: Picture, run: Residuals | None = None) -> str:
    """The page, with its libraries in it; coloured by the residual norms of a run, if one is given."""
    data = json.dumps(page_data(inspection, picture, run), ensure_ascii=False, separators=(",", ":"))
    parts = {
        "TITLE": html.escape(f"{inspection.name}: bypass_fx"),
        "STYLE": _asset("page.css"),
        "DATA": data.replace("<", "\\u003c"),
        "LIBRARIES": "\n".join(map(_library, _LIBRARIES)),
        "SCRIPT": "\n".join(map(_asset, _SCRIPTS)),
    }
    page = _asset("page.html")
    for name, text in parts.items():
        before, _, behind = page.partition(f"<!--{name}-->")
        page = before + text + behind
    return page


def page_data(inspection: Inspection, picture: Picture, run: Residuals | None = None) -> dict[str, Any]:
    """What the page's script reads: nodes, edges, and the text on sites and refusals."""
    plan = inspection.plan
    return {
        "name": inspection.name,
        "summary": f"{summary(plan)}; mode {plan.mode}",
        "totals": in_words(inspection),
        "nodes": [_short(asdict(node), stage="both") for node in picture.nodes],
        "edges": [_short(asdict(edge), stage="both", seen=True) for edge in picture.edges],
        "sites": {site.name: asdict(panel(inspection, site)) for site in plan.sites},
        "refusals": {refusal.name: asdict(refusal) for refusal in plan.refusals},
        "run": asdict(run) if run else None,
    }


def _short(entry: dict[str, Any], **usual: Any) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value not in ("", None) and usual.get(key) != value}


def _library(name: str) -> str:
    """A library with its licence, which goes wherever the page goes."""
    return f"/*!\n{_asset(f'vendor/{name}.LICENSE').strip()}\n*/\n{_asset(f'vendor/{name}.min.js')}"


def _asset(name: str) -> str:
    return files("bypass_fx.inspection").joinpath("web", name).read_text(encoding="utf-8")
