"""The folder of a run: what it is of, records as they come, checkpoints, and at the end the weights and the figure."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from bypass_fx.checkpoint import Checkpoints, sync
from bypass_fx.history import Event, History, Moment, from_row, to_row
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.plan import Plan

ABOUT, SUMMARY, HISTORY, PLAN, WEIGHTS = "run.json", "summary.json", "history.jsonl", "plan.json", "model.safetensors"
FIGURE, AVERAGED = "figure.png", "averaged.safetensors"
FILES = (WEIGHTS, PLAN, HISTORY, ABOUT, SUMMARY, FIGURE)  # of a finished run
_CHECKPOINTS = "checkpoints"


class RunFolderError(BypassError):
    """A run folder can't be written where it was asked for, or holds no run that can be gone on with."""


def expect_writable(folder: Path) -> None:
    """See to it, before any training, that a run can be written into this folder; nothing is created.

    Raises:
        RunFolderError: it exists and isn't empty, or the folder above it can't be written to.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunFolderError(f"{str(folder)!r} exists already; give --out another name, or go on with it by --resume")
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunFolderError(f"{str(above)!r} is no folder that can be written to; give --out another place")


def read_about(folder: Path) -> dict[str, Any]:
    """What an unfinished run's folder says it is of.

    Raises:
        RunFolderError: there is no run in it, or it is finished.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{str(folder)!r} holds no run ({error}); give the folder of one") from error
    if not isinstance(about, dict) or "settings" not in about:
        raise RunFolderError(f"{ABOUT} in {str(folder)!r} is damaged; start a new run")
    if (folder / SUMMARY).exists():
        raise RunFolderError(f"the run in {str(folder)!r} is finished; start another with --weights {folder / WEIGHTS}")
    return about


def read_events(folder: Path) -> tuple[dict[str, Any], list[Event]]:
    """What a run's folder says it is of, and its records and moments so far.

    Raises:
        RunFolderError: there is no run in it, or its history is damaged.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        lines = (folder / HISTORY).read_text(encoding="utf-8").splitlines()
        return about, [from_row(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunFolderError(
            f"{str(folder)!r} holds no run that can be read ({reason}); give the folder of one"
        ) from error


class RunFolder:
    """One run's folder. Only the main process writes; until a run begins to write, nothing is created.

    Raises:
        RunFolderError: something else lies there, or a run that is finished, or one of another kind.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], plan: Plan) -> None:
        self.path, self._about, self._plan = path.absolute(), dict(about), plan
        self._shown = path
        self._file: TextIO | None = None
        self._board: Any = None
        if (self.path / ABOUT).exists():
            read_about(self.path)
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunFolderError(f"{str(path)!r} exists already and holds no run; give another folder")

    @property
    def how_to_go_on(self) -> str:
        """What a user does to go on with the run."""
        return f"go on with: bypass-fx train --resume {self._shown}"

    def checkpoints(self, keep: int) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.path / _CHECKPOINTS, keep)

    @contextmanager
    def writing(self, *past: Iterable[Event]) -> Iterator[None]:
        """Inside, `note` appends to the history, which begins with the `past` events of a resumed run.

        Where the run fails before there is a checkpoint, its folder goes again.
        """
        created = next((path for path in (*reversed(self.path.parents), self.path) if not path.exists()), None)
        try:
            self._begin([event for events in past for event in events])
            yield
        except BaseException:
            if created and not self.checkpoints(1).steps():
                shutil.rmtree(created, ignore_errors=True)
            raise
        finally:
            if self._file:
                with suppress(OSError):  # what could not be written, `note` has reported
                    self._file.close()
                self._file = None
            if self._board:
                self._board.close()

    def note(self, event: Event) -> None:
        """Append an event to the history.

        Raises:
            RunFolderError: the disk is full, say.
        """
        assert self._file is not None
        try:
            self._file.write(_line(event))
            self._file.flush()
        except OSError as error:
            raise RunFolderError(
                f"{HISTORY} can't be written ({error}); make room, then {self.how_to_go_on}"
            ) from error
        if self._board:
            _to_board(self._board, event)

    def finish(self, history: History, state: Mapping[str, Tensor], averaged: Mapping[str, Tensor] | None) -> None:
        """Write the weights, the figure and at last the summary, each whole or not at all; the checkpoints go.

        Raises:
            RunFolderError: the disk is full, say; the checkpoints stay.
        """
        from safetensors.torch import save_file

        from bypass_fx import figure

        try:
            with _replacing(self.path / WEIGHTS) as file:
                save_file(plain(state), file)
            if averaged is not None:
                with _replacing(self.path / AVERAGED) as file:
                    save_file(plain(averaged), file)
            with _replacing(self.path / FIGURE) as file:
                figure.draw(history, file)
            _write_json(self.path / SUMMARY, {**self._about, **summary(history)})
        except Exception as error:  # safetensors has a kind of its own for a full disk
            raise RunFolderError(
                f"the result can't be written ({error}); make room, then {self.how_to_go_on}"
            ) from error
        shutil.rmtree(self.path / _CHECKPOINTS, ignore_errors=True)

    def _begin(self, past: list[Event]) -> None:
        try:
            if not (self.path / ABOUT).exists():
                self.path.mkdir(parents=True, exist_ok=True)
                _write_json(self.path / ABOUT, self._about)
            with _replacing(self.path / PLAN) as file:
                self._plan.save(file)
            with _replacing(self.path / HISTORY) as file:
                file.write_text("".join(map(_line, sorted(past, key=lambda event: event.step))), encoding="utf-8")
            self._file = (self.path / HISTORY).open("a", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(
                f"{str(self._shown)!r} can't be written ({error}); give --out another place"
            ) from error
        if self._about["settings"]["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            purge = past[-1].step + 1 if past else None
            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge)


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict on the CPU, every entry in memory of its own, so that tied weights keep all their names too."""
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def summary(history: History) -> dict[str, Any]:
    """What a run came to: scores at its moments, phases in steps, sites, arrivals, time and versions."""
    return {
        "moments": {
            moment.title: {
                "step": moment.step,
                "bypass": moment.bypass.flat(),
                "baseline": moment.baseline and moment.baseline.flat(),
            }
            for moment in history.moments
        },
        "phases": history.spans(),
        "steps_per_epoch": history.steps_per_epoch,
        "sites": len(history.plan),
        "coefficients": history.plan.coefficients,
        "returns": [asdict(report) for report in history.reports],
        "seconds": round(history.seconds, 2),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes `path` in one step when it is on the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())  # safetensors lets nobody else read what it writes
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def _write_json(path: Path, content: Any) -> None:
    with _replacing(path) as file:
        file.write_text(f"{json.dumps(_finite(content), indent=1, ensure_ascii=False)}\n", encoding="utf-8")


def _line(event: Event) -> str:
    return f"{json.dumps(_finite(to_row(event)), ensure_ascii=False)}\n"


def _to_board(board: Any, event: Event) -> None:
    if isinstance(event, Moment):
        arms = {"bypass": event.bypass, "baseline": event.baseline}
        numbers = {
            f"{name}/{arm}": value for arm, score in arms.items() if score for name, value in score.flat().items()
        }
    else:
        numbers = {f"step/{name}": getattr(event, name) for name in ("loss", "baseline", "residual", "out", "lr")}
        numbers |= {
            f"geometry/{name}": value for name, value in (asdict(event.geometry) if event.geometry else {}).items()
        }
    for name, value in numbers.items():
        if value is not None:
            board.add_scalar(name, value, event.step)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
