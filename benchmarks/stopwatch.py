"""Times of interleaved runs, and the peak of memory."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median

import torch

Action = Callable[[], object]
SHORT = (
    0.05  # seconds, on a GPU: of what takes less, several runs are timed together, as the host runs ahead in training
)


def seconds(action: Action, device: str = "cpu") -> float:
    """Wall time of one run, with what it started on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(actions: Mapping[str, Action], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Times of each action, one of each in turn, after one run of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    once = min(seconds(action, device) for action in actions.values()) if device == "cuda" else SHORT
    runs = math.ceil(SHORT / once)
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(seconds(lambda action=action: [action() for _ in range(runs)], device) / runs)  # type: ignore[misc]
    return times


@contextlib.contextmanager
def turn(device: str) -> Iterator[None]:
    """Benchmarks started side by side, to compile at the same time, take turns with the GPU."""
    if device != "cuda":
        yield
        return
    with Path(tempfile.gettempdir(), "bypass_fx-gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """The median over the rounds of each action's time against that of `base` in the same round."""
    return {
        name: median(own / theirs for own, theirs in zip(each, times[base], strict=True))
        for name, each in times.items()
        if name != base
    }


def kernels_take(action: Action, runs: int = 3) -> float:
    """Seconds that a GPU's kernels take in a run, one after another, as torch's profiler sees them: no waits for the host."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(runs):
            action()
        torch.cuda.synchronize()
    took = sum(event.device_time for event in profile.events() if event.device_type.name == "CUDA")
    return float(1e-6 * took / runs)


def page_faults(action: Action, runs: int = 3) -> float:
    """Pages of memory that the operating system must hand out in a run, as what was freed has gone back to it."""
    action()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(runs):
        action()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / runs


def peak_memory(action: Action, device: str = "cpu") -> int:
    """The most bytes allocated at once during a run, beyond those before it."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() - before
    only_cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=only_cpu, profile_memory=True, acc_events=True) as profile:
        action()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
