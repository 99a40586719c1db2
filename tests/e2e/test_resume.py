"""A run that was stopped anywhere, or killed, comes to the very weights of one that was not; and what can't go on says so."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import crashes
from bypass_fx.checkpoint import CheckpointError
from bypass_fx.data import Data, DataError
from bypass_fx.history import Event, History, Record
from bypass_fx.interrupt import Stopped
from bypass_fx.passes.errors import BypassError
from bypass_fx.settings import Settings
from bypass_fx.trainer import Trainer
from tests.runs import digits, mlp, short

EPOCH = 5
RICH: dict[str, Any] = {
    "train1": 3, "patience": 1, "tolerance": 0.5, "cycles": 2, "ema": 0.9, "lr_schedule": "cosine", "warmup": 1,
    "optimizer": "nadamw", "weight_decay": 0.01, "evaluate_every": 1,
}  # fmt: skip

RUNS: dict[str, dict[str, Any]] = {
    "homotopy": {"comeback": "homotopy", "accept": "not-worse", "accept_tolerance": 100.0},
    "published": {"comeback": "published"},
    "undone": {"accept": "not-worse", "return_lr": 2.0},
}


class Noisy(nn.Sequential):
    """Dropout and BatchNorm: random state and buffers to remember."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 6), nn.ReLU())
        super().__init__(*layers, nn.Linear(6, 10))


def _stopping(step: int) -> Any:
    """Sends the process SIGTERM when the record of that step, or the first after it, comes up."""
    stopped: list[bool] = []

    def stop(event: Event) -> None:
        if isinstance(event, Record) and event.step >= step and not stopped:
            stopped.append(True)
            signal.raise_signal(signal.SIGTERM)

    return stop


def _state(model: nn.Module, history: History) -> tuple[Any, ...]:
    rows = [replace(record, seconds=0.0) for record in history.records]
    return {k: v.tolist() for k, v in model.state_dict().items()}, rows, history.moments, history.evaluations


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """Undisturbed runs by their names."""
    found = {}
    for name, changes in RUNS.items():
        model = Noisy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found[name] = _state(model, Trainer(model, digits(), short(**RICH, **changes)).fit())
    assert [row.name for row in found["undone"][2]].count("rolled back") == 1
    return found


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(("homotopy", step) for step in (6, 16, 25, 31, 44)),
        ("published", 23),
        *(("undone", step) for step in (16, 31, 40, 50)),  # in opt1, waiting for the verdict, at it, and after it
    ],
)
@pytest.mark.filterwarnings("ignore:opt2 ended")
def test_a_stopped_run_goes_on_exactly(whole: Any, tmp_path: Path, name: str, step: int) -> None:
    settings = short(**RICH, **RUNS[name])
    with pytest.raises(Stopped, match=r"stopped after step \d+ of 75, saved; go on with: .*--resume") as stopped:
        Trainer(Noisy(), digits(), settings, _stopping(step), folder=tmp_path / "run").fit()
    assert stopped.value.number == signal.SIGTERM
    model = Noisy()
    history = Trainer(model, digits(), settings, folder=tmp_path / "run").fit()
    assert _state(model, history) == whole[name]


def test_kill_9_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of what `python -m benchmarks crashes` does twenty times."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lengths = [argument for phase in ("train1", "opt1", "opt2", "train3") for argument in (f"--{phase}", "2")]
    monkeypatch.setattr(crashes, "JOB", [*lengths, "--checkpoint-seconds", "0"])
    seconds = crashes.undisturbed(tmp_path / "whole")
    rows = [crashes.examine(number, tmp_path / str(number), tmp_path / "whole", seconds) for number in (1,)]
    assert all(row["equal"] and row["killed"] for row in rows)


def _interrupted(folder: Path, **changes: Any) -> Settings:
    settings = short(checkpoint_seconds=0, **changes)
    with pytest.raises(Stopped):
        Trainer(mlp(digits()), digits(), settings, _stopping(20), folder=folder).fit()
    return settings


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_costs_no_more_than_the_steps_since_the_one_before(tmp_path: Path, damage: str) -> None:
    settings = _interrupted(tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir()) / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 16
    newest.write_bytes(content if damage == "flipped" else content[:-100])
    model, undisturbed = mlp(digits()), mlp(digits())
    with pytest.warns(UserWarning, match="is damaged"):
        Trainer(model, digits(), settings, folder=tmp_path / "run").fit()
    Trainer(undisturbed, digits(), settings).fit()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in undisturbed.state_dict().items())


def _with_label(label: int) -> Data:
    class Labelled(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(64), label if index == 9 else 1

    return Data("mine", Labelled(), Labelled(), "classification", 10, (64,))


class _Raising(torch.utils.data.Dataset[Any]):
    """The digits, until one of them can't be read any more."""

    def __init__(self, broken: bool) -> None:
        self.inner, self.reads, self.broken = digits().train, 0, broken

    def __len__(self) -> int:
        return 1437

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.broken and self.reads > 4000:
            raise OSError("the disk has gone")
        return self.inner[index]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("mlp", {"lr": 1e-3}, r"saved with lr=0\.004, not 0\.001; set that"),
        ("mlp", {"select": "1"}, r"select=None, not '1'"),
        ("wide", {}, "is of another model|another plan"),
        ("deep", {}, "another plan"),
        ("mlp", {"optimizer": "sgd"}, "optimizer='adam', not 'sgd'"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_stays(
    tmp_path: Path, model: str, changes: dict[str, Any], message: str
) -> None:
    settings = _interrupted(tmp_path / "run")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    others = {
        "mlp": mlp(digits()),
        "wide": nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 10)),
        "deep": nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10)),
    }
    weights = {name: value.clone() for name, value in others[model].state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        Trainer(others[model], digits(), replace(settings, **changes), folder=tmp_path / "run").fit()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert all(torch.equal(weights[name], value) for name, value in others[model].state_dict().items())


def test_data_that_fail_midway_leave_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    def data(broken: bool) -> Data:
        return replace(digits(), train=_Raising(broken))

    settings = short(baseline=False)
    with pytest.raises(DataError, match=r"reading minibatch 1\d failed: OSError: the disk has gone.*step \d+ is saved"):
        Trainer(mlp(digits()), data(True), settings, folder=tmp_path / "run").fit()
    model, undisturbed = mlp(digits()), mlp(digits())
    Trainer(model, data(False), settings, folder=tmp_path / "run").fit()
    Trainer(undisturbed, data(False), settings).fit()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in undisturbed.state_dict().items())


@pytest.mark.parametrize("label", [-1, 10, 99])
def test_a_label_out_of_range_is_named_where_the_data_could_not_be_looked_through(label: int) -> None:
    with pytest.raises(BypassError, match=r"failed in train1, epoch 1, step 1: IndexError.*labels must lie below"):
        Trainer(mlp(digits()), _with_label(label), short(batch_size=20)).fit()


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits there")
def test_a_full_disk_ends_the_run_with_what_was_saved_before(tmp_path: Path) -> None:
    """A limit on the size of files, which needs no right to mount a small disk; the error is the write's all the same."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    settings = _interrupted(tmp_path / "run")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        refused = pytest.raises(BypassError, match=r"File too large.*(make room|give --out)")
        with refused, warnings.catch_warnings(action="ignore"):  # of each checkpoint that could not be written
            Trainer(mlp(digits()), digits(), settings, folder=tmp_path / "run").fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    model, undisturbed = mlp(digits()), mlp(digits())
    Trainer(model, digits(), settings, folder=tmp_path / "run").fit()
    Trainer(undisturbed, digits(), settings).fit()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in undisturbed.state_dict().items())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk in memory with room for a few checkpoints of the smallest model and no more."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes Linux and the rights of root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_run_goes_on_once_a_full_disk_has_room_again(small_disk: Path) -> None:
    settings = _interrupted(small_disk / "run")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"0" * 4096):
            pass
    with (
        pytest.raises(BypassError, match=r"No space left.*(make room|give --out)"),
        warnings.catch_warnings(action="ignore"),
    ):
        Trainer(mlp(digits()), digits(), settings, folder=small_disk / "run").fit()
    filler.unlink()
    model, undisturbed = mlp(digits()), mlp(digits())
    Trainer(model, digits(), settings, folder=small_disk / "run").fit()
    Trainer(undisturbed, digits(), settings).fit()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in undisturbed.state_dict().items())
