"""How long planning and extending take: beside Torch-Pruning's dependency graph, and as a transformer grows deeper."""

from __future__ import annotations

import gc
import time
import warnings
from statistics import median
from typing import Any

import timm
import torch
from torch import nn

import bypass_fx
from bypass_fx.usual_inputs import usual_inputs

from . import exactness, zoo
from .results_file import ResultsFile

REPEATS = 3
LONG = 5.0  # seconds
DEPTHS = (12, 24, 48, 96)


def _seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _extend(model: nn.Module) -> float:
    """Seconds of plan + extend; the model is contracted again."""
    spent = _seconds(lambda: bypass_fx.extend(model, mode="all"))
    bypass_fx.contract(model)
    return spent


def beside_torch_pruning(name: str) -> dict[str, Any]:
    """Both on the same model: ours the median of repeats, theirs the lower of two builds (of one that takes long)."""
    import torch_pruning

    model = zoo.build(name, device="cpu").eval()
    inputs = usual_inputs(model)
    example = torch.zeros_like(inputs[0]) if inputs else torch.zeros(1, 3, 224, 224)

    def dependencies() -> None:
        torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)

    row: dict[str, Any] = {"modules": sum(1 for _ in model.modules()), "first": _extend(model)}
    ours = [_extend(model)]
    try:
        theirs = [_seconds(dependencies)]
    except Exception as error:  # what it can't do is a row of the table
        return row | {"extend": ours[0], "torch_pruning": f"{type(error).__name__}: {str(error)[:80]}"}
    if theirs[0] < LONG:
        theirs.append(_seconds(dependencies))
    ours += [_extend(model) for _ in range(REPEATS - 1)]
    return row | {"extend": median(ours), "torch_pruning": min(theirs), "ratio": median(ours) / min(theirs)}


def deep(blocks: int) -> dict[str, Any]:
    """A vision transformer of so many blocks, without memory for its weights."""
    with torch.device("meta"):
        model = timm.models.VisionTransformer(depth=blocks, embed_dim=64, num_heads=2)
    modules = sum(1 for _ in model.modules())
    _extend(model)
    spent = median(_extend(model) for _ in range(REPEATS))
    return {"modules": modules, "extend": spent, "milliseconds_per_module": 1000 * spent / modules}


def run(pattern: str = "", results: str = "planning.jsonl") -> ResultsFile:
    """Measure every model and depth that no earlier run has measured."""
    from rich.progress import track

    file = ResultsFile(results, ("torch", "timm", "torch-pruning"))
    todo = [f"depth:{blocks}" for blocks in DEPTHS] + [name for name in exactness.models() if name.startswith("timm:")]
    for name in track([n for n in todo if pattern in n and n not in file.done("model")], description="planning"):
        kind, _, rest = name.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.add({"model": name, **(deep(int(rest)) if kind == "depth" else beside_torch_pruning(name))})
        gc.collect()
    return file


def summary(file: ResultsFile) -> str:
    """The median of the ratios, and the time per module as the depth grows, in Markdown."""
    compared = [row for row in file if "ratio" in row]
    failed = [row for row in file if isinstance(row.get("torch_pruning"), str)]
    ratios = sorted(row["ratio"] for row in compared)
    lines = [
        f"plan + extend against Torch-Pruning's DependencyGraph on {len(compared)} models: ratio {median(ratios):.2f} in the "
        f"median, {ratios[0]:.2f} to {ratios[-1]:.2f}; at most a half in {sum(r <= 0.5 for r in ratios)}. "
        f"On {len(failed)} more models DependencyGraph does not build.",
        "",
        "| blocks | modules | seconds | milliseconds a module |",
        "|---|---|---|---|",
    ]
    for row in file:
        if row["model"].startswith("depth:"):
            blocks, each = row["model"].partition(":")[2], row["milliseconds_per_module"]
            lines.append(f"| {blocks} | {row['modules']} | {row['extend']:.3f} | {each:.2f} |")
    return "\n".join(lines) + "\n"
