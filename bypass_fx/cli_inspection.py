"""`bypass-fx inspect` shows where a model can be bypassed, and draws it; `bypass-fx list` shows it for whole libraries."""

from __future__ import annotations

import gc
import json as json_format
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bypass_fx import terminal, zoo_sites
from bypass_fx.nearest import did_you_mean
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.plan import Mode

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bypass_fx.inspection import Inspection, Residuals
    from bypass_fx.passes.plan import Plan

_MODEL = "mlp, 2c2d, timm:NAME, torchvision:NAME, package.module:factory, or the folder of a run."
_OUT = "Draw the model to a file: .html (look around in it), .svg, .png, .dot, .graphml or .json (for networkx)."
_KINDS = ("any", "strict", "folded", "augmented", "relaxed")


class UsageError(BypassError):
    """The command line asks for something that does not exist; the message says what does."""


def complete_model(incomplete: str) -> list[str]:
    """Names of models that begin with what was typed."""
    return [name for name in ("mlp", "2c2d") if name.startswith(incomplete)] + zoo_sites.names(incomplete)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """The collector of cyclic garbage rests: it finds next to none here, and takes a fifth of the time to look for it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def inspect(
    model: Annotated[str | None, typer.Argument(help=_MODEL, autocompletion=complete_model)] = None,
    mode: Annotated[str, typer.Option(help="auto, strict, relaxed or all.")] = "auto",
    select: Annotated[str | None, typer.Option(help="Only sites whose name fits this pattern.")] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of one sample, such as 3x224x224 or 128:int64; once for each argument."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and nothing else.")] = False,
    code: Annotated[bool, typer.Option("--code", help="Show the forwards before and after the surgery.")] = False,
    out: Annotated[list[Path] | None, typer.Option("--out", help=_OUT)] = None,
    after: Annotated[bool, typer.Option("--after", help="Draw .svg, .png and .dot after the surgery.")] = False,
    depth: Annotated[int | None, typer.Option(min=1, help="Levels of modules in .svg, .png and .dot.")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Colour the sites by the residual norms of this run.")
    ] = None,
) -> None:
    """Show where a model can be bypassed, why not elsewhere, what it costs and what the surgery writes.

    For timm's and torchvision's models no weights are downloaded, nor made (but for RegNets); large ones need no memory.

    [bold]Examples[/]

    bypass-fx inspect timm:resnet18

    bypass-fx inspect torchvision:vit_b_16 --mode all --code

    bypass-fx inspect timm:convnext_tiny --out convnext.html --out convnext.svg

    bypass-fx inspect my_package.nets:make --input 3x64x64 --json > plan.json

    bypass-fx inspect --run runs/digits-mlp --out digits.html
    """
    if model is None and run is None:
        raise UsageError(f"name a model ({_MODEL[:-1]}), or give --run the folder of a run")
    with _without_collecting(), terminal.warnings_as_lines():
        from bypass_fx import inspection

        network, made, inputs = _model(model or str(run))
        if made is not None and select is None and mode == "auto":
            mode = made.mode
        else:
            made = None
        if sizes:
            inputs = tuple(_sample(network, *_shape(size)) for size in sizes)
        name = model or str(run)
        found = inspection.inspect(
            network, name, mode=cast(Mode, mode), select=select, example_inputs=inputs, plan=made
        )
        norms = inspection.read_residuals(run) if run else None
        for path in out or ():
            inspection.write(found, path, run=norms, stage="after" if after else "before", depth=depth)
        if json:
            typer.echo(found.plan.to_json())
            return
        _print(found, norms, code)
    screen = terminal.console()
    for path in out or ():
        screen.print(f"wrote {path}", soft_wrap=True, markup=False)
    if run and not out:
        screen.print("--out PAGE.html draws the graph, coloured by these norms, with a slider over the steps")


def _print(found: Inspection, norms: Residuals | None, code: bool) -> None:
    """The tables of sites and refusals, the code if it is asked for, and the totals."""
    from bypass_fx.inspection import rewritten, tables

    screen, totals = terminal.console(), tables.totals(found)
    if found.plan.sites:
        screen.print(tables.site_table(found.plan, screen.width, norms))
    if found.plan.refusals:
        screen.print()
        screen.print(tables.refusal_table(found.plan))
    if code:
        screen.print(tables.diff(rewritten(found.linked, found.plan)), soft_wrap=True)
    screen.print()
    screen.print(totals, soft_wrap=not screen.is_terminal)


def _model(name: str) -> tuple[nn.Module, Plan | None, tuple[Tensor, ...] | None]:
    """A model by its name; a run's with its plan, and an input of its data's shape."""
    from bypass_fx import models
    from bypass_fx.passes.plan import Plan

    folder = Path(name)
    if not folder.is_dir():
        network = models.build_empty(name)
        known = name in models.BUILTIN
        return network, None, (_sample(network, models.BUILTIN[name][1].shape),) if known else None
    try:
        about = json_format.loads((folder / "summary.json").read_text(encoding="utf-8"))
        fit = models.Fit(tuple(about["shape"]), about["outputs"])
        network = models.build_empty(about["model"], fit)
        return network, Plan.load(folder / "plan.json"), (_sample(network, fit.shape),)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{name!r} is a folder, but not that of a run with all its files "
            f"({type(error).__name__}: {error}); {_MODEL}"
        ) from error


def _shape(text: str) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype that a text names: 3x224x224, or 128:int64."""
    import torch

    size, _, dtype_name = text.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    sides = size.split("x")
    if not all(side.isdigit() and int(side) for side in sides) or not isinstance(dtype, torch.dtype):
        raise UsageError(f"--input {text!r} is no shape; write 3x224x224, or 128:int64 for whole numbers")
    return tuple(map(int, sides)), dtype


def _sample(network: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """A batch of one, on the device of the model."""
    import torch

    device = next((parameter.device for parameter in network.parameters()), None)
    return torch.empty(1, *shape, dtype=dtype, device=device)


def list_models(
    pattern: Annotated[str, typer.Argument(help="Only models whose name fits, such as 'timm:vit*'.")] = "*",
    kind: Annotated[str, typer.Option(help="any, strict, folded, augmented or relaxed.")] = "any",
    exact: Annotated[bool, typer.Option("--exact", help="A strict fold must be exact in training mode too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """List the models of timm and torchvision that have sites, and how many of which kind, as they were measured.

    [bold]Examples[/]

    bypass-fx list --kind strict

    bypass-fx list 'timm:convnext*' --kind folded --exact
    """
    from bypass_fx.inspection import tables

    if kind not in _KINDS:
        raise UsageError(f"kind is {kind!r}; {did_you_mean(kind, _KINDS)} choose from {', '.join(_KINDS)}")
    rows = zoo_sites.offering(cast(zoo_sites.ListedKind, kind), pattern, exact)
    if json:
        content: list[Any] = [asdict(row) for row in rows]
        typer.echo(json_format.dumps(content, indent=1))
        return
    screen = terminal.console()
    measured_with, every = zoo_sites.read()
    screen.print(tables.zoo_table(rows, screen.width))
    screen.print(f"\n{len(rows)} of {len(every)} models; measured with {measured_with}", soft_wrap=True)
    screen.print(
        "folded, augm.: sites with --mode strict, exact: those exact in training mode too; "
        "relaxed, auto, all: sites with that mode",
        style="dim",
    )
