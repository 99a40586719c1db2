"""What a plan adds to a model, in words: coefficients, the walk with ψ, the way back, and what the figures are for."""

from __future__ import annotations

from textwrap import shorten

from bypass_fx.passes.folding import summary

from .facts import Costs, Shape
from .inspection import Inspection
from .panel import si


def in_words(inspection: Inspection) -> list[str]:
    """What the plan adds to the model, estimated from shapes, with what the figures count; a line for each part."""
    costs = inspection.costs
    lines = [f"{summary(inspection.plan)}; {_share(costs)} of the model's {costs.parameters} parameters"]
    if inspection.plan.sites:
        lines += [f"opt1: {_walk(costs)}", f"opt2: {_return(costs)}", _basis(inspection)]
    return lines


def _share(costs: Costs) -> str:
    return (
        f"{costs.share:.2g}".rstrip(".")
        if costs.share >= 1
        else f"{costs.share:.2%}"
        if costs.share >= 1e-4
        else "<0.01%"
    )


def _walk(costs: Costs) -> str:
    memory = f"δ, its gradient and Adam's two moments take {si(costs.coefficient_bytes)}B"
    if costs.psi_flops is None or costs.kept_bytes is None:
        return f"ψ adds 2 FLOP per element of z forward, 4 backward; {memory}; give example inputs (--input) for totals"
    of = f" ({costs.psi_flops / costs.forward_flops:.2%} of the model's)" if costs.forward_flops else ""
    return (
        f"ψ adds {si(costs.psi_flops)}FLOP a sample forward{of}, twice that backward, and keeps z, at most "
        f"{si(costs.kept_bytes)}B a sample; {memory}"
    )


def _return(costs: Costs) -> str:
    flops, memory = si(costs.product_flops), si(costs.product_bytes)
    beside = ""
    if costs.forward_flops:
        samples = costs.product_flops / costs.forward_flops
        beside = f" ({f'{samples:.2g}' if samples >= 0.01 else 'under 0.01'} samples' forward)"
    return (
        f"where the way back asks for the constraint, its products add {flops}FLOP{beside} and {memory}B a step; "
        "a penalty's backward takes about twice that"
    )


def _basis(inspection: Inspection) -> str:
    if inspection.inputs is None:
        return "Estimates from shapes; the sizes of z are not known, as nothing tells this model's input."
    given = inspection.inputs.values() if not isinstance(inspection.inputs, tuple) else inspection.inputs
    tensors = [item for value in given for item in (value if isinstance(value, list) else [value])]
    shapes = ", ".join(_by(tuple(tensor.shape)) for tensor in tensors if hasattr(tensor, "shape"))
    run = inspection.run_to_sites
    failed = f"; the run ended early: {shorten(run.failure, 100)}" if run and run.failure else ""
    return f"Estimates from shapes, for an input of {shapes}{failed}."


def _by(shape: Shape) -> str:
    return "×".join(map(str, shape))
