"""Sharded parameters: the plan, ‖ADW‖ with its gradient, and the fold are those of the whole model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bypass_fx
from bypass_fx import fsdp, sharded, surgery
from bypass_fx.passes.matrices import is_sharded, placed_like, whole
from bypass_fx.passes.runs import on_values, ways
from bypass_fx.passes.trace import Tracing
from tests.untraced import BOTH, Model, X, attentions


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A mesh of one process; what differs between several is in e2e/test_distributed.py."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*conv, nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))


def _walked(net: nn.Module) -> dict[str, float]:
    """Every D away from 0; the norms."""
    for site in surgery.sites(net):
        with torch.no_grad():
            surgery.delta_of(net, site).copy_(torch.linspace(-1, 1, site.width))
    return {name: float(norm) for name, norm in bypass_fx.norms(net).items()}


def test_a_sharded_model_is_planned_walked_and_contracted_as_the_whole_one_is(group: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    net, plain = _net(), _net()
    for child in net:
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=group)
    fully_shard(net, mesh=group)
    classes = [type(module) for module in net.modules()]
    assert bypass_fx.plan(net, mode="strict") == bypass_fx.plan(plain, mode="strict")
    for model in (net, plain):
        bypass_fx.extend(model, mode="strict")
        assert {site.constraint for site in surgery.sites(model)} == {"folded", "augmented"}
    assert _walked(net) == pytest.approx(_walked(plain), rel=1e-6)
    for model in (net, plain):
        bypass_fx.penalty(model).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in net.named_parameters():
        assert is_sharded(parameter) == ("delta" not in name)
        gradient, other = parameter.grad, theirs[name].grad
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert not is_sharded(parameter) or gradient.placements == parameter.placements
            assert torch.allclose(whole(gradient), other, rtol=1e-5, atol=1e-7), name
    reports = [bypass_fx.contract(model) for model in (net, plain)]
    assert [s.bias_shift for s in reports[0].sites] == pytest.approx([s.bias_shift for s in reports[1].sites])
    assert max(site.bias_shift for site in reports[0].sites) > 0.1
    state = sharded.gathered(net.state_dict())
    assert all(torch.allclose(state[name], value, atol=1e-6) for name, value in plain.state_dict().items())
    assert [type(module) for module in net.modules()] == classes


@pytest.mark.parametrize(
    ("policy", "units"),
    [
        ({}, ["0", "1", "3", "6", "8"]),  # what stands in lists and sequences and has parameters
        ({"AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "MIN_NUM_PARAMS": "80"}, ["0", "6"]),
        ({"AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "TRANSFORMER_CLS_TO_WRAP": "Conv2d"}, ["0", "3"]),
    ],
)
def test_layers_are_sharded_as_accelerate_is_configured(
    group: Any, monkeypatch: pytest.MonkeyPatch, policy: dict[str, str], units: list[str]
) -> None:
    from torch.distributed.fsdp import FSDPModule

    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    for name, value in policy.items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    net = _net().to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fsdp.shard(net, net, torch.device("cpu"), fsdp.configured())
    assert [name for name, module in net.named_modules() if isinstance(module, FSDPModule)] == ["", *units]
    assert all(torch.equal(value, before[name]) for name, value in sharded.gathered(net.state_dict()).items())


def test_layers_that_the_model_does_not_have_are_named(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "TRANSFORMER_CLS_TO_WRAP": "Blck"}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in variables.items():
        monkeypatch.setenv(f"FSDP_{name}", value)
    net = _net()
    with pytest.raises(bypass_fx.BypassError, match=r"layer class Blck.*Mend fsdp_transformer_layer_cls_to_wrap"):
        fsdp.shard(net, net, torch.device("cpu"), fsdp.configured())


def test_states_are_gathered_and_given_back_in_shards(group: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    plain = nn.Linear(3, 2)
    net = copy.deepcopy(plain)
    fully_shard(net, mesh=group)
    optimizers = [torch.optim.Adam(model.parameters()) for model in (net, plain)]
    for model, optimizer in zip((net, plain), optimizers, strict=True):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    state = sharded.gathered(optimizers[0].state_dict())
    assert not any(is_sharded(value) for entry in state["state"].values() for value in entry.values())
    sharded.load_optimizer(optimizers[0], state)
    assert is_sharded(optimizers[0].state[net.weight]["exp_avg"])
    assert torch.equal(whole(optimizers[0].state[net.weight]["exp_avg"]), optimizers[1].state[plain.weight]["exp_avg"])
    sharded.load_model(net, plain.state_dict())
    assert torch.equal(whole(net.weight), plain.weight) and is_sharded(net.weight)
    with pytest.raises(KeyError, match="one of model and state only"):
        sharded.load_model(net, {"weight": plain.weight})
    assert placed_like(plain.weight, plain.weight.double()).dtype == torch.float32


def test_a_model_that_was_extended_before_it_was_sharded_is_refused_as_it_is(group: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    net = bypass_fx.extend(_net(), mode="strict")
    fully_shard(net, mesh=group)
    with pytest.raises(bypass_fx.SurgeryError, match="shard the model first, then extend it"):
        bypass_fx.contract(net)
    assert surgery.is_extended(net)
    net(torch.randn(2, 3, 4, 4)).sum().backward()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")
def test_calls_are_observed_in_a_sharded_model_which_goes_on_as_before(group: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    net, plain = Model(), Model()
    for layer in net.layers:
        fully_shard(layer, mesh=group)
    fully_shard(net, mesh=group)
    assert ways(Tracing(net), (X,), {}) == [on_values]
    before = net(X)
    plan = bypass_fx.plan(net, example_inputs=(X,))
    assert plan == bypass_fx.plan(plain, example_inputs=(X,)) and attentions(plan) == BOTH
    assert all(map(is_sharded, net.parameters()))
    assert torch.equal(net(X), before)
    bypass_fx.extend(net, plan, example_inputs=(X,))
    assert torch.equal(net(X), before)
