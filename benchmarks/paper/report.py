"""The claims table in Markdown, with what was shortened, and the figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.results_file import RESULTS, ResultsFile
from bypass_fx import figure

from . import figures, theory
from .claims import CLAIMS, Case, Finding, Trace, find
from .experiment import BASELINE, Experiment, load, related

Row = Mapping[str, Any]
THEORY = ("theorem", "cost")
LENGTHS = ("train1", "opt1", "opt2", "train3")


def summary(file: ResultsFile) -> str:
    """Every claim with the seeds that bear it out, for each experiment, length and data that was run; draws the figures."""
    lines = ["# The paper's claims", "", *_not_run(file.rows), *_theory(file.rows)]
    for length, data in sorted({(row["length"], row["data"]) for row in file if "length" in row}, reverse=True):
        rows = [row for row in file if (row.get("length"), row.get("data")) == (length, data)]
        for experiment in load(length == "full", "" if data == "digits" else data).values():
            if of := cases(rows, experiment):
                lines += _part(experiment, of, [row for row in rows if row["experiment"] in related(experiment)])
    return "\n".join(lines)


def cases(rows: Sequence[Row], experiment: Experiment) -> list[Case]:
    """The arms of each seed; where an experiment varies another one, with the arms of that."""
    by_seed: dict[int, dict[str, Trace]] = {}
    for row in rows:
        if row["experiment"] in related(experiment):
            by_seed.setdefault(row["seed"], {})[row["arm"]] = Trace(row)
    return [arms for _, arms in sorted(by_seed.items()) if {BASELINE, "bypass", *experiment.arms} <= arms.keys()]


def _not_run(rows: Sequence[Row]) -> Iterator[str]:
    """The commands whose results are not here, or not of all seeds."""
    left = []
    for full in (False, True):
        for name, experiment in load(full).items():
            seeds = {row["seed"] for row in rows if (row["experiment"], row.get("length")) == (name, experiment.length)}
            if len(seeds) < experiment.seeds:
                command = f"`python -m benchmarks paper {name}{' --full' if full else ''}`"
                left.append(f"{command} ({len(seeds)} of {experiment.seeds} seeds are here)" if seeds else command)
    if left:
        yield from (f"Not run, or not to the end: {', '.join(left)}.", "")


def _theory(rows: Sequence[Row]) -> Iterator[str]:
    found = []
    for name in THEORY:
        of = [{name: Trace(row)} for row in rows if row["experiment"] == name]
        found += [find(claim, name, of) for claim in CLAIMS if name in claim.experiments and of]
    yield from ("## Without training", "", *_table(found), "")
    for row in rows:
        if row["experiment"] == "cost":
            yield (
                f"Time of a forward and backward of 2c2d, minibatch 128, beside one before the surgery: "
                f"{row['time_opt1']:.2f} in opt1, {row['time_opt2']:.2f} with the penalty (medians of alternating rounds). "
                "Each seed of the theorem's draws shapes, scales and zeros of A, D and W "
                f"{theory.DRAWS} times."
            )
            yield ""


def _part(experiment: Experiment, of: Sequence[Case], rows: Sequence[Row]) -> Iterator[str]:
    data = next(iter(of[0].values())).row["data"]
    yield from (f"## {experiment.name}, {experiment.length}: {experiment.title}", "", _about(experiment, of), "")
    yield from _table([find(claim, experiment.name, of) for claim in CLAIMS if experiment.name in claim.experiments])
    yield ""
    for number, picture in figures.draw(experiment, rows).items():
        path = f"paper-{experiment.length}-{data}-fig{number}.png"
        picture.set_dpi(100)
        figure.save(picture, RESULTS / path)
        yield from (f"![{experiment.title}, as the paper's Fig. {number}]({path})", "")


def _about(experiment: Experiment, of: Sequence[Case]) -> str:
    some = next(iter(of[0].values())).row
    steps = [f"{name} {experiment.steps(getattr(experiment, name), some['per_epoch'])}" for name in LENGTHS]
    slopes = " then ".join(f"{slope * experiment.shorten:g}t" for slope in experiment.gamma)
    seeds = f"{len(of)} seed{'s' * (len(of) > 1)} on {some['data']}"
    told = f"{seeds}; steps: {', '.join(steps)} (the return, as published, takes those of opt2 at most)."
    if experiment.data == "digits":
        told += " **Stand-in data**: digits as 32×32×3 images, for want of CIFAR-10."
    if not experiment.full:
        told += f" **Shortened**: {_shortened(experiment)}; γ = {slopes}."
    minutes = sum(trace.row["seconds"] for case in of for trace in case.values()) / 60
    return f"{told} {minutes:.0f} minutes of a shared machine after θ\\*."


def _shortened(experiment: Experiment) -> str:
    full = load(full=True)[experiment.name]
    ratios = []
    for name in LENGTHS:
        ours, theirs = getattr(experiment, name) / experiment.shorten, getattr(full, name)
        if theirs and not math.isclose(ours, theirs):
            ratios.append(f"{name} {ours:g} epochs for {theirs:g}")
    return ", ".join(ratios)


def _table(found: Sequence[Finding]) -> Iterator[str]:
    yield "| claim | source | seeds that bear it out | median | of |"
    yield "|---|---|---|---|---|"
    for each in found:
        number = "none" if math.isnan(each.number) else f"{each.number:.6g}"
        yield (
            f"| {each.claim.text} | {each.claim.source} | {each.borne_out} of {each.seeds} | {number} | "
            f"{each.claim.number} |"
        )
