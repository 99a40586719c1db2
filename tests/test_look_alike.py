"""Affine maps by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.look_alike import is_convolution, linear_look_alike


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


class Same(nn.Conv2d):
    """Pads by the input's size, as TensorFlow does; its forward has no graph."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
        geometry = zip(input.shape[2:], self.stride, self.kernel_size, strict=True)
        rows, columns = (max((-(-size // step) - 1) * step + kernel - size, 0) for size, step, kernel in geometry)
        around = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
        padded = nn.functional.pad(input, around) if any(around) else input
        return nn.functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Weight standardisation: the weight that is applied is not the one that is stored."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
        if input.shape[0] == 0:
            return input
        return nn.functional.conv2d(input, self.weight - self.weight.mean(), self.bias)


class Reflecting(Same):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
        return super().forward(nn.functional.pad(input, [1, 1, 1, 1], mode="reflect") if input.numel() else input)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Same(3, 6, 3, stride=2), True),
        (Same(4, 4, 5, groups=4, bias=False), True),
        (Standardised(3, 6, 3), False),
        (Reflecting(3, 6, 3), False),
        (nn.ConvTranspose2d(3, 6, 3), False),
    ],
)
def test_only_what_computes_a_convolution_is_one(module: nn.Conv2d, expected: bool) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert is_convolution(module) == expected
    assert module.training and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_convolutions_without_a_graph_make_augmented_sites() -> None:
    net = nn.Sequential(Same(3, 6, 3, stride=2), nn.ReLU(), Same(6, 4, 3)).double()
    (site,) = bypass_fx.plan(net, mode="strict").sites
    assert site.constraint == "augmented" and site.second is not None and site.second.name == "2"
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    bypass_fx.extend(net, mode="strict")
    with torch.no_grad():  # two channels that are the same, read with opposite signs: A D [W b_W] = 0
        for parameter in (net[0].weight, net[0].bias):
            parameter[1] = parameter[0]
        net[2].weight[:, 1] = -net[2].weight[:, 0]
        net.get_parameter(site.parameter)[:2] = 0.7
    with_d = net(x)
    assert float(bypass_fx.norms(net)[site.name]) < 1e-14
    bypass_fx.contract(net)
    assert torch.allclose(net(x), with_d, rtol=0, atol=1e-13)


class Gain(nn.Conv2d):
    """A mask of ones, or a gain of 1: the weight is another one as soon as it changes."""

    def __init__(self) -> None:
        super().__init__(2, 3, 3)
        self.register_buffer("gain", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.gain, self.bias)


class SelfMasking(nn.Conv2d):
    """As in PixelCNN: the forward overwrites a part of the weight before it convolves."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data[:, :, 2:] = 0
        return super().forward(x)


@pytest.mark.parametrize("module", [Gain(), SelfMasking(2, 3, 3)])
def test_a_convolution_whose_weight_may_become_another_is_none(module: nn.Conv2d) -> None:
    assert not is_convolution(module)


def test_trying_a_module_out_draws_no_random_numbers_of_the_users() -> None:
    noisy, before = Noisy(4, 4), torch.get_rng_state()
    assert linear_look_alike(noisy) is None
    assert torch.equal(torch.get_rng_state(), before)


class Followed(nn.Module):
    """A Linear of its own, and whatever is to come behind it."""

    def __init__(self, *behind: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        for index, module in enumerate(behind):
            self.add_module(str(index), module)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.weight, self.bias)
        for module in self.children():
            x = module(x)
        return x


def test_what_one_module_of_a_class_does_is_not_taken_to_be_what_another_with_children_does() -> None:
    model = nn.Sequential(Followed(), nn.ReLU(), Followed(nn.Tanh()), nn.ReLU(), nn.Linear(4, 4))
    assert [site.name for site in bypass_fx.plan(model, mode="strict")] == ["1"]
