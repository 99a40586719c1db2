"""What the command line shows: live progress, the closing table of a run, and errors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bypass_fx.history import Event, History, Moment, Record, Score

if TYPE_CHECKING:
    from bypass_fx.probe import ProbeReport

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


class LiveProgress:
    """Shows the events of a training run: a line with phase, losses, residual and time left, and one line per moment.

    Without a terminal only the moments are shown. Steps after train1 count double in the time left, as there are two
    arms then.
    """

    def __init__(self, out: Console, total_steps: int, train1_steps: int) -> None:
        self._train1 = train1_steps
        self._total = total_steps
        self._progress = Progress(
            TextColumn("[bold]{task.description:<6}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[steps]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left {task.fields[losses]}"),
            console=out,
            transient=True,
            expand=True,
            disable=not out.is_terminal,
        )
        self._task = self._progress.add_task("train1", total=self._work(total_steps), steps="", losses="")

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Moment):
            self._progress.console.print(moment_line(event))
        else:
            self._update(event)

    def _update(self, record: Record) -> None:
        losses = f"loss {number(record.loss)}"
        if record.baseline is not None:
            losses += f" baseline {number(record.baseline)}"
        if record.residual is not None:
            losses += f" residual {record.residual:.2g}"
        self._progress.update(
            self._task,
            completed=self._work(record.step),
            description=record.phase,
            steps=f"{record.step}/{self._total}",
            losses=losses,
        )

    def _work(self, step: int) -> int:
        return step + max(0, step - self._train1)


def moment_line(moment: Moment) -> str:
    """A moment in one line: how both arms stand.

    Example:
        >>> moment_line(Moment("after opt1", 1650, Score(0.01, 0.2, 0.99, 0.95), Score(0.05, 0.3, 0.98, 0.92)))
        '[bold]after opt1[/] (step 1650): training loss 0.0100, baseline 0.0500'
    """
    baseline = f", baseline {number(moment.baseline.train_loss)}" if moment.baseline != moment.bypass else ""
    return f"[bold]{moment.name}[/] (step {moment.step}): training loss {number(moment.bypass.train_loss)}{baseline}"


def result_table(history: History) -> Table:
    """Loss and accuracy on both sets, of both arms, at θ*, after opt1, after proj and at the end."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    has_accuracy = history.moments[0].bypass.train_accuracy is not None
    table.add_column("")
    for header in ("step", "train loss", "test loss", *(("train acc.", "test acc.") if has_accuracy else ())):
        table.add_column(header, justify="right")
    for moment in history.moments:
        table.add_row(moment.name, str(moment.step), *_cells(moment.bypass))
        if moment.name != "θ*":
            table.add_row("  baseline", str(moment.step), *_cells(moment.baseline), style="dim")
    return table


def _cells(score: Score) -> list[str]:
    accuracies = [value for value in (score.train_accuracy, score.test_accuracy) if value is not None]
    return [number(score.train_loss), number(score.test_loss), *(f"{value:.1%}" for value in accuracies)]


def probed_sites(found: ProbeReport) -> Table:
    """What each site promises."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("site", overflow="fold")
    for header in ("‖∂L/∂δ‖", "over ‖∂L/∂θ‖"):
        table.add_column(header, justify="right")
    for site in sorted(found.sites, key=lambda site: -site.gradient):
        table.add_row(escape(site.name), number(site.gradient), number(site.ratio))
    return table


def candidate_table(found: ProbeReport) -> Table:
    """What the candidate sets of sites gained, best first."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tried", overflow="fold")
    for header in ("sites", "loss", "gain per step"):
        table.add_column(header, justify="right")
    for candidate in found.candidates:
        cells = (str(len(candidate.sites)), number(candidate.loss), f"{candidate.gain:+.2e}")
        table.add_row(escape(candidate.name), *cells)
    return table


def number(value: float) -> str:
    """A loss or a norm in four figures or so.

    Example:
        >>> number(0.0123456), number(43210.9), number(1.5e-7)
        ('0.0123', '43211', '1.50e-07')
    """
    if 1e-3 <= abs(value) < 1e6 or value == 0:
        return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.2e}"


def _one_line(message: str) -> str:
    return " ".join(message.split())
