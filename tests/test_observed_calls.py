"""Modules that code without a graph calls: traced for the calls that a run on the example inputs shows."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import bypass_fx
from bypass_fx.passes import runs as runs_of_models
from bypass_fx.passes.calls import Constant
from bypass_fx.passes.link import Linked
from bypass_fx.passes.units import Arguments
from tests.untraced import BOTH, MASK, Attention, Cache, Layer, Model, X, attentions, fill


def test_an_attention_below_a_forward_without_a_graph_is_a_site_as_the_run_shows_it_called() -> None:
    model = Model()
    assert attentions(bypass_fx.plan(model)) == []
    before = model(X)
    bypass_fx.extend(model, example_inputs=(X,))
    assert attentions(bypass_fx.Plan(tuple(bypass_fx.sites(model)))) == BOTH
    assert torch.equal(model(X), before)
    fill(model, 0.1)
    assert not torch.allclose(model(X), before)
    fill(model, 0.0)
    bypass_fx.contract(model)
    assert torch.equal(model(X), before) and type(model.layers[0].attention) is Attention


def test_what_a_module_seen_so_calls_is_seen_there() -> None:
    linked = Linked(Model(), (X,))
    assert linked.unseen == {"layers", "layers.0", "layers.1", "head"}
    assert linked.is_observed("layers.0") and not linked.is_observed("layers.0.attention")
    assert [spot.unit.path for spot in linked.callers["layers.1.attention"]] == ["layers.1"]


def test_the_run_leaves_all_as_it_was() -> None:
    model, cache, dice = Model(), Cache(), torch.get_rng_state()
    model.head.register_buffer("calls", torch.zeros(()))
    model.head.register_forward_hook(lambda head, args, result: head.calls.add_(1).sum() * 0 + result)
    linked = Linked(model, {"x": X, "cache": cache})
    assert linked.observed is not None and linked.observed.calls["layers.0"]
    assert model.training and model.runs == 0 and float(model.head.calls) == 0 and cache.values == []
    assert torch.equal(torch.get_rng_state(), dice)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model", "inputs", "times"),
    [
        (Model(), (X,), 1),
        (Model(), None, 0),
        (Model(), Arguments((X,), {}), 0),  # as in the middle of a call
        (nn.Sequential(Layer().attention.v, nn.ReLU()), (X,), 0),  # every call is seen
    ],
)
def test_the_model_runs_only_where_calls_are_not_seen(
    model: nn.Module, inputs: Any, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[object] = []
    monkeypatch.setattr(runs_of_models, "on_values", lambda *arguments: runs.append(arguments))
    Linked(model, inputs)
    assert len(runs) == times


class Asking(Model):
    """Calls its layers in another way where its input has no values."""

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return super().forward(x, MASK if isinstance(x, FakeTensor) or x.is_meta else mask, cache)


def test_the_calls_are_those_of_a_run_on_values() -> None:
    linked = Linked(Asking(), (X,))
    assert linked.observed is not None
    (call,) = linked.observed.calls["layers.0"]
    assert dict(call.arguments)["mask"] == Constant(None)


class Stepped(nn.Module):
    """A layer that is told which step it is at, and may be told a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

    def forward(self, x: Tensor, step: int, scale: float | None = None, *, extra: list[int] | None = None) -> Tensor:
        hidden = self.first(x * step if scale is None else x * scale)
        result: Tensor = self.last(self.act(hidden))
        return result


class Steps(nn.Module):
    """Calls one layer again and again."""

    def __init__(self, *calls: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.calls = Stepped(), calls

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.nullcontext():
            for call in self.calls:
                x = x + self.layer(x, **call)
        return x


def variants(model: nn.Module, path: str = "layer") -> int:
    return len(Linked(model, (X,)).variants(path))


def test_every_way_of_calling_a_module_is_traced_once() -> None:
    assert variants(Steps({"step": 1}, {"step": 1, "scale": 0.5}, {"step": 1})) == 2


def test_of_very_many_ways_the_first_are_traced() -> None:
    assert variants(Steps(*({"step": 1, "scale": float(n)} for n in range(30)))) == 16


def test_calls_that_one_graph_serves_are_one_way() -> None:
    model = Steps({"step": 1}, {"step": 2}, {"step": 3})
    assert variants(model) == 1
    before = model(X)
    bypass_fx.extend(model, mode="all", example_inputs=(X,))
    assert torch.equal(model(X), before)
    type_before = type(model.layer)
    model.calls = ({"step": 4},)
    model(X)
    assert type(model.layer) is type_before, "a step that was not seen needs no other code"


class Appending(nn.Module):
    """Hands on a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Stepped()

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Any] = []
        with contextlib.nullcontext():
            x = self.layer(x, 1, extra=seen)
        seen.append(x)
        return x


def test_a_call_is_noted_as_it_was_when_it_was_made() -> None:
    linked = Linked(Appending(), (X,))
    assert linked.observed is not None
    (call,) = linked.observed.calls["layer"]
    assert dict(call.arguments)["extra"] == Constant([])


class Deciding(nn.Module):
    """Branches on values when it is called with a limit, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.last = Stepped(), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x: Tensor, limit: Tensor | None = None) -> Tensor:
        if limit is not None and bool((x > limit).all()):
            return x
        result: Tensor = x + self.last(self.act(self.inner(x, 2, scale=2.0)))
        return result


class Limited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Deciding()

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.nullcontext():
            result: Tensor = self.block(x, limit=x.new_zeros(()))
        return result


def test_a_module_whose_call_does_not_trace_has_no_graph_and_those_below_it_are_called_as_observed() -> None:
    model = Limited()
    linked = Linked(model, (X,))
    assert "block" in linked.failures and not linked.variants("block")
    assert linked.is_observed("block.inner")
    before = model(X)
    bypass_fx.extend(model, mode="strict", example_inputs=(X,))
    assert [site.name for site in bypass_fx.sites(model)] == ["block.inner.act"]
    assert torch.equal(model(X), before)


def test_a_run_that_breaks_off_shows_nothing_and_the_refusals_say_so() -> None:
    class Outside(Model):
        def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
            with contextlib.nullcontext():
                self.layers[0](x)
            raise RuntimeError("not with these")

    linked = Linked(Outside(Attended(), Attended()), (X,))
    assert linked.observed is not None and linked.observed.calls == {}
    assert linked.observed.failure == "RuntimeError: not with these"
    plan = bypass_fx.plan(linked.model, example_inputs=(X,))
    assert attentions(plan) == [] and "RuntimeError: not with these" in str(plan.refusals)


class Attended(nn.Module):
    """An attention that its defaults show too, with an option that nobody sees left out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, **others: Any) -> Tensor:
        weights = self.q(x) @ x.transpose(-2, -1)
        weights = weights if mask is None else weights + mask
        result: Tensor = self.out(weights.softmax(-1) @ self.v(x))
        return result


def test_a_plan_of_observed_calls_asks_for_the_example_inputs_it_was_made_with() -> None:
    model = Model()
    plan = bypass_fx.Plan.from_json(bypass_fx.plan(model, example_inputs=(X,)).to_json())
    with pytest.raises(bypass_fx.PlanError, match="pass the example_inputs that the plan was made with"):
        bypass_fx.extend(model, plan)
    assert type(model.layers[0].attention) is Attention
    bypass_fx.extend(model, plan, example_inputs=(X,))


def test_an_attention_that_its_defaults_show_asks_for_them_too() -> None:
    model = Handing(Attended())
    plan = bypass_fx.plan(model, example_inputs=(X,))
    assert attentions(plan) == ["layer.matmul_1"]
    with pytest.raises(bypass_fx.PlanError, match=r"how the model calls layer is not seen; pass the example_inputs"):
        bypass_fx.extend(model, plan)


class Handing(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.nullcontext():
            result: Tensor = self.layer(x)
        return result


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def test_a_probe_and_a_look_for_stuck_channels_take_the_example_inputs() -> None:
    model = Model()
    report = bypass_fx.probe(model, _loss, [X], example_inputs=(X,))
    assert [site.name for site in report.sites] == BOTH
    assert bypass_fx.stuck(model, _loss, [X], example_inputs=(X,)).channels == 16


@pytest.mark.parametrize("extended", [True, False])
def test_a_schedule_goes_through_several_cycles_and_gives_the_model_back(extended: bool) -> None:
    model = Model()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    if extended:
        bypass_fx.extend(model, example_inputs=(X,))
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "delta" not in n], 0.01)
    schedule = bypass_fx.BypassSchedule(model, optimizer, opt1=2, opt2=3, cycles=2, example_inputs=(X,))
    steps = 0
    while schedule.phase != "done" and steps < 20:
        (_loss(model, X) + schedule.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        steps += 1
    assert schedule.phase == "done" and len(schedule.reports) == 2
    assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == classes


def test_one_layer_that_is_called_several_times_is_one_site() -> None:
    layer = Layer()
    model = Model(layer, layer, layer)
    before = model(X)
    bypass_fx.extend(model, example_inputs=(X,))
    assert attentions(bypass_fx.Plan(tuple(bypass_fx.sites(model)))) == BOTH[:1]
    assert torch.equal(model(X), before)


def test_a_model_without_values_is_run_too() -> None:
    with torch.device("meta"):
        model = Model()
    assert attentions(bypass_fx.plan(model, example_inputs=(X.to("meta"),))) == BOTH


SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": (transformers.LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0), transformers.LlamaForCausalLM),
    "bert": (transformers.BertConfig(**SIZES), transformers.BertModel),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_attentions_of_transformers_are_sites(name: str) -> None:
    config, cls = CONFIGS[name]
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").eval()
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "use_cache": False}
    plain, masked = model(**inputs)[0], model(**inputs, attention_mask=mask)[0]
    assert attentions(bypass_fx.plan(model)) == []
    bypass_fx.extend(model, example_inputs=inputs)
    assert len(attentions(bypass_fx.Plan(tuple(bypass_fx.sites(model))))) == 2
    assert torch.equal(model(**inputs)[0], plain)
    assert torch.equal(model(**inputs, attention_mask=mask)[0], masked)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


KINDS = {"eager": eager}


class ByName(nn.Module):
    """Its attention is a function of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.kind = nn.Linear(8, 8), "eager"

    def forward(self, x: Tensor, cache: Cache | None = None, pair: Any = None) -> Tensor:
        one, other = pair
        with contextlib.nullcontext():
            v = self.v(x) if cache is None else cache.update(self.v(x))
            return KINDS[self.kind](one, other, v)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ByName()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        with contextlib.nullcontext():
            return x + self.inner(x, cache, (x, x))  # type: ignore[no-any-return]


def test_attention_that_a_table_names_is_listed_with_what_would_help() -> None:
    (refusal,) = bypass_fx.plan(Around()).refusals
    assert refusal.name == "inner.attention" and refusal.remedy.startswith("pass example_inputs")
    inputs = (torch.randn(2, 3, 8), Cache())
    (refusal,) = bypass_fx.plan(Around(), example_inputs=inputs).refusals
    assert refusal.name == "inner.attention" and "without one" in refusal.remedy
    (refusal,) = bypass_fx.plan(Around(), example_inputs=inputs[:1]).refusals
    assert refusal.name == "inner.attention" and refusal.remedy.startswith("split")


def test_a_tensor_alone_is_the_only_argument() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.ones(2, 3)
    assert bypass_fx.plan(net, example_inputs=x) == bypass_fx.plan(net, example_inputs=(x,))
    assert bypass_fx.sites(bypass_fx.extend(net, example_inputs=x))
