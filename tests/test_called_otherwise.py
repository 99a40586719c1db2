"""Extended owners in calls that their plan did not see: rewritten where the site stands as it did, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bypass_fx
from tests.untraced import BOTH, MASK, Attention, Cache, Layer, Model, Pair, X, attentions, fill


@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_mask_that_the_example_inputs_did_not_have_is_taken(projects: bool, train: bool) -> None:
    model = Model(Layer(projects), Layer(projects)).train(train)
    before, masked = model(X), model(X, MASK)
    bypass_fx.extend(model, example_inputs=(X,))
    assert attentions(bypass_fx.Plan(tuple(bypass_fx.sites(model)))) == BOTH
    assert torch.equal(model(X, MASK), masked) and torch.equal(model(X), before)
    fill(model, 0.1)
    assert not torch.allclose(model(X, MASK), masked)


class Turned(Attention):
    """With a mask it gives its values another way out."""

    def forward(self, x: Tensor, pair: Pair, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        mixed = super().forward(x, pair, mask, cache)
        return mixed if mask is None else mixed.unflatten(-1, (2, 4)).transpose(-2, -1).flatten(-2)


class Crossed(Attention):
    """With a mask it takes its values from another map."""

    def forward(self, x: Tensor, pair: Pair, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        weights = (self.q(x) * pair[0]) @ (self.k(x) * pair[1]).transpose(-2, -1)
        return weights.softmax(-1) @ (self.v(x) if mask is None else self.k(x))


@pytest.mark.parametrize("kind", [Turned, Crossed])
def test_a_call_in_which_the_result_leaves_or_the_values_come_in_another_way_is_refused(kind: type[Attention]) -> None:
    model = Model(Layer(projects=False))
    model.layers[0].attention = kind(projects=False)
    bypass_fx.extend(model, example_inputs=(X,))
    assert attentions(bypass_fx.Plan(tuple(bypass_fx.sites(model)))) == BOTH[:1]
    with pytest.raises(
        bypass_fx.SurgeryError, match=r"no strict site when called like this \(mask is a Tensor and was None\)"
    ):
        model(X, MASK)


def test_a_cache_is_refused_in_words_that_help() -> None:
    model = bypass_fx.extend(Model(), example_inputs=(X,))
    with pytest.raises(
        bypass_fx.SurgeryError, match=r"cache is a Cache and was None; .* without one, e.g. with use_cache=F"
    ):
        model(X, cache=Cache())


class Gathering(nn.Module):
    """Goes by what its `*args` and `**kwargs` hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, *scales: Any, **others: Any) -> Tensor:
        h = torch.relu(self.first(x))
        for scale in scales:
            h = h * (7 if scale is None else scale[0] if isinstance(scale, tuple) else scale)
        if others.get("scale") is not None:
            h = h * others["scale"]
        return self.last(h.sigmoid())  # type: ignore[no-any-return]


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *(
        ((X, scale), {})
        for scale in (2.0, 3.0, None, torch.tensor(2.0), (2.0,), (torch.ones(16),), (torch.ones(16), 3))
    ),
    *(((X,), {"scale": scale}) for scale in (2.0, 3.0, None, torch.ones(16))),
]


@pytest.mark.parametrize("planned", range(7))
def test_what_star_arguments_gather_is_checked_at_every_call(planned: int) -> None:
    model = Gathering()
    before = [model(*args, **kwargs) for args, kwargs in CALLS]
    bypass_fx.extend(model, mode="all", example_inputs=CALLS[planned][0])
    for (args, kwargs), expected in zip(CALLS, before, strict=True):
        assert torch.equal(model(*args, **kwargs), expected)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("masked", ["src_mask", "src_key_padding_mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_layer_of_torch_takes_a_mask_that_it_was_not_planned_with(
    train: bool, masked: str, dtype: torch.dtype
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1).train(train)
    x, mask = torch.randn(5, 5, 8), torch.ones(5, 5).triu(1).to(dtype)

    def run() -> Tensor:
        torch.manual_seed(0)
        out: Tensor = layer(x, **{masked: mask})
        return out

    before = run()
    bypass_fx.extend(layer, mode="all")
    assert torch.equal(run(), before)
    bypass_fx.contract(layer)
    assert torch.equal(run(), before)


class Skips(nn.Module):
    """Leaves out an activation where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, skips: bool = False) -> Tensor:
        h = self.last(torch.relu(self.first(x)))
        return h if skips else h.sigmoid()  # type: ignore[no-any-return]


def test_a_relaxed_activation_may_be_left_out_in_a_call() -> None:
    model = Skips()
    before, skipped = model(X), model(X, skips=True)
    bypass_fx.extend(model, mode="all")
    assert {site.name: site.kind for site in bypass_fx.sites(model)} == {"relu": "strict", "sigmoid": "relaxed"}
    assert torch.equal(model(X, skips=True), skipped) and torch.equal(model(X), before)
    fill(model, 0.1)
    assert not torch.allclose(model(X, skips=True), skipped)


class Heads(nn.Module):
    """It splits the heads of its values by the batch of its queries, which the caller alone knows to be the same."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.q, self.v, self.out, self.step = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), step

    def forward(self, query: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        batch = query.size(0)
        q, v = (each.view(batch, -1, 2, 4).transpose(1, 2) for each in (self.q(query), self.v(value)))
        weights = q @ q.transpose(-2, -1)
        if mask is not None:
            weights = weights + mask
        elif self.step == "overwrites":
            v.mul_(2.0)
        elif self.step == "reads A's bias":
            weights = weights + self.out(value).sum()
        mixed = (weights.softmax(-1) @ v).transpose(1, 2).reshape(batch, -1, 8)
        out: Tensor = self.out(mixed)
        return out


class OnItself(nn.Module):
    def __init__(self, step: str = "") -> None:
        super().__init__()
        self.heads = Heads(step)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.heads(x, x, mask)
        return out


def test_a_call_that_makes_the_values_as_planned_is_taken_where_its_own_graph_does_not_tell_their_sizes() -> None:
    model, x = OnItself(), torch.randn(2, 5, 8)
    before = model(x, None)
    bypass_fx.extend(model, mode="strict")
    assert [site.constraint for site in bypass_fx.sites(model)] == ["folded"]
    assert torch.equal(model(x, None), before)


@pytest.mark.parametrize("step", ["overwrites", "reads A's bias"])
def test_such_a_call_is_refused_where_it_does_more_to_the_values_or_reads_the_bias_again(step: str) -> None:
    model = bypass_fx.extend(OnItself(step), mode="strict")
    with pytest.raises(bypass_fx.SurgeryError, match="no strict site when called like this"):
        model(torch.randn(2, 5, 8), None)
