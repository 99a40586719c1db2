"""The tables and the figure of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from benchmarks.results_file import ResultsFile

from . import verdict
from .protocol import Protocol, Stage
from .record import costs
from .tasks import Task

Row = dict[str, Any]


def rows_of(file: ResultsFile, task: str, budget: str = "steps") -> dict[str, Row]:
    """The rows of a task by their arm."""
    return {row["arm"]: row for row in file if row["kind"] == "arm" and row["task"] == task and row["budget"] == budget}


def reference(file: ResultsFile, task: str) -> str:
    """The best plain arm of a task at equal steps."""
    rows = rows_of(file, task)
    return verdict.best_plain({arm: row["loss"] for arm, row in rows.items() if row["family"] == "plain"})


def ratios(file: ResultsFile, task: str, arm: str, budget: str = "steps", against: str = "") -> list[float] | None:
    """An arm's losses over those of the best plain arm, or of another, at equal steps; None where it did not run."""
    row = rows_of(file, task, budget).get(arm)
    if row is None:
        return None
    return verdict.ratios(row["loss"], rows_of(file, task)[against or reference(file, task)]["loss"])


def summary(protocol: Protocol, stage: Stage, file: ResultsFile) -> str:
    """The tables in Markdown."""
    tasks = [task for task in protocol.of(stage) if "continue" in rows_of(file, task.name)]
    missing = [task.name for task in protocol.of(stage) if task not in tasks]
    length = "full" if protocol.full else "shortened"
    lines = [
        f"Stage {stage}, {length} lengths. Final training loss over that of the task's best plain arm, from the same θ\\*: "
        "geometric mean over the seeds with a bootstrap interval of 95 %; won, tied (±0.1 %) and lost seeds; the worst "
        "ratio to `continue`; the test loss over the best plain arm's, geometric mean; test accuracy, median; what the "
        "arm's run costs over plain training in time.",
        "",
        *([f"Tasks not run yet: {', '.join(missing)}.", ""] if missing else []),
        "## All tasks with every seed",
        "",
    ]
    whole = [task.name for task in tasks if not task.arms]
    lines += _overall(protocol, stage, file, whole)
    lines += _by_stuck(file, whole)
    for task in tasks:
        rows, best = rows_of(file, task.name), reference(file, task.name)
        first = rows["continue"]
        lines += [
            "",
            f"## {task.name}",
            "",
            f"{len(first['seeds'])} seeds from {first['seeds'][0]} on, θ\\* after {first['train1']} steps at a loss of "
            f"{geometric_mean(first['at_start']):.4g}, then {first['steps']} steps. Best plain arm: {best}, "
            f"{geometric_mean(max(loss, verdict.FLOOR) for loss in rows[best]['loss']):.4g}.",
            *_missing(protocol, stage, task, rows),
            "",
            *_HEAD,
        ]
        prices = costs(file, task.name)
        for budget in ("steps", "time"):
            for arm, row in rows_of(file, task.name, budget).items():
                name = arm if budget == "steps" else f"{arm}, equal time ({row['steps']} steps)"
                lines.append(_line(name, file, task.name, arm, budget, row, rows[best], prices[arm]))
    return "\n".join(lines) + "\n"


def _missing(protocol: Protocol, stage: Stage, task: Task, rows: dict[str, Row]) -> list[str]:
    arms = [arm.name for arm in protocol.arms(stage, task) if arm.name not in rows]
    return ["", f"Not run yet: {'; '.join(arms)}."] if arms else []


_HEAD = (
    "| arm | ratio | interval | won | tied | lost | worst to continue | rolled back | test loss | test accuracy | cost |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def _line(name: str, file: ResultsFile, task: str, arm: str, budget: str, row: Row, best: Row, price: float) -> str:
    values = ratios(file, task, arm, budget)
    to_continue = ratios(file, task, arm, budget, "continue")
    assert values and to_continue
    test = geometric_mean(verdict.ratios(row["test_loss"], best["test_loss"]))
    accuracy = f"{100 * median(row['test_accuracy']):.1f} %" if "test_accuracy" in row else ""
    return (
        f"| {name} | {_numbers([values])} | {max(to_continue):.3f} | {_undone(row)} | {test:.3f} | {accuracy} | "
        f"{price if budget == 'steps' else 1:.2f} |"
    )


def _numbers(by_task: Sequence[Sequence[float]]) -> str:
    low, high = verdict.bootstrap(by_task)
    counts = [verdict.tally(values) for values in by_task]
    shares = (sum(getattr(c, part) for c in counts) / len(counts) for part in ("wins", "ties", "losses"))
    return f"{verdict.geometric_mean(by_task):.3f} | {low:.3f} to {high:.3f} | " + " | ".join(
        f"{100 * share:.0f} %" for share in shares
    )


def _overall(protocol: Protocol, stage: Stage, file: ResultsFile, tasks: list[str]) -> list[str]:
    lines = [
        f"{', '.join(tasks)}; each counts the same.",
        "",
        "| arm | ratio | interval | won | tied | lost | worst to continue |",
        "|---|---|---|---|---|---|---|",
    ]
    for budget in ("steps", "time"):
        for arm, run in _where_run(file, tasks, budget).items():
            worst = max(max(ratios(file, task, arm, budget, "continue") or ()) for task in run)
            name = _named(arm if budget == "steps" else f"{arm}, equal time", run, tasks)
            lines.append(
                f"| {name} | {_numbers([ratios(file, task, arm, budget) or () for task in run])} | {worst:.3f} |"
            )
    return lines + _lower_of_both(file, tasks)


def _where_run(file: ResultsFile, tasks: list[str], budget: str = "steps") -> dict[str, list[str]]:
    """The tasks that each arm ran on; those that ran on all first."""
    arms = dict.fromkeys(name for task in tasks for name in rows_of(file, task, budget))
    found = {arm: [task for task in tasks if arm in rows_of(file, task, budget)] for arm in arms}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _named(arm: str, run: list[str], tasks: list[str]) -> str:
    left_out = [task for task in tasks if task not in run]
    return f"{arm}, without {', '.join(left_out)}" if left_out else arm


def _lower_of_both(file: ResultsFile, tasks: list[str]) -> list[str]:
    """What `accept="baseline"` of the trainer comes to: the preset and plain training side by side, and the lower kept."""
    lower, to_continue = [], []
    for task in tasks:
        preset, plain = (ratios(file, task, arm) for arm in ("preset", "continue"))
        if preset is None or plain is None:
            return []
        lower.append([min(pair) for pair in zip(preset, plain, strict=True)])
        to_continue += [low / other for low, other in zip(lower[-1], plain, strict=True)]
    name = "the lower of preset and continue, both trained"
    return [f"| {name} | {_numbers(lower)} | {max(to_continue):.3f} |"] if lower else []


def _by_stuck(file: ResultsFile, tasks: list[str]) -> list[str]:
    """Each arm against `continue`, for the seeds whose θ* has stuck channels and for the others, over all tasks."""
    counts = {row["task"]: row["stuck"] for row in file if row["kind"] == "stuck" and row["task"] in tasks}
    shares = "; ".join(f"{task} {sum(map(bool, stuck))} of {len(stuck)}" for task, stuck in counts.items())
    if len(counts) < len(tasks):
        return []
    lines = [
        "",
        "## Seeds with and without stuck channels",
        "",
        f"Seeds whose θ\\* has a channel that lets less than a thousandth of the gradient through: {shares}. Loss over that "
        "of `continue`, geometric mean over these seeds and over the others; won, tied, lost.",
        "",
        "| arm | with | | without | |",
        "|---|---|---|---|---|",
    ]
    for arm, run in _where_run(file, tasks).items():
        by_task = {task: ratios(file, task, arm, against="continue") for task in run}
        cells = []
        for wanted in (True, False):
            seen = [
                value
                for task, values in by_task.items()
                for value, stuck in zip(values or (), counts[task], strict=True)
                if bool(stuck) == wanted
            ]
            tally = verdict.tally(seen) if seen else None
            shown = f"{tally.wins:.0%}, {tally.ties:.0%}, {tally.losses:.0%}".replace("%", " %") if tally else ""
            cells += [f"{geometric_mean(seen):.3f}" if seen else "", shown]
        lines.append(f"| {_named(arm, run, tasks)} | {' | '.join(cells)} |")
    return lines


def draw(protocol: Protocol, file: ResultsFile, path: Path) -> None:
    """Every seed's ratio to the best plain arm, and the geometric mean, an arm a row and a task a panel."""
    from matplotlib.figure import Figure

    from bypass_fx import figure

    tasks = [task for task in protocol.tasks if "continue" in rows_of(file, task)]
    if not tasks:
        return
    arms = [*dict.fromkeys(arm for task in tasks for arm in rows_of(file, task))][::-1]
    picture = Figure(figsize=(1.6 + 2.3 * len(tasks), 1.2 + 0.26 * len(arms)), dpi=110, layout="constrained")
    grid = picture.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(grid, tasks, strict=True):
        rows = rows_of(file, task)
        for place, arm in enumerate(arms):
            if arm in rows:
                values = ratios(file, task, arm)
                assert values
                colour = "#3b6fb6" if rows[arm]["family"] == "plain" else "#c0392b"
                axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.25, markersize=3)
                axes.plot(geometric_mean(values), place, "|", color="black", markersize=11, markeredgewidth=1.6)
        axes.axvline(1, color="#999999", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(f"{task}\nover {reference(file, task)}", fontsize=9)
        axes.tick_params(labelsize=8, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_yticks(range(len(arms)), arms)
    figure.save(picture, path)


def _undone(row: Row) -> str:
    """How many seeds were rolled back, and how many were not bypassed at all."""
    spared = len(row.get("not_bypassed", ()))
    return f"{sum(row['rolled_back'])}" + (f", {spared} not begun" if spared else "")
