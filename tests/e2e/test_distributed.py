"""Two processes train as one does: DDP and FSDP2 through all phases, and a run goes on with another number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bypass_fx.history import History
from bypass_fx.run_folder import read_events
from tests.distributed_job import job, numbers

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
ACCELERATE += [
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "29714",
]


def launch(launcher: list[str], *arguments: str | Path) -> None:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "-m", "tests.distributed_job", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, dict[str, torch.Tensor]]:
    done = job(tmp_path_factory.mktemp("alone") / "run", "auto")
    assert done
    history, model = done
    (report,) = history.reports
    assert len(report.arrivals) == 2 and min(arrival.norm for arrival in report.arrivals) > 1e-3  # folded with D ≠ 0
    return history, model.state_dict()


def expect_equal(folder: Path, sharding: str, alone: tuple[History, dict[str, torch.Tensor]]) -> None:
    """Every recorded number, every weight and the arrivals, within what float32 sums in another order differ by."""
    found: Any = json.loads((folder / f"{sharding}.json").read_text())
    wanted = json.loads(json.dumps(numbers(alone[0])))
    for part in ("records", "moments"):
        assert len(found[part]) == len(wanted[part])
        for one, other in zip(found[part], wanted[part], strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    steps = [
        [(arrival["site"], arrival["step"]) for arrival in some["reports"][0]["arrivals"]] for some in (found, wanted)
    ]
    assert steps[0] == steps[1]
    weights = load_file(folder / f"{sharding}.safetensors")
    assert weights.keys() == alone[1].keys()
    assert all(torch.allclose(weights[name], value, rtol=1e-3, atol=1e-5) for name, value in alone[1].items())


def test_ddp_and_fsdp2_under_torchrun_train_as_one_process_does(tmp_path: Path, alone: Any) -> None:
    launch(TORCHRUN, tmp_path, "ddp", "fsdp2")
    for sharding in ("ddp", "fsdp2"):
        expect_equal(tmp_path, sharding, alone)
        saved = load_file(tmp_path / sharding / "model.safetensors")  # the plain original state dict
        assert saved.keys() == alone[1].keys()


def test_ddp_under_accelerate_launch_with_accumulated_gradients_too(tmp_path: Path, alone: Any) -> None:
    launch(ACCELERATE, tmp_path, "ddp", "--accumulate", "2")
    expect_equal(tmp_path, "ddp", alone)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, alone: Any) -> None:
    launch(TORCHRUN, tmp_path, "fsdp2", "--stop", "17")  # in the middle of opt1
    _, events = read_events(tmp_path / "fsdp2")
    assert 15 <= events[-1].step <= 25 and (tmp_path / "fsdp2" / "checkpoints").exists()
    assert job(tmp_path / "fsdp2", "auto", stop=40) is None  # one process, up to the middle of opt2
    launch(TORCHRUN, tmp_path, "fsdp2")
    expect_equal(tmp_path, "fsdp2", alone)
