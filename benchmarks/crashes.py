"""kill -9 at random moments of a run that saves after every step, and what the resumed run comes to."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from bypass_fx import run_folder

from .results_file import ResultsFile

JOB = ["--train1", "3", "--opt1", "3", "--opt2", "3", "--train3", "3", "--cycles", "2", "--checkpoint-seconds", "0"]


def start(folder: Path, resume: bool = False) -> subprocess.Popen[bytes]:
    """A process that trains into a folder, or goes on with the run in it."""
    job = ["--resume", str(folder)] if resume else [*JOB, "--out", str(folder)]
    return subprocess.Popen([sys.executable, "-m", "bypass_fx", "train", *job], stdout=subprocess.DEVNULL)


def undisturbed(folder: Path) -> float:
    """Run to the end; returns the seconds from the folder's appearance to the end."""
    process = start(folder)
    _await(folder, process)
    began = time.monotonic()
    assert process.wait() == 0
    return time.monotonic() - began


def kill(number: int, folder: Path, seconds: float) -> dict[str, Any]:
    """Kill a run at a moment drawn by its number; what it has left behind."""
    moment = random.Random(number).uniform(0, seconds)
    process = start(folder)
    _await(folder, process)
    time.sleep(moment)
    process.kill()
    killed = process.wait() == -9 and not (folder / run_folder.SUMMARY).exists()
    row: dict[str, Any] = {"number": number, "after": round(moment, 3), "killed": killed}
    if not killed:  # it had come to its end already
        return row
    run_folder.read_about(folder)
    left = [path.name for path in (folder / "checkpoints").glob("*")] if (folder / "checkpoints").exists() else []
    saved = [name for name in left if name.startswith("step-")]
    return row | {
        "checkpoints": len(saved),
        "half-written": len(left) - len(saved),
        "at": max(saved, default="")[5:].lstrip("0"),
    }


def examine(number: int, folder: Path, whole: Path, seconds: float) -> dict[str, Any]:
    """Kill a run, go on with it, and compare the weights with the undisturbed run's."""
    row = kill(number, folder, seconds)
    if row["killed"]:
        row["resumed"] = start(folder, resume=True).wait() == 0
    return row | {"equal": row.get("resumed", True) and equal(folder, whole)}


def run(kills: int = 20, results: str = "crashes.jsonl") -> ResultsFile:
    """Kill until so many runs were hit before their end."""
    file = ResultsFile(results, ("torch", "accelerate", "safetensors"))
    with TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        seconds = undisturbed(whole)
        while sum(row["killed"] for row in file.rows) < kills:
            number = len(file.rows)
            file.add(examine(number, Path(scratch, f"run-{number}"), whole, seconds))
    return file


def summary(file: ResultsFile) -> str:
    """How many came back, in a sentence and a table in Markdown."""
    rows = [row for row in file.rows if row["killed"]]
    lines = [
        f"{len(rows)} runs of two bypasses killed (SIGKILL) at random moments, {median(r['after'] for r in rows):.1f} s "
        "after their folder appeared in the median; a checkpoint after every step. "
        f"{sum(r['resumed'] for r in rows)} went on, "
        f"{sum(r['equal'] for r in rows)} came to the very weights of the undisturbed run, bit for bit; "
        f"{sum(r['half-written'] > 0 for r in rows)} were hit while a checkpoint was being written.",
        "",
        "| killed after, s | last checkpoint's step | half-written | went on | equal |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['after']:.2f} | {r['at'] or 'none'} | {r['half-written']} | {r['resumed']} | {r['equal']} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def _await(folder: Path, process: subprocess.Popen[bytes]) -> None:
    while not (folder / run_folder.ABOUT).exists():
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.005)


def equal(folder: Path, whole: Path) -> bool:
    """Whether two finished runs came to the same weights, bit for bit."""
    found, wanted = (load_file(path / run_folder.WEIGHTS) for path in (folder, whole))
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())
