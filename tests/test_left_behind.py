"""What a part leaves behind in an attribute for others to read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx


class Balanced(nn.Module):
    """A part that leaves a loss of its own behind, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(4, 4), 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.note(x)
        return self.fc(x)  # type: ignore[no-any-return]

    def note(self, x: Tensor) -> None:
        self.aux = x.mean()  # type: ignore[assignment]

    def forget(self) -> None:
        self.scale = 1.0


class ReadsWhatAPartLeaves(nn.Module):
    """Adds it to what it returns."""

    def __init__(self, attribute: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.fc1, self.fc2 = Balanced(), nn.Linear(4, 8), nn.Linear(8, 4)
        self.part.scale = 0.5
        self.attribute = attribute

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return y + self.fc2(F.gelu(self.fc1(y))) + getattr(self.part, self.attribute)  # type: ignore[no-any-return]


def test_what_a_childs_forward_sets_is_not_taken_for_a_constant() -> None:
    """It was: 0.0, as it had been before the first call, without a word."""
    plan = bypass_fx.plan(ReadsWhatAPartLeaves("aux"), mode="all")
    assert not plan.sites
    assert "reads the attribute `aux` of part, which the forward of that sets" in plan.refusals[0].reason


def test_what_another_method_of_a_child_sets_is_one() -> None:
    net, x = ReadsWhatAPartLeaves("scale"), torch.randn(2, 4)
    expected = net(x)
    bypass_fx.extend(net)
    assert torch.equal(net(x), expected)
