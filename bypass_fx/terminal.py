"""What the command line shows: the tables of a probe and of stuck channels, warnings and errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bypass_fx.progress import number, plain_table

if TYPE_CHECKING:
    from bypass_fx.probe import ProbeReport
    from bypass_fx.stuck import StuckReport

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


def probed_sites(found: ProbeReport) -> Table:
    """What each site promises."""
    table = plain_table(["site"], ["‖∂L/∂δ‖", "over ‖∂L/∂θ‖"])
    for site in sorted(found.sites, key=lambda site: -site.gradient):
        table.add_row(escape(site.name), number(site.gradient), number(site.ratio))
    return table


def candidate_table(found: ProbeReport) -> Table:
    """What the candidate sets of sites gained, best first."""
    table = plain_table(["tried"], ["sites", "loss", "gain per step"])
    for candidate in found.candidates:
        cells = (str(len(candidate.sites)), number(candidate.loss), f"{candidate.gain:+.2e}")
        table.add_row(escape(candidate.name), *cells)
    return table


_SHOWN = 8  # channels that a line names


def stuck_sites(found: StuckReport) -> Table:
    """The sites with stuck channels, and which these are."""
    table = plain_table(["site"], ["stuck", "of"])
    table.add_column("channels", overflow="fold")
    for site in found.sites:
        if site.stuck:
            more = ", …" if len(site.stuck) > _SHOWN else ""
            which = ", ".join(map(str, site.stuck[:_SHOWN])) + more
            table.add_row(escape(site.name), str(len(site.stuck)), str(len(site.shares)), which)
    return table


def _one_line(message: str) -> str:
    return " ".join(message.split())
