"""How a training run shows: live, in a line with a bar, and at the end in a table."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bypass_fx.history import Event, History, Moment, Record, Score
from bypass_fx.phases import Lengths


class LiveProgress:
    """Shows the events of a training run: a line with phase, losses, ‖ADW‖, sites still out, steps a second and time left.

    A line for each moment stays. Without a terminal only the moments are shown. Where there is a baseline, steps after
    train1 count double in the time left, as there are two arms then.
    """

    def __init__(self, out: Console, lengths: Lengths, baseline: bool = True) -> None:
        self._total, self._train1 = lengths.total, lengths.train1
        self._twice = baseline
        self._marks: deque[tuple[int, float]] = deque(maxlen=20)
        self._progress = Progress(
            TextColumn("[bold]{task.description:<6}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[steps]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left {task.fields[numbers]}"),
            console=out,
            transient=True,
            expand=True,
            disable=not out.is_terminal,
        )
        self._task = self._progress.add_task("train1", total=self._work(self._total), steps="", numbers="")

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
        self._marks.append((record.step, time.monotonic()))
        phase = record.phase if record.cycle < 2 else f"{record.phase} ({record.cycle})"
        self._progress.update(
            self._task,
            completed=self._work(record.step),
            description=phase,
            steps=f"{record.step}/{self._total}",
            numbers=record_line(record, self._rate()),
        )

    def _rate(self) -> float | None:
        """Steps a second over the last records."""
        (first, began), (last, now) = self._marks[0], self._marks[-1]
        return (last - first) / (now - began) if now > began else None

    def _work(self, step: int) -> int:
        return step + max(0, step - self._train1) * self._twice


def record_line(record: Record, rate: float | None = None) -> str:
    """The numbers of a record in a line.

    Example:
        >>> record_line(Record(10, 1.0, "opt2", 0.5, 0.6, 0.01, 1.0, out=3), 99.4)
        'loss 0.5000 baseline 0.6000 ‖ADW‖ 0.01 3 out 99 steps/s'
    """
    parts = [f"loss {number(record.loss)}"]
    if record.baseline is not None:
        parts.append(f"baseline {number(record.baseline)}")
    if record.residual is not None:
        parts.append(f"‖ADW‖ {record.residual:.2g}")
    if record.out is not None:
        parts.append(f"{record.out} out")
    if rate is not None:
        parts.append(f"{rate:.0f} steps/s" if rate >= 10 else f"{rate:.1f} steps/s")
    return " ".join(parts)


def moment_line(moment: Moment) -> str:
    """A moment in one line: how both arms stand.

    Example:
        >>> def score(loss):
        ...     return Score({"loss": loss}, {"loss": 0.2})
        >>> moment_line(Moment("after opt1", 1650, score(0.01), score(0.05)))
        '[bold]after opt1[/] (step 1650): training loss 0.0100, baseline 0.0500'
    """
    differs = moment.baseline is not None and moment.baseline != moment.bypass
    baseline = f", baseline {number(moment.baseline.train_loss)}" if differs and moment.baseline else ""
    return f"[bold]{moment.title}[/] (step {moment.step}): training loss {number(moment.bypass.train_loss)}{baseline}"


def result_table(history: History) -> Table:
    """Loss and metrics on both sets, of both arms, at the moments of the run."""
    table = plain_table()
    table.add_column("")
    table.add_column("step", justify="right")
    for name in history.moments[0].bypass.train:
        for part in ("train", "test"):
            table.add_column(f"{part} {'acc.' if name == 'accuracy' else name}", justify="right")
    for moment in history.moments:
        table.add_row(moment.title, str(moment.step), *_cells(moment.bypass))
        if moment.baseline is not None and moment.title != "θ*":
            table.add_row("  baseline", str(moment.step), *_cells(moment.baseline), style="dim")
    return table


def _cells(score: Score) -> list[str]:
    return [
        f"{scores[name]:.1%}" if name == "accuracy" else number(scores[name])
        for name in score.train
        for scores in (score.train, score.test)
    ]


def plain_table(names: Iterable[str] = (), numbers: Iterable[str] = ()) -> Table:
    """A table without lines: columns of names, which may take several lines, and of numbers, to the right of them."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in names:
        table.add_column(header, overflow="fold")
    for header in numbers:
        table.add_column(header, justify="right")
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
