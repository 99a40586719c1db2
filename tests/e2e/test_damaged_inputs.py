"""Damaged inputs, more than twenty: each is a clear error of one line, or is passed over with a warning; nothing is lost."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from bypass_fx.checkpoint import _checksum
from bypass_fx.data import Data, DataError
from bypass_fx.history import Event, Record
from bypass_fx.interrupt import Stopped
from bypass_fx.passes.errors import BypassError
from bypass_fx.settings import Settings
from bypass_fx.trainer import Trainer
from bypass_fx.weights import load_weights
from tests.runs import digits, mlp, short

SETTINGS = short(checkpoint_seconds=0)  # a checkpoint after every step, of which three stay
State = dict[str, Tensor]


def fit(
    folder: Path | None,
    model: nn.Module | None = None,
    data: Data | None = None,
    settings: Settings = SETTINGS,
    on_event: Callable[[Event], None] = lambda event: None,
) -> State:
    """Train, or go on with the run in the folder; where that is refused, the model must be as it was."""
    model = model or mlp(digits())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        Trainer(model, data or digits(), settings, on_event, folder=folder).fit()
    except BypassError:
        assert same(model.state_dict(), before)
        raise
    return model.state_dict()


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed() -> State:
    return fit(None)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its opt2, step 20 or so."""

    def stop(event: Event) -> None:
        if isinstance(event, Record) and event.step >= 20:
            signal.raise_signal(signal.SIGTERM)

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stopped):
        fit(folder, on_event=stop)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """From the newest on."""
    return sorted((run / "checkpoints").iterdir(), reverse=True)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def forge(checkpoint: Path, **changes: Any) -> None:
    """Another state, whose checksum is right."""
    file, sums = checkpoint / "state.json", checkpoint / "checksums.json"
    saved = json.loads(file.read_text())
    saved = {**saved, **changes, "state": {**saved["state"], **changes.get("state", {})}}
    file.write_text(json.dumps(saved))
    sums.write_text(json.dumps({**json.loads(sums.read_text()), file.name: _checksum(file)}))


def of_newest(harm: Callable[[Path], object], name: str) -> Callable[[Path], object]:
    return lambda run: harm(checkpoints(run)[0] / name)


def of_all(harm: Callable[[Path], object], name: str = ".") -> Callable[[Path], object]:
    return lambda run: [harm(checkpoint / name) for checkpoint in checkpoints(run)]


def foreign(file: Path) -> None:
    save_file({"other": torch.zeros(2)}, file)


# What befell the folder of a stopped run → that it goes on with, in the end as if nothing had happened.
OUTLIVED: dict[str, Callable[[Path], object]] = {
    "truncated tensors": of_newest(truncate, "tensors.safetensors"),
    "a flipped bit in the tensors": of_newest(flip, "tensors.safetensors"),
    "empty tensors": of_newest(lambda file: file.write_bytes(b""), "tensors.safetensors"),
    "another model's tensors": of_newest(foreign, "tensors.safetensors"),
    "a truncated state": of_newest(truncate, "state.json"),
    "a flipped bit in the state": of_newest(flip, "state.json"),
    "no checksums": of_newest(Path.unlink, "checksums.json"),
    "checksums of another kind": of_newest(lambda file: file.write_text("[]"), "checksums.json"),
    "an empty checkpoint": of_newest(shutil.rmtree, "."),
    "a truncated history": lambda run: truncate(run / "history.jsonl"),
    "a flipped plan": lambda run: flip(run / "plan.json"),
}


@pytest.mark.filterwarnings("ignore:.* is damaged")
@pytest.mark.parametrize("name", OUTLIVED)
def test_a_damaged_run_goes_on(name: str, stopped: Path, undisturbed: State, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    newest = checkpoints(run)[0]
    OUTLIVED[name](run)
    newest.mkdir(exist_ok=True)
    assert same(fit(run), undisturbed)
    assert (run / "summary.json").exists()


def with_labels(bad: int) -> Data:
    """Digits with one label that is no class, in a set that could not be looked through before."""

    class Labelled(Dataset[Any]):
        def __len__(self) -> int:
            return 1437

        def __getitem__(self, index: int) -> Any:
            x, y = digits_once[index]
            return x, bad if index == 700 else int(y)

    digits_once = digits().train
    return replace(digits(), train=Labelled())


def of_odd_shapes() -> Data:
    class Odd(Dataset[Any]):
        def __len__(self) -> int:
            return 1437

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(64 if index < 1400 else 63), 1

    return replace(digits(), train=Odd())


def with_a_hole() -> Data:
    x, y = digits().train[:]
    return replace(digits(), train=TensorDataset(x.clone().index_fill_(0, torch.tensor([9]), torch.nan), y))


def sequential(*widths: int) -> nn.Module:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Refused:
    """What befell a stopped run or what it is to go on with, and what is said of it."""

    message: str
    damage: Callable[[Path], object] = lambda run: None
    attempt: Callable[[Path], object] = fit
    goes_on: bool = False  # some steps further, before it is met


def weights_from(harm: Callable[[Path], object]) -> Callable[[Path], object]:
    def attempt(run: Path) -> None:
        model, file = mlp(digits()), run / "weights.safetensors"
        before = {name: value.clone() for name, value in model.state_dict().items()}
        save_file(dict(sequential(64, 5, 5, 10).state_dict()), file)
        harm(file)
        try:
            load_weights(model, file)
        finally:
            file.unlink()
            assert same(model.state_dict(), before)

    return attempt


def changed(**changes: Any) -> Callable[[Path], object]:
    return lambda run: fit(run, settings=replace(SETTINGS, **changes))


def on(make: Callable[..., Data], *arguments: Any) -> Callable[[Path], object]:
    return lambda run: fit(run, data=make(*arguments))


REFUSED: dict[str, Refused] = {
    "every checkpoint truncated": Refused("can be used; start a new run", of_all(truncate, "tensors.safetensors")),
    "every checkpoint of another version": Refused("can be used; start a new run", of_all(lambda at: forge(at, format=9))),
    "a truncated run.json": Refused("holds no run", lambda run: truncate(run / "run.json")),
    "a run.json of another kind": Refused("run.json.* is damaged", lambda run: (run / "run.json").write_text("[]")),
    "another plan": Refused("saved with another plan", of_all(lambda at: forge(at, state={"plan": "{}"}))),
    "other settings": Refused(r"saved with lr=0\.004, not 0\.001; set that", attempt=changed(lr=1e-3)),
    "another optimizer": Refused("optimizer='adam', not 'sgd'", attempt=changed(optimizer="sgd")),
    "other sites": Refused("select=None, not '1'", attempt=changed(select="1")),
    "another condition": Refused("accept='always', not 'not-worse'", attempt=changed(accept="not-worse")),
    "a wider model": Refused("another (model|plan)", attempt=lambda run: fit(run, sequential(64, 6, 5, 10))),
    "a shallower model": Refused("another plan", attempt=lambda run: fit(run, sequential(64, 5, 10))),
    "a model of other outputs": Refused("give the model 10 outputs", attempt=lambda run: fit(run, sequential(64, 5, 5, 9))),
    "truncated weights": Refused("can't be read as weights", attempt=weights_from(truncate)),
    "another model's weights": Refused("lacks 0.weight", attempt=weights_from(foreign)),
    "a label below the classes": Refused("evaluation.*lie below the model", attempt=on(with_labels, -1)),
    "a label above the classes": Refused("evaluation.*lie below the model", attempt=on(with_labels, 10)),
    "examples of two shapes": Refused(
        "reading .* failed.*is saved", attempt=on(of_odd_shapes), goes_on=True
    ),
    "numbers that are none": Refused(
        "broken values in the data", attempt=on(with_a_hole), goes_on=True
    ),
    "an empty training set": Refused(
        "training set of digits is empty",
        attempt=lambda run: replace(digits(), train=TensorDataset(torch.zeros(0, 64), torch.zeros(0).long())),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*trying the one before")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_loses_nothing(name: str, stopped: Path, undisturbed: State, tmp_path: Path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    case = REFUSED[name]
    case.damage(run)

    def contents() -> dict[Path, bytes]:
        return {file.relative_to(run): file.read_bytes() for file in run.rglob("*") if file.is_file()}

    before = contents()
    with pytest.raises(BypassError, match=case.message) as refused:
        case.attempt(run)
    assert "\n" not in str(refused.value)
    if case.goes_on:
        assert same(fit(run), undisturbed)
    else:
        assert contents() == before


def test_there_are_more_than_twenty() -> None:
    assert len(OUTLIVED) + len(REFUSED) > 20


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_is_no_class_is_named_with_its_step(label: int) -> None:
    with pytest.raises(BypassError, match=r"failed in train1, epoch 1, step 1: IndexError.*labels must lie below"):
        fit(None, data=with_labels(label), settings=short(batch_size=1437))


class Raising(Dataset[Any]):
    """Some of the digits, until one of them can't be read any more."""

    def __init__(self, limit: int | None) -> None:
        self.inner, self.reads, self.limit = digits().train, 0, limit

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.limit is not None and self.reads > self.limit:
            raise OSError("the disk has gone")
        return self.inner[index]


@pytest.mark.parametrize("train1", [0, 1])  # in the first evaluation, and in a step
def test_data_that_fail_midway_leave_a_checkpoint_to_go_on_from(train1: int, tmp_path: Path) -> None:
    def data(limit: int | None) -> Data:
        return replace(digits(), train=Raising(limit))

    settings = short(baseline=False, train1=train1, opt1=1, opt2=1, train3=0, batch_size=100)
    with pytest.raises(DataError, match=r"reading .* failed: OSError: the disk has gone.*; step \d+ is saved"):
        fit(tmp_path / "run", data=data(250), settings=settings)
    whole = fit(None, data=data(None), settings=settings)
    assert same(fit(tmp_path / "run", data=data(None), settings=settings), whole)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits there")
def test_a_full_disk_ends_the_run_with_what_was_saved_before(stopped: Path, undisturbed: State, tmp_path: Path) -> None:
    """A limit on the size of files, which needs no right to mount a small disk; the error is the write's all the same."""
    import resource

    run = shutil.copytree(stopped, tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        refused = pytest.raises(BypassError, match=r"File too large.*(make room|give --out)")
        with refused, warnings.catch_warnings(action="ignore"):  # of each checkpoint that could not be written
            fit(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert same(fit(run), undisturbed)


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


def test_a_run_goes_on_once_a_full_disk_has_room_again(small_disk: Path, stopped: Path, undisturbed: State) -> None:
    run, filler = shutil.copytree(stopped, small_disk / "run"), small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"0" * 4096):
            pass
    with (
        pytest.raises(BypassError, match=r"No space left.*(make room|give --out)"),
        warnings.catch_warnings(action="ignore"),
    ):
        fit(run)
    filler.unlink()
    assert same(fit(run), undisturbed)
