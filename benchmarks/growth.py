"""How the cost of a bypass grows: with width, depth, batch and number of sites of a character transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import bypass_fx

from .planning import deep
from .results_file import ResultsFile
from .stopwatch import interleaved, ratios
from .workloads import CharTransformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDS = 7
EXTENDED_DEPTHS = (12, 24, 48, 96)


@dataclass(frozen=True, slots=True)
class Size:
    """A transformer, its batch of texts of 64 characters, and how many of its MLPs get a D."""

    width: int = 128
    blocks: int = 4
    batch: int = 16
    sites: int = 4


SERIES: dict[str, tuple[Size, ...]] = {
    "width": tuple(Size(width=width) for width in (32, 64, 128, 256, 512)),
    "depth": tuple(Size(blocks=blocks, sites=blocks) for blocks in (2, 4, 8, 16, 32)),
    "batch": tuple(Size(batch=batch) for batch in (2, 4, 8, 16, 32, 64)),
    "sites": tuple(Size(blocks=16, sites=sites) for sites in (1, 2, 4, 8, 16)),
}
FIELD = {"width": "width", "depth": "blocks", "batch": "batch", "sites": "sites"}
ARMS: dict[str, dict[str, Any]] = {
    "opt1": {},
    "homotopy": {"comeback": "homotopy"},
    "penalty": {"comeback": "published"},
}


def measure(size: Size, device: str) -> dict[str, Any]:
    """Ratios of a step, without an optimiser's, to that of the model without D; strict sites, in eager mode."""
    torch.manual_seed(0)
    text = torch.randint(0, 96, (size.batch, 65), device=device)
    plain, extended = (CharTransformer(size.blocks, size.width, tokens=64).to(device) for _ in range(2))
    patterns = [f"blocks.{index}.act" for index in range(size.sites)]
    bypass_fx.extend(extended, mode="strict", select=patterns)
    assert len(bypass_fx.sites(extended)) == size.sites
    steps: dict[str, Callable[[], None]] = {"base": partial(_step, plain, text, None)}
    for arm, options in ARMS.items():
        optimizer = torch.optim.SGD(extended.parameters(), lr=0.0)
        long = 10**7
        schedule = bypass_fx.BypassSchedule(
            extended, optimizer, long if arm == "opt1" else 0, long, gamma=bypass_fx.Linear(1e-12), epsilon=1e-30,
            snapshot=None, **options,
        )  # fmt: skip
        steps[arm] = partial(_step, extended, text, schedule)
    with torch.no_grad():
        for site in bypass_fx.sites(extended):
            bypass_fx.surgery.delta_of(extended, site).fill_(1e-3)
    times = interleaved(steps, ROUNDS, device)
    return {"seconds": median(times["base"]), "ratios": ratios(times, "base")}


def _step(model: nn.Module, text: Tensor, schedule: Any) -> None:
    loss: Any = nn.functional.cross_entropy(model(text[:, :-1]), text[:, 1:].flatten())
    if schedule:
        loss = loss + schedule.penalty()
    model.zero_grad()
    loss.backward()
    if schedule:
        schedule.step()


def todo(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for series, sizes in SERIES.items():
        for size in sizes:
            found[f"growth:{series}:{getattr(size, FIELD[series])}"] = partial(measure, size, device)
    for blocks in EXTENDED_DEPTHS:
        found[f"extend:{blocks}"] = partial(deep, blocks)
    return found


def points(file: ResultsFile | dict[str, dict[str, Any]], series: str) -> list[tuple[int, dict[str, float]]]:
    """(size, ratios) of a series, as far as it is measured."""
    rows = file.values() if isinstance(file, dict) else list(file)
    prefix = f"growth:{series}:"
    return [(int(row["name"].removeprefix(prefix)), row["ratios"]) for row in rows if row["name"].startswith(prefix)]


def draw(file: ResultsFile) -> None:
    """A figure for each series: overhead-width.png and so on, beside the results."""
    from bypass_fx.figure import save

    for series in SERIES:
        if found := sorted(points(file, series)):
            save(_figure(series, found), file.path.with_name(f"{file.path.stem}-{series}.png"))


def _figure(series: str, found: list[tuple[int, dict[str, float]]]) -> Figure:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(4.4, 3), dpi=110, layout="constrained")
    axes = picture.subplots()
    for arm, colour in zip(ARMS, ("tab:gray", "tab:purple", "tab:red"), strict=True):
        label = "opt1" if arm == "opt1" else f"opt2, {arm}"
        axes.plot([size for size, _ in found], [each[arm] for _, each in found], "o-", ms=3, color=colour, label=label)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([size for size, _ in found], [str(size) for size, _ in found])
    axes.set_xlabel({"depth": "blocks", "batch": "texts in a batch"}.get(series, series))
    axes.set_ylabel("step against the same without D")
    axes.legend(frameon=False, fontsize=8)
    return picture


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """The series as a table, and the time that extend takes, in Markdown."""
    lines = [
        f"How it grows: eager steps without an optimiser's of a character transformer ({Size().blocks} blocks of width "
        f"{Size().width}, {Size().batch} texts of 64 characters, D in each MLP, but for what varies), "
        "against the same without D.",
        "",
        f"| | | {' | '.join(ARMS)} |",
        "|---|---|" + "---|" * len(ARMS),
    ]
    for series in SERIES:
        for size, found in sorted(points(rows, series)):
            lines.append(f"| {series} | {size} | " + " | ".join(f"{found[arm]:.3f}" for arm in ARMS) + " |")
    lines += [
        "",
        "plan + extend as a vision transformer grows:",
        "",
        "| blocks | modules | ms | ms a module |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        if name.startswith("extend:"):
            each = row["milliseconds_per_module"]
            lines.append(f"| {name.partition(':')[2]} | {row['modules']} | {1000 * row['extend']:.0f} | {each:.2f} |")
    return "\n".join([*lines, ""])
