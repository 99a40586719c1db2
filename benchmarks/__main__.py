"""`python -m benchmarks NAME`: run a measurement, or go on with one that was stopped; results stand in `results/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import torch
import typer

import bypass_fx
from bypass_fx import zoo_sites

from . import comeback, coverage, crashes, digits, exactness, overhead, pages, paper, planning, replicas
from .helps import protocol, record, report
from .results_file import RESULTS, cores

app = typer.Typer(no_args_is_help=True, add_completion=False)
Pattern = Annotated[str, typer.Option(help="Only models whose name contains this.")]


@app.callback()
def _program() -> None:
    """Measurements of bypass_fx."""
    torch.set_num_threads(cores())


@app.command("coverage")
def run_coverage(only: Pattern = "") -> None:
    """Plan, extend and contract every model of timm and torchvision; `bypass-fx list` shows what was found."""
    file = coverage.run(only)
    Path(bypass_fx.__file__).with_name(zoo_sites.FILE).write_text(coverage.listing(file))
    _write("coverage.md", coverage.summary(file))


@app.command("exactness")
def run_exactness(only: Pattern = "") -> None:
    """Real forwards of the smallest model of every family: nothing missed, outputs equal, gradients, restoration."""
    _write("exactness.md", exactness.summary(exactness.run(only)))


@app.command("planning")
def run_planning(only: Pattern = "") -> None:
    """Time plan + extend beside Torch-Pruning's dependency graph, and as a model grows deeper."""
    _write("planning.md", planning.summary(planning.run(only)))


@app.command("digits")
def run_digits(seeds: Annotated[int, typer.Option(help="How many seeds.")] = 10) -> None:
    """The main job with its default settings, over seeds."""
    _write("digits.md", digits.summary(digits.run(seeds)))


@app.command("pages")
def run_pages(only: Pattern = "") -> None:
    """The pages of `bypass-fx inspect` in headless Chromium: first paint, interactions, screenshots."""
    _write("pages.md", pages.summary(pages.run(only)))


@app.command("comeback")
def run_comeback(seeds: Annotated[int, typer.Option(help="How many seeds.")] = 20) -> None:
    """Every way back on Eggholder and on the digits, over seeds."""
    _write("comeback.md", comeback.summary(comeback.run(seeds)))


@app.command("crashes")
def run_crashes(kills: Annotated[int, typer.Option(help="How many runs to kill.")] = 20) -> None:
    """Kill runs at random moments, go on with them, and compare what they come to."""
    _write("crashes.md", crashes.summary(crashes.run(kills)))


@app.command("overhead")
def run_overhead(only: Pattern = "") -> None:
    """Steps, memory and compile time of extended models against the same without; the penalty alone; peers."""
    file = overhead.run(only)
    _write(file.path.with_suffix(".md").name, overhead.summary(file))


@app.command("replicas")
def run_replicas(count: Annotated[int, typer.Option(help="How many replicas.")] = 20) -> None:
    """What a step of many seeds as one batched model costs beside a step of one."""
    file = replicas.run(count)
    _write(file.path.with_suffix(".md").name, replicas.summary(file))


@app.command("paper")
def run_paper(
    only: Annotated[
        str, typer.Argument(help="One experiment: V-A, V-B, VI-A, VI-B, VI-C or theory; all, if left out.")
    ] = "",
    full: Annotated[bool, typer.Option(help="As long as the paper's, not shortened.")] = False,
    cifar10: Annotated[str, typer.Option(help="The folder of CIFAR-10; digits, if left out.")] = "",
) -> None:
    """The paper's experiments, and how many of the seeds bear out each of its claims."""
    torch.set_num_threads(1)  # the replicas of one go side by side
    _write("paper.md", paper.summary(paper.run(only, full, cifar10)))


@app.command("helps")
def run_helps(
    stage: Annotated[
        str,
        typer.Argument(help="search, held-out, fresh, unseen, or in-sample: the verdict's arms on the searched half."),
    ],
    full: Annotated[bool, typer.Option(help="The full lengths, which take days on two cores.")] = False,
    only: Annotated[str, typer.Option(help="Only tasks whose name contains this.")] = "",
    arm: Annotated[list[str] | None, typer.Option(help="Only this arm, or these; the others stay to be run.")] = None,
    cifar10: Annotated[str, typer.Option(help="A folder with CIFAR-10, which is then a task too.")] = "",
) -> None:
    """Whether bypassing helps: every arm of the protocol from the same θ*, seed by seed."""
    found = protocol.read(full, cifar10)
    chosen = next((each for each in get_args(protocol.Stage) if each == stage), None)
    if chosen is None:
        raise typer.BadParameter(f"{stage!r} is no stage; take {', '.join(get_args(protocol.Stage))}")
    names = arm or []
    strange = sorted({*names} - {each.name for each in (*found.plain, *found.search, *found.verdict)})
    if strange:
        raise typer.BadParameter(f"there is no arm {strange[0]!r}; protocol.toml names them")
    file = record.run(found, chosen, only, names)
    report.draw(found, file, file.path.with_suffix(".png"))
    _write(file.path.with_suffix(".md").name, report.summary(found, chosen, file))


def _write(name: str, text: str) -> None:
    (RESULTS / name).write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    app()
