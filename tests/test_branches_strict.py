"""Sizes, casts and picks between W, σ and A: which leave a site strict, and which do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bypass_fx
from bypass_fx.surgery import delta_of
from tests.branching import Body, Two, equal, net


def cast_in_one_branch(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    if h.dtype != s.b.weight.dtype:
        h = h.to(s.b.weight.dtype)
    return s.b(h)  # type: ignore[no-any-return]


def cast_there_and_back(s: Two, x: Tensor) -> Tensor:
    return s.b(F.relu(s.a(x).double()).to(x.dtype))  # type: ignore[no-any-return]


def reads_its_shape(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    if h.shape[-1] != 8 or h.size(0) > 100:
        raise ValueError("eight are needed")
    return s.b(h.contiguous())  # type: ignore[no-any-return]


@pytest.mark.parametrize("body", [cast_in_one_branch, cast_there_and_back, reads_its_shape])
def test_sizes_dtypes_and_casts_leave_a_site_strict(body: Body) -> None:
    model, x = net(body), torch.randn(3, 4)
    expected = model(x)
    bypass_fx.extend(model, mode="strict")
    (site,) = bypass_fx.sites(model)
    assert site.constraint == "folded" and equal(model(x), expected)
    with torch.no_grad():
        delta_of(model, site).normal_()
        model.a.weight.zero_()  # type: ignore[operator, union-attr]
    before = model(x)
    bypass_fx.contract(model)
    torch.testing.assert_close(model(x), before)


def shifted_in_one_branch(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    return s.b(h + 1 if x.shape[0] > 2 else h)  # type: ignore[no-any-return]


def another_in_one_branch(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    return s.b(h if x.shape[0] > 2 else s.a.bias)  # type: ignore[no-any-return]


def whole_in_one_branch(s: Two, x: Tensor) -> Tensor:
    h = F.relu(s.a(x))
    return s.b((h.to(torch.int32) if x.shape[0] > 2 else h).float())  # type: ignore[no-any-return]


def another_cast_like_it(s: Two, x: Tensor) -> Tensor:
    h, other = F.relu(s.a(x)), torch.sin(x.repeat(1, 2))
    return s.b(h if x.shape[0] > 2 else other.type_as(h))  # type: ignore[no-any-return]


def whole_as_a_tensor_is(s: Two, x: Tensor) -> Tensor:
    h, positive = F.relu(s.a(x)), (x > 0).long()
    if x.shape[0] > 2:
        h = h.type_as(positive)
    return s.b(h.float())  # type: ignore[no-any-return]


def whole_by_a_dtype_that_is_read(s: Two, x: Tensor) -> Tensor:
    return s.b(F.relu(s.a(x)).to(torch.argmax(x, -1).dtype).float())  # type: ignore[no-any-return]


def whole_by_a_dtype_that_is_picked(s: Two, x: Tensor) -> Tensor:
    return s.b(F.relu(s.a(x)).to(torch.int32 if x.shape[0] > 2 else x.dtype).float())  # type: ignore[no-any-return]


def whole_before_it(s: Two, x: Tensor) -> Tensor:
    return s.b(F.relu(s.a(x).to((x > 0).dtype).float()))  # type: ignore[no-any-return]


OTHER_WAYS = [
    *(shifted_in_one_branch, another_in_one_branch, whole_in_one_branch, another_cast_like_it, whole_as_a_tensor_is),
    *(whole_by_a_dtype_that_is_read, whole_by_a_dtype_that_is_picked, whole_before_it),
]


@pytest.mark.parametrize("body", OTHER_WAYS)
def test_a_result_that_goes_another_way_in_one_branch_is_no_strict_site(body: Body) -> None:
    assert not bypass_fx.plan(net(body), mode="strict").sites
