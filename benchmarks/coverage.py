"""Coverage: every model of timm and torchvision planned, extended and contracted, and what was found in each."""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections import Counter
from typing import Any

from torch import nn

import bypass_fx
from bypass_fx import zoo_sites
from bypass_fx.passes.link import Linked
from bypass_fx.passes.match import match
from bypass_fx.passes.plan import MODES
from bypass_fx.usual_inputs import usual_inputs

from . import zoo
from .results_file import ResultsFile


def examine(model: nn.Module) -> dict[str, Any]:
    """Plan the model in every mode, extend it with every site there is, contract it, and compare it with what it was."""
    before = _snapshot(model)
    start = time.perf_counter()
    linked = Linked(model)
    plans = {mode: match(linked, mode, usual_inputs(model)) for mode in MODES}
    planned = time.perf_counter()
    everything = plans["all"]
    if everything.sites:
        bypass_fx.extend(model, everything)
        extended = time.perf_counter()
        bypass_fx.contract(model)
    else:
        extended = planned
    finished = time.perf_counter()
    return {
        "modules": len(linked.modules),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "activations": sum(site.activation != "attention" for site in everything.sites)
        + sum(refusal.activation != "attention" for refusal in everything.refusals),
        "sites": {mode: dict(Counter(_kind(site) for site in plan.sites)) for mode, plan in plans.items()},
        "refusals": {mode: dict(Counter(_class(r.reason) for r in plan.refusals)) for mode, plan in plans.items()},
        "coefficients": everything.coefficients,
        "unchanged": _snapshot(model) == before,
        "seconds": {"plan": planned - start, "extend": extended - planned, "contract": finished - extended},
    }


def _kind(site: bypass_fx.Site) -> str:
    kind = "attention" if site.activation == "attention" else site.kind
    return " ".join([kind, site.constraint, site.exact])


def _class(reason: str) -> str:
    """A reason without the names in it."""
    head = reason.split(", which")[0]
    for start in (
        "it has other queries than values",
        "between",
        "its values are not seen to come from",
        "the BatchNorm",
    ):
        if head.startswith(start):
            return start
    if head.startswith("A (") and ") reads" in head:
        return "A reads" + re.sub(r"\d+", "n", re.sub(r" \(\S+\)", "", head.partition(") reads")[2]))
    for start in ("in front of it stands", "its result goes into"):
        if head.startswith(start):
            inner = head[head.rfind("(") + 1 : head.rfind(")")] if "(" in head else head.removeprefix(start).strip()
            return f"{start} {inner if not inner.startswith('an argument') else 'an argument'}"
    if ": its forward" in reason:
        return "its forward" + reason.split(": its forward", 1)[1][:80]
    return reason


def _snapshot(model: nn.Module) -> Any:
    classes = [(path, type(module), tuple(sorted(module.__dict__))) for path, module in model.named_modules()]
    return classes, [(name, id(value)) for name, value in model.named_parameters()], list(model.state_dict())


def run(pattern: str = "", results: str = "coverage.jsonl") -> ResultsFile:
    """Examine every model that no earlier run has examined."""
    from rich.progress import track

    file = ResultsFile(results, ("torch", "timm", "torchvision"))
    todo = [name for name in zoo.names() if pattern in name and name not in file.done("model")]
    for name in track(todo, description="coverage"):
        file.add({"model": name, **_row(name)})
        gc.collect()
    return file


def _row(name: str) -> dict[str, Any]:
    try:
        model = zoo.build(name)
    except Exception as error:  # a model that its own library can't build on meta is a row of the table
        return {"error": f"not built: {type(error).__name__}: {str(error)[:200]}"}
    try:
        return examine(model)
    except Exception:  # a crash is a row of the table, and the run goes on
        return {"error": traceback.format_exc(limit=-3)[-800:]}


def summary(file: ResultsFile) -> str:
    """The table over all models, in Markdown."""
    rows = [row for row in file if "error" not in row]
    changed = sum(not row["unchanged"] for row in rows)
    active = [row for row in rows if row["activations"]]
    with_site = sum(any(not kind.startswith("attention") for kind in row["sites"]["all"]) for row in active)
    lines = [
        f"{len(file.rows)} models, {len(file.rows) - len(rows)} not examined, {changed} changed after contraction.",
        f"{len(active)} call an element-wise activation; {with_site} of them have a site.",
        "",
        "| mode | models with a site | sites | strict folded | strict augmented | attention | relaxed | refusals |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        kinds: Counter[str] = Counter()
        for row in rows:
            for kind, count in row["sites"][mode].items():
                kinds["attention" if kind.startswith("attention") else " ".join(kind.split()[:2])] += count
        refused = sum(sum(row["refusals"][mode].values()) for row in rows)
        models = sum(bool(row["sites"][mode]) for row in rows)
        counts = [kinds[kind] for kind in ("strict folded", "strict augmented", "attention", "relaxed zero")] + [
            refused
        ]
        lines.append(f"| {mode} | {models} | {sum(kinds.values())} | " + " | ".join(map(str, counts)) + " |")
    seconds = sorted(sum(row["seconds"].values()) for row in rows)
    lines += ["", f"Seconds a model: median {seconds[len(seconds) // 2]:.2f}, highest {seconds[-1]:.2f}."]
    return "\n".join(lines) + "\n"


def listing(file: ResultsFile) -> str:
    """The table that `bypass-fx list` reads."""
    rows = [_listed(row) for row in file if "error" not in row]
    versions = ", ".join(f"{name} {file.header[name]}" for name in ("python", "torch", "timm", "torchvision"))
    return zoo_sites.write(rows, f"{file.header['command']}: {versions}")


def _listed(row: dict[str, Any]) -> zoo_sites.ModelSites:
    strict = row["sites"]["strict"]

    def count(word: str) -> int:
        return sum(number for kind, number in strict.items() if word in kind.split())

    totals = (sum(row["sites"][mode].values()) for mode in ("relaxed", "auto", "all"))
    return zoo_sites.ModelSites(
        row["model"],
        row["parameters"],
        row["activations"],
        count("folded"),
        count("augmented"),
        count("always"),
        *totals,
    )
