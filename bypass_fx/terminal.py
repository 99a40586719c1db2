"""What the command line shows: the tables of an inspection, warnings and errors."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bypass_fx.passes.plan import Affine, Plan

_PIPED_WIDTH = 160  # where there is no terminal, lines are for grep, not for the eye


def console(stderr: bool = False) -> Console:
    """A console on standard output or standard error; wide where it is not a terminal."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=max(made.width, _PIPED_WIDTH))


def show_error(message: str) -> None:
    """One red line on standard error."""
    console(stderr=True).print(f"[red]Error: {escape(_one_line(message))}[/]", soft_wrap=True)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Inside, a Python warning is one yellow line on standard error."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        console(stderr=True).print(f"[yellow]Warning: {escape(_one_line(str(message)))}[/]", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def site_table(plan: Plan) -> Table:
    """The sites of a plan: where, of which kind, and between which affine maps."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("site", "kind", "constraint", "activation"):
        table.add_column(header, overflow="fold")
    table.add_column("width", justify="right")
    for header in ("W", "A", "exact"):
        table.add_column(header, overflow="fold")
    for site in plan.sites:
        constraint = {"folded": "A D W = 0", "augmented": "A D [W b] = 0", "zero": "D = 0"}[site.constraint]
        ends = _affine(site.first), _affine(site.second)
        cells = (site.name, site.kind, constraint, site.activation, str(site.width), *ends, site.exact)
        table.add_row(*map(escape, cells))
    return table


def refusal_table(plan: Plan) -> Table:
    """The refusals of a plan, those of one reason together."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for refusal in plan.refusals:
        groups[refusal.reason, refusal.remedy].append(refusal.name)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("refused", justify="right")
    for header in ("reason", "what would help", "where"):
        table.add_column(header, overflow="fold")
    for (reason, remedy), names in sorted(groups.items(), key=lambda group: -len(group[1])):
        where = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        table.add_row(str(len(names)), *map(escape, (reason, remedy, where)))
    return table


def _affine(affine: Affine | None) -> str:
    return str(affine) if affine else "-"


def _one_line(message: str) -> str:
    return " ".join(message.split())
