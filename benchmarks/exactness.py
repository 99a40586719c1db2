"""Exactness and completeness on real forwards: the smallest model of each of timm's model files, and of torchvision.

For each model: every activation call that a run makes is counted from outside (a TorchFunctionMode, and the stack of
module calls) and looked up in the plan; outputs before and after `extend` are compared with torch.equal in both modes;
a backward pass shows which δ get a gradient; after `contract` the state dict is loaded into a fresh model.
"""

from __future__ import annotations

import copy
import gc
import json
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import bypass_fx
from bypass_fx.passes.activations import FUNCTIONS
from bypass_fx.passes.plan import Refusal
from bypass_fx.usual_inputs import usual_inputs

from . import zoo
from .results_file import RESULTS, ResultsFile

TORCHVISION = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf",
    "resnet18", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vit_b_32",
    "lraspp_mobilenet_v3_large",
    "fcn_resnet50", "deeplabv3_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn", "r3d_18", "s3d", "mvit_v1_b", "swin3d_t", "raft_small", "quantized_resnet18",
    "quantized_mobilenet_v3_large",
]  # fmt: skip


class Calls(TorchFunctionMode):
    """Counts activation calls by the module that makes them: independent of how the compiler finds them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {module: path for path, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.entered: Counter[str] = Counter()
        self.made: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stack and (func in FUNCTIONS or (getattr(func, "__objclass__", None) is not None and _method(func))):
            module = self.stack[-1]
            alone = not list(module.children()) and (isinstance(module, nn.PReLU) or not list(module.parameters()))
            owner = self.stack[-2] if alone and len(self.stack) > 1 else module
            call = (self.paths[owner], self.paths[module] if alone and owner is not module else "")
            self.made["\t".join(call)] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the module calls of a run."""

        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(module)
            self.entered[self.paths[module]] += 1

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            self.stack.pop()

        hooks = [m.register_forward_pre_hook(enter) for m in self.paths]
        hooks += [m.register_forward_hook(leave) for m in self.paths]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _method(func: Any) -> bool:
    from bypass_fx.passes.activations import METHODS

    return getattr(func, "__name__", "") in METHODS


def missed(model: nn.Module, inputs: tuple[Any, ...], plan: bypass_fx.Plan) -> tuple[int, list[str]]:
    """How many activation calls a run makes, and those in owners where the plan has fewer entries than a call makes."""
    calls = Calls(model)
    with torch.no_grad(), calls.watching():
        model(*inputs)
    planned: Counter[str] = Counter()
    entries: list[bypass_fx.Site | Refusal] = [*plan.sites, *plan.refusals]
    for entry in entries:
        planned[entry.owner] += entry.activation != "attention"
    per_owner: Counter[str] = Counter()
    for key, count in calls.made.items():
        owner, module = key.split("\t")
        if (
            module and planned[module]
        ):  # a module that code without a graph calls is one entry, however often it is called
            continue
        inner = 1 if not module else max(1, calls.entered[module])
        # a module made of several activation calls (x * sigmoid(x)) is one activation
        per_owner[owner] += count if not module else min(count, inner)
    found = []
    for owner, count in per_owner.items():
        expected = count / max(1, calls.entered[owner])
        children = sum(planned[path] for path in calls.entered if path.startswith(owner + ".") or not owner)
        if planned[owner] + 1e-9 < expected and planned[owner] + children + 1e-9 < expected:
            found.append(f"{owner}: {expected:g} calls, {planned[owner]} in the plan")
    return sum(calls.made.values()), found


def examine(name: str) -> dict[str, Any]:
    """One model, on the CPU, with random weights."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model = zoo.build(name, device="cpu")
    inputs = _small(usual_inputs(model) or (torch.empty(1, 3, 224, 224),))
    plan = bypass_fx.plan(model, mode="all", example_inputs=inputs)
    calls, absent = missed(model, inputs, plan)
    row: dict[str, Any] = {"calls": calls, "sites": len(plan.sites), "refusals": len(plan.refusals), "missed": absent}
    state = copy.deepcopy(model.state_dict())
    for train in (False, True):
        if train and "detection" in type(model).__module__:
            continue  # training takes targets
        model.train(train)
        before = _run(model, inputs, state)
        bypass_fx.extend(model, plan)
        after = _run(model, inputs, state)
        row[f"equal_{'train' if train else 'eval'}"] = _equal(before, after)
        if not train or "without_gradient" not in row:
            row["without_gradient"] = _without_gradient(model, inputs)
        bypass_fx.contract(model)
    fresh = zoo.build(name, device="cpu")
    fresh.load_state_dict(model.state_dict(), strict=True)
    row["restored"] = list(fresh.state_dict()) == list(state)
    row["seconds"] = time.perf_counter() - start
    return row


def _small(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Two examples of the usual shape, with values."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        shape = (2, *tensor.shape[1:]) if tensor.dim() > 3 else tuple(tensor.shape)
        return torch.rand(shape, generator=generator)

    filled: tuple[Any, ...] = tree_map_only(Tensor, fill, inputs)
    return filled


def _run(model: nn.Module, inputs: tuple[Any, ...], state: dict[str, Tensor]) -> list[Tensor]:
    """The outputs under one seed; the buffers are as in the state before and after."""
    torch.manual_seed(3)
    with torch.no_grad():
        result = [leaf for leaf in tree_leaves(model(*copy.deepcopy(inputs))) if isinstance(leaf, Tensor)]
    model.load_state_dict(state, strict=False)
    return result


def _equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)
    )


def _without_gradient(model: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """Sites whose δ gets no gradient in a backward pass from all outputs."""
    outputs = [leaf for leaf in tree_leaves(model(*copy.deepcopy(inputs))) if isinstance(leaf, Tensor)]
    total = sum(leaf.float().square().sum() for leaf in outputs if leaf.requires_grad)
    if isinstance(total, Tensor):
        total.backward()  # type: ignore[no-untyped-call]
    return [site.name for site in bypass_fx.sites(model) if model.get_parameter(site.parameter).grad is None]


def models() -> list[str]:
    """The smallest model of every model file of timm, by the coverage results, and a choice of torchvision's."""
    from timm.models._registry import _module_to_models

    covered = RESULTS / "coverage.jsonl"
    rows = [json.loads(line) for line in covered.read_text().splitlines()[1:]] if covered.exists() else []
    size = {row["model"]: row["parameters"] for row in rows if "parameters" in row}
    smallest = [
        min((f"timm:{name}" for name in sorted(names) if f"timm:{name}" in size), key=size.__getitem__, default="")
        for _, names in sorted(_module_to_models.items())
    ]
    return [name for name in smallest if name] + [f"torchvision:{name}" for name in TORCHVISION]


def run(pattern: str = "", results: str = "exactness.jsonl") -> ResultsFile:
    """Examine every model that no earlier run has examined."""
    from rich.progress import track

    file = ResultsFile(results, ("torch", "timm", "torchvision"))
    todo = [name for name in models() if pattern in name and name not in file.done("model")]
    for name in track(todo, description="exactness"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                row = examine(name)
            except Exception:  # a crash is a row of the table, and the run goes on
                row = {"error": traceback.format_exc(limit=-3)[-800:]}
        file.add({"model": name, **row})
        gc.collect()
    return file


def summary(file: ResultsFile) -> str:
    """The table over all models, in Markdown."""
    rows = [row for row in file if "error" not in row]
    exact = sum(row["equal_eval"] and row.get("equal_train", True) for row in rows)
    lines = [
        f"{len(file.rows)} models, {len(file.rows) - len(rows)} failed; {sum(row['calls'] for row in rows)} activation "
        f"calls, {sum(len(row['missed']) for row in rows)} owners with a call that is neither a site nor a refusal.",
        f"Outputs torch.equal after extend in eval and train mode: {exact} of {len(rows)}; "
        f"state dict strict into a fresh model after contract: {sum(row['restored'] for row in rows)} of {len(rows)}.",
        "",
        "| model | calls | sites | refusals | missed | equal in eval | equal in train | δ without gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in file:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['error'].strip().splitlines()[-1][:80]} |||||||")
            continue
        cells = [row["calls"], row["sites"], row["refusals"], len(row["missed"]), row["equal_eval"]]
        cells += [row.get("equal_train", "takes targets"), len(row["without_gradient"])]
        lines.append(f"| {row['model']} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
