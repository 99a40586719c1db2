"""SIGTERM and Ctrl-C as a wish to stop after the step under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bypass_fx.passes.errors import BypassError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BypassError):  # noqa: N818 - no error: it was asked for
    """A run was asked to stop, and did; what it had reached is saved. `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class Wish:
    """Whether the process was asked to stop: the number of the signal, 0 if none came."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        """Note a signal; the next one of its kind ends the process at once."""
        self.number = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def noticed() -> Iterator[Wish]:
    """Inside, the signals only set a `Wish`; outside the main thread, where Python has none, it never comes true."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.signal(number, wish) for number in SIGNALS}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
