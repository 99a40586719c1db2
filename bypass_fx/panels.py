"""The panels that the figures of runs are made of, each drawn from the events of one run or the mean over several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from bypass_fx.history import Event, Moment, Phase, Record, Score, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = Sequence[Event]
Points = list[tuple[float, float]]  # (epoch, value)

BASELINE, BYPASS, INK, RELATIVE = "#2f6fb0", "#d1495b", "#444444", "#4a8f5a"
SHADES: dict[Phase, str] = {"opt1": "#9a9a9a", "opt2": "#8a5fc0"}
NAMES: dict[Phase, str] = {"train1": "train₁", "opt1": "opt₁", "opt2": "opt₂", "train3": "train₃"}


def records(run: Run) -> list[Record]:
    """The records of a run, in order."""
    return [event for event in run if isinstance(event, Record)]


def moments(run: Run) -> tuple[Moment, ...]:
    """The moments of a run that end a phase."""
    return tuple(event for event in run if isinstance(event, Moment) and event.name != "evaluation")


def epoch_steps(run: Run) -> float:
    """Steps in an epoch."""
    return next(record.step / record.epoch for record in records(run))


def loss(axes: Axes, runs: Sequence[Run]) -> None:
    """Training loss of both arms (Fig. 3a, 4a, 8a)."""
    before = [[(r.epoch, r.loss) for r in records(run) if r.phase == "train1"] for run in runs]
    _mean(axes, before, INK, "before θ*")
    for color, label, name in ((BASELINE, "baseline", "baseline"), (BYPASS, "bypass", "loss")):
        after = [[(r.epoch, getattr(r, name)) for r in records(run) if r.phase != "train1"] for run in runs]
        _mean(axes, [start[-1:] + rest for start, rest in zip(before, map(_present, after), strict=True)], color, label)
    _log_scale(axes)
    axes.set_ylabel("training loss")
    axes.legend(frameon=False)


def residual(axes: Axes, runs: Sequence[Run]) -> None:
    """Σ‖ADW‖ or ‖D‖ over the sites (Fig. 3b, 4c, 8c)."""
    _mean(axes, [[(r.epoch, r.residual) for r in records(run) if r.residual] for run in runs], BYPASS, "bypass")
    _log_scale(axes)
    axes.set_ylabel("Σ‖ADW‖ or ‖D‖")


def step_size(axes: Axes, runs: Sequence[Run]) -> None:
    """‖ω_{t+1} − ω_t‖ of both arms (Fig. 3c; per step, where the paper's Fig. 4f adds up an epoch's)."""
    _both(axes, runs, "step")
    _log_scale(axes)
    axes.set_ylabel("step ‖ω′ − ω‖")


def distance(axes: Axes, runs: Sequence[Run]) -> None:
    """‖θ* − ω_t‖ of both arms (Fig. 3d, 5a)."""
    _both(axes, runs, "distance")
    axes.set_ylabel("distance ‖θ* − ω‖")


def cosines(axes: Axes, runs: Sequence[Run]) -> None:
    """The cosines of ∠θ*Oθ_t, ∠θ*Oω_t and ∠θ_t θ* ω_t (Fig. 5b)."""
    _both(axes, runs, "cosine")
    _mean(axes, [_seen(run, "relative") for run in runs], RELATIVE, "relative")
    axes.set_ylabel("cosine")
    axes.legend(frameon=False)


def relative(axes: Axes, runs: Sequence[Run]) -> None:
    """The cosine of ∠θ_t θ* ω_t, run by run (Fig. 5c)."""
    for run in runs:
        _mean(axes, [_seen(run, "relative")], RELATIVE, "")
    axes.set_ylabel("cosine of ∠θ θ* ω")


def advantage(axes: Axes, runs: Sequence[Run]) -> None:
    """Loss of the bypass minus loss of the baseline, on both sets (Fig. 4b): below 0 the bypass is ahead."""
    _difference(axes, runs, lambda scores: "loss")
    axes.set_ylabel("loss − baseline's")


def metric(axes: Axes, runs: Sequence[Run]) -> None:
    """The training metric of both arms, accuracy where there is one (Fig. 4d)."""
    _mean(axes, [_scores(run, lambda m: _metric(m.baseline, "train")) for run in runs], BASELINE, "baseline")
    _mean(axes, [_scores(run, lambda m: _metric(m.bypass, "train")) for run in runs], BYPASS, "bypass")
    axes.set_ylabel(f"training {_metric_name(runs)}")
    axes.legend(frameon=False)


def metric_advantage(axes: Axes, runs: Sequence[Run]) -> None:
    """Metric of the bypass minus that of the baseline, on both sets (Fig. 4e, 8b): above 0 the bypass is ahead."""
    _difference(axes, runs, _named_metric)
    axes.set_ylabel(f"{_metric_name(runs)} − baseline's")


def shade(axes: Axes, run: Run) -> None:
    """Opt1 grey and opt2 purple, as in the paper; a phase that is not over yet is left white."""
    for phase, start, stop in spans(moments(run)):
        if phase in SHADES:
            axes.axvspan(start / epoch_steps(run), stop / epoch_steps(run), color=SHADES[phase], alpha=0.22, lw=0)


def name_phases(axes: Axes, run: Run) -> None:
    """Write each phase's name above the part of the axis that it takes."""
    for phase, start, stop in spans(moments(run)):
        middle = (start + stop) / 2 / epoch_steps(run)
        axes.text(middle, 1.01, NAMES[phase], transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=INK)


def _both(axes: Axes, runs: Sequence[Run], name: str) -> None:
    """One number of the geometry, of both arms."""
    for color, label, key in ((BASELINE, "baseline", f"baseline_{name}"), (BYPASS, "bypass", name)):
        _mean(axes, [_seen(run, key) for run in runs], color, label)
    axes.legend(frameon=False)


def _difference(axes: Axes, runs: Sequence[Run], name: Callable[[Score], str]) -> None:
    for part, color in (("train", BYPASS), ("test", BASELINE)):

        def gap(moment: Moment, part: str = part) -> float | None:
            if moment.baseline is None:
                return None
            key = name(moment.bypass)
            return float(getattr(moment.bypass, part)[key] - getattr(moment.baseline, part)[key])

        _mean(axes, [_scores(run, gap) for run in runs], color, f"{part}ing set" if part == "train" else "test set")
    axes.axhline(0, color=INK, lw=0.6)
    axes.legend(frameon=False)


def _scores(run: Run, value: Callable[[Moment], float | None]) -> Points:
    found = sorted((event for event in run if isinstance(event, Moment)), key=lambda moment: moment.step)
    return _present([(moment.step / epoch_steps(run), value(moment)) for moment in found])


def _named_metric(score: Score) -> str:
    return next((name for name in score.train if name != "loss"), "loss")


def _metric(score: Score | None, part: str) -> float | None:
    return None if score is None else float(getattr(score, part)[_named_metric(score)])


def _metric_name(runs: Sequence[Run]) -> str:
    return next((_named_metric(moment.bypass) for run in runs for moment in moments(run)), "metric")


def _seen(run: Run, name: str) -> Points:
    return _present([(r.epoch, getattr(r.geometry, name)) for r in records(run) if r.geometry])


def _present(points: Sequence[tuple[float, float | None]]) -> Points:
    return [(x, y) for x, y in points if y is not None]


def _mean(axes: Axes, curves: Sequence[Points], color: str, label: str) -> None:
    """One curve, or the mean of several with their standard deviation as a shade, on the first one's epochs."""
    import numpy as np

    filled = [np.array(curve) for curve in curves if curve]
    if not filled:
        return
    x = filled[0][:, 0]
    y = np.stack(
        [np.interp(x, curve[:, 0], curve[:, 1]) if curve is not filled[0] else curve[:, 1] for curve in filled]
    )
    for first, last in _unbroken(x.tolist()):
        middle = y[:, first:last].mean(0)
        axes.plot(x[first:last], middle, color=color, lw=1, label=label if first == 0 else None)
        if len(filled) > 1:
            spread = y[:, first:last].std(0, ddof=1)
            lower = np.maximum(middle - spread, y[:, first:last].min(0))  # a logarithmic axis has no room below 0
            axes.fill_between(x[first:last], lower, middle + spread, color=color, alpha=0.2, lw=0)


def _unbroken(x: Sequence[float]) -> list[tuple[int, int]]:
    """The parts of a curve without a wide gap: between two bypasses there is no residual to draw."""
    gaps = sorted(b - a for a, b in pairwise(x))
    wide = 20 * gaps[len(gaps) // 2] if gaps else 0
    cuts = [index + 1 for index, (a, b) in enumerate(pairwise(x)) if b - a > wide]
    return list(pairwise([0, *cuts, len(x)]))


def _log_scale(axes: Axes) -> None:
    values: list[Any] = [y for line in axes.get_lines() for y in list(cast(Any, line.get_ydata()))]
    if values and min(values) > 0:
        axes.set_yscale("log")
