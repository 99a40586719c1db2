"""The residual norms of a run's sites, step by step, as its folder holds them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bypass_fx.passes.errors import BypassError


class RunError(BypassError):
    """A folder is no run's, or its files can't be read."""


@dataclass(frozen=True, slots=True)
class Residuals:
    """‖ADW‖ or ‖D‖ of every site at the steps where it was recorded; None where a site has none at that step."""

    steps: tuple[int, ...]
    phases: tuple[str, ...]
    residuals: dict[str, tuple[float | None, ...]]


def read_residuals(folder: Path) -> Residuals:
    """Read the residual norms from a run's history.

    Raises:
        RunError: the folder has no history, or one that holds no residual of single sites.
    """
    file = folder / "history.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row.get("residuals")]
        names = list(dict.fromkeys(name for row in rows for name in row["residuals"]))
        residuals = {name: tuple(row["residuals"].get(name) for row in rows) for name in names}
        steps, phases = tuple(row["step"] for row in rows), tuple(row["phase"] for row in rows)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{str(file)!r} can't be read as a run's history ({error}); give the folder of a run") from error
    if not rows:
        raise RunError(
            f"{str(file)!r} holds no residual norms of single sites: it was written by a version before; run it again"
        )
    return Residuals(steps, phases, residuals)
