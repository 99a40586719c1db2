"""The figures of runs: the picture that each run leaves behind, and those of the paper from any number of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bypass_fx import panels
from bypass_fx.history import History
from bypass_fx.panels import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Callable[["Axes", Sequence[Run]], None]

# The paper's figure → its panels, in its order.
FIGURES: dict[str, tuple[Panel, ...]] = {
    "3": (panels.loss, panels.residual, panels.step_size, panels.distance),
    "4": (
        panels.loss, panels.advantage, panels.residual,
        panels.metric, panels.metric_advantage, panels.step_size,
    ),
    "5": (panels.distance, panels.cosines, panels.relative),
    "8": (panels.loss, panels.metric_advantage, panels.residual),
}  # fmt: skip


def draw(history: History, path: str | Path) -> None:
    """Draw a run into a PNG file: training loss of both arms above, the sum of ‖ADW‖ or ‖D‖ over the sites below."""
    save(figure(history), path)


def save(picture: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(picture)
    picture.savefig(path, format="png")


def figure(history: History) -> Figure:
    """The picture of a run as a matplotlib figure; opt1 is shaded grey and opt2 purple."""
    from matplotlib.figure import Figure

    run: Run = [*history.records, *history.moments, *history.evaluations]
    picture = Figure(figsize=(8, 5.4), dpi=150, layout="constrained")
    loss, residual = picture.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    for axes, panel in ((loss, panels.loss), (residual, panels.residual)):
        _fill(axes, panel, [run])
    residual.set_xlim(0, history.records[-1].epoch)
    residual.set_xlabel("epoch")
    panels.name_phases(loss, run)
    picture.align_ylabels()
    return picture


def paper_figure(name: str, runs: Sequence[Run]) -> Figure:
    """A figure of the paper from the events of runs: of one, or the mean and standard deviation over several.

    Args:
        name: "3", "4", "5" or "8".
        runs: the events of each run, finished or not, with at least one record each.
    """
    from matplotlib.figure import Figure

    chosen = FIGURES[name]
    columns = 2 if len(chosen) == 4 else 3
    rows = -(-len(chosen) // columns)
    picture = Figure(figsize=(4.2 * columns, 3.1 * rows), dpi=150, layout="constrained")
    grid = picture.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, chosen, strict=True):
        _fill(axes, panel, runs)
        axes.set_xlabel("epoch")
    return picture


def _fill(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    panel(axes, runs)
    panels.shade(axes, runs[0])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5)  # six digits each, where there are many epochs
