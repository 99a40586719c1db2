"""Tensors with a shape and no data, for runs of a model that cost neither time nor memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def on_fakes() -> Iterator[Any]:
    """A FakeTensorMode that takes a model's own tensors too; a model that fails on fakes is no error to log."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and rarely needed

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            yield fake
    finally:
        log.setLevel(level)
