"""Branches of which one fails on traced values: the refusal says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bypass_fx


class Joins(nn.Module):
    """A map that reads more channels than there are gets those of an earlier one, too: which ones, only sizes tell."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.before, self.step = nn.ModuleList([nn.Linear(4, 4)]), step
        self.behind = nn.ModuleList([nn.Linear(8, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for each in self.before:
            x = torch.relu(each(x))
            kept.append(x)
        for each in self.behind:
            if self.differs(x, each.in_features):
                x = torch.cat([x, kept.pop()], dim=1)
            x = each(x)
        return x if self.step != "after it" else x + kept.pop()

    def differs(self, x: Tensor, features: int) -> bool | Tensor:
        return (x.sum() > 0) if self.step == "by a value" else x.shape[1] != features


@pytest.mark.parametrize(("step", "by"), [("", "a size"), ("by a value", "a traced value")])
def test_a_branch_that_fails_is_named_with_its_error_and_what_would_help(step: str, by: str) -> None:
    (refusal,) = bypass_fx.plan(Joins(step), mode="all").refusals
    assert f"branches on {by}, and fails in one branch (IndexError: pop from empty list)" in refusal.reason
    assert "let a number or a flag that __init__ sets decide it" in refusal.reason


def test_what_fails_in_no_branch_alone_is_told_as_it_is() -> None:
    model = Joins("after it")
    model.behind = model.behind[1:]
    model.before = model.before[:0]
    plan = bypass_fx.plan(nn.Sequential(model), mode="all")
    assert "does not trace (IndexError: pop from empty list)" in plan.refusals[0].reason
