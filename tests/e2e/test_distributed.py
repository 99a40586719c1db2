"""Two processes train as one does: DDP and FSDP2 through all phases, and a run goes on with another number of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bypass_fx import cli
from bypass_fx.engine import Engine
from bypass_fx.history import History
from bypass_fx.run_folder import read_events
from bypass_fx.settings import Settings, SettingsError
from tests.distributed_job import COMMAND, TRAIN, VARIANTS, job, numbers

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
# accelerate starts several processes on CPUs by MPI alone; in the way it does for GPUs, they find no GPU and take gloo.
MULTI = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
MULTI += ["--dynamo_backend", "no", "--main_process_port", "29714"]
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Net
  fsdp_reshard_after_forward: false
machine_rank: 0
main_process_port: 29715
mixed_precision: 'no'
num_machines: 1
num_processes: 2
"""

Whole = tuple[History, dict[str, torch.Tensor]]


def launch(launcher: list[str], folder: Path, *variants: str) -> None:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "-m", "tests.distributed_job", str(folder), *variants]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def _alone(folder: Path, **changes: Any) -> Whole:
    done = job(folder, **{**changes, "sharding": "auto"})
    assert done
    return done[0], {name: value.clone() for name, value in done[1].state_dict().items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    history, state = _alone(tmp_path_factory.mktemp("alone") / "run")
    (report,) = history.reports
    assert len(report.arrivals) == 2 and min(arrival.norm for arrival in report.arrivals) > 1e-3  # folded with D ≠ 0
    return history, state


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    launch(TORCHRUN, folder, *(name for name in VARIANTS if name not in ("ddp in parts", "as launched")))
    return folder


def expect_equal(folder: Path, variant: str, alone: Whole) -> None:
    """Every recorded number, every weight and the arrivals, within what float32 sums in another order differ by."""
    found: Any = json.loads((folder / f"{variant}.json").read_text())
    assert found["world"] == 2 and found["sharded"] == ("ddp" not in variant)
    assert bool(found["graphs"]) == ("compiled" in variant)
    wanted = json.loads(json.dumps(numbers(alone[0])))
    for part in ("records", "moments"):
        assert len(found[part]) == len(wanted[part])
        for one, other in zip(found[part], wanted[part], strict=True):
            assert one.pop("name", "") == other.pop("name", "")
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    steps = [
        [(arrival["site"], arrival["step"]) for arrival in some["reports"][0]["arrivals"]] for some in (found, wanted)
    ]
    assert steps[0] == steps[1]
    weights = load_file(folder / f"{variant}.safetensors")
    assert weights.keys() == alone[1].keys()
    assert all(torch.allclose(weights[name], value, rtol=1e-3, atol=1e-5) for name, value in alone[1].items())


@pytest.mark.parametrize("variant", ["ddp", "ddp compiled", "fsdp2", "fsdp2 compiled"])
def test_two_processes_under_torchrun_train_as_one_does(under_torchrun: Path, variant: str, alone: Whole) -> None:
    expect_equal(under_torchrun, variant, alone)
    saved = load_file(under_torchrun / variant / "model.safetensors")  # the plain original state dict
    assert saved.keys() == alone[1].keys()


def test_averaged_weights_are_sharded_as_the_model_is(under_torchrun: Path, tmp_path: Path, alone: Whole) -> None:
    expect_equal(under_torchrun, "fsdp2 averaged", alone)
    _alone(tmp_path / "run", ema=0.9)
    wanted, found = (
        load_file(at / "averaged.safetensors") for at in (tmp_path / "run", under_torchrun / "fsdp2 averaged")
    )
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[name], value, rtol=1e-3, atol=1e-5) for name, value in wanted.items())


def test_a_bypass_of_a_sharded_model_is_rolled_back_by_the_main_process(under_torchrun: Path, tmp_path: Path) -> None:
    undone = _alone(tmp_path / "run", undo=True)
    assert undone[0].reports[0].rolled_back and "rolled back" in [moment.name for moment in undone[0].moments]
    expect_equal(under_torchrun, "fsdp2 undone", undone)


@pytest.mark.parametrize("variant", ["ddp stuck", "fsdp2 stuck"])
def test_processes_agree_on_what_is_stuck(under_torchrun: Path, tmp_path: Path, variant: str) -> None:
    alone = _alone(tmp_path / "run", **VARIANTS[variant])
    assert "0.1" in {arrival.site for arrival in alone[0].reports[0].arrivals}
    expect_equal(under_torchrun, variant, alone)


def test_ddp_and_the_command_line_under_accelerate_launch(tmp_path: Path, alone: Whole) -> None:
    launch([*ACCELERATE, *MULTI], tmp_path, "ddp in parts", COMMAND)
    expect_equal(tmp_path, "ddp in parts", alone)
    cli.app([*TRAIN.split(), str(tmp_path / "alone")], standalone_mode=False)
    for file in ("model.safetensors", "averaged.safetensors"):
        one, two = (load_file(tmp_path / run / file) for run in ("alone", COMMAND))
        assert all(torch.allclose(two[name], value, rtol=1e-3, atol=1e-5) for name, value in one.items())


def test_a_run_goes_on_with_one_process_and_then_as_accelerate_is_configured(
    under_torchrun: Path, tmp_path: Path, alone: Whole
) -> None:
    shutil.copytree(under_torchrun / "stopped", tmp_path / "stopped")
    _, events = read_events(tmp_path / "stopped")
    assert 15 <= events[-1].step <= 25 and (tmp_path / "stopped" / "checkpoints").exists()
    assert job(tmp_path / "stopped", sharding="auto", stop=40) is None  # up to the middle of opt2
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    launch([*ACCELERATE, "--config_file", str(tmp_path / "fsdp.yaml")], tmp_path, "as launched")
    expect_equal(tmp_path, "as launched", alone)


@pytest.mark.parametrize(
    ("variables", "sharding", "message"),
    [
        ({"FSDP_VERSION": "1"}, "auto", "set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "auto", "fsdp_offload_params of accelerate's.*take it out"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "auto", "gradient_checkpointing here to yes"),
        ({}, "ddp", "set sharding to auto"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sharding: str, message: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=message):
        Engine(Settings(sharding=sharding))
