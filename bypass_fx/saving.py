"""When a run writes a checkpoint, and when it stops because a signal asked for it: all its processes at the same step."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from bypass_fx.checkpoint import CheckpointError, Checkpoints
from bypass_fx.data import DataError
from bypass_fx.engine import Engine
from bypass_fx.interrupt import Stopped, Wish

STEPS_PER_CHECK = 10  # between the processes' agreements on stopping and saving
_STOP = 1000  # + the number of the signal

State = Callable[[], dict[str, Any]]


class Saving:
    """Writes the states of a run; every process calls its methods, as gathering a state takes them all.

    Args:
        checkpoints: where they go; None for a run that keeps none.
        engine: the processes.
        every: seconds between two checkpoints.
    """

    def __init__(self, checkpoints: Checkpoints | None, engine: Engine, every: float) -> None:
        self._checkpoints, self._engine, self._every = checkpoints, engine, every
        self._saved_at = time.monotonic()

    def save(self, step: int, state: State) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: the disk is full, say.
        """
        now = state()
        self._saved_at = time.monotonic()
        if self._checkpoints and self._engine.is_main:
            self._checkpoints.save(step, now)

    def heed(self, wish: Wish, step: int, state: State, told: str) -> None:
        """Save where it is time to, and stop where a signal asked for it.

        Raises:
            Stopped: all is saved; says what it is told to.
        """
        if self._engine.shares.world > 1 and step % STEPS_PER_CHECK:
            return
        due = time.monotonic() - self._saved_at >= self._every and self._engine.is_main
        wanted = self._engine.agreed(_STOP + wish.number if wish.number else int(due and self._checkpoints is not None))
        if wanted >= _STOP:
            self.save(step, state)
            raise Stopped(told, wanted - _STOP)
        if wanted:
            try:
                self.save(step, state)
            except CheckpointError as error:
                warnings.warn(f"{error}; the run goes on, and the checkpoint before stays", stacklevel=2)

    @contextlib.contextmanager
    def before_bad_data(self, step: int, state: State) -> Iterator[None]:
        """Inside, between two steps, data that can't be read end the run with a checkpoint of what it has reached."""
        try:
            yield
        except DataError as error:
            saved = ""
            if self._checkpoints and self._engine.shares.world == 1:  # of several processes, the others know nothing
                self.save(step, state)
                saved = f"; step {step} is saved"
            raise DataError(f"{error}{saved}") from error
