"""The command line from end to end: the main job on real formats, inspection, and bad input that ends in one line."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bypass_fx import cli, models, progress
from bypass_fx.cli_settings import OPTIONS
from bypass_fx.run_folder import FILES
from bypass_fx.settings import Settings, preset
from tests.cifar10 import write_cifar10
from tests.test_readme import BLOCKS

SHORT = ["--train1", "2", "--opt1", "1", "--opt2", "1", "--train3", "1"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["bypass-fx", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return call


def _expect_refusal(result: Result, message: str, folder: Path) -> None:
    """One line on standard error, exit code 2, and nothing written."""
    assert result.code == 2
    assert re.fullmatch(rf"Error: [^\n]*{message}[^\n]*\n", result.err), result.err
    assert not (folder / "runs").exists() and not (folder / "out").exists()


def test_the_main_job_trains_shows_and_leaves_a_run_folder(run: Run, tmp_path: Path) -> None:
    result = run("train", *SHORT)
    assert result.code == 0, result.err
    assert "2 sites with 10 coefficients" in result.out
    for row in ("θ*", "after opt1", "after proj", "end"):
        assert re.search(rf"^{re.escape(row)} +\d+( +\d\.\d+){{2}}( +\d+\.\d%){{2}}", result.out, re.MULTILINE), row
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"the run is in runs/{folder.name}" in result.out
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    fresh = models.build("mlp", models.Fit((64,), 10))
    fresh.load_state_dict(load_file(folder / "model.safetensors"), strict=True)


def test_the_readmes_job_beats_the_baseline_after_opt1(run: Run, tmp_path: Path) -> None:
    first = next(block for language, block in BLOCKS if not language)
    program, *arguments = first.partition(" && ")[2].split()
    assert program == "bypass-fx" and run(*arguments).code == 0
    (summary,) = tmp_path.glob("runs/*/summary.json")
    after = json.loads(summary.read_text())["moments"]["after opt1"]
    assert after["bypass"]["train_loss"] < after["baseline"]["train_loss"]


def test_a_run_is_the_same_again_under_one_seed(run: Run, tmp_path: Path) -> None:
    for out in ("first", "second"):
        assert run("train", *SHORT, "--out", out, "--seed", "3").code == 0
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_2c2d_runs_on_cifar10_with_the_papers_1024_coefficients(run: Run, tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar", per_batch=4)
    result = run("train", "--model", "2c2d", "--data", "cifar10:cifar", *SHORT, "--lr", "1e-4", "--batch-size", "20")
    assert result.code == 0, result.err
    assert "1 sites with 1024 coefficients" in result.out


def test_a_residual_net_runs_on_an_image_folder_and_goes_on_from_its_weights(run: Run, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (32, 32), (99 * number, 9 * index, 0)).save(tmp_path / "pictures" / name / f"{index}.png")
    job = ["train", "--model", "timm:resnet10t", "--data", "imagefolder:pictures", "--image-size", "32", "--lr", "1e-4"]
    assert run(*job, *SHORT, "--out", "first").code == 0
    result = run(
        *job, "--train1", "0", "--opt1", "1", "--opt2", "1", "--train3", "0", "--weights", "first/model.safetensors"
    )
    assert result.code == 0, result.err
    before, after = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/**/summary.json")))
    assert after["moments"]["θ*"]["bypass"] == pytest.approx(before["moments"]["end"]["bypass"], rel=1e-6)


def test_eggholder_is_a_regression_without_accuracies(run: Run) -> None:
    result = run("train", "--data", "eggholder", "--n", "3", *SHORT)
    assert result.code == 0, result.err
    assert "test loss" in result.out and "acc." not in result.out


def test_a_bypass_that_is_rolled_back_says_why(run: Run) -> None:
    result = run("train", *SHORT, "--return-lr", "0.5", "--accept", "not-worse")
    assert result.code == 0, result.err
    assert re.search(r"^rolled back +25", result.out, re.MULTILINE)
    assert re.search(
        r"^bypass 1 was rolled back: the loss is \S+ after 5 steps of train3, and was", result.out, re.MULTILINE
    )


def test_a_warning_is_one_line(run: Run) -> None:
    result = run("train", *SHORT, "--comeback", "penalty", "--gamma", "1e-9")
    assert result.code == 0
    assert re.fullmatch(r"Warning: penalty: after [^\n]* handed over to the proximal return\n", result.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "timm:resnet19"], "did you mean timm:resnet1"),
        (["--model", "2c2"], "did you mean 2c2d"),
        (["--data", "digit"], "did you mean digits"),
        (["--data", "cifar10:nowhere"], "no folder 'nowhere'"),
        (["--data", "imagefolder:empty"], "'empty' is empty"),
        (["--mode", "relaxed"], "finds no site"),
        (["--select", "head*"], "names no site"),
        (["--lr", "1e30"], "train1, epoch 1, step 2; lower the learning rate"),
        (["--epsilon", "0"], "epsilon is 0.0; give a number above 0"),
        (["--weights", "nowhere.pt"], "no file 'nowhere.pt'"),
        (["--weights", "other.safetensors"], "give the --model it was saved from"),
        (["--optimizer", "adma"], "did you mean adam"),
        (["--optimizer", "lookahaed_adam"], "unknown optimizer 'lookahaed_adam'"),
        (["--comeback", "homotpy"], "did you mean .?homotopy"),
        (["--device", "tpu9"], "can't be used here"),
        (["--gamma", "quick"], "write a slope"),
        (["--image-size", "0"], "image_size is 0"),
        (["--seed", "99999999999"], "seed is 99999999999"),
        (["--out", "empty/../other.safetensors"], "exists already"),
        (["--preset", "papre"], "did you mean paper"),
        (["--resume", "empty"], "holds no run"),
        (["--precision", "fp8"], "precision is 'fp8'"),
        (["--lr-schedule", "cosin"], "did you mean cosine"),
    ],
)
def test_bad_input_ends_in_one_line(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    _expect_refusal(run("train", *SHORT, *arguments), message, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "other.safetensors"}


def test_a_label_out_of_range_ends_in_one_line(run: Run, tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar", per_batch=1, labels=[0, 1, 2, 3, 4, 99])
    _expect_refusal(run("train", "--model", "2c2d", "--data", "cifar10:cifar"), "has the label 99", tmp_path)


def test_a_model_without_an_activation_ends_in_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "flat_net.py").write_text(
        "from torch import nn\n\ndef make(in_features, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, num_classes))\n"
    )
    _expect_refusal(run("train", "--model", "flat_net:make"), "nothing to bypass", tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    shown: list[object] = []

    def interrupt(self: object, event: object) -> None:
        shown.append(event)
        if len(shown) == 5:
            signal.raise_signal(number)

    with monkeypatch.context() as patched:
        patched.setattr(progress.LiveProgress, "__call__", interrupt)
        result = run("train", *SHORT, "--out", "out")
    assert result.code == code
    assert re.fullmatch(
        r"Error: stopped after step 1\d of 25, saved; go on with: bypass-fx train --resume out\n", result.err
    )
    assert run("train", *SHORT, "--out", "whole").code == 0
    assert run("train", "--resume", "out").code == 0
    resumed, whole = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_every_setting_is_an_option_once() -> None:
    listed = [name for texts in OPTIONS.values() for name in texts]
    assert sorted(listed) == sorted(field.name for field in fields(Settings))


def test_options_are_the_settings_of_the_run(run: Run, tmp_path: Path) -> None:
    given = [
        "--preset",
        "improved",
        "--cycles",
        "1",
        "--no-baseline",
        "--n",
        "2",
        "--mode",
        "strict",
        "--return-lr",
        "0.01",
    ]
    assert run("train", *SHORT, *given, "--tensorboard", "--out", "out").code == 0
    lengths = {"train1": 2, "opt1": 1, "opt2": 1, "train3": 1, "cycles": 1, "n": 2}
    others = {"baseline": False, "mode": "strict", "return_lr": 0.01, "tensorboard": True}
    wanted = preset("improved", {**lengths, **others})
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"] == asdict(wanted)


def test_a_package_that_is_not_installed_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    result = run("inspect", "timm:resnet18")
    assert result.code == 2 and "timm is not installed; run: pip install 'bypass_fx[train]'" in result.err


def test_tensorboard_is_no_part_of_what_training_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    result = run("train", *SHORT, "--tensorboard")
    assert result.code == 2 and "tensorboard is not installed; run: pip install tensorboard\n" in result.err


@pytest.mark.parametrize("command", [[], ["train"], ["inspect"], ["list"], ["plot"], ["probe"]])
def test_help_has_examples(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.code == 0
    assert ("bypass-fx " + " ".join(command)).strip() in result.out


def test_importing_the_library_brings_none_of_the_heavy_parts() -> None:
    others = "'accelerate', 'transformers', 'lightning', 'tensorboard', 'typer', 'rich'"
    heavy = f"{{{others}, 'timm', 'torchvision', 'sklearn', 'matplotlib', 'bypass_fx.trainer'}}"
    code = (
        f"import torch, sys; before = set(sys.modules); import bypass_fx; print((set(sys.modules) - before) & {heavy})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_python_m_is_the_command(tmp_path: Path) -> None:
    """A process of its own, so that the exit code and the error line are those that a shell sees."""
    command = [sys.executable, "-m", "bypass_fx", "train", "--epsilon", "-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: epsilon is -1.0; give a number above 0, such as 1e-4\n"
    assert list(tmp_path.iterdir()) == []


def test_probe_tells_what_the_sites_promise_and_what_was_gained(run: Run) -> None:
    result = run("probe", "mlp", "--steps", "3")
    assert result.code == 0
    for words in ("‖∂L/∂δ‖", "gain per step", "after 3 steps of plain training"):
        assert words in result.out


def test_stuck_names_the_channels_that_have_stopped_learning(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.build("mlp", models.Fit((64,), 10))
    first = next(name for name, _ in model.named_parameters() if name.endswith("bias"))
    with torch.no_grad():
        model.get_parameter(first)[[1, 4]] = -30.0
    save_file(model.state_dict(), tmp_path / "dead.safetensors")
    result = run("stuck", "mlp", "--weights", "dead.safetensors", "--batches", "2")
    assert result.code == 0, result.err
    assert re.search(r"^\S+ +2 +5 +1, 4 *$", result.out, re.MULTILINE)
    assert re.search(r"^2 of 10 channels at 2 sites are stuck$", result.out, re.MULTILINE)
    trained = run("train", *SHORT, "--preset", "improved", "--out", "run")
    assert trained.code == 0, trained.err
    assert "nothing stuck" in trained.out and "no channel was stuck, so plain training went on" in trained.out


def test_the_figures_of_the_paper_are_drawn_from_runs(run: Run, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert run("train", *SHORT, "--cycles", "2", "--evaluate-every", "1", "--seed", seed, "--out", seed).code == 0
    result = run("plot", "0", "1", "--out", "figures")
    assert result.code == 0, result.err
    assert result.out.split() == [f"figures/figure-{name}.png" for name in "3458"]
    assert all((tmp_path / path).read_bytes().startswith(b"\x89PNG") for path in result.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nowhere"], "holds no run"), (["x", "--figures", "7"], "figure '7'")]
)
def test_plot_refuses_what_it_cannot_draw(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    _expect_refusal(run("plot", *arguments), message, tmp_path)
