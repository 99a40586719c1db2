"""The paper's experiments, and how many seeds bear out each of its claims: `python -m benchmarks paper`."""

from __future__ import annotations

from benchmarks.results_file import ResultsFile

from . import theory
from .experiment import load, related
from .report import summary
from .walk import Stage, Walk

__all__ = ["THEORY", "run", "summary"]

THEORY = "theory"
THEOREM_SEEDS = 20


def run(only: str = "", full: bool = False, cifar10: str = "", results: str = "paper.jsonl") -> ResultsFile:
    """Run what no earlier run has finished, of one experiment with the one that it varies, of "theory", or of all."""
    experiments = load(full, cifar10)
    if only not in ("", THEORY, *experiments):
        raise ValueError(f"there is no experiment {only!r}; choose from {THEORY}, {', '.join(experiments)}")
    wanted = set(related(experiments[only])) if only in experiments else set[str]() if only else experiments.keys()
    file = ResultsFile(results, ("torch", "torchvision", "scikit-learn"))
    if only in ("", THEORY):
        _without_training(file)
    for name in [name for name in experiments if name in wanted]:
        experiment = experiments[name]
        seeds = experiment.seeds if only in ("", name) else min(experiment.seeds, experiments[only].seeds)
        done = {_key(row) for row in file}
        data = experiment.data.partition(":")[0]
        left = [
            seed
            for seed in range(seeds)
            if any((experiment.name, data, experiment.length, arm, seed) not in done for arm in experiment.arms)
        ]
        groups = [[seed] for seed in left] if experiment.at_once else [left] * bool(left)
        stage = Stage(experiment) if groups else None
        for group in groups:
            assert stage is not None
            walk = Walk(stage, group)
            for row in walk.rows():
                if _key(row) not in done:
                    file.add(row)
            walk.forget()
            print(experiment.name, experiment.length, "seeds", group, flush=True)
    return file


def _without_training(file: ResultsFile) -> None:
    done = {(row["experiment"], row["seed"]) for row in file}
    for seed in range(THEOREM_SEEDS):
        if ("theorem", seed) not in done:
            file.add({"experiment": "theorem", "seed": seed, **theory.theorem(seed)})
    if ("cost", 0) not in done:
        file.add({"experiment": "cost", "seed": 0, **theory.cost()})


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row.get(name) for name in ("experiment", "data", "length", "arm", "seed"))
