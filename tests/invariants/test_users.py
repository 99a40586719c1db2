"""The invariants on models as people write them (tests/users), and on what they do around a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bypass_fx
from benchmarks.exactness import missed
from bypass_fx.surgery import delta_of
from tests.users import USERS


def built(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    model, inputs = USERS[name]
    return model(), inputs()


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What a run returns under one seed; the running statistics are as before."""
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    found = [leaf.detach() for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
    model.load_state_dict(state)
    return found


def belongings(model: nn.Module) -> list[Any]:
    """Everything that the modules hold, by identity."""
    return [
        (path, type(module), {key: id(value) for key, value in module.__dict__.items()}, list(module._parameters))
        for path, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", USERS)
def test_extend_changes_nothing_and_contract_leaves_nothing(name: str) -> None:
    model, inputs = built(name)
    outputs(model, inputs)  # such models fill their caches at first use
    before, parameters = belongings(model), dict(model.named_parameters())
    plan = bypass_fx.plan(model, mode="all", example_inputs=inputs)
    assert plan.sites and belongings(model) == before
    assert len({site.name for site in plan}) == len({site.parameter for site in plan}) == len(plan)
    for train in (True, False):
        model.train(train)
        expected = outputs(model, inputs)
        bypass_fx.extend(model, plan, example_inputs=inputs)
        found = outputs(model, inputs)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
        assert all(model.get_parameter(path) is parameter for path, parameter in parameters.items())
        added = set(dict(model.named_parameters())) - set(parameters)
        assert added == {site.parameter for site in plan}
        loss = sum(leaf.float().square().sum() for leaf in tree_leaves(model(*inputs)) if leaf.requires_grad)
        assert isinstance(loss, Tensor)
        loss.backward()
        assert all(delta_of(model, site).grad is not None for site in plan)
        bypass_fx.contract(model)
        model.zero_grad()
    model.train()
    keys = [[key for key in held if key != "_parameters"] for _, _, held, _ in belongings(model)]
    assert keys == [[key for key in held if key != "_parameters"] for _, _, held, _ in before]
    assert [entry[1] for entry in belongings(model)] == [entry[1] for entry in before]
    assert list(dict(model.named_parameters())) == list(parameters)


@pytest.mark.parametrize("name", USERS)
def test_every_activation_call_is_a_site_or_a_refusal(name: str) -> None:
    model, inputs = built(name)
    plan = bypass_fx.plan(model, mode="all", example_inputs=inputs)
    calls, absent = missed(model, inputs, plan)
    assert calls and not absent


STRICT = [name for name in USERS if bypass_fx.plan(built(name)[0], mode="strict").sites]


@pytest.mark.parametrize("name", STRICT)
def test_a_contraction_of_what_meets_its_constraint_changes_nothing_beyond_rounding(name: str) -> None:
    model, inputs = built(name)
    bypass_fx.extend(model.eval(), mode="strict", example_inputs=inputs)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for site in bypass_fx.sites(model):
            assert site.first is not None and site.second is not None
            # W = 0 leaves b_W alone, which the fold must carry; where nothing carries it, A = 0
            zero = site.first.weight if site.constraint == "folded" else site.second.weight
            if zero in own:
                own[zero].zero_()
                delta_of(model, site).normal_()
    expected = outputs(model, inputs)
    report = bypass_fx.contract(model)
    assert report.residual == 0
    assert all(
        torch.allclose(one, other, atol=1e-5) for one, other in zip(expected, outputs(model, inputs), strict=True)
    )


def test_modules_that_run_with_other_weights_have_no_strict_sites() -> None:
    plan = bypass_fx.plan(built("Maml")[0], mode="strict")
    assert not plan.sites and "functional_call" in plan.refusals[0].reason


def test_what_is_folded_on_these_models_is_not_nothing() -> None:
    constraints = [site.constraint for name in STRICT for site in bypass_fx.plan(built(name)[0], mode="strict")]
    assert constraints.count("folded") > 15 and constraints.count("augmented") > 2
