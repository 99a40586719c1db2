"""A backend for torch.compile: Inductor, told how to treat graphs with ψ in them.

The gradients of ψ need z, which a compiler can compute again from what the layer before keeps anyway. Left to itself,
Inductor keeps z at the ends of residual blocks, as it is used far apart there, or stands in a long chain of sums, and
writes it out in the backward elsewhere, as more than four tensors are read for it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import activation

WRITTEN_FROM = 8  # reads: a value that is used again, and computed from more than these, is written out
# Why torch keeps what is cheap to compute again. The sums of a chain without ψ had better be kept.
FAR_APART = {"ban_recompute_used_far_apart": False}
IN_A_CHAIN = {"ban_recompute_long_fusible_chains": False}
_PSI = str(Path(activation.__file__))


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """What `torch.compile(model, backend="bypass_fx")` calls with each graph; others than those with ψ are Inductor's alone.

    Args:
        graph: as torch.compile makes it.
        example_inputs: its inputs.
        mode: of torch.compile: "reduce-overhead", "max-autotune", …
        options: Inductor's settings, over what the mode and this backend set.

    Raises:
        RuntimeError: Inductor has no such mode or setting, or the setting is of another type; the message names it.

    Example:
        >>> import bypass_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> fast = torch.compile(bypass_fx.extend(net), backend="bypass_fx")
    """
    from torch._functorch import config as of_autograd
    from torch._inductor.compile_fx import compile_fx

    known = torch._TorchCompileInductorWrapper(mode, options, None)  # refuses settings that Inductor does not have
    settings = known.config
    if not computes_psi(graph):
        return compile_fx(graph, example_inputs, config_patches=settings)
    with of_autograd.patch(FAR_APART | IN_A_CHAIN if ends_a_block(graph) else FAR_APART):
        return compile_fx(graph, example_inputs, config_patches={"realize_reads_threshold": WRITTEN_FROM, **settings})


def _let_go() -> None:
    """Give the CUDA graphs back, as Inductor does where torch.compiler.reset() is called."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


vars(backend)["reset"] = _let_go


def computes_psi(graph: fx.GraphModule) -> bool:
    """Whether a graph of torch.compile's holds a D-activation: by the file that its calls stand in."""
    return any(map(_of_psi, graph.graph.nodes))


def ends_a_block(graph: fx.GraphModule) -> bool:
    """Whether a D-activation in the graph takes a sum, as those at the ends of a ResNet's blocks do."""
    return any(_of_psi(node) and any(map(_adds, node.all_input_nodes)) for node in graph.graph.nodes)


def _of_psi(node: fx.Node) -> bool:
    return _PSI in (node.stack_trace or "")


def _adds(node: fx.Node) -> bool:
    return not _of_psi(node) and node.target in _SUMS


_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
