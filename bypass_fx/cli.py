"""The command line: `train` runs the main job, `stuck` and `probe` look at a θ*; `inspect` and `list` have a file."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from bypass_fx import cli_inspection, terminal
from bypass_fx.cli_settings import with_settings
from bypass_fx.interrupt import Stopped
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.plan import Mode
from bypass_fx.settings import Settings, from_dict
from bypass_fx.settings import preset as make_settings

_DEFAULT = Settings()
_TRAIN_NEEDS = {"accelerate", "timm", "torchvision", "sklearn", "matplotlib", "PIL", "tensorboard"}

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _program() -> None:
    """Bypass stationary points: extend a model that has slowed down, walk, come back to the original architecture."""


def _option(panel: str, text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel)


@app.command()
@with_settings
def train(
    context: typer.Context,
    preset: Annotated[str, _option("Job", "Settings to begin with: default, paper, improved, ...")] = "default",
    resume: Annotated[Path | None, _option("Job", "Go on with the unfinished run in this folder.")] = None,
    model: Annotated[
        str,
        typer.Option(
            help="mlp, 2c2d, timm:NAME, torchvision:NAME or package.module:factory.",
            rich_help_panel="Job",
            autocompletion=cli_inspection.complete_model,
        ),
    ] = "mlp",
    data: Annotated[str, _option("Job", "digits, eggholder, cifar10:DIR, imagefolder:DIR, timm:NAME:DIR.")] = "digits",
    weights: Annotated[Path | None, _option("Job", "Start from these weights (.safetensors or a state dict).")] = None,
    image_size: Annotated[int, _option("Job", "Side of an image folder's images, in pixels.")] = 64,
    augment: Annotated[str, _option("Job", "timm's augmentation of an image folder: rand-m9-mstd0.5, flip.")] = "",
    out: Annotated[Path | None, _option("Job", "Run folder to write; runs/DATA-MODEL-TIME if left out.")] = None,
    **settings: Any,
) -> None:
    """Train a model through a bypass, beside a baseline that goes on without.

    Both take the same minibatches in the same number of steps. Without options: a small network on scikit-learn's digits,
    in less than two minutes. Also under torchrun and accelerate launch.

    [bold]Examples[/]

    bypass-fx train

    bypass-fx train --preset paper --model 2c2d --data cifar10:DIR

    bypass-fx train --model timm:resnet18 --data imagefolder:DIR --weights run/model.safetensors --train1 0

    torchrun --nproc-per-node 8 -m bypass_fx train --model timm:vit_small_patch16_224 --data imagefolder:DIR

    bypass-fx train --resume runs/digits-mlp-20260101-120000
    """
    from bypass_fx import run_folder
    from bypass_fx.engine import is_main_process

    # By its name: typer brings a click of its own, beside which the installed one's enumeration is another.
    source = {name: getattr(context.get_parameter_source(name), "name", "") for name in settings}
    changes = {name: value for name, value in settings.items() if source[name] == "COMMANDLINE"}
    if resume:
        about = run_folder.read_about(resume)
        chosen, folder = from_dict({**about["settings"], **changes}), resume
    else:
        chosen = make_settings(preset, changes)
        job = {"model": model, "data": data, "weights": str(weights) if weights else None}
        about = {**job, "image_size": image_size, "augment": augment}
        folder = out or Path("runs", f"{_slug(Path(data).name)}-{_slug(model)}-{datetime.now():%Y%m%d-%H%M%S}")
        if is_main_process():
            run_folder.expect_writable(folder)
    _train(about, chosen, folder)


def _train(about: dict[str, Any], settings: Settings, folder: Path) -> None:
    import torch

    from bypass_fx import data as datasets
    from bypass_fx import models, progress
    from bypass_fx.engine import leave
    from bypass_fx.trainer import Trainer
    from bypass_fx.weights import load_weights

    name = about["model"]
    examples = datasets.load(about["data"], models.takes_vectors(name), about["image_size"], about["augment"])
    torch.manual_seed(settings.seed)
    assert examples.shape and examples.outputs
    about = {**about, "shape": list(examples.shape), "outputs": examples.outputs}
    network = models.build(name, models.Fit(examples.shape, examples.outputs))
    if about["weights"]:
        load_weights(network, about["weights"])
    screen = terminal.console()
    with terminal.warnings_as_lines():
        trainer = Trainer(network, examples, settings, folder=folder, about=about)
        if not trainer.is_main:
            trainer.fit()
            leave()
            return
        sites = f"{len(trainer.plan)} sites with {trainer.plan.coefficients} coefficients"
        screen.print(f"{name} on {about['data']}: {sites}, {trainer.total_steps} steps")
        trainer.on_event = live = progress.LiveProgress(screen, trainer.lengths, settings.baseline)
        with live:
            history = trainer.fit()
    leave()
    screen.print(progress.result_table(history))
    for cycle, report in enumerate(history.reports, start=1):
        if report.rolled_back:
            screen.print(f"bypass {cycle} was rolled back: {report.rolled_back}", soft_wrap=True, markup=False)
    if "nothing stuck" in {moment.name for moment in history.moments}:
        screen.print("no channel was stuck, so plain training went on to the end")
    screen.print(f"{history.seconds:.0f} s; the run is in {folder}", soft_wrap=True)


app.command()(cli_inspection.inspect)
app.command("list")(cli_inspection.list_models)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, finished or not.")],
    figures: Annotated[str, typer.Option(help="Which of the paper's figures: 3, 4, 5, 8, with commas.")] = "3,4,5,8",
    out: Annotated[Path, typer.Option(help="Folder to write figure-3.png and so on into.")] = Path(),
) -> None:
    """Draw the figures of the paper from runs: from one, or the mean and standard deviation over several.

    Figure 3: loss, ‖ADW‖, step size, distance from θ*. 4: loss, its advantage over the baseline, ‖ADW‖, accuracy, its
    advantage, step size. 5: distance and three cosines. 8: loss, advantage, Σ‖D‖.

    [bold]Examples[/]

    bypass-fx plot runs/digits-mlp-20260101-120000

    bypass-fx plot runs/seed-* --figures 4,5 --out figures
    """
    from bypass_fx import figure, run_folder
    from bypass_fx.nearest import did_you_mean

    chosen = figures.split(",")
    for name in chosen:
        if name not in figure.FIGURES:
            raise BypassError(
                f"unknown figure {name!r}; {did_you_mean(name, figure.FIGURES, 'choose from 3, 4, 5, 8')}"
            )
    events = [run_folder.read_events(folder)[1] for folder in runs]
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        figure.save(figure.paper_figure(name, events), out / f"figure-{name}.png")
        terminal.console().print(str(out / f"figure-{name}.png"), soft_wrap=True)


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="mlp, 2c2d, timm:NAME, torchvision:NAME or package.module:factory.")],
    data: Annotated[str, typer.Option(help="digits, eggholder, cifar10:DIR or imagefolder:DIR.")] = "digits",
    weights: Annotated[Path | None, typer.Option(help="θ*: a .safetensors file or a state dict.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of each trial, one minibatch each.")] = 20,
    optimizer: Annotated[str, typer.Option(help="Any of timm's: adam, adamw, momentum, ...")] = _DEFAULT.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate λ.")] = _DEFAULT.lr,
    batch_size: Annotated[int, typer.Option(help="Examples in a minibatch.")] = _DEFAULT.batch_size,
    mode: Annotated[str, typer.Option(help="auto, strict, relaxed or all.")] = _DEFAULT.mode,
    image_size: Annotated[int, typer.Option(help="Side of an image folder's images, in pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="Fixes the first weights and the minibatches.")] = _DEFAULT.seed,
) -> None:
    """Try a few steps with and without D-activations, and say which sites gain the most.

    Every trial starts from the same weights and takes the same minibatches.

    [bold]Examples[/]

    bypass-fx probe mlp --data digits --weights run/model.safetensors

    bypass-fx probe timm:resnet18 --data imagefolder:DIR --weights run/model.safetensors --steps 50
    """
    from bypass_fx import probe as probing
    from bypass_fx import progress
    from bypass_fx.optimizers import make_optimizer

    settings = Settings(optimizer=optimizer, lr=lr, batch_size=batch_size, mode=cast(Mode, mode), seed=seed)
    network, loss, batches = _at_theta_star(model, data, weights, image_size, batch_size, seed)
    with terminal.warnings_as_lines():
        found = probing(
            network,
            loss,
            islice(batches, steps),
            optimizer=make_optimizer(network, settings),
            steps=steps,
            mode=settings.mode,
        )
    screen = terminal.console()
    screen.print(terminal.probed_sites(found), "", terminal.candidate_table(found))
    screen.print(
        f"\nLoss {progress.number(found.loss)}, after {found.steps} steps of plain training "
        f"{progress.number(found.plain)}: "
        + ("a bypass looks worth it" if found.worth else "no set of sites gained more than plain training")
    )


@app.command()
def stuck(
    model: Annotated[str, typer.Argument(help="mlp, 2c2d, timm:NAME, torchvision:NAME or package.module:factory.")],
    data: Annotated[str, typer.Option(help="digits, eggholder, cifar10:DIR or imagefolder:DIR.")] = "digits",
    weights: Annotated[Path | None, typer.Option(help="θ*: a .safetensors file or a state dict.")] = None,
    batches: Annotated[
        int | None, typer.Option(min=1, help="How many minibatches to look at; all if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a minibatch.")] = _DEFAULT.batch_size,
    mode: Annotated[str, typer.Option(help="auto, strict, relaxed or all.")] = _DEFAULT.mode,
    image_size: Annotated[int, typer.Option(help="Side of an image folder's images, in pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="Fixes the first weights and the minibatches.")] = _DEFAULT.seed,
) -> None:
    """Find the channels that have stopped learning: dead ReLUs and saturated units, that stop the gradient of every example.

    [bold]Examples[/]

    bypass-fx stuck mlp --data digits --weights run/model.safetensors

    bypass-fx stuck torchvision:vgg11 --data imagefolder:DIR --weights vgg11.safetensors --batches 20
    """
    from bypass_fx import stuck as looking

    network, loss, found = _at_theta_star(model, data, weights, image_size, batch_size, seed)
    with terminal.warnings_as_lines():
        report = looking(network, loss, islice(found, batches), mode=cast(Mode, mode))
    screen = terminal.console()
    if report.stuck:
        screen.print(terminal.stuck_sites(report), "")
    screen.print(f"{report.stuck} of {report.channels} channels at {len(report.sites)} sites are stuck")


def _at_theta_star(
    model: str, data: str, weights: Path | None, image_size: int, batch_size: int, seed: int
) -> tuple[Any, Any, Iterator[Any]]:
    """The model, its loss function and the minibatches of one epoch, in random order."""
    import torch

    from bypass_fx import data as datasets
    from bypass_fx import models
    from bypass_fx.evaluation import expect_fit
    from bypass_fx.feed import placed
    from bypass_fx.task import task
    from bypass_fx.weights import load_weights

    examples = datasets.load(data, vectors=models.takes_vectors(model), image_size=image_size)
    assert examples.shape and examples.outputs
    torch.manual_seed(seed)
    network = models.build(model, models.Fit(examples.shape, examples.outputs))
    if weights:
        load_weights(network, weights)
    kind = task(examples.task)
    expect_fit(network, examples, kind, torch.device("cpu"))
    shuffled = torch.utils.data.DataLoader(
        examples.train, batch_size, shuffle=True, drop_last=True, collate_fn=examples.collate,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return network, kind.loss, (placed(batch, torch.device("cpu")) for batch in shuffled)


def main() -> None:
    """Run the command line; what the user can mend ends in one red line and the exit code 2."""
    try:
        app()
    except Stopped as stopped:
        terminal.show_error(str(stopped))
        sys.exit(128 + stopped.number)
    except BypassError as error:
        terminal.show_error(str(error))
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _TRAIN_NEEDS:
            raise
        needed = package if package == "tensorboard" else "'bypass_fx[train]'"
        terminal.show_error(f"{package} is not installed; run: pip install {needed}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _slug(name: str) -> str:
    """A model's or data's name as part of a folder's name."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.")
