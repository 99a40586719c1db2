"""D's gradients are averaged wherever DDP averages the others', however the model is handed over."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bypass_fx
from bypass_fx import gradient_averaging, surgery
from tests.bypasses import X, adam, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*record_function")


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield dist.new_group([0])
    finally:
        dist.destroy_process_group()


class Larger(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[nn.Module, Any], tuple[nn.Module, nn.Module]]] = {  # what runs, and what is extended
    "the wrapper": lambda net, group: (ddp := DistributedDataParallel(net, process_group=group), ddp),
    "the model inside": lambda net, group: (DistributedDataParallel(net, process_group=group), net),
    "the wrapper compiled": lambda net, group: (
        compiled := torch.compile(DistributedDataParallel(net, process_group=group), backend="eager"),
        compiled,
    ),
    "a part of what is wrapped": lambda net, group: (DistributedDataParallel(Larger(net), process_group=group), net),
    "what holds the wrapper": lambda net, group: (
        larger := Larger(DistributedDataParallel(net, process_group=group)),
        larger,
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ddp_around_in_or_beside_the_model_is_seen(
    way: Callable[..., Any], group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = mlp()
    running, extended = way(net, group)
    bypass_fx.extend(extended)
    over: list[Any] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: over.append(group))
    running(X).square().sum().backward()
    assert over == [group] * len(surgery.sites(extended))


def test_another_model_is_left_alone_and_no_gradient_is_averaged_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = DistributedDataParallel(mlp())
    other = bypass_fx.extend(mlp())
    over: list[Any] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: over.append(group))
    other(X).sum().backward()
    assert not over
    bypass_fx.extend(wrapped)
    deltas = [surgery.delta_of(wrapped, site) for site in surgery.sites(wrapped)]
    gradient_averaging.average_gradients(deltas)
    wrapped(X).sum().backward()
    assert len(over) == len(deltas)


@pytest.mark.parametrize("unused", [False, True])
def test_a_model_that_is_wrapped_after_it_was_extended_is_refused_where_ddp_would_wait_for_d(unused: bool) -> None:
    model = mlp()
    optimizer = adam(model)
    schedule = bypass_fx.BypassSchedule(model, optimizer, 1, 1)
    wrapped = DistributedDataParallel(model, find_unused_parameters=unused)

    def step() -> None:
        wrapped(X).square().mean().backward()
        optimizer.step()
        schedule.step()

    if unused:
        for _ in range(4):
            step()
        assert schedule.phase == "done"
    else:
        with pytest.raises(bypass_fx.BypassError, match="wrap the model first"):
            step()
