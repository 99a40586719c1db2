"""Where an infinity can reach an activation, 0 · ∞ would change the function: no site stands there."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bypass_fx
from tests.test_what_a_trace_sees import net


def best_alone(scores: Tensor) -> Tensor:
    """The way in which a mixture of experts routes to the best of them."""
    best, where = scores.topk(2, -1)
    return torch.full_like(scores, -math.inf).scatter_(-1, where, best)


def worst_out(scores: Tensor) -> Tensor:
    scores.scatter_(-1, scores.argmin(-1, keepdim=True), -math.inf)
    return scores


def first_out(scores: Tensor) -> Tensor:
    scores[:, 0] = -math.inf
    return scores


def under_another_name(scores: Tensor, mask: Tensor) -> Tensor:
    kept = scores
    scores += mask
    return kept


def in_a_view(scores: Tensor) -> Tensor:
    part = scores[:, 1:2]
    part.fill_(-math.inf)
    return scores


def with_others(scores: Tensor, mask: Tensor) -> Tensor:
    torch._foreach_add_([scores], [mask])
    return scores


INFINITE = {
    "constant": lambda s, x: s.b(F.relu(s.a(x) + torch.tensor([0.0, float("-inf")] * 4))),
    "buffer": lambda s, x: s.b(torch.sigmoid((s.a(x) + s.mask) * 1.0)),
    "written": lambda s, x: s.b(torch.relu(s.a(x).masked_fill_(x.sum() > 0, -math.inf).clone())),
    "scattered over": lambda s, x: s.b(torch.sigmoid(best_alone(s.a(x)).to(x.dtype))),
    "scattered in": lambda s, x: s.b(torch.sigmoid(worst_out(s.a(x)))),
    "under another name": lambda s, x: s.b(torch.sigmoid(under_another_name(s.a(x), s.mask))),
    "in a view": lambda s, x: s.b(torch.sigmoid(in_a_view(s.a(x)))),
    "with others": lambda s, x: s.b(torch.sigmoid(with_others(s.a(x), s.mask))),
    "set": lambda s, x: s.b(torch.sigmoid(first_out(s.a(x)))),
}


@pytest.mark.parametrize("how", INFINITE)
def test_where_an_infinity_can_reach_the_activation_there_is_no_site(how: str) -> None:
    model = net(INFINITE[how])
    model.register_buffer("mask", torch.tensor([0.0, -math.inf] * 4))
    plan = bypass_fx.plan(model, mode="all")
    assert not plan.sites and "infinities" in plan.refusals[0].reason


def test_an_infinity_that_a_softmax_ends_is_no_obstacle() -> None:
    model = net(lambda s, x: s.b(F.relu(s.a((x + s.mask).softmax(-1)))))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf] * 2))
    assert bypass_fx.plan(model, mode="all").sites
