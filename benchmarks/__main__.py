"""`python -m benchmarks NAME`: run a measurement, or go on with one that was stopped; results stand in `results/`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from . import coverage, exactness
from .results_file import RESULTS

app = typer.Typer(no_args_is_help=True, add_completion=False)
Pattern = Annotated[str, typer.Option(help="Only models whose name contains this.")]


@app.callback()
def _program() -> None:
    """Measurements of bypass_fx."""
    torch.set_num_threads(2)


@app.command("coverage")
def run_coverage(only: Pattern = "") -> None:
    """Plan, extend and contract every model of timm and torchvision."""
    _write("coverage.md", coverage.summary(coverage.run(only)))


@app.command("exactness")
def run_exactness(only: Pattern = "") -> None:
    """Real forwards of the smallest model of every family: nothing missed, outputs equal, gradients, restoration."""
    _write("exactness.md", exactness.summary(exactness.run(only)))


def _write(name: str, text: str) -> None:
    (RESULTS / name).write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    app()
