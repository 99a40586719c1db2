"""The trainer: two arms that differ in the bypass alone, the phases in order, and clear ends to bad runs."""

import copy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bypass_fx.data import Data, load
from bypass_fx.engine import resolve_device
from bypass_fx.feed import Feed, in_order
from bypass_fx.history import Moment, Record
from bypass_fx.models import Fit, ModelError, build
from bypass_fx.optimizers import make_optimizer
from bypass_fx.passes.errors import BypassError
from bypass_fx.settings import Settings, SettingsError
from bypass_fx.trainer import Trainer, TrainingError
from tests import untraced
from tests.runs import digits, mlp, scores, short, trainer

EPOCH = 5  # 1,437 digits in minibatches of 256


def test_the_phases_follow_each_other_in_their_lengths() -> None:
    history = trainer(train1=3, opt1=2, opt2=4, train3=1).fit()
    assert history.spans() == [
        ("train1", 0, 3 * EPOCH),
        ("opt1", 3 * EPOCH, 5 * EPOCH),
        ("opt2", 5 * EPOCH, 9 * EPOCH),
        ("train3", 9 * EPOCH, 10 * EPOCH),
    ]
    assert [moment.name for moment in history.moments] == ["θ*", "after opt1", "after proj", "end"]
    assert [record.phase for record in history.records] == ["train1"] * 3 + ["opt1"] * 2 + ["opt2"] * 4 + ["train3"]


def test_n_counts_opt1_in_steps() -> None:
    run = trainer(n=3)
    assert ("opt1", 2 * EPOCH, 2 * EPOCH + 3) in run.fit().spans()
    assert run.total_steps == 6 * EPOCH + 3


@pytest.mark.parametrize("changes", [{"train1": 0}, {"opt1": 0}, {"train3": 0}, {"train1": 0, "opt1": 0, "train3": 0}])
def test_a_phase_may_be_left_out(changes: dict[str, int]) -> None:
    run = trainer(**changes)
    history = run.fit()
    assert len(history.moments) == 4 and history.moments[-1].step == run.total_steps
    assert not set(changes) & {phase for phase, _, _ in history.spans()}


def _by_hand(model: nn.Module, data: Data, settings: Settings, epochs: int) -> None:
    """A plain loop of the same settings, to compare the arms with."""
    optimizer = make_optimizer(model, settings)
    for ((x, y),) in islice(Feed(data.train, settings.batch_size, settings.seed).from_step(0), epochs * EPOCH):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_the_baseline_is_plain_training_without_a_break(optimizer: str) -> None:
    data, settings = digits(), short(optimizer=optimizer)
    plain = mlp(data)
    _by_hand(plain, data, settings, epochs=8)
    history = Trainer(mlp(data), data, settings).fit()
    baseline = history.moment("end").baseline
    assert baseline and baseline.train_loss == pytest.approx(scores(plain, data, data.train)["loss"], rel=1e-6)


def test_at_the_start_of_the_bypass_the_arms_are_equal_and_part_after() -> None:
    history = trainer().fit()
    start, end = history.moment("θ*"), history.moment("after opt1")
    assert start.bypass == start.baseline
    assert end.bypass != end.baseline


class _Dropped(nn.Sequential):
    """A net whose two arms would part in opt1 at once if they drew other dropout masks."""

    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.5), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def test_both_arms_draw_the_same_dropout() -> None:
    data = digits()
    records: list[Record] = []

    def keep(event: Record | Moment) -> None:
        if isinstance(event, Record):
            records.append(event)

    Trainer(_Dropped(), data, short(opt1=1, batch_size=1437), keep).fit()
    first = next(record for record in records if record.phase == "opt1")
    assert first.loss == first.baseline


def test_a_run_repeats_under_its_seed_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    data = digits()
    model = copy.deepcopy(_Dropped())
    torch.manual_seed(5)
    first = Trainer(copy.deepcopy(model), data, short()).fit()
    assert torch.equal(torch.rand(1), expected)
    second = Trainer(copy.deepcopy(model), data, short()).fit()
    other = Trainer(copy.deepcopy(model), data, short(seed=1)).fit()
    assert first.moments == second.moments
    assert first.moments[-1] != other.moments[-1]


def test_the_model_comes_back_in_its_own_architecture() -> None:
    data = digits()
    model = mlp(data)
    parameters = dict(model.named_parameters())
    history = Trainer(model, data, short()).fit()
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert history.moment("end").bypass.train_loss == pytest.approx(scores(model, data, data.train)["loss"])
    assert [arrival.site for arrival in history.reports[0].arrivals] == [site.name for site in history.plan]


def test_records_hold_both_losses_and_the_residual_of_the_bypass() -> None:
    history = trainer().fit()
    by_phase = {record.phase: record for record in history.records}
    assert by_phase["train1"].baseline is None and by_phase["train1"].residual is None
    assert by_phase["opt1"].residual is not None and by_phase["opt1"].residual > 0
    assert by_phase["opt2"].residual == 0
    assert by_phase["train3"].residual is None and by_phase["train3"].baseline is not None
    assert history.records[-1].step == history.moments[-1].step


@pytest.mark.parametrize("comeback", ["penalty", "proximal", "homotopy"])
def test_every_return_runs_to_the_end(comeback: str) -> None:
    run = trainer(comeback=comeback, gamma="0.5,3:50", return_lr=1e-3, epsilon=1e6 if comeback == "penalty" else 1e-6)
    history = run.fit()
    assert history.reports[0].comeback == comeback
    assert history.moments[-1].step == run.total_steps


def test_a_regression_has_losses_and_no_accuracy() -> None:
    data = load("eggholder")
    history = Trainer(mlp(data), data, short(batch_size=100)).fit()
    assert history.moments[0].bypass.train.keys() == {"loss", "r2"}
    assert history.moments[0].bypass.train_loss > 1000


def test_a_convolutional_model_of_residual_blocks_trains_with_relaxed_sites() -> None:
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    data = Data("noise", TensorDataset(x, y), TensorDataset(x, y), "classification", 3, (3, 32, 32))
    model = build("torchvision:resnet18", Fit(data.shape, 3))
    run = Trainer(model, data, Settings(train1=1, opt1=1, opt2=1, train3=1, batch_size=8, lr=1e-3))
    assert len(run.plan) == 16 and run.plan.coefficients == 3840
    assert run.fit().moments[-1].bypass.train_loss > 0


@pytest.mark.parametrize("select", [None, "stuck"])
def test_sites_that_a_run_on_example_inputs_shows_are_trained_too(select: str | None, tmp_path: Path) -> None:
    """Their calls are not in any graph; each embedding, and a run that goes on, must see them again."""
    x = torch.randn(16, 3, 8)
    data = Data(
        "noise", TensorDataset(x, x.mean(-1, True)), TensorDataset(x, x.mean(-1, True)), "regression", 1, (3, 8)
    )
    phases = {"train1": 1, "opt1": 1, "opt2": 1, "train3": 1, "cycles": 2}
    settings = Settings(batch_size=8, lr=1e-3, select=select, **phases)  # type: ignore[arg-type]
    run = Trainer(untraced.Model(), data, settings, example_inputs=(x[:2],), folder=tmp_path)
    assert [site.activation for site in run.plan] == ["attention"] * 2
    history = run.fit()
    assert len(history.reports) == (2 if select is None else 0)
    assert type(run.model) is untraced.Model and not any("delta" in name for name in run.model.state_dict())
    with pytest.raises(BypassError):
        Trainer(untraced.Model(), data, settings)


def test_a_compiled_model_trains_as_the_plain_one_does() -> None:
    data = digits()
    compiled = torch.compile(mlp(data), backend="eager")
    moments = Trainer(cast(nn.Module, compiled), data, short()).fit().moments
    for found, expected in zip(moments, trainer().fit().moments, strict=True):  # ψ's gradients round otherwise there
        assert (found.name, found.step) == (expected.name, expected.step)
        for one, other in ((found.bypass, expected.bypass), (found.baseline, expected.baseline)):
            assert one is not None and other is not None
            assert one.train == pytest.approx(other.train, rel=1e-5) and one.test == pytest.approx(other.test, rel=1e-5)


def test_evaluation_is_the_mean_over_all_examples() -> None:
    data = digits()
    model = _Dropped().train()
    found = scores(model, data, data.train)
    x, y = data.train[:]
    with torch.no_grad():
        output = model.eval()(x)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(output, y).item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx((output.argmax(1) == y).float().mean().item())


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_a_loss_that_is_not_finite_stops_the_run_and_undoes_it(optimizer: str) -> None:
    data = digits()
    model = mlp(data).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=r"train1, epoch 1, step [2-5]; lower the learning rate"):
        Trainer(model, data, short(lr=1e30, optimizer=optimizer)).fit()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_loss_that_breaks_during_the_bypass_takes_the_sites_out_again() -> None:
    data = digits()
    model = mlp(data)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=r"opt2, epoch 5, step 2\d.*lower the learning rate"):
        Trainer(model, data, short(return_lr=1e30)).fit()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model) is nn.Sequential


def _with_outputs(count: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, count))


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (nn.Linear(64, 10), {}, "nothing to bypass"),
        (_with_outputs(10), {"mode": "relaxed"}, "finds no site"),
        (_with_outputs(10), {"select": "nothing*"}, "names no site"),
        (_with_outputs(3), {}, "give the model 10 outputs"),
        (nn.Linear(5, 10), {}, r"can't take inputs of shape \(64,\)"),
        (_with_outputs(10), {"optimizer": "adma"}, "did you mean adam"),
        (_with_outputs(10), {"comeback": "homotpy"}, "did you mean .?homotopy"),
        (_with_outputs(10), {"device": "tpu9"}, "device 'tpu9' can't be used"),
        (_with_outputs(10), {"device": "cuda:77"}, "can't be used"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_training(model: nn.Module, changes: Any, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BypassError, match=message):
        Trainer(model, digits(), short(**changes))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_targets_and_outputs_of_a_regression_must_have_one_shape() -> None:
    x, y = torch.randn(8, 4), torch.randn(8)
    data = Data("flat", TensorDataset(x, y), TensorDataset(x, y), "regression", 1, (4,))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(ModelError, match=r"returns shape \(2, 1\).*needs \(2,\)"):
        Trainer(model, data, short())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"return_lr": 0.0}, "return_lr is 0.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"opt2": 0}, "opt2 is 0; give a whole number from 1 up"),
        ({"train1": -1}, "train1 is -1; give a whole number from 0 up"),
        ({"mode": "stric"}, "did you mean strict"),
        ({"gamma_unit": "steps"}, "did you mean step"),
        ({"gamma": "fast"}, "gamma is 'fast'"),
        ({"gamma": "0.1,5"}, "gamma is '0.1,5'"),
        ({"gamma": "-1"}, "give a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings(**changes)


def test_the_device_is_found_by_name() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in {"cpu", "cuda", "mps", "xpu"}


def test_data_that_ends_on_one_example_is_evaluated_whole() -> None:
    data = digits()
    assert sum(len(y) for (_, y), _ in in_order(data.train, 512)) == 1437


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda x: x, digits(), short()), r"model is a function; give a torch\.nn\.modules\.module\.Module"),
        ((mlp(digits()), digits().train, short()), r"data is a TensorDataset; give a bypass_fx\.data\.Data"),
        ((mlp(digits()), digits(), {"train1": 2}), r"settings is a dict; give a bypass_fx\.settings\.Settings"),
        (
            (mlp(digits()).requires_grad_(False), digits(), short()),
            r"no parameter of the model is to be trained; call requires_grad_",
        ),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(BypassError, match=message):
        Trainer(*arguments)


def test_a_loss_without_a_gradient_is_refused_and_the_model_is_as_it_was() -> None:
    model = mlp(digits())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = replace(digits(), task="custom")

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]).detach()

    with pytest.raises(BypassError, match="the loss has no gradient"):
        Trainer(model, data, short(), loss_fn=loss_fn).fit()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"train1": 2.5}, "train1 is 2.5; give a whole number"), ({"select": "probe"}, "run a probe first")],
)
def test_settings_that_no_run_can_follow_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings(**change)
