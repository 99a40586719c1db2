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
    hand_over_biases(graph)
    with of_autograd.patch(FAR_APART | IN_A_CHAIN if ends_a_block(graph) else FAR_APART):
        return compile_fx(graph, example_inputs, config_patches={"realize_reads_threshold": WRITTEN_FROM, **settings})


def _let_go() -> None:
    """Give the CUDA graphs back, as Inductor does where torch.compiler.reset() is called."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


vars(backend)["reset"] = _let_go


def hand_over_biases(graph: fx.GraphModule) -> None:
    """Let the operator ψ take the gradient of the bias before it, which its kernel sums on the way.

    Inductor sums it so for an activation; the operator is closed to it, and z's gradient would be read once more. The
    bias of a dense layer whose result goes to ψ and nowhere else no longer takes part in the layer's own backward.
    """
    for part in _parts(graph):
        for node in part.graph.nodes:
            _hand_over(node)
        part.recompile()


def _hand_over(psi: fx.Node) -> None:
    from .psi_op import psi_op

    layer = psi.args[0] if psi.target is psi_op._opoverload and len(psi.args) < _PLACES else None
    bias = _bias_of(layer) if isinstance(layer, fx.Node) and len(layer.users) == 1 else None
    if not isinstance(layer, fx.Node) or bias is None:
        return
    with layer.graph.inserting_before(layer):
        alone = layer.graph.call_method("detach", (bias,))
    alone.meta = {**layer.meta, "example_value": bias.meta["example_value"].detach()}
    layer.replace_input_with(bias, alone)
    psi.args = (*psi.args, bias)


_PLACES = 7  # of the operator's arguments, the last of which is the bias


def _bias_of(layer: fx.Node) -> fx.Node | None:
    """The bias of a dense layer, where it has one of as many numbers as channels, that is trained."""
    if layer.target is not torch.nn.functional.linear:
        return None
    bias = layer.args[2] if len(layer.args) > 2 else layer.kwargs.get("bias")
    if not isinstance(bias, fx.Node):
        return None
    value, z = bias.meta.get("example_value"), layer.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or not isinstance(z, torch.Tensor):  # graphs that were split may not say
        return None
    trained = value.requires_grad and z.requires_grad  # not where gradients are switched off around the layer
    return bias if trained and value.shape == z.shape[-1:] else None


def computes_psi(graph: fx.GraphModule) -> bool:
    """Whether a graph of torch.compile's holds a D-activation: by the file that its calls stand in."""
    return any(_of_psi(node) for part in _parts(graph) for node in part.graph.nodes)


def ends_a_block(graph: fx.GraphModule) -> bool:
    """Whether a D-activation in the graph takes a sum, as those at the ends of a ResNet's blocks do."""
    nodes = [node for part in _parts(graph) for node in part.graph.nodes]
    return any(_of_psi(node) and any(map(_adds, node.all_input_nodes)) for node in nodes)


def _parts(graph: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph, and those in it: what is checkpointed has one of its own."""
    return [part for part in graph.modules() if isinstance(part, fx.GraphModule)]


def _of_psi(node: fx.Node) -> bool:
    return _PSI in (node.stack_trace or "")


def _adds(node: fx.Node) -> bool:
    return not _of_psi(node) and node.target in _SUMS


_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
