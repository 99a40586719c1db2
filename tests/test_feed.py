"""Minibatches: in an order that the seed alone fixes, whoever reads them, however many, and from wherever on."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from bypass_fx.data import DataError
from bypass_fx.feed import Feed, Shares, in_order, placed
from bypass_fx.settings import SettingsError

NUMBERS = TensorDataset(torch.arange(11), torch.arange(11))


class Plain(Dataset[Any]):
    """The same numbers from a data set of the user's own, with noise from every generator that augmentations use."""

    def __init__(self, noise: bool = False, broken: int | None = None) -> None:
        self.noise, self.broken = noise, broken

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise OSError(f"example {index} is on a disk that has gone")
        drawn = random.random() + np.random.rand() + float(torch.rand(()))
        return index, (drawn if self.noise else 0.0)


def _order(seed: int = 0, batch_size: int = 4, start: int = 0, steps: int = 6, **others: Any) -> list[list[int]]:
    feed = Feed(others.pop("examples", NUMBERS), batch_size, seed, **others)
    return [[int(x) for part in parts for x in part[0]] for parts in islice(feed.from_step(start), steps)]


def test_minibatches_depend_on_the_seed_and_the_step_alone() -> None:
    torch.manual_seed(1)
    once = _order()
    torch.manual_seed(2)
    assert _order() == once and _order(start=3, steps=3) == once[3:]
    assert _order(seed=1) != once and once[:2] != once[2:4]


def test_an_epoch_leaves_out_an_incomplete_minibatch_but_never_all() -> None:
    first = _order(steps=2)
    assert [len(batch) for batch in first] == [4, 4] and len({number for batch in first for number in batch}) == 8
    assert [len(batch) for batch in _order(batch_size=50, steps=2)] == [11, 11]
    assert Feed(NUMBERS, 4, 0).steps_per_epoch == 2 and Feed(NUMBERS, 50, 0).steps_per_epoch == 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a machine of one core has
@pytest.mark.parametrize("workers", [0, 2])
def test_any_dataset_gives_the_minibatches_that_tensors_give(workers: int) -> None:
    assert _order(examples=Plain(), workers=workers) == _order()


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_processes_and_parts_share_out_the_same_minibatches(world: int, parts: int) -> None:
    shares = [_order(shares=Shares(rank, world, parts)) for rank in range(world)]
    together = [[number for share in step for number in share] for step in zip(*shares, strict=True)]
    assert together == _order()


def test_a_minibatch_that_cannot_be_shared_out_evenly_is_refused() -> None:
    with pytest.raises(SettingsError, match="multiple of 3"):
        Feed(NUMBERS, 4, 0, Shares(0, 3))


def test_augmentations_are_the_same_wherever_they_are_drawn_and_leave_the_generators_alone() -> None:
    def noise(start: int = 0, **others: Any) -> list[float]:
        feed = Feed(Plain(noise=True), 4, 0, **others)
        return [float(y) for parts in islice(feed.from_step(start), 4 - start) for part in parts for y in part[1]]

    random.seed(3)
    expected = random.random()
    random.seed(3)
    alone = noise()
    assert random.random() == expected
    assert len(set(alone)) == 16  # another one in each epoch, too
    assert noise(start=2) == alone[8:] and noise(workers=1) == alone
    halves = [noise(shares=Shares(rank, 2)) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(alone)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_raises_is_named_with_the_minibatch(workers: int) -> None:
    feed = Feed(Plain(broken=_order(steps=2)[1][0]), 4, 0, workers=workers)
    steps = feed.from_step(0)
    if workers == 0:
        next(steps)
    with pytest.raises(DataError, match=r"reading minibatch 2 failed: OSError: .*disk that has gone"):
        list(islice(steps, 2))


def test_an_evaluation_reads_every_example_once_whatever_the_number_of_processes() -> None:
    for world in (1, 2, 3, 4):
        read = [[*in_order(NUMBERS, 4, Shares(rank, world))] for rank in range(world)]
        assert len({len(batches) for batches in read}) == 1  # the processes meet in every minibatch
        counted = [int(x) for batches in read for (xs, _), counts in batches if counts for x in xs]
        assert sorted(counted) == list(range(11))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_augments_an_example_the_same_way_each_time(workers: int) -> None:
    def noise(shares: Shares | None = None) -> list[tuple[int, float]]:
        batches = in_order(Plain(noise=True), 4, shares, workers=workers)
        return [(int(x), float(y)) for (xs, ys), counts in batches if counts for x, y in zip(xs, ys, strict=True)]

    torch.manual_seed(0)
    alone = noise()
    torch.manual_seed(1)
    expected = torch.get_rng_state()
    assert noise() == alone and torch.equal(torch.get_rng_state(), expected)
    assert sorted([*noise(Shares(0, 2)), *noise(Shares(1, 2))]) == alone and len({y for _, y in alone}) == 11


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_names_data_that_raise(workers: int) -> None:
    with pytest.raises(DataError, match=r"the data for an evaluation failed: OSError: .*disk that has gone"):
        list(in_order(Plain(broken=7), 4, workers=workers))


def test_images_are_placed_as_floats_with_their_channels_last() -> None:
    batch = {"x": torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), "y": torch.tensor([1, 2]), "name": "a"}
    found = placed(batch, torch.device("cpu"), channels_last=True)
    assert found["x"].is_contiguous(memory_format=torch.channels_last) and float(found["x"].max()) == 1
    assert torch.equal(found["y"], batch["y"]) and found["name"] == "a"
