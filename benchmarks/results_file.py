"""Results as JSON lines: a header with the machine, the versions and the command, then a line for every measurement."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class ResultsFile:
    """A file that a run appends to, and that a later run goes on with."""

    def __init__(self, name: str, packages: tuple[str, ...] = ("torch",)) -> None:
        self.path = RESULTS / name
        self.rows: list[dict[str, Any]] = []
        if not self.path.exists():
            RESULTS.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(_header(packages)) + "\n")
        self.header: dict[str, Any]
        self.header, *self.rows = map(json.loads, self.path.read_text().splitlines())

    def done(self, key: str) -> set[Any]:
        """The values of a field in the rows that are there."""
        return {row.get(key) for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and have it on disk."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _header(packages: tuple[str, ...]) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "machine": f"{platform.machine()}, {cores()} of {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
