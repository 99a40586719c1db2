"""Repeated blocks in one line: `blocks.0.mlp.act`, `blocks.1.mlp.act`, … become `blocks.{0-11}.mlp.act`."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Affine, Plan, Refusal, Site

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SiteRow:
    """Sites that are equal but for the block they stand in; `first` and `second` name W and A, from the owner on.

    A name below the owner begins with a dot, as `.fc1` beside `blocks.{0-11}.mlp.act`.
    """

    name: str
    sites: tuple[Site, ...]
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class RefusalRow:
    """Refusals of one reason, with the folded names of the calls; a block's number in the reason is written `*`."""

    reason: str
    remedy: str
    names: tuple[str, ...]
    count: int


def site_rows(sites: Iterable[Site]) -> list[SiteRow]:
    """The sites folded, in the order of their first ones."""
    groups: dict[Hashable, list[Site]] = {}
    for site in sites:
        ends = _seen_from(site, site.first), _seen_from(site, site.second)
        alike = (site.kind, site.constraint, site.activation, site.width, site.channel_dim, site.exact)
        groups.setdefault((_template(site.name), *ends, alike), []).append(site)
    rows: list[SiteRow] = []
    for group in groups.values():
        by_name = {site.name: site for site in group}
        for name, members in _fold(list(by_name)):
            own = tuple(by_name[member] for member in members)
            first, second = (_end(name, own[0], affine) for affine in (own[0].first, own[0].second))
            rows.append(SiteRow(name, own, first, second))
    return rows


def refusal_rows(refusals: Iterable[Refusal]) -> list[RefusalRow]:
    """The refusals by reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Refusal]] = {}
    for refusal in refusals:
        groups.setdefault((_numberless(refusal.reason), refusal.remedy), []).append(refusal)
    rows = []
    for (reason, remedy), group in groups.items():
        one = {refusal.reason for refusal in group}
        names = tuple(fold_names([refusal.name for refusal in group]))
        rows.append(RefusalRow(one.pop() if len(one) == 1 else reason, remedy, names, len(group)))
    return sorted(rows, key=lambda row: -row.count)


def summary(plan: Plan) -> str:
    """How many sites a plan has, and how many activations it refuses, in words."""
    sites = f"{len(plan)} site{'s' * (len(plan) != 1)}, {plan.coefficients} coefficients"
    return f"{sites}; {len(plan.refusals)} activation{'s' * (len(plan.refusals) != 1)} refused"


def fold_names(names: Sequence[str]) -> list[str]:
    """Names that differ in the number of a block alone, as one.

    Example:
        >>> fold_names(["blocks.0.act", "blocks.1.act", "blocks.3.act", "head.act"])
        ['blocks.{0-1,3}.act', 'head.act']
    """
    groups: dict[Path, list[str]] = {}
    for name in names:
        groups.setdefault(_template(name), []).append(name)
    return [folded for group in groups.values() for folded, _ in _fold(group)]


def _template(name: str) -> Path:
    return tuple("*" if part.isdigit() else part for part in name.split("."))


def _fold(names: list[str]) -> list[tuple[str, list[str]]]:
    """Names of one template, folded where the numbers make a full grid; else split along the first that varies."""
    paths = [name.split(".") for name in names]
    values = [list(dict.fromkeys(column)) for column in zip(*paths, strict=True)]
    if math.prod(map(len, values)) == len(set(names)):
        return [(".".join(map(_spread, values)), names)]
    varying = next(place for place, column in enumerate(values) if len(column) > 1)
    return [
        folded
        for value in values[varying]
        for folded in _fold([name for name, path in zip(names, paths, strict=True) if path[varying] == value])
    ]


def _spread(values: list[str]) -> str:
    """`{0-3,5}` for the numbers 0, 1, 2, 3 and 5; a value alone as it is."""
    if len(values) == 1:
        return values[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, values)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _seen_from(site: Site, affine: Affine | None) -> Path:
    """The affine map's path, with a star for every block that it shares with the site."""
    if affine is None:
        return ()
    here, there = site.name.split("."), affine.name.split(".")
    common = _common(here, there)
    return tuple("*" if place < common and part.isdigit() else part for place, part in enumerate(there))


def _end(folded: str, site: Site, affine: Affine | None) -> str:
    """W or A as a row shows it."""
    if affine is None:
        return "-"
    owner = f"{site.owner}." if site.owner else ""
    if owner and affine.name.startswith(owner):
        return "." + affine.name.removeprefix(owner)
    there = affine.name.split(".")
    common = _common(site.name.split("."), there)
    return ".".join([*folded.split(".")[:common], *there[common:]])


def _common(one: Sequence[str], two: Sequence[str]) -> int:
    """How many components two paths share from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _numberless(reason: str) -> str:
    return re.sub(r"(?<![\w.])\d+(?=\.\w)|(?<=\w\.)\d+(?![\w])", "*", reason)
