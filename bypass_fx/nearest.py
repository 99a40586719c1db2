"""The names nearest to a mistaken one, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
