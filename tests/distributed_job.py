"""What each process of a distributed test runs: `python -m tests.distributed_job FOLDER VARIANT...`."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.utils import counters

from bypass_fx import cli
from bypass_fx.accept import Condition
from bypass_fx.data import load
from bypass_fx.engine import leave
from bypass_fx.history import Event, History, Record
from bypass_fx.interrupt import Stopped
from bypass_fx.passes.matrices import is_sharded
from bypass_fx.run_folder import plain
from bypass_fx.settings import Settings
from bypass_fx.sharded import gathered
from bypass_fx.trainer import Trainer

COMPILED = {"compile": "default", "compile_backend": "aot_eager"}
# A name → how its run differs; "stop", "undo" and "dead" are the job's own.
VARIANTS: dict[str, dict[str, Any]] = {
    "ddp": {"sharding": "ddp"},
    "ddp compiled": {"sharding": "ddp", **COMPILED},
    "ddp in parts": {"sharding": "ddp", "accumulate": 2},
    "fsdp2": {"sharding": "fsdp2"},
    "fsdp2 compiled": {"sharding": "fsdp2", **COMPILED},
    "fsdp2 averaged": {"sharding": "fsdp2", "ema": 0.9},
    "fsdp2 undone": {"sharding": "fsdp2", "undo": True},
    "ddp stuck": {"sharding": "ddp", "select": "stuck", "dead": (3, 11)},
    "fsdp2 stuck": {"sharding": "fsdp2", "select": "stuck", "dead": (3, 11)},
    "stopped in opt1": {"sharding": "fsdp2", "stop": 17},
    "as launched": {"sharding": "auto", "accumulate": 2},
}
COMMAND = "command line"  # ends the group of processes, so it comes last
TRAIN = "train --train1 1 --opt1 1 --opt2 1 --train3 1 --lr-schedule cosine --ema 0.9 --out"


class Net(nn.Sequential):
    """Layers of a kind that an FSDP configuration can name."""


def job(folder: Path, rank: int = 0, **changes: Any) -> tuple[History, nn.Module] | None:
    """A run over all phases, with sites that come home with D ≠ 0; None where it was stopped."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # all begin with the main process's weights
    layers = [nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 10)]
    model = nn.Sequential(Net(*layers))
    lengths = {"train1": 2, "opt1": 3, "opt2": 6, "train3": 2, "batch_size": 240}
    way = {"comeback": "penalty", "gamma": "0.5", "epsilon": 0.15}
    stop, undo = changes.pop("stop", None), changes.pop("undo", False)
    with torch.no_grad():
        model[0][0].bias[list(changes.pop("dead", ()))] = -3.0

    def count(event: Event) -> None:
        if isinstance(event, Record) and stop is not None and event.step >= stop:
            signal.raise_signal(signal.SIGTERM)

    accept = Condition(lambda model: rank > 0, after=3) if undo else None  # the others would keep it
    data = load("digits", vectors=True)
    trainer = Trainer(model, data, Settings(**{**lengths, **way, **changes}), count, accept=accept, folder=folder)
    try:
        return trainer.fit(), model
    except Stopped:
        return None


def main() -> None:
    folder, *names = sys.argv[1:]
    for name in names:
        if name == COMMAND:
            cli.app([*TRAIN.split(), str(Path(folder) / COMMAND)], standalone_mode=False)
            continue
        place = Path(folder) / ("stopped" if name == "as launched" else name.split(" in opt1")[0])
        counters.clear()
        done = job(place, _rank(), **VARIANTS[name])
        if done:
            history, model = done
            state = plain(gathered(model.state_dict()))
            if _rank() == 0:
                save_file(state, Path(folder) / f"{name}.safetensors")
                sharded = all(is_sharded(parameter) for parameter in model.parameters())
                machine = {"world": torch.distributed.get_world_size(), "sharded": sharded}
                found = {**numbers(history), **machine, "graphs": counters["stats"]["unique_graphs"]}
                (Path(folder) / f"{name}.json").write_text(json.dumps(found))
    leave()


def _rank() -> int:
    import os

    return int(os.environ["RANK"])


def numbers(history: History) -> dict[str, Any]:
    """What two runs are compared by."""
    rows = []
    for record in history.records:
        row = {**asdict(record), **asdict(record.geometry)} if record.geometry else asdict(record)
        rows.append({key: value for key, value in row.items() if isinstance(value, int | float) and key != "seconds"})
    return {
        "records": rows,
        "moments": [{"name": moment.title, **moment.bypass.flat()} for moment in history.moments],
        "reports": [asdict(report) for report in history.reports],
    }


if __name__ == "__main__":
    main()
