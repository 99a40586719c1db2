"""The penalty alone: its value and gradient against the least that its arithmetic and its reading and writing can take."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import bypass_fx

from .stopwatch import interleaved, seconds

WIDTHS = tuple(2**k for k in range(6, 15))  # of one site, W and A being square
SITES = (1, 4, 16, 64, 200)  # of width 64 and 256
BYTES = 12 * 2**30  # of memory that a measurement may take
LONGEST = 8.0  # seconds
ROUNDS = 5


@cache
def machine(device: str) -> dict[str, float]:
    """Floating-point operations a second in a float32 product, and bytes a second read and written in a copy."""
    a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
    source, target = (torch.zeros(2**26, device=device) for _ in range(2))
    out = torch.empty_like(a)
    product = min(seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(5))
    copied = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    return {"flops": 2 * 2048**3 / product, "bandwidth": 2 * source.nbytes / copied}


def counted(width: int, sites: int) -> dict[str, int]:
    """Three products; A and W read, their gradients written, R written and read: float32."""
    return {"flops": sites * 3 * 2 * width**3, "bytes": sites * 4 * 6 * width**2}


def floor(width: int, sites: int, device: str) -> float:
    """Seconds that the penalty's value and gradient take at least."""
    rates, count = machine(device), counted(width, sites)
    return max(count["flops"] / rates["flops"], count["bytes"] / rates["bandwidth"])


def measure(width: int, sites: int, device: str) -> dict[str, Any]:
    """Seconds of value and gradient: ours, and by autograd through A D W, site by site."""
    low = floor(width, sites, device)
    row: dict[str, Any] = {"width": width, "sites": sites, "floor": low}
    if sites * 4 * width**2 * 12 > BYTES:
        return row | {"skipped": "memory"}
    if low > LONGEST:
        return row | {"skipped": f"at least {low:.0f} s"}
    pairs = [(nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)) for _ in range(sites)]
    blocks = [nn.Sequential(first, nn.ReLU(), second) for first, second in pairs]
    model = nn.Sequential(*blocks).to(device)
    bypass_fx.extend(model, mode="strict", select="*.1")
    weights = [(second.weight, first.weight) for first, second in pairs]
    deltas = [bypass_fx.surgery.delta_of(model, site) for site in bypass_fx.sites(model)]
    assert len(deltas) == sites
    with torch.no_grad():
        for delta in deltas:
            delta.normal_()

    def ours() -> None:
        model.zero_grad()
        bypass_fx.penalty(model).backward()  # type: ignore[no-untyped-call]

    def by_autograd() -> None:
        model.zero_grad()
        norms = [torch.linalg.vector_norm((a * d) @ w) for (a, w), d in zip(weights, deltas, strict=True)]
        _sum(norms).backward()

    times = interleaved({"ours": ours, "autograd": by_autograd}, 3 if low > 1 else ROUNDS, device)
    return row | {name: median(each) for name, each in times.items()}


def _sum(norms: list[Tensor]) -> Any:
    return torch.stack(norms).sum()


def todo(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by name."""
    sizes = [(width, 1) for width in WIDTHS] + [(width, count) for width in (64, 256) for count in SITES[1:]]
    return {f"penalty:{width}×{count}": partial(measure, width, count, device) for width, count in sizes}


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """A table, in Markdown."""
    lines = [
        "The penalty alone, value and gradient, A and W square, float32. The floor is the longer of the time of its three "
        "products at the rate of a product of 2048 × 2048 matrices, and that of reading A and W, writing their gradients, "
        "and writing and reading A D W once, at the rate of a copy, both measured in the same run.",
        "",
        "| width | sites | floor | bypass_fx | × floor | autograd, site by site |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if name.startswith("penalty:"):
            start = f"| {row['width']} | {row['sites']} | {_ms(row['floor'])} | "
            if "skipped" in row:
                lines.append(start + f"not measured: {row['skipped']} | | |")
            else:
                lines.append(
                    start + f"{_ms(row['ours'])} | {row['ours'] / row['floor']:.2f} | {_ms(row['autograd'])} |"
                )
    return "\n".join([*lines, ""])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
