"""Dense tensors as matrices, and their sums by channel."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import bypass_fx
from bypass_fx.dense import channel_sums, lies


@given(st.permutations(range(4)), st.tuples(*[st.integers(1, 4)] * 4), st.integers(0, 3))
def test_a_dense_tensor_is_seen_as_a_matrix_whatever_its_order(
    order: list[int], shape: tuple[int, ...], axis: int
) -> None:
    back = [order.index(at) for at in range(4)]
    z = torch.empty([shape[at] for at in order]).permute(back)
    assert z.shape == torch.Size(shape)
    matrix = lies(z.shape, z.stride(), axis)
    assert matrix is not None and matrix.rows * matrix.columns == z.numel() and matrix.channels == z.shape[axis]
    channel = torch.arange(z.shape[axis]).view(-1, *[1] * (3 - axis)).expand(z.shape)
    in_memory = torch.empty_like(z, dtype=torch.int64).copy_(channel).as_strided((z.numel(),), (1,))
    at = torch.arange(z.numel())
    row, column = at // matrix.columns, at % matrix.columns
    assert torch.equal(in_memory, column if matrix.by_column else row % matrix.channels)


def test_a_tensor_with_gaps_or_overlaps_or_nothing_in_it_is_none() -> None:
    for z in (torch.empty(4, 6)[:, ::2], torch.empty(6).expand(4, 6), torch.empty(0, 6), torch.empty(2, 6, 0)):
        assert lies(z.shape, z.stride(), 1) is None


def in_order(z: Tensor, order: list[int]) -> Tensor:
    """The same numbers, whose axes lie in memory in the order that is given."""
    return z.permute(order).contiguous().permute([order.index(at) for at in range(z.dim())])


@given(
    st.permutations(range(4)),
    st.tuples(*[st.integers(0, 5)] * 4),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_sums_by_channel_are_right_in_whatever_order_the_numbers_lie(
    order: list[int], shape: tuple[int, ...], axis: int, dtype: torch.dtype, step_by_step: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    g, z = (in_order(torch.randn(shape, generator=generator).to(dtype), order) for _ in range(2))
    others = [at for at in range(4) if at != axis]
    right = (g.double() * z.double()).sum(others)
    rounding = 0.1 if step_by_step else 1e-4  # where the products of bfloat16 are written out, they are rounded
    for one in (g, in_order(g, order[::-1])):  # the second is laid out otherwise than z
        found = channel_sums(one, z, axis, step_by_step)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert (found - right).norm() <= rounding * (g.double() * z.double()).norm()


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 6, 3), (2, 6, 3, 3, 3)])
def test_sums_by_channel_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    g, z = torch.randn(shape), torch.randn(shape)
    axis = min(1, len(shape) - 1)
    others = [at for at in range(len(shape)) if at != axis]
    right = (g * z).sum(others) if others else g * z
    assert torch.allclose(channel_sums(g, z, axis), right, atol=1e-5)
    assert torch.allclose(channel_sums(g, z, axis, step_by_step=True), right, atol=1e-5)


def test_the_product_is_not_written_out_for_the_sums() -> None:
    from torch.profiler import ProfilerActivity, profile

    g, z = torch.randn(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        channel_sums(g, z, 1)
    assert max(event.cpu_memory_usage for event in seen.key_averages()) < g.nbytes / 10


def test_a_narrow_gradient_is_summed_as_exactly_as_a_wide_one() -> None:
    torch.manual_seed(0)
    g, z = torch.randn(4000, 40), torch.randn(4000, 40)
    narrow = channel_sums(g.bfloat16(), z.bfloat16(), 1)
    right = (g.bfloat16().double() * z.bfloat16().double()).sum(0)
    assert (narrow - right).norm() <= 1e-5 * right.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own check reads it
def test_a_backward_that_is_compiled_computes_the_same() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3))
    bypass_fx.extend(net, mode="all")
    x, found = torch.randn(4, 3, 32, 32), []
    for around in (nullcontext(), compiled_autograd._enable(partial(torch.compile, backend="eager"))):
        net.zero_grad()
        with around:
            net(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None])
    assert len(found[0]) == 5 and all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*found, strict=True))
