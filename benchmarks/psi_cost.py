"""ψ alone: its forward and its backward beside those of σ, and beside what reading and writing once would take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bypass_fx.activation import psi
from bypass_fx.passes.derivatives import ELEMENTWISE, Parameter

from .penalty_cost import machine
from .stopwatch import interleaved

ROUNDS = 15
ROWS = {"cpu": 4, "cuda": 128}  # images
SHAPES: dict[str, tuple[str, tuple[Parameter, ...], tuple[int, ...], bool]] = {  # σ, one image, channels last
    "vit_base": ("gelu", ("none",), (197, 3072), True),
    "resnet50, 56 × 56": ("relu", (), (256, 56, 56), True),
    "resnet50, 56 × 56, channels first": ("relu", (), (256, 56, 56), False),
    "efficientnet_b0, 7 × 7": ("silu", (), (1152, 7, 7), True),
}


def measure(shape: str, device: str) -> dict[str, Any]:
    """Seconds of value and of both gradients, by autograd: of σ, and of ψ."""
    name, parameters, image, last = SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    z = torch.randn(ROWS[device], *image, device=device, dtype=dtype)
    axis = -1 if len(image) == 2 else 1
    if last and axis == 1:
        z = z.contiguous(memory_format=torch.channels_last)
    z.requires_grad_()
    g = torch.randn_like(z)
    delta = torch.full((z.shape[axis],), 1e-3, device=device, requires_grad=True)
    ways: dict[str, Callable[[], Tensor]] = {
        "sigma": lambda: ELEMENTWISE[name].value(z, *parameters),
        "psi": lambda: psi(name, z, delta, axis, *parameters),
    }
    made = {way: forward() for way, forward in ways.items()}
    inputs = {"sigma": [z], "psi": [z, delta]}
    backwards = {
        f"{way} backward": partial(torch.autograd.grad, made[way], inputs[way], g, retain_graph=True) for way in ways
    }
    times = interleaved({**ways, **backwards}, ROUNDS, device)
    once = z.nbytes / machine(device)["bandwidth"]
    return {"shape": shape, "seconds": {way: median(each) for way, each in times.items()}, "a pass": once}


def todo(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by name."""
    return {f"psi:{shape}": partial(measure, shape, device) for shape in SHAPES}


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """A table, in Markdown."""
    lines = [
        "ψ alone, beside σ, in eager mode. A pass is the reading or the writing of z at the rate of a copy: σ takes two, and "
        "its backward three.",
        "",
        "| z of | a pass | σ | ψ | σ backward | ψ backward |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if name.startswith("psi:"):
            spent = [row["seconds"][way] for way in ("sigma", "psi", "sigma backward", "psi backward")]
            cells = " | ".join(f"{1000 * each:.3g} ms" for each in (row["a pass"], *spent))
            lines.append(f"| {row['shape']} | {cells} |")
    return "\n".join([*lines, ""])
