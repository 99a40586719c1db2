"""The settings of a run as options of the command line: a row each, under the panel of the help that shows it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, cast, get_type_hints

import typer

from bypass_fx.passes.plan import Mode
from bypass_fx.settings import Settings

# Panel → setting → help.
OPTIONS: dict[str, dict[str, str]] = {
    "Job": {
        "seed": "Fixes the first weights, the minibatches and dropout.",
        "baseline": "Train a copy without the bypass beside it.",
        "geometry": "Record step sizes, distances from θ* and angles.",
    },
    "Phases, in epochs": {
        "train1": "Before the bypass, until training slows down.",
        "patience": "End train1 after so many without progress; 0: never.",
        "tolerance": "What counts as progress, as a share.",
        "opt1": "The walk in the larger space.",
        "opt2": "The way back.",
        "train3": "After the bypass.",
        "n": "Length of opt1 in steps, instead of --opt1.",
        "cycles": "How often opt1, opt2 and train3 are gone through.",
        "evaluate_every": "Evaluate in between; 0: never.",
    },
    "Optimiser": {
        "optimizer": "Any of timm's: adam, adamw, momentum, ...",
        "lr": "Learning rate λ.",
        "lr_schedule": "timm's: none, cosine, step, poly, ...",
        "warmup": "Epochs of warm-up of an LR schedule.",
        "momentum": "Momentum, where the optimiser has one.",
        "weight_decay": "Weight decay.",
        "batch_size": "Examples in a step, over all processes.",
        "accumulate": "Parts into which a process splits its share.",
        "ema": "Decay of averaged weights; 0: none.",
    },
    "Bypass": {
        "comeback": "Way back: homotopy, variety, lagrangian, proximal, penalty or published.",
        "return_lr": "Learning rate λ′ in opt2; --lr if not given.",
        "delta_rate": "D's learning rate over --lr.",
        "gamma": "γ(t) of a penalty: a slope, or SLOPE,T:SLOPE,...",
        "gamma_unit": "What t counts in γ(t): step or epoch.",
        "epsilon": "A site has arrived when ‖ADW‖ or ‖D‖ is below ε.",
        "accept": "Keep the outcome: always, not-worse or forecast, else θ* comes back; baseline: the lower of both arms.",
        "accept_after": "Epochs of --train3 before that is decided; all if not given.",
        "accept_tolerance": "How much higher than at θ* the training loss may be.",
        "at_budget": "With sites still out after --opt2: contract or rollback.",
        "mode": "Sites: auto, strict, relaxed or all.",
        "select": "Only sites whose name fits this pattern; stuck: only channels that have stopped learning.",
    },
    "Machine": {
        "device": "auto, cpu, cuda, cuda:1, ...",
        "precision": "no, bf16 or fp16 (autocast).",
        "sharding": "On many processes: auto, ddp or fsdp2.",
        "compile": "torch.compile: default, reduce-overhead, ...",
        "compile_backend": "Its backend.",
        "fused": "The optimiser's fused kernels.",
        "channels_last": "Images with their channels last.",
        "tf32": "TF32 for float32 products.",
        "gradient_checkpointing": "Time for memory.",
        "workers": "Processes that load data.",
        "checkpoint_seconds": "Save this often.",
        "keep": "How many checkpoints stay.",
        "tensorboard": "Write events for TensorBoard.",
    },
}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command whose last parameter is `**settings` have an option for every setting, with the setting's default."""
    own = inspect.signature(command, eval_str=True)
    parameters = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
    kinds, defaults = get_type_hints(Settings), Settings()
    for panel, texts in OPTIONS.items():
        for name, text in texts.items():
            kind = str if kinds[name] == Mode else kinds[name]  # a wrong one is refused as the other settings are
            shown: Any = Annotated[kind, typer.Option(help=text, rich_help_panel=panel)]
            default = getattr(defaults, name)
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=shown)
            )
    cast(Any, command).__signature__ = own.replace(parameters=parameters)
    return command
