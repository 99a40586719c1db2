"""The generators of random numbers that a forward may draw from: Python's, NumPy's and torch's own."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Dice = tuple[Any, Any, bytes]


def dice() -> Dice:
    """The state of every one of them; of equal states equal numbers come."""
    numpy = sys.modules.get("numpy")
    with _disable_current_modes():  # under one of fake tensors the state would be none
        of_torch = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), _numpys(numpy) if numpy else b"", of_torch


def put_back(before: Dice) -> None:
    """Give every one the state that `dice` noted.

    >>> before = dice()
    >>> drawn = random.random(), float(torch.rand(()))
    >>> put_back(before)
    >>> drawn == (random.random(), float(torch.rand(())))
    True
    """
    of_python, of_numpy, of_torch = before
    random.setstate(of_python)
    with _disable_current_modes():
        torch.set_rng_state(torch.frombuffer(bytearray(of_torch), dtype=torch.uint8))
    numpy: Any = sys.modules.get("numpy")
    if isinstance(of_numpy, bytes) and len(of_numpy) == _MERSENNE_TWISTER:
        ctypes.memmove(numpy.random.get_bit_generator().ctypes.state_address, of_numpy, _MERSENNE_TWISTER)


@contextmanager
def unrolled(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Afterwards every one is as before, those of the GPUs that hold these tensors too."""
    before = dice()
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            put_back(before)


def _numpys(numpy: Any) -> Any:
    """The state of NumPy's own generator: of the usual kind its memory, for get_state takes as long as a small trace."""
    if not hasattr(numpy.random, "get_bit_generator"):  # before NumPy 1.24
        _, keys, position, *_ = numpy.random.get_state()
        return bytes(keys), position
    generator = numpy.random.get_bit_generator()
    if type(generator) is numpy.random.MT19937:
        return ctypes.string_at(generator.ctypes.state_address, _MERSENNE_TWISTER)
    return str(generator.state)


_MERSENNE_TWISTER = 4 * 624 + 4  # bytes: its words, and the position in them
