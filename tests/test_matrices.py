"""Weights as matrices, against what the modules themselves compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bypass_fx.passes.matrices import columns, offset, respond, rows, tensor_named
from bypass_fx.passes.plan import Affine

LINEAR = Affine("0", "linear", "0.weight", "0.bias")


def conv(groups: int = 1) -> Affine:
    return Affine("0", "conv", "0.weight", "0.bias", groups=groups, taps=9)


def test_rows_of_a_linear_are_its_weight() -> None:
    net = nn.Sequential(nn.Linear(3, 5))
    assert torch.equal(rows(net, LINEAR), net[0].weight[None])


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_convolution_applied_to_patches_are_the_convolution(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups, bias=False))
    x = torch.randn(1, 4, 3, 3)
    patches = x.reshape(groups, -1, 1)
    assert torch.allclose((rows(net, conv(groups)) @ patches).flatten(), net(x).flatten(), atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_columns_of_a_convolution_give_every_tap_of_its_outputs(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=2, groups=groups, bias=False))
    x = torch.randn(4)
    by_tap = (columns(net, conv(groups), 4) @ x.view(groups, -1, 1)).reshape(6, 9)
    single = net(x.view(1, 4, 1, 1)).flatten(2)[0].flip(1)  # one pixel meets every tap once, in reverse order
    assert torch.allclose(by_tap, single, atol=1e-6)


def test_columns_of_a_linear_behind_a_flatten_give_every_position() -> None:
    net = nn.Sequential(nn.Linear(2 * 4, 3, bias=False))
    by_tap = columns(net, LINEAR, 2)
    x = torch.randn(1, 2, 2, 2)
    expected = net(x.flatten(1)).flatten()
    found = sum(by_tap[0].view(3, 4, 2)[:, p] @ x.flatten(2)[0, :, p] for p in range(4))
    assert isinstance(found, torch.Tensor) and torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_and_columns_of_a_transposed_convolution(groups: int) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False))
    affine = Affine("0", "conv_transpose", "0.weight", stored="in_out", groups=groups, taps=9)
    x = torch.randn(4)
    by_tap = (columns(net, affine, 4) @ x.view(groups, -1, 1)).reshape(6, 9)
    assert torch.allclose(by_tap, net(x.view(1, 4, 1, 1)).flatten(2)[0], atol=1e-6)
    assert rows(net, affine).shape == (groups, 6 // groups, 4 // groups * 9)


@pytest.mark.parametrize(
    ("module", "affine", "x"),
    [
        (nn.Linear(4, 3, bias=False), LINEAR, torch.ones(1, 4)),
        (nn.Conv2d(4, 6, 3, bias=False), conv(), torch.ones(1, 4, 3, 3)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False), conv(2), torch.ones(1, 4, 3, 3)),
    ],
)
def test_respond_is_what_the_map_makes_of_a_constant(module: nn.Module, affine: Affine, x: torch.Tensor) -> None:
    constant = torch.tensor([1.0, -2.0, 0.5, 3.0])
    filled = x * constant.view(1, 4, *[1] * (x.dim() - 2))
    answer = respond(nn.Sequential(module), affine, constant)
    assert torch.allclose(answer, module(filled).flatten(), atol=1e-5)


def test_a_batchnorm_in_eval_mode_is_part_of_w_and_of_its_offset() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).eval()
    for value in (net[1].running_mean, net[1].running_var, net[1].weight, net[1].bias):
        nn.init.uniform_(value, 0.5, 2.0)
    affine = Affine("0", "linear", "0.weight", "0.bias", norm="1")
    x = torch.randn(7, 3)
    b = offset(net, affine)
    assert b is not None and torch.allclose(x @ rows(net, affine)[0].t() + b, net(x), atol=1e-5)


def test_tensors_are_found_by_name_and_missing_ones_are_reported() -> None:
    net = nn.Sequential(nn.Linear(3, 5))
    assert tensor_named(net, "0.weight") is net[0].weight
    with pytest.raises(AttributeError):
        tensor_named(net, "0.weights")


class SignsByGetattr(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value.sign() if name == "weight" else value


class SignsByProperty(nn.Linear):
    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        own = self._parameters["weight"]
        assert own is not None
        return own.sign()


@pytest.mark.parametrize("cls", [SignsByGetattr, SignsByProperty])
def test_a_weight_is_what_the_class_makes_of_it_where_it_is_read(cls: type[nn.Linear]) -> None:
    linear = nn.Linear(3, 5)
    expected = linear.weight.sign()
    linear.__class__ = cls
    assert torch.equal(tensor_named(nn.Sequential(linear), "0.weight"), expected)
