"""Plans as data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bypass_fx


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Softmax(1), nn.Tanh(), nn.Linear(6, 2))


def test_a_plan_survives_json() -> None:
    plan = bypass_fx.plan(net())
    again = bypass_fx.Plan.from_json(plan.to_json())
    assert again == plan and len(again) == 1 and len(again.refusals) == 1


def test_a_plan_from_a_file_does_the_same_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = bypass_fx.plan(net(), mode="all")
    plan.save(path)
    code = (
        "import sys, torch, bypass_fx; from tests.test_plan import net; model = net();"
        "bypass_fx.extend(model, bypass_fx.Plan.load(sys.argv[1])); print(sorted(model.state_dict()))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    here = net()
    bypass_fx.extend(here, plan)
    assert found.stdout.strip() == str(sorted(here.state_dict()))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "sites": []}', '{"format": 1, "sites": [{}]}'])
def test_a_damaged_plan_is_refused(text: str) -> None:
    with pytest.raises(bypass_fx.PlanError, match="plan"):
        bypass_fx.Plan.from_json(text)


WRONG = [
    ("mode", "loose"), ("exact", 3), ("constraint", "zzz"), ("width", "8"), ("moving", "0"), ("view", [[1]]), ("first", "0"),
    ("first.groups", True), ("first.norm", 1.5), ("first.part", [[0]]), ("first.bias", {}), ("second.weight", None),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[field for field, _ in WRONG])
def test_a_field_of_another_type_is_refused_as_it_is_read(field: str, value: object) -> None:
    written = json.loads(bypass_fx.plan(net(), mode="strict").to_json())
    site = written["sites"][0]
    part, _, name = field.rpartition(".")
    holder = written if field == "mode" else site[part] if part else site
    assert name in holder
    holder[name] = value
    with pytest.raises(bypass_fx.PlanError, match=r"not a plan written by Plan\.to_json"):
        bypass_fx.Plan.from_json(json.dumps(written))


def test_a_plan_whose_matrices_lie_otherwise_is_refused() -> None:
    written = json.loads(bypass_fx.plan(net(), mode="strict").to_json())
    written["sites"][0]["second"]["groups"] = 3
    model = net()
    with pytest.raises(bypass_fx.PlanError, match="plan this model anew"):
        bypass_fx.extend(model, bypass_fx.Plan.from_json(json.dumps(written)))
    assert not bypass_fx.surgery.is_extended(model)


def test_names_of_parameters_are_qualified() -> None:
    site = bypass_fx.plan(nn.Sequential(net()), mode="strict").sites[0]
    assert site.owner == "0" and site.parameter == "0.delta_1" and site.name == "0.1"


def test_a_plan_written_before_channels_could_be_chosen_is_the_same_plan() -> None:
    plan = bypass_fx.plan(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    written = json.loads(plan.to_json())
    for site in written["sites"]:
        assert site.pop("moving") == []
    assert bypass_fx.Plan.from_json(json.dumps(written)) == plan


class Between(nn.Module):
    """W, something, σ, A."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.act, self.second = nn.Linear(4, 8), between, nn.Tanh(), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.act(self.between(self.first(x))))
        return result


class ReadTwice(Between):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.act(self.between(self.first(x)))
        return self.second(z) + z.mean()


CHANGED = [
    (Between(nn.LayerNorm(8)), "LayerNorm"),
    (Between(nn.BatchNorm1d(8)), "others now"),
    (Between(nn.Dropout()), "others now"),
    (ReadTwice(nn.Identity()), "goes into mean"),
]


@pytest.mark.parametrize(("model", "why"), CHANGED, ids=["norm", "batchnorm", "dropout", "reader"])
def test_a_strict_site_that_is_none_any_more_is_refused(model: nn.Module, why: str) -> None:
    plan = bypass_fx.plan(Between(nn.Identity()))
    bypass_fx.contract(bypass_fx.extend(Between(nn.Identity()), plan))
    with pytest.raises(
        bypass_fx.PlanError, match=rf"act: in this model it is no such site.*{why}.*plan this model anew"
    ):
        bypass_fx.extend(model, plan)
    assert not bypass_fx.surgery.is_extended(model)


def edited(**changes: object) -> bypass_fx.Plan:
    written = json.loads(bypass_fx.plan(Between(nn.Identity())).to_json())
    written["sites"][0].update(changes)
    return bypass_fx.Plan.from_json(json.dumps(written))


@pytest.mark.parametrize("changes", [{"channel_dim": 0}, {"view": [2, 4]}, {"first": None}, {"moving": [3, 0, 3]}])
def test_an_edit_that_would_fold_something_else_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(bypass_fx.PlanError, match="act: "):
        bypass_fx.extend(Between(nn.Identity()), edited(**changes))


@pytest.mark.parametrize("changes", [{"constraint": "augmented"}, {"constraint": "zero"}, {"exact": "eval"}])
def test_an_edit_that_asks_for_more_is_taken(changes: dict[str, object]) -> None:
    model = Between(nn.Identity())
    bypass_fx.extend(model, edited(**changes))
    assert len(bypass_fx.sites(model)) == 1


def test_a_call_that_a_plan_names_twice_is_refused() -> None:
    plan = bypass_fx.plan(Between(nn.Identity()))
    with pytest.raises(bypass_fx.PlanError, match="act: two sites of the plan"):
        bypass_fx.extend(Between(nn.Identity()), bypass_fx.Plan(plan.sites * 2))
