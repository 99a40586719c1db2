"""The numbers that torch's functions ask traced values for: they ask first, and do without where they are told none."""

from __future__ import annotations

from types import FrameType
from typing import Any

from torch.utils._pytree import tree_leaves


class Doubts:
    """What was asked in vain, and may end the trace: `F.avg_pool2d(x, x.size(2))` goes on, `items[x.size(2) :]` does not.

    Until the same call hands the value over to be traced, the one who asked may have caught the error, and gone on.
    """

    def __init__(self) -> None:
        self._open: list[tuple[FrameType, int, Any, str]] = []

    def raised(self, frame: FrameType, value: Any, reason: str) -> None:
        """The call that the frame is in asked a value for its number."""
        self._open.append((frame, frame.f_lasti, value, reason))

    def settle(self, frame: FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The call that the frame is in is a function of torch's, and is traced with these arguments."""
        if self._open:
            given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            self._open = [
                (asked, at, value, reason)
                for asked, at, value, reason in self._open
                if not (asked is frame and at == frame.f_lasti and id(value) in given)
            ]

    @property
    def reason(self) -> str:
        """Why the trace can't be trusted; empty where it can."""
        return self._open[0][-1] if self._open else ""
