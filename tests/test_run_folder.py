"""A run folder: written whole or not at all, and weights that load strictly or name what doesn't fit."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bypass_fx
from bypass_fx import figure
from bypass_fx.history import History
from bypass_fx.passes.plan import Plan
from bypass_fx.run_folder import FILES, RunFolderError, WeightsError, expect_writable, load_weights, plain_state, write
from tests.runs import digits, mlp, trainer


@pytest.fixture(scope="module")
def finished() -> tuple[History, nn.Module]:
    run = trainer()
    return run.fit(), run.model


def test_a_run_folder_holds_the_run(finished: tuple[History, nn.Module], tmp_path: Path) -> None:
    history, model = finished
    folder = tmp_path / "a" / "run"
    write(folder, history, model, {"model": "mlp"})
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["run"]

    fresh = mlp(digits(), seed=9)
    fresh.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    assert Plan.load(folder / "plan.json") == history.plan
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [record.loss for record in history.records]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["model"] == "mlp" and summary["coefficients"] == 10
    assert summary["moments"]["after opt1"]["bypass"]["train_loss"] == history.moment("after opt1").bypass.train_loss
    assert [arrival["site"] for arrival in summary["return"]["arrivals"]] == ["1", "3"]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_can_go_into_an_empty_folder(finished: tuple[History, nn.Module], tmp_path: Path) -> None:
    write(tmp_path, *finished, {})
    assert len(list(tmp_path.iterdir())) == len(FILES)


def test_the_summary_is_strict_json_where_a_number_is_not_finite(
    finished: tuple[History, nn.Module], tmp_path: Path
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    write(tmp_path / "run", *finished, {"odd": [float("nan"), {"inner": float("inf")}]})
    text = (tmp_path / "run" / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["odd"] == [None, {"inner": None}]


def test_a_failure_in_the_middle_leaves_nothing(
    finished: tuple[History, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "draw", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        write(tmp_path / "run", *finished, {})
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


def test_tied_weights_keep_all_their_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    state = plain_state(model)
    assert set(state) == set(model.state_dict())
    assert state["0.weight"].data_ptr() != state["1.weight"].data_ptr()


def _net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_loaded_from_both_formats(tmp_path: Path, suffix: str) -> None:
    model, other = _net(), _net()
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), file)
    load_weights(other, file)
    assert torch.equal(other[0].weight, model[0].weight)


def _prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in _net().state_dict().items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            _net(5).state_dict(),
            r"has in another shape 0\.weight \[5, 2\] for \[4, 2\], 0\.bias \[5\] for \[4\] and 1 more",
        ),
        ({**_net().state_dict(), "2.scale": torch.zeros(1)}, r"has beside the model's 2\.scale; give the --model"),
        ({"0.weight": torch.zeros(4, 2)}, r"lacks 0\.bias, 2\.weight and 1 more"),
        (_prefixed("module."), "take DataParallel's prefix 'module.' off"),
        (_prefixed("_orig_mod."), "take torch.compile's prefix '_orig_mod.' off"),
        (bypass_fx.extend(_net()).state_dict(), "call bypass_fx.contract before saving"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_leave_the_model(
    state: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    model = _net()
    before = plain_state(model)
    torch.save(dict(state), tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=message):
        load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_and_missing_files_are_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    with pytest.raises(WeightsError, match="there is no file"):
        load_weights(_net(), file)
    (save_file if suffix == ".safetensors" else torch.save)(_net().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(WeightsError, match="can't be read as weights"):
        load_weights(_net(), file)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds no state dict"):
        load_weights(_net(), tmp_path / "list.pt")
