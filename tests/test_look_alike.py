"""Affine maps by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.look_alike import linear_look_alike


class Transposed(nn.Module):
    """As in GPT-2: the weight is stored (inputs, outputs), and the input is flattened to a matrix."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.outputs)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Cast(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
        return super().forward(input.to(self.weight.dtype))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
        return super().forward(input) * 2


class Noisy(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
        return super().forward(nn.functional.dropout(input, 0.5, self.training))


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        (Transposed(3, 5), "in_out"),
        (Transposed(4, 4), "in_out"),
        (Cast(3, 5), "out_in"),
        (Cast(4, 4, bias=False), "out_in"),
        (Scaled(3, 5), None),
        (Noisy(3, 5), None),
        (nn.Embedding(3, 5), None),
        (nn.LayerNorm(5), None),
        (nn.Bilinear(3, 3, 5), None),
    ],
)
def test_only_what_computes_a_linear_map_is_one(module: nn.Module, stored: str | None) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert linear_look_alike(module) == stored
    assert module.training and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_meta_module_is_recognised_without_its_weights() -> None:
    with torch.device("meta"):
        assert linear_look_alike(Transposed(3, 5)) == "in_out"


def test_look_alikes_are_the_w_and_a_of_a_strict_site() -> None:
    net = nn.Sequential(Transposed(4, 8), nn.GELU(), Transposed(8, 4)).double()
    with torch.no_grad():
        net[0].weight[:, 1] = net[0].weight[:, 0]
        net[2].weight[1] = -net[2].weight[0]
    bypass_fx.extend(net)
    site = bypass_fx.sites(net)[0]
    assert site.constraint == "folded" and site.second is not None and site.second.stored == "in_out"
    with torch.no_grad():
        net.get_parameter(site.parameter)[:2] = 0.7
    assert float(bypass_fx.norms(net)["1"]) < 1e-14
    x = torch.randn(5, 4, dtype=torch.float64)
    before, bias = net(x), net[2].bias.detach().clone()
    bypass_fx.contract(net)
    assert torch.allclose(net(x), before, rtol=1e-12, atol=1e-12) and not torch.allclose(net[2].bias, bias)
