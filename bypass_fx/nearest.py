"""The names nearest to a mistaken one, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from bypass_fx.passes.errors import BypassError

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """ "did you mean ...?" with up to three names near `name`, or `otherwise` where none is.

    Example:
        >>> did_you_mean("adma", ["adam", "sgd"])
        'did you mean adam?'
        >>> did_you_mean("xyz", ["adam", "sgd"], "take adam")
        'take adam'
    """
    nearest = difflib.get_close_matches(name, [*known], n=3)
    return f"did you mean {', '.join(nearest)}?" if nearest else otherwise


def named(name: str, table: Mapping[str, T], what: str) -> T:
    """The entry of that name.

    Raises:
        BypassError: there is none; the nearest names are offered.

    Example:
        >>> named("one", {"one": 1}, "number")
        1
    """
    if isinstance(name, str) and name in table:
        return table[name]
    hint = did_you_mean(str(name), table, "give one of the known names")
    raise BypassError(f"unknown {what} {name!r}; {hint} ({', '.join(table)})")
