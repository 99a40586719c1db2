"""What a user would pick instead, on the same models: LoRA by PEFT, Torch-Pruning's graph, torchvision's extractor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import bypass_fx

from .stopwatch import interleaved, ratios, seconds
from .workloads import WORKLOADS, Workload

ROUNDS = 4


def insertion(name: str, device: str) -> dict[str, Any]:
    """Seconds to insert and to take out, and step ratios of what was inserted."""
    workload = WORKLOADS[name]
    plain = workload.build(device)
    inputs, classes = workload.batch(device)
    extended = copy.deepcopy(plain)
    row: dict[str, Any] = {"extend": seconds(lambda: bypass_fx.extend(extended))}
    adapted, row["lora"] = _with_lora(copy.deepcopy(plain))
    steps: dict[str, Callable[[], None]] = {}
    for arm, model in {"base": plain, "opt1": extended, "lora": adapted}.items():
        steps[arm] = partial(_step, model, inputs, classes)
    row["ratios"] = ratios(interleaved(steps, ROUNDS, device), "base")
    row["contract"] = seconds(lambda: bypass_fx.contract(extended))
    row["merge"] = seconds(adapted.merge_and_unload)
    return row | _graphs(workload, plain)


def _with_lora(model: nn.Module) -> tuple[Any, float]:
    from peft import LoraConfig, get_peft_model

    kinds = (nn.Linear, nn.Conv2d)
    targets = [
        path for path, module in model.named_modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
    ]  # fmt: skip
    config = LoraConfig(r=8, target_modules=targets)
    made: list[Any] = []
    spent = seconds(lambda: made.append(get_peft_model(model, config)))
    return made[0], spent


def _step(model: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(inputs), classes).backward()  # type: ignore[no-untyped-call]


def _graphs(workload: Workload, model: nn.Module) -> dict[str, Any]:
    """Seconds that others take to see the whole model's graph; what they can't do is a word."""
    import torch_pruning
    from torchvision.models.feature_extraction import create_feature_extractor

    model = copy.deepcopy(model).eval()
    inputs = workload.batch("cpu")[0][:1].to(next(model.parameters()).device)
    last = [path for path, module in model.named_modules() if path and not list(module.children())][-1]
    ways: dict[str, Callable[[], object]] = {
        "torch_pruning": lambda: torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs),
        "extractor": lambda: create_feature_extractor(model, [last]),
    }
    found: dict[str, Any] = {}
    for way, action in ways.items():
        try:
            found[way] = median(seconds(action) for _ in range(3))
        except Exception as error:  # what it can't do is an entry of the table
            found[way] = type(error).__name__
    return found


def todo(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by name."""
    return {f"beside:{name}": partial(insertion, name, device) for name in WORKLOADS}


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """A table, in Markdown."""
    lines = [
        "Beside what one would pick instead, on the same models, eager, forward and backward: LoRA of rank 8 in every dense "
        "layer and ungrouped convolution (PEFT; the model's own weights are frozen there, so it is another computation), "
        "Torch-Pruning's dependency graph, torchvision's feature extractor. In ms; steps against the model's.",
        "",
        "| model | extend | contract | LoRA in | LoRA merged | Torch-Pruning | extractor | step, D | step, LoRA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if name.startswith("beside:"):
            keys = ("extend", "contract", "lora", "merge", "torch_pruning", "extractor")
            numbers = [f"{1000 * row[key]:.0f}" if isinstance(row[key], float) else row[key] for key in keys]
            numbers += [f"{row['ratios'][arm]:.3f}" for arm in ("opt1", "lora")]
            lines.append(f"| {name.partition(':')[2]} | {' | '.join(numbers)} |")
    return "\n".join([*lines, ""])
