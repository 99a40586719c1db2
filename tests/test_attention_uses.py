"""What else a forward does to the values of attention and to its result: a site is claimed only where that is nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from tests.attentions import Multihead
from tests.test_attention import attention_site, refusal


class Steps(nn.Module):
    """One attention with a step before it (on v), behind it (on the result), and beside A."""

    def __init__(
        self,
        values: Callable[[Tensor], Tensor] = lambda v: v,
        result: Callable[[Tensor], Tensor] = lambda o: o,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.v, self.proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.values, self.result, self.beside = values, result, beside

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.result(F.scaled_dot_product_attention(x, x, self.values(self.v(x))))
        out: Tensor = self.proj(mixed)
        return out if self.beside is None else out + self.beside(mixed)


def copied(o: Tensor) -> Tensor:
    other = torch.zeros_like(o)
    other[:] = o
    return other


def first_token_cleared(v: Tensor) -> Tensor:
    v[:, 0] = 0
    return v


def doubled_in_a_view(o: Tensor) -> Tensor:
    o.view(-1).mul_(2)
    return o


@pytest.mark.parametrize(
    "beside",
    [
        lambda o: o * 0.5, lambda o: o.mean(), lambda o: F.layer_norm(o, (8,)), lambda o: torch.cat([o, o], -1)[..., :8],
        lambda o: (o > 0).to(o.dtype), lambda o: o.detach(), lambda o: F.scaled_dot_product_attention(o, o, o), copied,
    ],
    ids=["mul", "mean", "norm", "cat", "comparison", "detach", "attention", "copy"],
)  # fmt: skip
def test_a_result_that_something_else_reads_too_is_refused(beside: Callable[[Tensor], Tensor]) -> None:
    plan = bypass_fx.plan(nn.Sequential(Multihead(), Steps(beside=beside)), mode="strict")
    assert [site.name for site in plan] == ["0.attn.attention"]
    assert "no affine map" in next(r.reason for r in plan.refusals if r.name.startswith("1."))


def test_a_result_whose_shape_alone_is_read_elsewhere_is_a_site() -> None:
    site = attention_site(Steps(beside=lambda o: torch.zeros_like(o) + o.new_ones(1) * o.shape[-1]))
    assert site.constraint == "folded"


@pytest.mark.parametrize("step", [first_token_cleared, doubled_in_a_view, lambda o: o.mul_(2) * 1])
def test_values_and_results_that_are_overwritten_are_refused(step: Callable[[Tensor], Tensor]) -> None:
    assert "not only moved" in refusal(Steps(values=step))
    assert "overwritten in place" in refusal(Steps(result=step))


@pytest.mark.parametrize("step", [lambda v: v.type_as(v.argmax(-1)).float(), lambda v: v.to((v > 0).dtype).float()])
def test_values_cast_to_whole_numbers_are_not_only_moved(step: Callable[[Tensor], Tensor]) -> None:
    assert "not only moved" in refusal(Steps(values=step))


def test_a_dropout_that_never_stops_is_no_wire() -> None:
    assert "not only moved" in refusal(Steps(values=F.dropout))
    assert "goes into dropout" in refusal(Steps(result=F.dropout))


def test_a_squeeze_of_whatever_has_size_one_is_no_move() -> None:
    assert "not only moved" in refusal(Steps(values=torch.squeeze))


class OnImages(nn.Module):
    """Attention over the pixels of images with the channels last; with three axes, its reshapes would run too."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, height * width, 3, self.heads, -1).unbind(2)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(mixed.transpose(1, 2).reshape(batch, height, width, -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("heads", [1, 2])
def test_a_trial_in_which_the_projection_would_not_run_says_nothing(heads: int) -> None:
    torch.manual_seed(heads)
    model, x = OnImages(heads).eval(), torch.randn(2, 3, 4, 8)
    with torch.no_grad():
        model.qkv.weight[16:] = 0  # so that A D W = 0 for every D
    (site,) = bypass_fx.sites(bypass_fx.extend(model))
    with torch.no_grad():
        bypass_fx.surgery.delta_of(model, site).normal_()
        before = model(x)
        bypass_fx.contract(model)
        torch.testing.assert_close(model(x), before)
    assert site.constraint == "folded" and site.width == 8
