"""The folder that a run leaves behind, written whole or not at all, and weights read back into a model."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bypass_fx.history import History
from bypass_fx.passes.errors import BypassError

FILES = ("model.safetensors", "plan.json", "history.jsonl", "summary.json", "figure.png")
_WRAPPERS = {"module.": "DataParallel's", "_orig_mod.": "torch.compile's"}


class RunFolderError(BypassError):
    """A run folder can't be written where it was asked for."""


class WeightsError(BypassError):
    """A file holds no weights, or none that fit the model."""


def expect_writable(folder: Path) -> None:
    """See to it, before any training, that `write` will be able to make this folder; nothing is created.

    Raises:
        RunFolderError: it exists and isn't empty, or the folder above it can't be written to.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunFolderError(f"{str(folder)!r} exists already; give --out another name, or remove it")
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunFolderError(f"{str(above)!r} is no folder that can be written to; give --out another place")


def write(folder: Path, history: History, model: nn.Module, about: Mapping[str, Any]) -> None:
    """Write a run: weights, plan, records, figure, and a summary that begins with `about`.

    All files go to a hidden folder beside `folder` first, which then takes its name in one step.

    Raises:
        RunFolderError: the disk is full, say, or the folder has come to exist; nothing is left behind.
    """
    from safetensors.torch import save_file

    from bypass_fx import figure

    expect_writable(folder)
    folder = folder.absolute()
    partial = folder.parent / f".{folder.name}.{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        history.plan.save(partial / "plan.json")
        save_file(plain_state(model), partial / "model.safetensors")
        shutil.copymode(partial / "plan.json", partial / "model.safetensors")  # safetensors lets nobody else read it
        rows = (json.dumps(_finite(asdict(record)), ensure_ascii=False) for record in history.records)
        (partial / "history.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        text = json.dumps(_finite({**about, **summary(history)}), indent=1, ensure_ascii=False)
        (partial / "summary.json").write_text(f"{text}\n", encoding="utf-8")
        figure.draw(history, partial / "figure.png")
        partial.replace(folder)
    except OSError as error:
        raise RunFolderError(f"{str(folder)!r} can't be written ({error}); give --out another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, every entry in memory of its own, so that tied weights keep all their names too."""
    state = model.state_dict()
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def summary(history: History) -> dict[str, Any]:
    """What a run came to: scores at its moments, phases in steps, sites, arrivals, time and versions."""
    return {
        "moments": {
            moment.name: {"step": moment.step, "bypass": asdict(moment.bypass), "baseline": asdict(moment.baseline)}
            for moment in history.moments
        },
        "phases": history.spans(),
        "steps_per_epoch": history.steps_per_epoch,
        "sites": len(history.plan),
        "coefficients": history.plan.coefficients,
        "return": asdict(history.report),
        "seconds": round(history.seconds, 2),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights, from a .safetensors file or a state dict saved by torch, strictly; else the model stays as it is.

    Raises:
        WeightsError: the file is missing or damaged, or its names or shapes aren't the model's.
    """
    file = Path(path)
    if not file.is_file():
        raise WeightsError(f"there is no file {str(path)!r}; give --weights a .safetensors file or a saved state dict")
    state = _read(file)
    own = model.state_dict()
    shapes = {name: (state[name].shape, own[name].shape) for name in own if name in state}
    complaints = [
        *_listed("lacks", [name for name in own if name not in state]),
        *_listed("has beside the model's", [name for name in state if name not in own]),
        *_listed("has in another shape", [f"{n} {[*a]} for {[*b]}" for n, (a, b) in shapes.items() if a != b]),
    ]
    if complaints:
        raise WeightsError(f"{str(path)!r} doesn't fit the model: it {', '.join(complaints)}; {_remedy(own, state)}")
    model.load_state_dict(state)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and pickle raise kinds of their own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{str(file)!r} can't be read as weights ({reason}); save it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{str(file)!r} holds no state dict; save model.state_dict() alone")
    return state


def _listed(verb: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return [f"{verb} {', '.join(names[:2])}{more}"]


def _remedy(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    for prefix, whose in _WRAPPERS.items():
        if {name.removeprefix(prefix) for name in state} == set(own):
            return f"take {whose} prefix {prefix!r} off its names"
    if any(name.rpartition(".")[2].startswith("delta_") for name in state.keys() - own.keys()):
        return "it was saved in the middle of a bypass: call bypass_fx.contract before saving"
    if own.keys() == state.keys():
        return "give the --data it was trained on, or the model of its width"
    return "give the --model it was saved from"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
