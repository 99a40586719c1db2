"""Containers of a forward's own kinds: dataclasses, which a graph makes in a run by their class; others it can't hold."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch.fx.immutable_collections import immutable_dict, immutable_list

from .errors import UntraceableError

_PLAIN = {dict, list, tuple, immutable_dict, immutable_list}


def fields_of(value: Any) -> dict[str, Any] | None:
    """What a dataclass is made of anew in a run; None for other values.

    It may be a dict as well, as the outputs of libraries are, whose `__post_init__` puts the fields into the dict.

    Raises:
        UntraceableError: it holds more than its fields, or is a container that a graph would hold as another kind.
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, type):
        return None
    if is_dataclass(value):
        made = {field.name: getattr(value, field.name) for field in fields(value)}
        plain = all(field.init for field in fields(value)) and (
            isinstance(value, dict) or not hasattr(kind, "__post_init__")
        )
        if not plain or getattr(value, "__dict__", made).keys() - made.keys():
            raise UntraceableError(f"its forward makes a {kind.__name__}, and not of its fields alone")
        return made
    if isinstance(value, dict | list) or (isinstance(value, tuple) and not hasattr(value, "_fields")):
        raise UntraceableError(f"its forward makes a {kind.__name__}, which a graph can't hold")
    return None
