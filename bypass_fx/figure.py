"""The picture of a run, after the paper's Fig. 4: the loss of both arms, and how far the model is out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bypass_fx.history import History, Phase, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE, BYPASS, INK = "#2f6fb0", "#d1495b", "#444444"
SHADES: dict[Phase, str] = {"opt1": "#9a9a9a", "opt2": "#8a5fc0"}
NAMES: dict[Phase, str] = {"train1": "train₁", "opt1": "opt₁", "opt2": "opt₂", "train3": "train₃"}


def draw(history: History, path: str | Path) -> None:
    """Draw a run into a PNG file: training loss of both arms above, the sum of ‖ADW‖ or ‖D‖ over the sites below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture = figure(history)
    FigureCanvasAgg(picture)
    picture.savefig(path, format="png")


def figure(history: History) -> Figure:
    """The picture of a run as a matplotlib figure; opt1 is shaded grey and opt2 purple."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 5.4), dpi=150, layout="constrained")
    loss, residual = picture.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    _draw_losses(loss, history.records)
    _draw_residual(residual, history.records)
    for axes in (loss, residual):
        _shade(axes, history)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
    _name_phases(loss, history)
    residual.set_xlabel("epoch")
    residual.set_xlim(0, history.records[-1].epoch)
    picture.align_ylabels()
    return picture


def _draw_losses(axes: Axes, records: tuple[Record, ...]) -> None:
    before = [(record.epoch, record.loss) for record in records if record.phase == "train1"]
    after = [record for record in records if record.phase != "train1"]
    baseline = [(record.epoch, record.baseline) for record in after if record.baseline is not None]
    bypass = [(record.epoch, record.loss) for record in after]
    for points, color, label in (
        (before, INK, "before θ*"),
        (before[-1:] + baseline, BASELINE, "baseline"),
        (before[-1:] + bypass, BYPASS, "bypass"),
    ):
        axes.plot([x for x, _ in points], [y for _, y in points], color=color, lw=1, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)


def _draw_residual(axes: Axes, records: tuple[Record, ...]) -> None:
    out = [(record.epoch, record.residual) for record in records if record.residual]
    axes.plot([epoch for epoch, _ in out], [value for _, value in out], color=BYPASS, lw=1.2)
    if out:
        axes.set_yscale("log")
    axes.set_ylabel("Σ‖ADW‖ or ‖D‖")


def _shade(axes: Axes, history: History) -> None:
    for phase, (start, stop) in history.spans().items():
        if phase in SHADES:
            axes.axvspan(
                start / history.steps_per_epoch, stop / history.steps_per_epoch, color=SHADES[phase], alpha=0.22, lw=0
            )


def _name_phases(axes: Axes, history: History) -> None:
    for phase, (start, stop) in history.spans().items():
        middle = (start + stop) / 2 / history.steps_per_epoch
        axes.text(middle, 1.01, NAMES[phase], transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=INK)
