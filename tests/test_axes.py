"""The channel axis by a run on example inputs, where code without a graph calls the activation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx


class Untraceable(nn.Module):
    """Applies an activation to what a function of (module, x) makes, in a forward that branches on a value."""

    def __init__(self, body: Callable[[Untraceable, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.act = body, nn.ReLU()
        self.conv1, self.conv2, self.up = nn.Conv1d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.ConvTranspose1d(3, 8, 3)
        self.fc, self.bn, self.gru = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GRU(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        return self.act(self.body(self, x))  # type: ignore[no-any-return]


SEQUENCE, IMAGE, TOKENS, GRID = (2, 3, 20), (2, 3, 9, 10), (2, 5, 6), (2, 5, 5, 6)
CASES: dict[str, tuple[Callable[[Untraceable, Tensor], Tensor], tuple[int, ...], int, int]] = {
    "convolution of a sequence": (lambda m, x: m.conv1(x), SEQUENCE, 8, -2),
    "transposed convolution": (lambda m, x: m.up(x), SEQUENCE, 8, -2),
    "norm": (lambda m, x: m.bn(m.conv1(x)), SEQUENCE, 8, -2),
    "scaled": (lambda m, x: torch.tanh(m.conv1(x)) * 2 + 1, SEQUENCE, 8, -2),
    "resized": (lambda m, x: F.interpolate(m.conv1(x), scale_factor=2.0), SEQUENCE, 8, -2),
    "transposed": (lambda m, x: m.conv1(x).transpose(1, 2), SEQUENCE, 8, -1),
    "one position": (lambda m, x: m.conv1(x)[:, :, 0], SEQUENCE, 8, -1),
    "concatenated": (lambda m, x: torch.cat([m.conv1(x), m.conv1(x)], 1), SEQUENCE, 16, -2),
    "one chunk": (lambda m, x: m.conv1(x).chunk(2, 1)[1], SEQUENCE, 4, -2),
    "flattened positions": (lambda m, x: m.conv2(x).flatten(2), IMAGE, 8, -2),
    "positions in a row": (lambda m, x: m.conv2(x).view(len(x), 8, -1), IMAGE, 8, -2),
    "tokens of a map": (lambda m, x: m.conv2(x).flatten(2).transpose(1, 2), IMAGE, 8, -1),
    "averaged": (lambda m, x: m.conv2(x).mean((2, 3)), IMAGE, 8, -1),
    "squeezed": (lambda m, x: m.conv1(x)[:, :, None].squeeze(2), SEQUENCE, 8, -2),
    "tokens": (lambda m, x: m.fc(x), TOKENS, 8, -1),
    "states": (lambda m, x: m.gru(x)[0], TOKENS, 8, -1),
    "channels last": (lambda m, x: m.fc(x), GRID, 8, -1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_tells_the_axis_by_the_map_that_the_value_comes_from(name: str) -> None:
    body, shape, width, axis = CASES[name]
    net, x = Untraceable(body), torch.randn(shape)
    plan = bypass_fx.plan(net, mode="all", example_inputs=(x,))
    assert [(site.width, site.channel_dim) for site in plan] == [(width, axis)]
    larger = torch.randn(*shape[:-1], shape[-1] + (3 if name not in ("tokens", "states", "channels last") else 0))
    before = net(x), net(larger)
    bypass_fx.extend(net, plan)
    assert all(map(torch.equal, (net(x), net(larger)), before))


def test_without_a_map_in_front_of_it_the_shape_tells_the_axis() -> None:
    for shape, axis in (((2, 5, 6), -1), ((2, 5, 6, 7), 1)):
        net = Untraceable(lambda m, x: x.exp())
        plan = bypass_fx.plan(net, mode="all", example_inputs=(torch.randn(shape),))
        assert [(site.width, site.channel_dim) for site in plan] == [(shape[axis], axis)]


class Score(nn.Module):
    """Applies an activation to what a function of (module, x) makes, in a graph."""

    def __init__(self, body: Callable[[Score, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.fc, self.scale = body, nn.Linear(6, 1), nn.Parameter(torch.zeros(6))
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: torch.sigmoid(m.fc(x).squeeze(1)),
        lambda m, x: torch.sigmoid(m.fc(x).view(-1)),
        lambda m, x: torch.relu(m.fc(x)[:, 0]),
        lambda m, x: F.leaky_relu(torch.mm(x, x.t())),  # of every row with every other
    ],
)
def test_the_rows_of_the_batch_are_no_channels(body: Callable[[Score, Tensor], Tensor]) -> None:
    plan = bypass_fx.plan(Score(body), mode="all", example_inputs=(torch.randn(4, 6),))
    assert not plan.sites and "may be the rows of the batch" in plan.refusals[0].reason


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x * F.softplus(m.scale),
        lambda m, x: torch.relu(torch.mm(x, m.weight)),
    ],
)
def test_an_axis_that_no_batch_has_may_be_that_of_channels(body: Callable[[Score, Tensor], Tensor]) -> None:
    plan = bypass_fx.plan(Score(body), mode="all", example_inputs=(torch.randn(4, 6),))
    assert [site.width for site in plan] == [6]


class Contacts(nn.Module):
    """What each pair of tokens has in common, of a sequence of any length."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.last, self.of = nn.Embedding(9, 8), nn.Linear(2, 1), of

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unflatten(-1, (2, 4))
        pairs = torch.einsum("bihd,bjhd->bijh", x, x).softmax(2)
        return torch.sigmoid(self.of(self.last(pairs)))


@pytest.mark.parametrize("of", [lambda x: x.squeeze(3), lambda x: x.squeeze(3)[:, 1:, 1:], lambda x: x.mean((2, 3))])
def test_an_axis_whose_length_is_that_of_the_inputs_holds_no_channels(of: Callable[[Tensor], Tensor]) -> None:
    plan = bypass_fx.plan(Contacts(of), mode="all", example_inputs=(torch.randint(9, (2, 5)),))
    assert not plan.sites and "its channels would be positions" in plan.refusals[0].reason


class OfOneLength(Contacts):
    """The same, of sequences of one length alone."""

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = super().forward(tokens)
        return out + out.new_zeros(5)


def test_an_axis_of_which_the_model_takes_one_length_alone_may_hold_channels() -> None:
    model, tokens = OfOneLength(lambda x: x.squeeze(3)), torch.randint(9, (2, 5))
    before = model(tokens)
    bypass_fx.extend(model, mode="all", example_inputs=(tokens,))
    assert [site.width for site in bypass_fx.sites(model)] == [5]
    assert torch.equal(model(tokens), before)


def test_the_features_of_an_input_are_channels_whatever_their_number() -> None:
    for shape in ((2, 5, 6), (2, 5, 6, 7)):
        (site,) = bypass_fx.plan(nn.Sequential(nn.ReLU()), mode="all", example_inputs=(torch.ones(shape),)).sites
        assert site.width == shape[site.channel_dim]
