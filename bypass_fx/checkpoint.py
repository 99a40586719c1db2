"""Checkpoints that survive a crash at any moment: written whole or not at all, and checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bypass_fx.packing import pack, unpack
from bypass_fx.passes.errors import BypassError

FORMAT = 1
_STATE, _TENSORS, _SUMS = "state.json", "tensors.safetensors", "checksums.json"
_NAME = re.compile(r"step-(\d{9})")


class CheckpointError(BypassError):
    """A checkpoint can't be written, or none that can be used is there."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of a run, each a folder `step-…` of safetensors, JSON and checksums; the last `keep` stay.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(Path(folder), keep=2)
        ...     for step in (1, 2, 3):
        ...         checkpoints.save(step, {"weight": torch.full((2,), float(step))})
        ...     checkpoints.steps(), checkpoints.load(3)
        ([2, 3], {'weight': tensor([3., 3.])})
    """

    folder: Path
    keep: int = 3

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, whole or not, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := _NAME.fullmatch(path.name)))

    def save(self, step: int, state: Any) -> None:
        """Write a checkpoint: into a hidden folder first, which takes its name when all of it is on the disk.

        Raises:
            CheckpointError: the disk is full, say; the checkpoints before it stay.
        """
        from safetensors.torch import save_file

        tree, tensors = pack(state)
        final = self._place(step)
        partial = self.folder / f".{final.name}.{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(tensors, partial / _TENSORS)
            (partial / _STATE).write_text(json.dumps({"format": FORMAT, "step": step, "state": tree}), encoding="utf-8")
            sums = {name: _checksum(partial / name) for name in (_STATE, _TENSORS)}
            (partial / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
            for name in (_STATE, _TENSORS, _SUMS):
                sync(partial / name)
            sync(partial)
            if final.exists():  # a run that was resumed from an older one comes by again
                shutil.rmtree(final)
            partial.replace(final)
            sync(self.folder)
        except Exception as error:  # safetensors has a kind of its own for a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"no checkpoint could be written in {str(self.folder)!r} ({error}); make room"
            ) from error
        self._tidy()

    def load(self, step: int) -> Any:
        """The state of one checkpoint.

        Raises:
            CheckpointError: it is damaged, or another version's.
        """
        from safetensors.torch import load_file

        folder = self._place(step)
        try:
            sums = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
            damaged = [name for name in (_STATE, _TENSORS) if sums.get(name) != _checksum(folder / name)]
            if damaged:
                raise CheckpointError(f"the checkpoint {str(folder)!r} is damaged: {damaged[0]} has another checksum")
            saved = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise CheckpointError(f"the checkpoint {str(folder)!r} is of another version's format")
            return unpack(saved["state"], load_file(folder / _TENSORS))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"the checkpoint {str(folder)!r} is damaged ({reason})") from error

    def newest(self) -> tuple[int, Any] | None:
        """The newest checkpoint that is whole, with a warning for each damaged one passed over; None where there is none.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        complaints = []
        for step in reversed(self.steps()):
            try:
                return step, self.load(step)
            except CheckpointError as error:
                complaints.append(str(error))
                warnings.warn(f"{error}; trying the one before it", stacklevel=2)
        if complaints:
            raise CheckpointError(f"no checkpoint in {str(self.folder)!r} can be used; start a new run")
        return None

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _tidy(self) -> None:
        old = [self._place(step) for step in self.steps()[: -self.keep]]
        begun = self.folder.glob(".step-*")  # by processes that were killed, but for what this one writes
        for path in (*old, *(each for each in begun if not each.name.endswith(f".{os.getpid()}"))):
            shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
