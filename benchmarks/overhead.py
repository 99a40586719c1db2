"""What a bypass costs: training steps of extended models against the same models without, in one run."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx import inductor

from . import beside, growth, penalty_cost, psi_cost
from .results_file import ResultsFile
from .stopwatch import SHORT, interleaved, kernels_take, page_faults, peak_memory, ratios, seconds, turn
from .workloads import WORKLOADS, Workload

REPEATS = 7
LONG, REPEATS_OF_LONG = 2.0, 4  # seconds of a step
BACKEND = inductor.backend  # without D it is Inductor as it comes
KEEPS = "eager, memory kept"
WAYS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    KEEPS: None,
    "compiled": {},
    "CUDA graphs": {"mode": "reduce-overhead"},
}
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc gives no memory back that is freed
SMALL = ("2c2d", "char12")  # whose kernels are so short that CUDA graphs pay
_KEEPING = " ".join(f"{name}={value}" for name, value in KEEPING.items())
FOREVER = 10**7  # steps of a phase that outlasts the measurement
RETURNS: dict[str, dict[str, Any]] = {
    "homotopy": {"comeback": "homotopy"},
    "homotopy, norms in every step": {"comeback": "homotopy", "penalty_every": 1},
    "penalty": {"comeback": "published"},
    "penalty, every 8th": {"comeback": "published", "penalty_every": 8},
}
Step = Callable[[], None]


class Arms:
    """A model without and with D, its training step, and that in opt1 and in opt2 with each return.

    The arms with D share one extended model, so that it is compiled once.
    """

    def __init__(self, workload: Workload, device: str, way: str, returns: dict[str, dict[str, Any]]) -> None:
        self.device, self.batch = device, workload.batch(device)
        plain = workload.build(device)
        extended = copy.deepcopy(plain)
        bypass_fx.extend(extended)
        self.sites = bypass_fx.sites(extended)
        with torch.no_grad():
            for site in self.sites:
                bypass_fx.surgery.delta_of(extended, site).fill_(1e-3)
        self.models = {"base": plain, "opt1": extended}
        run: dict[str, Any] = {arm: _compiled(model, way) for arm, model in self.models.items()}
        self.steps: dict[str, Step] = {"base": self._step(run["base"], self._optimizer(plain), None)}
        for name, options in {"opt1": {}, **returns}.items():
            optimizer = self._optimizer(extended)
            opt1 = FOREVER if name == "opt1" else 0
            schedule = bypass_fx.BypassSchedule(
                extended,
                optimizer,
                opt1,
                FOREVER,
                gamma=bypass_fx.Linear(1e-12),
                epsilon=1e-30,
                snapshot=None,
                **options,
            )
            self.steps[name] = self._step(run["opt1"], optimizer, schedule)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> Step:
        inputs, classes = self.batch

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
                loss: Tensor = F.cross_entropy(model(inputs), classes)
            if schedule:
                loss = loss + schedule.penalty()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if schedule:
                schedule.step()

        return step

    def held(self, arm: str) -> int:
        """Bytes of a model's parameters and of their momenta."""
        model = self.models["base" if arm == "base" else "opt1"]
        return 2 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _compiled(model: nn.Module, way: str) -> Any:
    options = WAYS[way]
    return model if options is None else torch.compile(model, backend=BACKEND, **options)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """On a GPU the penalty's products are in TF32, as torch's compiler asks for; nothing else in a step is one of float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@_tf32()
def steps_of(workload: Workload, way: str, device: str) -> dict[str, Any]:
    """Ratios of time and memory to the model without D; with a compiler, seconds of the first step as well."""
    compiled = WAYS[way] is not None
    if compiled:  # the compiler's own start belongs to neither arm
        first_of_all = torch.compile(nn.Linear(2, 2).to(device), backend=BACKEND)
        first_of_all(torch.ones(1, 2, device=device)).sum().backward()
    arms = Arms(workload, device, way, RETURNS)
    first = {arm: seconds(arms.steps[arm], device) for arm in ("base", "opt1")}
    if device == "cuda":
        torch.cuda.empty_cache()  # for who compiles beside
    with turn(device):
        seconds(arms.steps["base"], device)
        once = seconds(arms.steps["base"], device)
        times = interleaved(arms.steps, REPEATS_OF_LONG if once > LONG else REPEATS, device)
        kernels = {arm: kernels_take(step) for arm, step in arms.steps.items()} if device == "cuda" else {}
        peaks = {arm: peak_memory(arms.steps[arm], device) + arms.held(arm) for arm in arms.steps}
    row: dict[str, Any] = {
        "batch": (workload.on_gpu if device == "cuda" else workload.on_cpu),
        "sites": {
            kind: sum(site.constraint == kind for site in arms.sites) for kind in ("folded", "augmented", "zero")
        },
        "seconds": median(times["base"]),
        "ratios": ratios(times, "base"),
        "memory": {arm: peak / peaks["base"] for arm, peak in peaks.items() if arm != "base"},
    }
    if device == "cpu" and not compiled:
        row["faults"] = {arm: page_faults(arms.steps[arm]) for arm in ("base", "opt1")}
    if kernels:
        row["kernels"] = {arm: took / kernels["base"] for arm, took in kernels.items() if arm != "base"}
    if compiled:
        row["compile"] = {"base": first["base"], "ratio": first["opt1"] / first["base"]}
    return row


def _where_memory_is_kept(workload: Workload) -> dict[str, Any]:
    """Eager steps on a CPU in a process whose allocator keeps what is freed: glibc reads this as a process starts."""
    with mock.patch.dict(os.environ, KEEPING), ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_in_its_process, workload, torch.get_num_threads()).result()


def _in_its_process(workload: Workload, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return steps_of(workload, "eager", "cpu")


def run(pattern: str = "", results: str = "overhead-{device}.jsonl") -> ResultsFile:
    """Measure what no earlier run has measured, on a GPU if there is one, else on the CPU."""
    from rich.progress import track

    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = ResultsFile(results.format(device=device), ("torch", "timm", "peft", "torch-pruning"))
    todo: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, workload in WORKLOADS.items():
        ways = [way for way in WAYS if way != KEEPS and (way != "CUDA graphs" or (device == "cuda" and name in SMALL))]
        todo |= {f"step:{name}:{way}": partial(steps_of, workload, way, device) for way in ways}
        if device == "cpu" and sys.platform == "linux":
            todo[f"step:{name}:{KEEPS}"] = partial(_where_memory_is_kept, workload)
    todo |= psi_cost.todo(device) | penalty_cost.todo(device) | growth.todo(device) | beside.todo(device)
    for name in track([n for n in todo if pattern in n and n not in file.done("name")], description="overhead"):
        torch.compiler.reset()
        with warnings.catch_warnings(), torch._inductor.config.patch(force_disable_caches=True):
            warnings.simplefilter("ignore")
            file.add({"name": name, "device": _named(device), **todo[name]()})
        gc.collect()
    growth.draw(file)
    return file


def _named(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def summary(file: ResultsFile) -> str:
    """The tables, in Markdown."""
    rows = {row["name"]: row for row in file}
    on_gpu = any(row["device"] != "cpu" for row in file)
    precision = "bfloat16, channels-last" if on_gpu else "float32"
    once = f"as many steps as take {1000 * SHORT:.0f} ms" if on_gpu else "one step"
    arms = ["opt1", *RETURNS]
    lines = [
        f"Training steps against those of the same model without D, in one run: the median over {REPEATS} "
        f"rounds ({REPEATS_OF_LONG} where a step takes more than {LONG:.0f} s) of {once} of each, {precision}, "
        f"{', '.join(sorted({row['device'] for row in file}))}. A step is forward, loss, backward, SGD with momentum, and "
        "the schedule's own. opt2 is with the default return, which takes the norms, and with the published penalty, which "
        "takes norms and a gradient; in every step and in every 8th. "
        + ("" if on_gpu else "Batches are small, for two cores; the constraint costs the same for any batch. ")
        + "compiled: torch.compile of the model; the penalty and the schedule run beside it"
        + (", on an H200 with its products in TF32." if on_gpu else f". memory kept: with {_KEEPING} set, see below."),
        "",
        f"| model | way | on | batch | strict + relaxed sites | a step | {' | '.join(f'{arm}' for arm in arms)} |",
        "|---|---|---|---|---|---|" + "---|" * len(arms),
    ]
    order = [f"step:{model}:{way}" for way in WAYS for model in WORKLOADS]
    steps = sorted(
        (row for name, row in rows.items() if name.startswith("step:")), key=lambda row: order.index(row["name"])
    )
    for row in steps:
        _, model, way = row["name"].split(":")
        sites = f"{row['sites']['folded'] + row['sites']['augmented']} + {row['sites']['zero']}"
        numbers = " | ".join(f"{row['ratios'][arm]:.3f}" for arm in arms)
        on = f"{row['device'].split(' 80GB')[0]} | {_by(row['batch'])}"
        lines.append(f"| {model} | {way} | {on} | {sites} | {row['seconds']:.3f} s | {numbers} |")
    lines += _of_kernels(steps, arms)
    lines += ["", "Peak memory of a step (parameters, momenta, gradients, activations) against the same:", ""]
    head = [*arms, "first step, compiling", "page faults without D, in opt1"]
    lines += [f"| model | way | {' | '.join(head)} |", "|---|---|" + "---|" * len(head)]
    for row in steps:
        _, model, way = row["name"].split(":")
        compiling = f"{row['compile']['base']:.0f} s, × {row['compile']['ratio']:.2f}" if "compile" in row else ""
        faults = f"{row['faults']['base']:,.0f}, {row['faults']['opt1']:,.0f}" if "faults" in row else ""
        cells = [model, way, *(f"{row['memory'][arm]:.3f}" for arm in arms), compiling, faults]
        lines.append("| " + " | ".join(cells) + " |")
    other = "CPU" if on_gpu else "GPU"
    if not on_gpu:
        lines += [
            "",
            "A page fault is a page of memory that the operating system hands out, and fills with zeros, as glibc has given "
            "back what a step before had freed. ψ keeps z beside its result, where an activation in place has one tensor.",
        ]
    lines += ["", f"Not measured on this machine: {other}.", ""]
    return "\n".join(
        [*lines, psi_cost.summary(rows), penalty_cost.summary(rows), growth.summary(rows), beside.summary(rows)]
    )


def _of_kernels(steps: list[dict[str, Any]], arms: list[str]) -> list[str]:
    """What a GPU is busy with, where it was looked at."""
    shown = [row for row in steps if "kernels" in row]
    if not shown:
        return []
    about = "What the GPU's kernels take, one after another, against the same: without the waits for the host."
    lines = ["", about, "", f"| model | way | {' | '.join(arms)} |", "|---|---|" + "---|" * len(arms)]
    for row in shown:
        _, model, way = row["name"].split(":")
        cells = " | ".join(f"{row['kernels'][arm]:.3f}" if arm in row["kernels"] else "" for arm in arms)
        lines.append(f"| {model} | {way} | {cells} |")
    return lines


def _by(batch: list[int]) -> str:
    return f"{batch[0]} × {batch[1]}"
