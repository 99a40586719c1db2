"""What the settings ask of the machine: compiled steps, precision, memory formats, gradients in parts; and of the run."""

from __future__ import annotations

import shutil
import sysconfig
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bypass_fx.comeback import COMEBACKS
from bypass_fx.data import Data
from bypass_fx.engine import _expect_compilable
from bypass_fx.history import History, Record
from bypass_fx.models import Fit, ModelError, build
from bypass_fx.settings import PRESETS, SettingsError, from_dict, preset
from bypass_fx.task import TaskError, task
from bypass_fx.trainer import Trainer
from tests.runs import digits, mlp, short, trainer

EPOCH = 5

can_build = any(map(shutil.which, ("g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()


def _losses(history: History) -> list[float]:
    return [record.loss for record in history.records]


@pytest.mark.parametrize("comeback", COMEBACKS)
@pytest.mark.filterwarnings("ignore:opt2 ended", "ignore:variety", "ignore:lagrangian")
def test_a_whole_run_needs_three_compilations_and_has_no_graph_break(comeback: str) -> None:
    way = {"comeback": comeback, "gamma": "0.5", "epsilon": 0.05}
    plain = trainer(**way).fit()
    torch.compiler.reset()
    counters.clear()
    history = trainer(compile="default", compile_backend="aot_eager", **way).fit()
    assert not counters["graph_break"]
    assert 2 <= counters["stats"]["unique_graphs"] <= 3
    assert {record.phase for record in history.records if record.baseline} == {"opt1", "opt2", "train3"}
    assert _losses(history) == pytest.approx(_losses(plain), rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"comeback": "penalty", "gamma": "0.5", "epsilon": 0.05}], ids=str)
def test_half_precision_needs_no_more_compilations(settings: dict[str, Any]) -> None:
    torch.compiler.reset()
    counters.clear()
    trainer(compile="default", compile_backend="aot_eager", precision="bf16", **settings).fit()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 3


@pytest.mark.skipif(not can_build, reason="torch's own backend needs a C++ compiler and Python's headers")
def test_cuda_graphs_can_be_asked_for_and_are_skipped_on_a_cpu() -> None:
    lengths = {"train1": 1, "opt1": 1, "opt2": 1, "train3": 1, "device": "cpu"}
    plain = trainer(**lengths).fit()
    torch.compiler.reset()
    counters.clear()
    history = trainer(compile="reduce-overhead", **lengths).fit()
    assert counters["inductor"]["cudagraph_skips"] and counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"] and _losses(history) == pytest.approx(_losses(plain), rel=1e-5)


def test_cuda_graphs_are_refused_where_they_would_lose_gradients() -> None:
    settings = short(compile="reduce-overhead", accumulate=2)
    _expect_compilable(settings, torch.device("cpu"))
    with pytest.raises(SettingsError, match="set accumulate to 1, or compile to default"):
        _expect_compilable(settings, torch.device("cuda"))


def _vit() -> tuple[nn.Module, Data]:
    """A timm model of residual blocks, on images."""
    x = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Data(
        "noise", TensorDataset(x, torch.arange(16) % 4), TensorDataset(x, torch.arange(16) % 4), "classification", 4
    )
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **sizes), data


def _fit_vit(**changes: Any) -> History:
    model, data = _vit()
    return Trainer(model, data, short(batch_size=8, lr=1e-3, baseline=False, mode="all", **changes)).fit()


def test_a_timm_model_trains_the_same_in_parts_with_checkpointed_gradients_and_channels_last() -> None:
    plain = _losses(_fit_vit())
    for changes in ({"accumulate": 2}, {"gradient_checkpointing": True}, {"channels_last": True}, {"fused": True}):
        assert _losses(_fit_vit(**changes)) == pytest.approx(plain, rel=1e-4), changes


def test_autocast_changes_the_losses_a_little_and_the_weights_stay_float32() -> None:
    plain, run = _losses(trainer().fit()), trainer(precision="bf16")
    half = _losses(run.fit())
    assert half != plain and half == pytest.approx(plain, rel=0.01)
    assert {value.dtype for value in run.model.state_dict().values()} == {torch.float32}


def test_what_the_machine_cannot_do_is_refused() -> None:
    with pytest.raises(ModelError, match="neither timm's set_grad_checkpointing"):
        trainer(gradient_checkpointing=True)
    with pytest.raises(SettingsError, match="fp16 is for accelerators"):
        trainer(precision="fp16", device="cpu")
    with pytest.raises(SettingsError, match="a multiple of 7"):
        trainer(accumulate=7)


def test_a_models_own_loss_over_batches_of_any_kind() -> None:
    class Triples(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x = torch.linspace(-1, 1, 64)[index].repeat(3)
            return {"x": x, "goal": x.square().sum()}

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]).squeeze(1) - batch["goal"]).abs().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    settings = short(batch_size=16, lr=0.01, train1=10)
    history = Trainer(model, Data("mine", Triples(), Triples(), "custom"), settings, loss_fn=loss_fn).fit()
    assert history.moments[-1].bypass.train_loss < 0.6 * history.records[0].loss
    assert history.moments[-1].bypass.train.keys() == {"loss"}


def test_next_tokens_are_predicted_with_perplexity_by_models_of_transformers_too() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=7, n_positions=8, bos_token_id=0)
    tokens = torch.arange(40 * 9).view(40, 9) % 7  # each token tells the next
    following = tokens[:, 1:].clone()
    following[:, 0] = -100
    examples = TensorDataset(tokens[:, :-1], following)
    model = transformers.GPT2LMHeadModel(config)
    settings = short(train1=8, batch_size=20, lr=0.02, mode="all")
    history = Trainer(model, Data("counting", examples, examples, "next-token", 7), settings).fit()
    score = history.moments[-1].bypass.test
    assert score["accuracy"] > 0.9 and score["perplexity"] == pytest.approx(torch.tensor(score["loss"]).exp().item())


def test_the_scores_of_a_regression_are_squared_error_and_r2() -> None:
    x, y = torch.randn(30, 2), torch.randn(30, 2) * 3 + 1
    kind = task("regression")
    sums = sum(kind.sums(nn.Identity(), batch) for batch in zip(x.split(7), y.split(7), strict=True))
    score = kind.score(cast(Tensor, sums).tolist())
    spread = (y - y.mean()).square().sum()
    assert score["loss"] == pytest.approx(F.mse_loss(x, y).item())
    assert score["r2"] == pytest.approx(float(1 - (x - y).square().sum() / spread), rel=1e-5)


def test_an_unknown_task_and_a_loss_that_is_none_are_refused() -> None:
    with pytest.raises(TaskError, match="choose from classification"):
        task("clasification")
    with pytest.raises(ModelError, match="loss_fn returned NoneType; a 0-dim tensor is needed"):
        Trainer(mlp(digits()), digits(), short(), loss_fn=lambda model, batch: cast(Tensor, None))


def test_train1_ends_at_a_plateau() -> None:
    history = trainer(train1=50, patience=2, tolerance=0.2, opt1=1, opt2=1, train3=1).fit()
    theta = history.moment("θ*").step
    means = [record.loss for record in history.records if record.phase == "train1"]
    slow = [after > before * 0.8 for before, after in pairwise(means)]
    assert 3 * EPOCH <= theta < 50 * EPOCH and theta == EPOCH * len(means) and slow[-2:] == [True, True]
    assert history.moments[-1].step == theta + 3 * EPOCH


def test_cycles_bypass_again_and_again_beside_one_baseline() -> None:
    run = trainer(cycles=3, opt1=1, opt2=2, train3=1)
    history = run.fit()
    titles = ["θ*", "after opt1", "after proj"]
    again = [f"{title} ({cycle})" for cycle in (2, 3) for title in titles]
    assert [moment.title for moment in history.moments] == [*titles, *again, "end"]
    assert [phase for phase, _, _ in history.spans()] == ["train1", *["opt1", "opt2", "train3"] * 3]
    assert len(history.reports) == 3 and history.moments[-1].step == run.total_steps
    assert [record.cycle for record in history.records] == [0] * 2 + [1] * 4 + [2] * 4 + [3] * 4
    walked = [record.residual for record in history.records if record.phase == "opt1"]
    assert len(walked) == 3 and all(walked)


def test_without_a_baseline_there_is_one_arm() -> None:
    history = trainer(baseline=False).fit()
    assert all(moment.baseline is None for moment in history.moments)
    assert all(record.baseline is None for record in history.records)
    assert _losses(history) == _losses(trainer().fit())


def test_averaged_weights_begin_anew_after_a_bypass(tmp_path: Path) -> None:
    data = digits()
    seen: list[dict[str, Tensor]] = []
    model = mlp(data)

    def keep(event: Any) -> None:
        if isinstance(event, Record) and event.phase in ("opt2", "train3"):
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    Trainer(model, data, short(ema=0.5, batch_size=1437, train3=3), keep, folder=tmp_path / "run").fit()
    wanted = seen[-4]  # the weights that came back; then three steps, one a record
    for now in seen[-3:]:
        wanted = {name: wanted[name].lerp(now[name], 0.5) for name in now}
    found = load_file(tmp_path / "run" / "averaged.safetensors")
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in wanted.items())


def test_an_lr_schedule_of_timm_drives_both_arms_and_d() -> None:
    history = trainer(lr_schedule="cosine", warmup=1).fit()
    rates = [record.lr for record in history.records if record.lr is not None]
    assert rates[-1] == pytest.approx(0, abs=1e-4) and max(rates) == rates[0] and sorted(rates, reverse=True) == rates


def test_distances_and_angles_are_those_of_the_parameters() -> None:
    seen: list[tuple[Record, dict[str, Tensor]]] = []
    data = digits()
    model = mlp(data)

    def keep(event: Any) -> None:
        if isinstance(event, Record):
            seen.append((event, {name: p.detach().clone() for name, p in model.named_parameters()}))

    Trainer(model, data, short(), keep).fit()
    start = next(p for record, p in reversed(seen) if record.phase == "train1")
    for record, now in seen:
        if record.geometry is None:
            continue
        flat = torch.cat([value.flatten() for value in now.values()])
        still = torch.cat([start.get(name, torch.zeros_like(value)).flatten() for name, value in now.items()])
        assert record.geometry.distance == pytest.approx(float((flat - still).norm()), rel=1e-5)
        assert record.geometry.cosine == pytest.approx(float(F.cosine_similarity(flat, still, dim=0)), rel=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_set_of_settings_that_can_be_changed_and_saved(name: str) -> None:
    from dataclasses import asdict

    settings = preset(name, {"seed": 7})
    assert settings.seed == 7 and from_dict(asdict(settings)) == settings
    with pytest.raises(SettingsError, match="does not have"):
        from_dict({"sped": 7})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"lr": "fast"}, "lr is 'fast'; give a number"),
        ({"return_lr": "fast"}, "return_lr is 'fast'; give a number or None"),
        ({"train1": None}, "train1 is None; give a whole number"),
        ({"opt1": 2.5}, "opt1 is 2.5; give a whole number"),
        ({"baseline": "yes"}, "baseline is 'yes'; give True or False"),
        ({"comeback": 3}, "comeback is 3; give a text"),
        ({"mode": None}, "mode is None; give a text"),
    ],
)
def test_a_setting_of_another_type_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=f"^{told}$"):
        preset("default", wrong)


def test_the_papers_preset_runs_its_own_return() -> None:
    model = build("mlp", Fit((64,), 10))
    lengths = {"train1": 1, "opt1": 1, "opt2": 2, "train3": 1, "epsilon": 1e6}
    history = Trainer(model, digits(), preset("paper", lengths)).fit()
    assert history.reports[0].comeback == "penalty" and history.steps_per_epoch == 1437 // 128
