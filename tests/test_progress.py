"""What is shown while a run goes on: one line with everything in it, and a line for each moment that stays."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from bypass_fx.history import Moment, Record, Score
from bypass_fx.phases import Lengths
from bypass_fx.progress import LiveProgress

LENGTHS = Lengths(epoch=10, train1=100, opt1=50, opt2=50, train3=0, cycles=1)


def _shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> str:
    """Of a run whose steps take a hundredth of a second."""
    seconds = iter([1.0, 1.5, 2.0])
    monkeypatch.setattr("bypass_fx.progress.time.monotonic", lambda: next(seconds))
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120, color_system=None)
    with LiveProgress(console, LENGTHS) as live:
        live(Record(50, 5.0, "train1", 0.7, None, None, 0.5))
        live(Record(100, 10.0, "train1", 0.6, None, None, 1.0))
        live(Moment("θ*", 100, Score({"loss": 0.5}, {"loss": 0.9}), None))
        live(Record(150, 15.0, "opt2", 0.25, 0.5, 0.01, 1.5, cycle=2, out=3))
        live._progress.refresh()
        return screen.getvalue()


def test_a_line_tells_phase_steps_losses_norm_sites_out_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = _shown(monkeypatch, terminal=True)
    line = text[text.rindex("opt2 (2)") :]
    assert re.match(
        r"opt2 \(2\) +\S+ +150/200 +[-:\d]+ left loss 0.2500 baseline 0.5000 ‖ADW‖ 0.01 3 out 100 steps/s", line
    )


def test_steps_of_two_arms_count_double_in_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveProgress(Console(file=io.StringIO()), LENGTHS)
    live(Record(150, 15.0, "opt1", 0.25, 0.5, 0.01, 1.5))
    (task,) = live._progress.tasks
    assert (task.completed, task.total) == (100 + 2 * 50, 100 + 2 * 100)


def test_without_a_terminal_the_moments_alone_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _shown(monkeypatch, terminal=False) == "θ* (step 100): training loss 0.5000\n"
