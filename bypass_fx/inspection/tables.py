"""An inspection in the terminal: the sites folded by repeated blocks, the refusals by reason, the totals, and code."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bypass_fx.passes.folding import refusal_rows, site_rows
from bypass_fx.passes.plan import Plan
from bypass_fx.passes.plan_text import HEADERS, cells
from bypass_fx.progress import number, plain_table
from bypass_fx.zoo_sites import ModelSites

from .code import Rewritten
from .inspection import Inspection
from .panel import si
from .residuals import Residuals
from .totals import in_words

_KINDS = {"strict": "[blue]strict[/]", "relaxed": "[yellow]relaxed[/]"}
_WIDE = 120  # columns that the whole table of a usual model takes
_DIFF = {"+": "green", "-": "red", "@": "cyan"}


def site_table(plan: Plan, width: int, run: Residuals | None = None) -> Table:
    """The sites of a plan: where, of which kind, and between which affine maps; with their residual norms in a run.

    On a narrow screen W → A stands below the name, and "(eval)" beside a constraint whose fold is exact in eval mode only.
    """
    wide = width >= _WIDE
    table = plain_table()
    for header in HEADERS if wide else HEADERS[:6]:
        table.add_column(header, overflow="fold", justify="right" if header in ("width", "") else "left")
    for header in ("highest ‖·‖", "last ‖·‖") if run else ():
        table.add_column(header, justify="right")
    for row, text in zip(site_rows(plan.sites), cells(plan), strict=True):
        shown = [_KINDS.get(cell, escape(cell)) for cell in text]
        if not wide:
            *shown, w, a, exact = shown
            shown[0] += f"\n  [dim]{w} → {a}[/]" if row.sites[0].first else ""
            shown[3] += "" if exact == "always" else " (eval)"
        table.add_row(*shown, *(_norms(run, [site.name for site in row.sites]) if run else ()))
    return table


def _norms(run: Residuals, names: Iterable[str]) -> tuple[str, str]:
    """The highest norm over the run and the highest last one, of the sites of a row."""
    series = [[value for value in run.residuals.get(name, ()) if value is not None] for name in names]
    known = [values for values in series if values]
    if not known:
        return "-", "-"
    return number(max(map(max, known))), number(max(values[-1] for values in known))


def refusal_table(plan: Plan) -> Table:
    """The refusals of a plan, those of one reason together."""
    table = plain_table(numbers=["refused"])
    for header in ("reason", "what would help", "where"):
        table.add_column(header, overflow="fold")
    for row in refusal_rows(plan.refusals):
        where = ", ".join(row.names[:3]) + (", …" if len(row.names) > 3 else "")
        table.add_row(str(row.count), *map(escape, (row.reason, row.remedy, where)))
    return table


def totals(inspection: Inspection) -> Text:
    """What the plan adds to the model, estimated from shapes, with what the figures count."""
    return Text("\n".join(in_words(inspection)))


def diff(changes: Iterable[Rewritten]) -> Group:
    """The forwards before and after the surgery, as coloured diffs."""
    parts: list[Text] = []
    for change in changes:
        parts += [Text(""), Text(change.title, style="bold")]
        parts += [Text(line.rstrip(), style=_DIFF.get(line[:1], "")) for line in change.diff()]
    return Group(*parts)


def zoo_table(rows: Iterable[ModelSites], width: int) -> Table:
    """Models with the sites they offer; the narrow table leaves out how large they are."""
    wide = width >= _WIDE
    table = plain_table(["model"], ["parameters", "activations"] if wide else [])
    for header in ("folded", "augm.", "exact", "relaxed", "auto", "all"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        size = (si(row.parameters).strip(), str(row.activations)) if wide else ()
        counts = (row.folded, row.augmented, row.exact, row.relaxed, row.auto, row.all)
        table.add_row(escape(row.model), *size, *map(str, counts))
    return table
