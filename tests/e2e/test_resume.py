"""A run that was stopped anywhere, or killed, comes to the very weights of one that was not; and what can't go on says so."""

from __future__ import annotations

import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import crashes
from bypass_fx import cli
from bypass_fx.history import Event, History, Record
from bypass_fx.interrupt import Stopped
from bypass_fx.trainer import Trainer
from tests.runs import digits, short

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
    """One of what `python -m benchmarks crashes` does twenty times."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lengths = [argument for phase in ("train1", "opt1", "opt2", "train3") for argument in (f"--{phase}", "2")]
    job = [*lengths, "--checkpoint-seconds", "0"]
    monkeypatch.setattr(crashes, "JOB", job)
    began = time.monotonic()
    cli.app(["train", *job, "--out", str(tmp_path / "whole")], standalone_mode=False)
    row = crashes.kill(1, tmp_path / "killed", time.monotonic() - began)
    assert row["killed"]
    cli.app(["train", "--resume", str(tmp_path / "killed")], standalone_mode=False)
    assert crashes.equal(tmp_path / "killed", tmp_path / "whole")
