"""Which models of timm and torchvision offer which sites, as `python -m benchmarks coverage` measured them."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Literal

FILE = "zoo_sites.tsv"
ListedKind = Literal["any", "strict", "folded", "augmented", "relaxed"]


@dataclass(frozen=True, slots=True)
class ModelSites:
    """The activation calls of one model and how many of them are sites: strict ones with mode="strict", relaxed ones with
    mode="relaxed", and those of mode="auto" and mode="all".

    `exact` counts the strict sites whose fold is exact in training mode too.
    """

    model: str
    parameters: int
    activations: int
    folded: int
    augmented: int
    exact: int
    relaxed: int
    auto: int
    all: int

    def offers(self, kind: ListedKind) -> int:
        """How many sites of a kind the model has.

        Example:
            >>> ModelSites("net", 10, 3, 1, 1, 2, 3, 3, 3).offers("strict")
            2
        """
        counts = {"any": self.all, "strict": self.folded + self.augmented}
        return counts[kind] if kind in counts else int(getattr(self, kind))


def write(rows: list[ModelSites], measured_with: str) -> str:
    """The text of the file: a line on how it was measured, the names of the columns, and a line for each model."""
    names = "\t".join(field.name for field in fields(ModelSites))
    lines = ("\t".join(map(str, astuple(row))) for row in rows)
    return "\n".join([f"# {measured_with}", names, *lines]) + "\n"


@cache
def read() -> tuple[str, tuple[ModelSites, ...]]:
    """How the file that comes with the package was measured, and its rows."""
    measured_with, _, *lines = files("bypass_fx").joinpath(FILE).read_text(encoding="utf-8").splitlines()
    cells = (line.split("\t") for line in lines)
    return measured_with.removeprefix("# "), tuple(ModelSites(model, *map(int, counts)) for model, *counts in cells)


def offering(kind: ListedKind = "any", pattern: str = "*", exact: bool = False) -> list[ModelSites]:
    """The models that fit a glob pattern and have a site of a kind.

    Args:
        exact: only those with a strict site whose fold is exact in training mode too.

    Example:
        >>> [row.model for row in offering("strict", "timm:vit_giant_patch14_22*")]
        ['timm:vit_giant_patch14_224']
    """
    return [
        row for row in read()[1] if fnmatchcase(row.model, pattern) and row.offers(kind) and (row.exact or not exact)
    ]


def names(start: str) -> list[str]:
    """The models whose names begin like this; for shell completion, which can't wait for timm's import."""
    return [row.model for row in read()[1] if row.model.startswith(start)]
