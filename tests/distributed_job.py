"""What each process of a distributed test runs: `python -m tests.distributed_job FOLDER SHARDING... [--stop STEP]`."""

from __future__ import annotations

import argparse
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bypass_fx.data import load
from bypass_fx.engine import leave
from bypass_fx.history import Event, History, Record
from bypass_fx.interrupt import Stopped
from bypass_fx.passes.matrices import is_sharded
from bypass_fx.run_folder import plain
from bypass_fx.settings import Settings
from bypass_fx.sharded import gathered
from bypass_fx.trainer import Trainer


def job(folder: Path, sharding: str, stop: int | None = None, **changes: Any) -> tuple[History, nn.Module] | None:
    """A run over all phases, with sites that come home with D ≠ 0; None where it was stopped."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 10)]
    model = nn.Sequential(nn.Sequential(*layers))
    lengths = {"train1": 2, "opt1": 3, "opt2": 6, "train3": 2, "batch_size": 240}
    way = {"comeback": "penalty", "gamma": "0.5", "epsilon": 0.15}
    settings = Settings(**{**lengths, **way, "sharding": sharding, **changes})

    def count(event: Event) -> None:
        if isinstance(event, Record) and stop is not None and event.step >= stop:
            signal.raise_signal(signal.SIGTERM)

    trainer = Trainer(model, load("digits", vectors=True), settings, count, folder=folder)
    try:
        history = trainer.fit()
    except Stopped:
        return None
    world = trainer._engine.shares.world
    assert all(is_sharded(p) for p in model.parameters()) == (sharding == "fsdp2" and world > 1)
    return history, model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("shardings", nargs="+")
    parser.add_argument("--stop", type=int)
    parser.add_argument("--accumulate", type=int, default=1)
    given = parser.parse_args()
    for sharding in given.shardings:
        done = job(given.folder / sharding, sharding, given.stop, accumulate=given.accumulate)
        if done:
            state = plain(gathered(done[1].state_dict()))
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                save_file(state, given.folder / f"{sharding}.safetensors")
                (given.folder / f"{sharding}.json").write_text(json.dumps(numbers(done[0])))
    leave()


def numbers(history: History) -> dict[str, Any]:
    """What two runs are compared by."""
    rows = []
    for record in history.records:
        row = {**asdict(record), **asdict(record.geometry)} if record.geometry else asdict(record)
        rows.append({key: value for key, value in row.items() if isinstance(value, int | float) and key != "seconds"})
    return {
        "records": rows,
        "moments": [moment.bypass.flat() for moment in history.moments],
        "reports": [asdict(report) for report in history.reports],
    }


if __name__ == "__main__":
    main()
