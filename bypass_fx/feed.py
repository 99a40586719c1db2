"""The minibatches of a run, in an order fixed by the seed alone: not by the processes, the workers or a resumption."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate, get_worker_info

from bypass_fx.data import DataError, Examples, prepare, size
from bypass_fx.settings import SettingsError

Collate = Callable[[list[Any]], Any]
EVAL_BATCH = 512
_NO_EPOCH = -1  # for the augmentations of an evaluation


@dataclass(frozen=True, slots=True)
class Shares:
    """How a minibatch is divided: this process is `rank` of `world`, and takes its share in `parts`."""

    rank: int = 0
    world: int = 1
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Feed:
    """Minibatches of a training set, epoch after epoch, as one process takes them.

    Raises:
        SettingsError: a minibatch can't be divided evenly among the processes and parts.

    Example:
        >>> examples = TensorDataset(torch.arange(6.0))
        >>> halves = [Feed(examples, 2, 0, Shares(rank, 2)) for rank in (0, 1)]
        >>> alone = next(Feed(examples, 2, 0).from_step(1))[0][0]
        >>> bool(torch.equal(alone, torch.cat([next(half.from_step(1))[0][0] for half in halves])))
        True
    """

    examples: Examples
    batch_size: int
    seed: int
    shares: Shares = Shares()
    collate: Collate = default_collate
    workers: int = 0

    def __post_init__(self) -> None:
        at_once = min(self.batch_size, size(self.examples))
        among = self.shares.world * self.shares.parts
        if at_once % among:
            raise SettingsError(
                f"a minibatch of {at_once} examples can't be divided among {self.shares.world} processes in "
                f"{self.shares.parts} parts each; give a batch_size that is a multiple of {among}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches in an epoch; an incomplete last one is left out: BatchNorm can't take a single example."""
        return max(1, size(self.examples) // self.batch_size)

    def from_step(self, step: int) -> Iterator[list[Any]]:
        """The minibatches after the first `step` ones, without end; of each, this process's share in its parts.

        Raises:
            DataError: the data raised something of its own.
        """
        parts = self.shares.parts
        pieces = self._pieces(self._orders(step))
        for number in count(step + 1):
            with _named(f"minibatch {number}"):
                piece = list(islice(pieces, parts))
            yield piece

    def _orders(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """For every part of a minibatch, its examples as (epoch, index)."""
        first, skip = divmod(step, self.steps_per_epoch)
        rank, world, parts = self.shares.rank, self.shares.world, self.shares.parts
        for epoch in count(first):
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            order = torch.randperm(size(self.examples), generator=generator)
            for batch in islice(torch.split(order, self.batch_size), skip, self.steps_per_epoch):
                for part in batch.chunk(world * parts)[rank * parts : (rank + 1) * parts]:
                    yield [(epoch, index) for index in part.tolist()]
            skip = 0

    def _pieces(self, orders: Iterator[list[tuple[int, int]]]) -> Iterator[Any]:
        if isinstance(self.examples, TensorDataset) and self.collate is default_collate:
            # One indexing a batch: a DataLoader collates example by example, which costs more than a small model's step.
            for order in orders:
                yield list(self.examples[torch.tensor([index for _, index in order])])
        else:
            yield from _loader(self.examples, self.seed, orders, self.collate, self.workers)


def _loader(examples: Examples, seed: int, orders: Any, collate: Collate, workers: int) -> DataLoader[Any]:
    """Reads the minibatches that `orders` lists.

    timm's `create_loader` draws the order and the augmentations from the state of its sampler and of each worker, so
    they would change with the number of either, and in a run that is gone on with in the middle of an epoch.
    """
    return DataLoader(
        _Seeded(examples, seed),
        batch_sampler=orders,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # else it would draw from everybody's
    )


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever a user's data set raises, in one line that says what was read."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [""]
        raise DataError(
            f"reading {what} failed: {type(error).__name__}: {reason[0]}; mend or remove the example"
        ) from error


class _Seeded(Dataset[Any]):
    """Draws an example's augmentation from the seed, the epoch and its index, so that it is the same wherever it's drawn."""

    def __init__(self, examples: Examples, seed: int) -> None:
        self._examples, self._seed = examples, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        import numpy as np

        epoch, index = key
        seed = hash((self._seed, epoch, index)) % 2**32
        kept = None if get_worker_info() else (random.getstate(), np.random.get_state(), torch.get_rng_state())
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            return self._examples[index]
        finally:
            if kept:
                random.setstate(kept[0])
                np.random.set_state(kept[1])
                torch.set_rng_state(kept[2])


def in_order(
    examples: Examples,
    batch_size: int = EVAL_BATCH,
    shares: Shares | None = None,
    collate: Collate = default_collate,
    workers: int = 0,
) -> Iterator[tuple[Any, bool]]:
    """All examples once, as an evaluation reads them: this process's share of each minibatch, and whether it counts.

    Every process gets as many minibatches as the others; where there is none left for it, one that does not count. An
    example is augmented in the same way each time, where it is augmented at all.

    Raises:
        DataError: the data raised something of its own.
    """
    rank, world = (shares.rank, shares.world) if shares else (0, 1)
    starts, count = range(0, size(examples), batch_size), size(examples)

    def share(start: int) -> tuple[Tensor, bool]:
        parts = torch.arange(start, min(start + batch_size, count)).chunk(world)
        return (parts[rank], True) if rank < len(parts) else (parts[0][:1], False)

    pieces: Iterator[Any]
    if isinstance(examples, TensorDataset) and collate is default_collate:
        pieces = (list(examples[share(start)[0]]) for start in starts)
    else:
        orders = ([(_NO_EPOCH, index) for index in share(start)[0].tolist()] for start in starts)
        pieces = iter(_loader(examples, 0, orders, collate, workers))
    for start in starts:
        with _named("the data for an evaluation"):
            piece = next(pieces)
        yield piece, share(start)[1]


def placed(batch: Any, device: torch.device, channels_last: bool = False) -> Any:
    """A minibatch on its device, its images as floats where they are bytes."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = prepare(leaf.to(device, non_blocking=True))
        return leaf.contiguous(memory_format=torch.channels_last) if channels_last and leaf.dim() == 4 else leaf

    return torch.utils._pytree.tree_map(place, batch)
