"""A plan as people read it: a table in plain text, and one in HTML for notebooks."""

from __future__ import annotations

import html
import shutil
import textwrap
from typing import TYPE_CHECKING

from .folding import refusal_rows, site_rows, summary

if TYPE_CHECKING:
    from .plan import Plan

HEADERS = ("site", "", "kind", "constraint", "activation", "width", "W", "A", "exact")
CONSTRAINTS = {"folded": "A D W = 0", "augmented": "A D [W b] = 0", "zero": "D = 0"}


def cells(plan: Plan) -> list[tuple[str, ...]]:
    """The rows of a plan's table, one for every group of equal sites, under `HEADERS`."""
    found: list[tuple[str, ...]] = []
    for row in site_rows(plan.sites):
        site, times = row.sites[0], f"×{len(row.sites)}" if len(row.sites) > 1 else ""
        constraint = CONSTRAINTS[site.constraint]
        found.append(
            (
                row.name, times, site.kind, constraint, site.activation, str(site.width), row.first, row.second,
                site.exact,
            )
        )  # fmt: skip
    return found


def as_text(plan: Plan) -> str:
    """The plan as lines of text; reasons wrap at the width of the terminal."""
    rows = [HEADERS, *cells(plan)] if plan.sites else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"Plan with mode={plan.mode!r}: {summary(plan)}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    columns = max(shutil.get_terminal_size().columns, 40)
    for refused in refusal_rows(plan.refusals):
        remedy = f" ({refused.remedy})" if refused.remedy else ""
        line = f"refused {refused.count}: {refused.reason}{remedy}: {', '.join(refused.names)}"
        lines.append(textwrap.fill(line, columns, subsequent_indent="    ", break_on_hyphens=False))
    return "\n".join(lines)


def as_html(plan: Plan) -> str:
    """The plan as HTML: a table of the sites, and the refusals below it, folded away."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in HEADERS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells(plan))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if plan.sites else ""
    items = "".join(
        f"<li>{row.count} × {html.escape(row.reason)}"
        f"{f' ({html.escape(row.remedy)})' if row.remedy else ''}: <code>{html.escape(', '.join(row.names))}</code></li>"
        for row in refusal_rows(plan.refusals)
    )
    refused = f"<details><summary>{len(plan.refusals)} refused</summary><ul>{items}</ul></details>" if items else ""
    return f"<p>{html.escape(summary(plan))} (mode {plan.mode})</p>{table}{refused}"


def no_site(plan: Plan, select: object) -> str:
    """Why a plan has no site, and what to do."""
    if select is not None:
        return f"select={select!r} names no site of this model: see bypass_fx.plan(model).sites"
    if not plan.refusals:
        return "this model calls no element-wise activation that can be seen, so there is nothing to bypass"
    reasons = sorted({f"{refusal.name}: {refusal.reason}" for refusal in plan.refusals})
    more = f" (and {len(reasons) - 2} more)" if len(reasons) > 2 else ""
    remedy = "" if plan.mode == "all" else "; mode='all' takes every activation whose channels are known"
    return f"mode={plan.mode!r} finds no site in this model: {'; '.join(reasons[:2])}{more}{remedy}"
