"""Bypasses of several models that are in step: what each would do to its own D is done to the rows of one matrix."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from bypass_fx.bypass import Bypass
from bypass_fx.lookout import Seen
from bypass_fx.readout import send_rows
from bypass_fx.stack import Stack, rows_of


@torch.no_grad()
def lead(
    bypasses: Mapping[int, Bypass], seen: Mapping[int, Seen], deltas: Stack, rows: Sequence[int]
) -> dict[int, Seen]:
    """Let the returns scale D, and send what the steps go by to the host, for all those at once that are in step.

    Args:
        bypasses: those under way, by the number of their model.
        seen: what was measured of them.
        deltas: the D of models with the same sites.
        rows: the numbers of these models.

    Returns:
        What to tell the steps of the bypasses of which that was done.
    """
    in_step: dict[Hashable, list[int]] = {}
    for place, row in enumerate(rows):
        if row in bypasses and (key := bypasses[row].in_step) is not None:
            in_step.setdefault(key, []).append(place)
    found = dict[int, Seen]()
    for places in in_step.values():
        if len(places) > 1:
            numbers = [rows[place] for place in places]
            told = [seen.get(number, Seen()) for number in numbers]
            found |= zip(numbers, _together([bypasses[n] for n in numbers], told, deltas, places), strict=True)
    return found


def _together(bypasses: Sequence[Bypass], seen: Sequence[Seen], deltas: Stack, places: Sequence[int]) -> list[Seen]:
    first, values = bypasses[0], _stacked([each.values for each in seen])
    shrunk, sent = _shrunk(bypasses, values, deltas, places), None
    if values is not None:
        losses: list[Tensor] = [bypass.lookout.losses for bypass in bypasses]
        extents = _stacked([each.extent for each in seen]) if first.looks else None
        columns = [each.unsqueeze(1).to(values) for each in (extents, torch.stack(losses)) if each is not None]
        norms = shrunk if first.watches == "norms" else values
        sent = send_rows(torch.cat([norms, *columns], 1))
        torch._foreach_zero_(losses)
    return [
        Seen(each.values, each.extent, shrunk[place], sent[place] if sent else None) for place, each in enumerate(seen)
    ]


def _shrunk(bypasses: Sequence[Bypass], norms: Tensor | None, deltas: Stack, places: Sequence[int]) -> Tensor:
    """Scale D as the return of the first does, and give the norms after that, [bypasses, sites]."""
    first = bypasses[0]
    latest = first.only_out(norms) if first.measures and norms is not None else _stacked([b.latest for b in bypasses])
    assert latest is not None, "without norms from before it would measure"
    factors = first.factors(first.moment(latest))
    if factors is None:
        return latest
    rows = rows_of(places, latest.device)
    deltas.values[rows] = deltas.values[rows] * factors.index_select(1, deltas.owners).to(deltas.values)
    return latest * factors


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if len(there) == len(tensors) else None
