"""A run folder: records as they come, the result whole or not at all, and nothing where there is nothing to keep."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bypass_fx import figure
from bypass_fx.history import History, Moment, Record
from bypass_fx.passes.plan import Plan
from bypass_fx.run_folder import FILES, RunFolderError, expect_writable, plain, read_about, read_events
from bypass_fx.trainer import Trainer
from tests.runs import digits, mlp, short


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, History, nn.Module]:
    folder = tmp_path_factory.mktemp("runs") / "a" / "run"
    data = digits()
    model = mlp(data)
    settings = short(evaluate_every=1, ema=0.5, tensorboard=True)
    history = Trainer(model, data, settings, folder=folder, about={"model": "mlp"}).fit()
    return folder, history, model


def test_a_run_folder_holds_the_run(finished: tuple[Path, History, nn.Module]) -> None:
    folder, history, model = finished
    more = {"averaged.safetensors", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == {*FILES, *more}  # no checkpoints, nothing hidden
    fresh = mlp(digits(), seed=9)
    fresh.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    fresh.load_state_dict(load_file(folder / "averaged.safetensors"), strict=True)
    assert Plan.load(folder / "plan.json") == history.plan
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["model"] == "mlp" and summary["coefficients"] == 10 and summary["settings"]["ema"] == 0.5
    moment = history.moment("after opt1")
    assert summary["moments"]["after opt1"]["bypass"]["train_loss"] == moment.bypass.train_loss
    assert [arrival["site"] for arrival in summary["returns"][0]["arrivals"]] == ["1", "3"]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_reads_the_records_and_the_scores(finished: tuple[Path, History, nn.Module]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, history, _ = finished
    events = EventAccumulator(str(folder / "tensorboard")).Reload()

    def curve(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(tag)}

    away = [record for record in history.records if record.residual is not None]
    assert curve("step/loss") == pytest.approx({record.step: record.loss for record in history.records})
    assert curve("step/residual") == pytest.approx({record.step: record.residual for record in away})
    scored = {moment.step: moment for moment in (*history.evaluations, *history.moments)}
    assert curve("test_accuracy/bypass") == pytest.approx({s: m.bypass.test["accuracy"] for s, m in scored.items()})
    assert "geometry/distance" in events.Tags()["scalars"]


def test_the_history_can_be_read_again(finished: tuple[Path, History, nn.Module]) -> None:
    folder, history, _ = finished
    about, events = read_events(folder)
    assert about["model"] == "mlp"
    assert tuple(event for event in events if isinstance(event, Record)) == history.records
    moments = tuple(event for event in events if isinstance(event, Moment))
    assert set(map(id, history.evaluations)) and len(moments) == len(history.moments) + len(history.evaluations)
    assert [moment.step for moment in history.evaluations] == [5 * epoch for epoch in range(1, 9)]


def test_a_finished_run_is_not_gone_on_with(finished: tuple[Path, History, nn.Module]) -> None:
    folder, _, model = finished
    with pytest.raises(RunFolderError, match="is finished; start another with --weights"):
        read_about(folder)
    with pytest.raises(RunFolderError, match="is finished"):
        Trainer(model, digits(), short(), folder=folder)


def test_the_json_is_strict_where_a_number_is_not_finite(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    data = digits()
    odd = {"odd": [float("nan"), {"inner": float("inf")}]}
    Trainer(mlp(data), data, short(), folder=tmp_path / "run", about=odd).fit()
    text = (tmp_path / "run" / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["odd"] == [None, {"inner": None}]


def test_a_result_that_cannot_be_written_can_be_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    data = digits()
    settings = short(checkpoint_seconds=0)
    with monkeypatch.context() as patched:
        patched.setattr(figure, "draw", full)
        with pytest.raises(RunFolderError, match=r"No space left on device.*go on with: bypass-fx train --resume"):
            Trainer(mlp(data), data, settings, folder=tmp_path / "run").fit()
    assert "summary.json" not in {path.name for path in (tmp_path / "run").iterdir()}
    Trainer(mlp(data), data, settings, folder=tmp_path / "run").fit()
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(FILES)


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    data = digits()
    with pytest.raises(Exception, match="lower the learning rate"):
        Trainer(mlp(data), data, short(lr=1e30), folder=tmp_path / "runs" / "run").fit()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(RunFolderError, match="exists already"):
            expect_writable(taken)
    with pytest.raises(RunFolderError, match="no folder that can be written to"):
        expect_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunFolderError, match="another place"):
        expect_writable(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(RunFolderError, match="holds no run; give another folder"):
        Trainer(mlp(digits()), digits(), short(), folder=tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_run_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"holds no run|is damaged"):
        read_about(tmp_path)


def test_tied_weights_keep_all_their_names() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    state = plain(model.state_dict())
    assert set(state) == set(model.state_dict())
    assert state["0.weight"].data_ptr() != state["1.weight"].data_ptr()
