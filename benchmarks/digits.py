"""The main job with its default settings over seeds: a small network on the digits, bypassed, beside its baseline."""

from __future__ import annotations

from dataclasses import replace
from statistics import geometric_mean, median
from typing import Any

import torch

from bypass_fx import data, figure, models
from bypass_fx.settings import Settings
from bypass_fx.trainer import Trainer

from .results_file import RESULTS, ResultsFile


def examine(seed: int) -> dict[str, Any]:
    """One run: the scores of both arms at θ*, after opt1, after proj and at the end, and the run's seconds."""
    settings = replace(Settings(), seed=seed)
    examples = data.load("digits", vectors=True)
    torch.manual_seed(seed)
    model = models.build("mlp")
    history = Trainer(model, examples, settings).fit()
    if seed == 0:
        figure.draw(history, RESULTS / "digits.png")
    moments = {
        moment.name: {
            "step": moment.step,
            "bypass": moment.bypass.flat(),
            "baseline": moment.baseline and moment.baseline.flat(),
        }
        for moment in history.moments
    }
    return {"seed": seed, "moments": moments, "seconds": history.seconds}


def run(seeds: int = 10, results: str = "digits.jsonl") -> ResultsFile:
    """Run the seeds that no earlier run has run."""
    from rich.progress import track

    file = ResultsFile(results, ("torch", "timm", "scikit-learn"))
    for seed in track([seed for seed in range(seeds) if seed not in file.done("seed")], description="digits"):
        file.add(examine(seed))
    return file


def summary(file: ResultsFile) -> str:
    """Geometric means of the losses over the seeds, medians of the accuracies, in Markdown."""
    rows = file.rows
    lines = [
        f"{len(rows)} seeds, {median(row['seconds'] for row in rows):.0f} s a run (median). Training loss and test loss are "
        "geometric means over the seeds, test accuracy is the median.",
        "",
        "| moment | training loss: bypass | baseline | test loss: bypass | baseline | test accuracy: bypass | baseline |",
        "|---|---|---|---|---|---|---|",
    ]
    for moment in rows[0]["moments"]:
        cells = []
        for score in ("train_loss", "test_loss", "test_accuracy"):
            for arm in ("bypass", "baseline"):
                values = [row["moments"][moment][arm][score] for row in rows]
                cells.append(f"{geometric_mean(values):.4f}" if "loss" in score else f"{100 * median(values):.1f} %")
        lines.append(f"| {moment} | " + " | ".join(cells) + " |")
    for moment in ("after opt1", "end"):
        ratios = [
            row["moments"][moment]["bypass"]["train_loss"] / row["moments"][moment]["baseline"]["train_loss"]
            for row in rows
        ]
        lines.append(
            f"\n{moment.capitalize()}: training loss below the baseline's in {sum(r < 1 for r in ratios)} of "
            f"{len(rows)} seeds, ratio {geometric_mean(ratios):.3f} in the geometric mean, {max(ratios):.3f} at worst."
        )
    return "\n".join(lines) + "\n"
