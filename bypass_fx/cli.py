"""The command line: `train` runs the main job, `probe` says whether it pays; `inspect` and `list` are in `cli_inspection`."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, fields
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from bypass_fx import cli_inspection, terminal
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.plan import Mode
from bypass_fx.settings import Settings

_DEFAULT = Settings()
_PHASES = "Phases, in epochs"
_TRAIN_NEEDS = {"timm", "torchvision", "sklearn", "matplotlib", "PIL"}

app = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _program() -> None:
    """Bypass stationary points: extend a model that has slowed down, walk, come back to the original architecture."""


def _option(panel: str, text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel)


@app.command()
def train(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            help="mlp, 2c2d, timm:NAME, torchvision:NAME or package.module:factory.",
            rich_help_panel="Job",
            autocompletion=cli_inspection.complete_model,
        ),
    ] = "mlp",
    data: Annotated[str, _option("Job", "digits, eggholder, cifar10:DIR or imagefolder:DIR.")] = "digits",
    weights: Annotated[Path | None, _option("Job", "Start from these weights (.safetensors or a state dict).")] = None,
    image_size: Annotated[int, _option("Job", "Side of an image folder's images, in pixels.")] = 64,
    device: Annotated[str, _option("Job", "auto, cpu, cuda, cuda:1, ...")] = _DEFAULT.device,
    seed: Annotated[int, _option("Job", "Fixes the first weights, the minibatches and dropout.")] = _DEFAULT.seed,
    out: Annotated[Path | None, _option("Job", "Run folder to write; runs/DATA-MODEL-TIME if left out.")] = None,
    train1: Annotated[int, _option(_PHASES, "Before the bypass, until training slows down.")] = _DEFAULT.train1,
    opt1: Annotated[int, _option(_PHASES, "The walk in the larger space.")] = _DEFAULT.opt1,
    opt2: Annotated[int, _option(_PHASES, "The way back.")] = _DEFAULT.opt2,
    train3: Annotated[int, _option(_PHASES, "After the bypass.")] = _DEFAULT.train3,
    n: Annotated[int | None, _option(_PHASES, "Length of opt1 in steps, instead of --opt1.")] = None,
    optimizer: Annotated[str, _option("Optimiser", "Any of timm's: adam, adamw, momentum, ...")] = _DEFAULT.optimizer,
    lr: Annotated[float, _option("Optimiser", "Learning rate λ.")] = _DEFAULT.lr,
    momentum: Annotated[float, _option("Optimiser", "Momentum, where the optimiser has one.")] = _DEFAULT.momentum,
    weight_decay: Annotated[float, _option("Optimiser", "Weight decay.")] = _DEFAULT.weight_decay,
    batch_size: Annotated[int, _option("Optimiser", "Examples in a minibatch.")] = _DEFAULT.batch_size,
    comeback: Annotated[
        str, _option("Bypass", "Way back: homotopy, variety, lagrangian, proximal or penalty.")
    ] = _DEFAULT.comeback,
    return_lr: Annotated[float | None, _option("Bypass", "Learning rate λ′ in opt2; --lr if not given.")] = None,
    gamma: Annotated[str, _option("Bypass", "γ(t) of a penalty: a slope, or SLOPE,T:SLOPE,...")] = _DEFAULT.gamma,
    gamma_unit: Annotated[str, _option("Bypass", "What t counts in γ(t): step or epoch.")] = _DEFAULT.gamma_unit,
    epsilon: Annotated[float, _option("Bypass", "A site has arrived when ‖ADW‖ or ‖D‖ is below ε.")] = _DEFAULT.epsilon,
    mode: Annotated[str, _option("Bypass", "Sites: auto, strict, relaxed or all.")] = _DEFAULT.mode,
    select: Annotated[str | None, _option("Bypass", "Only sites whose name fits this pattern.")] = None,
) -> None:
    """Train a model through a bypass, beside a baseline that goes on without.

    Both take the same minibatches in the same number of steps.
    Without options: a small network on scikit-learn's digits, in less than two minutes.

    [bold]Examples[/]

    bypass-fx train

    bypass-fx train --model 2c2d --data cifar10:DIR --train1 500 --opt1 300 --opt2 250 --train3 450

    bypass-fx train --model timm:resnet18 --data imagefolder:DIR --weights run/model.safetensors --train1 0
    """
    import torch

    from bypass_fx import data as datasets
    from bypass_fx import models, run_folder

    settings = Settings(**{field.name: context.params[field.name] for field in fields(Settings)})
    folder = out or Path("runs", f"{_slug(Path(data).name)}-{_slug(model)}-{datetime.now():%Y%m%d-%H%M%S}")
    run_folder.expect_writable(folder)
    examples = datasets.load(data, vectors=models.takes_vectors(model), image_size=image_size)
    torch.manual_seed(seed)
    network = models.build(model, models.Fit(examples.shape, examples.outputs))
    if weights:
        run_folder.load_weights(network, weights)
    about = {
        "model": model,
        "data": data,
        "shape": examples.shape,
        "outputs": examples.outputs,
        "weights": str(weights) if weights else None,
        "settings": asdict(settings),
    }
    _train(network, examples, settings, folder, about)


def _train(network: Any, examples: Any, settings: Settings, folder: Path, about: dict[str, Any]) -> None:
    from bypass_fx import run_folder
    from bypass_fx.trainer import Trainer

    screen = terminal.console()
    with terminal.warnings_as_lines():
        trainer = Trainer(network, examples, settings)
        sites = f"{len(trainer.plan)} sites with {trainer.plan.coefficients} coefficients"
        screen.print(f"{about['model']} on {about['data']}: {sites}, {trainer.total_steps} steps")
        trainer.on_event = live = terminal.LiveProgress(screen, trainer.total_steps, trainer.train1_steps)
        try:
            with live:
                history = trainer.fit()
        except KeyboardInterrupt:
            screen.print("Stopped; nothing was written.")
            raise
        run_folder.write(folder, history, network, about)
    screen.print(terminal.result_table(history))
    screen.print(f"{history.seconds:.0f} s; the run is in {folder}", soft_wrap=True)


app.command()(cli_inspection.inspect)
app.command("list")(cli_inspection.list_models)


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
    import torch

    from bypass_fx import data as datasets
    from bypass_fx import evaluation, models, run_folder
    from bypass_fx import probe as probing
    from bypass_fx.trainer import make_optimizer

    settings = Settings(optimizer=optimizer, lr=lr, batch_size=batch_size, mode=cast(Mode, mode), seed=seed)
    examples = datasets.load(data, vectors=models.takes_vectors(model), image_size=image_size)
    torch.manual_seed(seed)
    network = models.build(model, models.Fit(examples.shape, examples.outputs))
    if weights:
        run_folder.load_weights(network, weights)
    with terminal.warnings_as_lines():
        found = probing(
            network,
            lambda net, batch: evaluation.loss_of(examples.task, net(datasets.prepare(batch[0])), batch[1]),
            islice(datasets.minibatches(examples.train, batch_size, seed, epoch=0), steps),
            optimizer=make_optimizer(network, settings),
            steps=steps,
            mode=settings.mode,
        )
    screen = terminal.console()
    screen.print(terminal.probed_sites(found), "", terminal.candidate_table(found))
    screen.print(
        f"\nLoss {terminal.number(found.loss)}, after {found.steps} steps of plain training "
        f"{terminal.number(found.plain)}: "
        + ("a bypass looks worth it" if found.worth else "no set of sites gained more than plain training")
    )


def main() -> None:
    """Run the command line; what the user can mend ends in one red line and the exit code 2."""
    try:
        app()
    except BypassError as error:
        terminal.show_error(str(error))
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _TRAIN_NEEDS:
            raise
        terminal.show_error(f"{package} is not installed; run: pip install 'bypass_fx[train]'")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _slug(name: str) -> str:
    """A model's or data's name as part of a folder's name."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.")
