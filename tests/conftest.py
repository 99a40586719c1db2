"""One thread (the nets are tiny), the same generated examples on every run, and a heap that is quickly searched."""

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("steady", derandomize=True, deadline=None, database=None)
settings.load_profile("steady")


@pytest.fixture(scope="module")
def small_heap() -> Iterator[None]:
    """Schedulers are looked for among all objects; those of the libraries are many, and none is one."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
