"""The callbacks lead the models of the real libraries through the bypass that a loop of one's own leads them through."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bypass_fx

with warnings.catch_warnings(action="ignore"):  # of what they import in turn
    import lightning.pytorch as lightning
    import transformers

    from bypass_fx.integrations import lightning as for_lightning
    from bypass_fx.integrations import transformers as for_transformers

ROOT = Path(__file__).parents[1]
WAY: dict[str, Any] = {"opt1": 4, "opt2": 6, "comeback": "penalty", "gamma": bypass_fx.Linear(0.3), "epsilon": 1e-9}
START, STEPS, BATCH = 3, 16, 8


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def _data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(STEPS * BATCH, 4, generator=generator), torch.arange(STEPS * BATCH) % 3)


def _by_hand(net: nn.Module) -> nn.Module:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0)
    schedule = None
    for step, (x, y) in enumerate(DataLoader(_data(), BATCH)):
        if step == START:
            schedule = bypass_fx.BypassSchedule(net, optimizer, **WAY)
        loss = F.cross_entropy(net(x), y)
        (loss + schedule.penalty() if schedule else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
    return net


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Tensor]:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # the budget ends first, by design
        return _by_hand(_net()).state_dict()


def _expect_same(net: nn.Module, wanted: dict[str, Tensor]) -> None:
    found = net.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-7) for name, value in wanted.items())


class Lit(lightning.LightningModule):
    def __init__(self, net: nn.Module, optimizers: int = 1) -> None:
        super().__init__()
        self.net, self.count = net, optimizers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        made = [torch.optim.AdamW(self.net.parameters(), lr=0.01, weight_decay=0.0) for _ in range(self.count)]
        return made if self.count > 1 else made[0]


def _lightning(callbacks: Any, **options: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": options.pop("enable_checkpointing", False),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, **quiet, **options)


@pytest.mark.filterwarnings("ignore")
def test_lightning_leads_a_module_through_the_bypass(by_hand: dict[str, Tensor]) -> None:
    callback = for_lightning.BypassCallback(start=START, **WAY)
    module = Lit(_net())
    _lightning(callback).fit(module, DataLoader(_data(), BATCH))
    _expect_same(module.net, by_hand)
    assert callback.report and callback.report.opt2_steps == 6 and type(module) is Lit


@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_optimiser_steps_where_gradients_are_accumulated(by_hand: dict[str, Tensor]) -> None:
    callback = for_lightning.BypassCallback(start=START, **WAY)
    module = Lit(_net())
    _lightning(callback, accumulate_grad_batches=2).fit(module, DataLoader(_data(), BATCH // 2))
    _expect_same(module.net, by_hand)


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_ends_within_the_bypass_contracts() -> None:
    callback = for_lightning.BypassCallback(start=START, opt1=100, opt2=100)
    module = Lit(_net())
    _lightning(callback).fit(module, DataLoader(_data(), BATCH))
    assert callback.report and module.net.state_dict().keys() == _net().state_dict().keys()


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_several_optimisers_is_refused_clearly() -> None:
    module = Lit(_net(), optimizers=2)
    module.automatic_optimization = False
    with pytest.raises(bypass_fx.BypassError, match="one optimizer"):
        _lightning(for_lightning.BypassCallback(start=0, **WAY)).fit(module, DataLoader(_data(), BATCH))


def test_a_callback_without_its_lengths_is_refused() -> None:
    with pytest.raises(bypass_fx.BypassError, match="needs opt2"):
        for_transformers.BypassCallback(start=0, opt1=3)


class Wrapped(nn.Module):
    """A net as transformers' Trainer calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def _transformers(model: nn.Module, callback: Any, folder: Path, data: Any, **options: Any) -> Any:
    given = {"per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": 0.01, "max_grad_norm": 0.0}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    evaluated = options.pop("eval_dataset", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), lr_scheduler_type="constant", **{**given, **quiet, **options}
    )
    return InOrder(model=model, args=arguments, train_dataset=data, eval_dataset=evaluated, callbacks=[callback])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parts", [1, 2])
def test_transformers_leads_a_model_through_the_bypass(by_hand: dict[str, Tensor], tmp_path: Path, parts: int) -> None:
    callback = for_transformers.BypassCallback(start=START, **WAY)
    model = Wrapped(_net())
    data = [{"x": x, "labels": y} for x, y in _data()]
    options = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": BATCH // parts}
    _transformers(model, callback, tmp_path, data, **options).train()
    _expect_same(model.net, by_hand)
    assert callback.report and callback.report.opt2_steps == 6


def _saved_and_gone_on(tmp_path: Path, way: dict[str, Any]) -> tuple[Any, Any, Wrapped, Wrapped]:
    data = [{"x": x, "labels": y} for x, y in _data()]
    callbacks, models = [], []
    for resume in (None, str(tmp_path / "checkpoint-10")):
        callbacks.append(for_transformers.BypassCallback(start=2, **way))
        models.append(Wrapped(_net()))
        options = {"save_strategy": "steps", "save_steps": 5}
        _transformers(models[-1], callbacks[-1], tmp_path, data, **options).train(resume_from_checkpoint=resume)
    return callbacks[0], callbacks[1], models[0], models[1]


@pytest.mark.filterwarnings("ignore")
def test_transformers_goes_on_after_the_bypass_without_another(tmp_path: Path) -> None:
    first, second, whole, resumed = _saved_and_gone_on(tmp_path, {"opt1": 2, "opt2": 3})
    assert second.report == first.report and second.report is not None
    _expect_same(resumed.net, whole.net.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_transformers_saves_no_extended_model_and_takes_none_for_the_best(tmp_path: Path) -> None:
    data = [{"x": x, "labels": y} for x, y in _data()]
    model = Wrapped(_net())
    callback = for_transformers.BypassCallback(start=2, opt1=100, opt2=6, delta_lr=0.5)  # the extended one learns fast
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    stopping = transformers.EarlyStoppingCallback(1, 10.0)
    trainer = _transformers(
        model, callback, tmp_path, data, eval_dataset=data, load_best_model_at_end=True, **options,
    )  # fmt: skip
    trainer.add_callback(stopping)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_global_step == 2
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert model.state_dict().keys() == best.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in best.items())
    for folder in tmp_path.glob("checkpoint-*"):
        assert load_file(folder / "model.safetensors").keys() == best.keys()


def test_transformers_saving_at_every_best_metric_is_refused(tmp_path: Path) -> None:
    data = [{"x": x, "labels": y} for x, y in _data()]
    options = {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"}
    callback = for_transformers.BypassCallback(start=2, opt1=1, opt2=1)
    trainer = _transformers(Wrapped(_net()), callback, tmp_path, data, eval_dataset=data, **options)
    with pytest.raises(bypass_fx.BypassError, match="take 'steps' or 'epoch'"):
        trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_lightning_goes_on_after_the_bypass_without_another(tmp_path: Path) -> None:
    reports = []
    for resume in (None, str(tmp_path / "at.ckpt")):
        saving = lightning.callbacks.ModelCheckpoint(tmp_path, "at", every_n_train_steps=10)
        callback = for_lightning.BypassCallback(start=2, opt1=2, opt2=3)
        module = Lit(_net())
        trainer = _lightning([callback, saving], enable_checkpointing=True)
        trainer.fit(module, DataLoader(_data(), BATCH), ckpt_path=resume)
        reports.append(callback.report)
        assert len(trainer.optimizers[0].param_groups) == 1
        assert callback._guide.schedule is None or resume is None
    assert reports[0] == reports[1] and reports[0] is not None


@pytest.mark.parametrize("start", [-1, 1.5, "now"])
def test_a_start_that_is_no_step_is_refused(start: Any) -> None:
    with pytest.raises(bypass_fx.BypassError, match="start is"):
        for_lightning.BypassCallback(start=start, opt1=3, opt2=3)


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_of_transformers_comes_back_to_its_architecture(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(0, 20, (40, 8), generator=torch.Generator().manual_seed(0))
    callback = for_transformers.BypassCallback(start=1, opt1=1, opt2=2, mode="all")
    _transformers(
        model, callback, tmp_path, [{"input_ids": row, "labels": row} for row in tokens], use_cpu=True
    ).train()
    assert callback.report and len(callback.report.arrivals) == 2
    copy.deepcopy(transformers.GPT2LMHeadModel(config)).load_state_dict(model.state_dict(), strict=True)
    assert not torch.equal(before["lm_head.weight"], model.state_dict()["lm_head.weight"])


def _patched(text: str, diff: str) -> str:
    """The text with a unified diff applied; its line numbers are not looked at, its context is."""
    for hunk in re.split(r"^@@.*@@\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(before) == 1, f"the patch does not apply: {before}"
        text = text.replace(before, after)
    return text


@pytest.mark.filterwarnings("ignore")
def test_the_readmes_patch_of_a_timm_loop_applies_and_bypasses(tmp_path: Path) -> None:
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name, value in (("a", 20), ("b", 200)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(8):
            Image.new("RGB", (32, 32), (value, 12 * index, 0)).save(tmp_path / "train" / name / f"{index}.png")
    scope: dict[str, Any] = {}
    exec(compile(_patched((ROOT / "tests" / "timm_loop.py").read_text(), diff), "timm_loop", "exec"), scope)
    torch.manual_seed(0)
    made: list[bypass_fx.BypassSchedule] = []

    class Watched(bypass_fx.BypassSchedule):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    scope["bypass_fx"] = type("Library", (), {"BypassSchedule": Watched})
    model, losses = scope["main"](tmp_path, 5)
    (schedule,) = made
    assert schedule.phase == "done" and schedule.report and len(schedule.report.arrivals) >= 8
    assert len(losses) == 5 and not any("delta" in name for name in model.state_dict())
