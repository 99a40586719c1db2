"""The paper's figures from the rows of an experiment: Fig. 3, 4, 5, 7 and 8 over the seeds, and Fig. 6 over the arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bypass_fx import figure
from bypass_fx.history import Event, Geometry, Moment, Record, Score

from .experiment import BASELINE, Experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
LAYOUTS = {"7": "8"}  # the same panels


def draw(experiment: Experiment, rows: Sequence[Row]) -> dict[str, Figure]:
    """The figures of one experiment by the paper's numbers; none where nothing has been run."""
    of = {(row["arm"], row["seed"]): row for row in rows if row["experiment"] == experiment.name}
    if "bypass" not in experiment.arms:
        return {"6": sensitivity(rows)}
    runs = [events(row, of[BASELINE, seed]) for (arm, seed), row in of.items() if arm == "bypass"]
    return {name: figure.paper_figure(LAYOUTS.get(name, name), runs) for name in experiment.figures if runs}


def events(bypass: Row, baseline: Row) -> list[Event]:
    """One seed as the events of a run: the curve of train1, then both arms, with scores where both have them."""
    per_epoch = bypass["per_epoch"]
    found: list[Event] = [
        Record(step, step / per_epoch, "train1", loss, None, None, 0.0)
        for step, loss in zip(bypass["before"]["step"], bypass["before"]["loss"], strict=True)
    ]
    own, other = bypass["curve"], baseline["curve"]
    for index, step in enumerate(own["step"]):
        geometry = Geometry(
            own["size"][index], own["distance"][index], own["cosine"][index],
            other["size"][index], other["distance"][index], other["cosine"][index], own["relative"][index],
        )  # fmt: skip
        found.append(
            Record(
                step,
                step / per_epoch,
                own["phase"][index],
                own["loss"][index],
                other["loss"][index],
                own["residual"][index],
                0.0,
                geometry=geometry,
            )
        )
    names = {step: name for name, step in bypass["ends"].items()}
    for at, scores in bypass["scores"].items():
        if at in baseline["scores"]:
            found.append(
                Moment(names.get(int(at), "evaluation"), int(at), _score(scores), _score(baseline["scores"][at]))
            )
    return found


def _score(flat: Mapping[str, float]) -> Score:
    parts = [
        {name.removeprefix(f"{part}_"): value for name, value in flat.items() if name.startswith(part)}
        for part in ("train", "test")
    ]
    return Score(*parts)


PANELS = {
    "n": ("bypass", "n = 100"),
    "γ(t)": ("bypass", "γ = 0.0005t", "γ = 0.05t"),
    "ε": ("bypass", "ε = 0.005", "ε = 0.05"),
}


def sensitivity(rows: Sequence[Row]) -> Figure:
    """Training loss above and ‖ADW‖ below for other n, γ and ε: means over the seeds (Fig. 6)."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12.6, 6.2), dpi=150, layout="constrained")
    grid = picture.subplots(2, len(PANELS), sharex=True)
    for column, (varied, arms) in enumerate(PANELS.items()):
        for name in (BASELINE, *arms):
            chosen = [row for row in rows if row["arm"] == name]
            label = "as in V-B" if name == "bypass" else name
            style = {"color": "#444444", "ls": "--"} if name == BASELINE else {}
            _curve(grid[0, column], chosen, "loss", label, style)
            if name != BASELINE:
                _curve(grid[1, column], chosen, "residual", label, style)
        grid[0, column].set_title(f"other {varied}")
        grid[0, column].legend(frameon=False, fontsize=8)
        grid[1, column].set_xlabel("epoch")
    for axes in grid.flat:
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("training loss")
    grid[1, 0].set_ylabel("‖ADW‖")
    return picture


def _curve(axes: Axes, rows: Sequence[Row], column: str, label: str, style: Mapping[str, Any]) -> None:
    if rows:
        steps = np.array(rows[0]["curve"]["step"])  # a row's records stand where its own phases begin
        curves = [np.array([row["curve"]["step"], row["curve"][column]], dtype=float) for row in rows]
        values = np.array([np.interp(steps, *curve) for curve in curves])
        axes.plot(steps / rows[0]["per_epoch"], values.mean(0), lw=1, label=label, **style)
