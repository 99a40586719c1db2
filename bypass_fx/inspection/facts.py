"""What a site comes to in a model: the shapes in its formula, and what its ψ and its constraint cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bypass_fx.passes.matrices import columns, rows, tensor_named
from bypass_fx.passes.plan import Plan, Site
from bypass_fx.passes.units import ExampleInputs

Shape = tuple[int, ...]
_PSI_FORWARD, _PSI_BACKWARD = 2, 4
_COPIES = 4  # δ, its gradient and the two moments of Adam
_BYTES = 4  # of a number in float32


@dataclass(frozen=True, slots=True)
class Facts:
    """One site's shapes and costs.

    Attributes:
        z: the shape of the activation's input for the example inputs; None where no run reached it.
        w, a: the shapes of the weights of W and A as they are stored; None for a relaxed site.
        product_flops: of A D W (and A D b_W), or of ‖D‖, computed once; the Gram form, where it is taken, needs fewer.
        product_entries: how many numbers A D W and the scaled A that it is made of hold.
    """

    z: Shape | None
    w: Shape | None
    a: Shape | None
    product_flops: int
    product_entries: int


@dataclass(frozen=True, slots=True)
class Costs:
    """What a plan adds to a model, estimated from shapes.

    ψ costs 2 FLOPs per element of z (a product and a sum) forward and 4 backward (∂z and ∂δ, a product and a sum each);
    for ∂δ each site keeps one more z until the backward pass, unless σ keeps it anyway. The coefficients stand four times in
    memory: δ, its gradient and Adam's two moments, in float32. A way back that needs the constraint computes A D W once a
    step, whatever the batch: 2 FLOPs per scalar product and term, and as much memory as the product and the scaled A take.
    A penalty's backward comes to about twice its forward. The figures per sample are None where z's shapes are not known.
    """

    coefficients: int
    parameters: int
    forward_flops: int | None
    psi_flops: int | None
    kept_bytes: int | None
    coefficient_bytes: int
    product_flops: int
    product_bytes: int

    @property
    def share(self) -> float:
        """The coefficients by the parameters of the model."""
        return self.coefficients / self.parameters if self.parameters else math.inf


@torch.no_grad()
def facts(model: nn.Module, site: Site, z: Shape | None) -> Facts:
    """The shapes and costs of one site."""
    if site.first is None or site.second is None:
        return Facts(z, None, None, 2 * site.width, site.width)
    w, a = rows(model, site.first), columns(model, site.second, site.width)
    flops, entries = _product_cost(w.shape, a.shape, site.constraint == "augmented")
    w_stored, a_stored = (tuple(tensor_named(model, affine.weight).shape) for affine in (site.first, site.second))
    return Facts(z, w_stored, a_stored, flops, entries)


def _product_cost(w: torch.Size, a: torch.Size, augmented: bool) -> tuple[int, int]:
    """FLOPs and numbers of A D [W b_W]: w is (groups, n / groups, columns), a is (groups, rows, n / groups)."""
    cells, n = max(w[0], a[0]), w[0] * w[1]
    wide, high = w[2] + augmented, a[1]
    if cells % w[0] or cells % a[0]:  # groups that cut through each other are multiplied as dense matrices
        cells, wide, high = 1, w[0] * w[2] + augmented, a[0] * a[1]
    scaled = n * high
    return scaled + 2 * n * high * wide, scaled + cells * high * wide


def costs(model: nn.Module, plan: Plan, found: Iterable[Facts], batch: int | None, forward_flops: int | None) -> Costs:
    """The sums over a plan's sites; `batch` samples made the shapes, and `forward_flops` (all samples together)."""
    found = list(found)
    shapes = [fact.z for fact in found]
    elements = sum(math.prod(z) for z in shapes if z is not None)
    known = batch is not None and None not in shapes
    size = max((p.element_size() for p in model.parameters() if p.is_floating_point()), default=_BYTES)
    return Costs(
        coefficients=plan.coefficients,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        forward_flops=forward_flops // batch if forward_flops and batch else None,
        psi_flops=_PSI_FORWARD * elements // batch if known and batch else None,
        kept_bytes=size * elements // batch if known and batch else None,
        coefficient_bytes=_COPIES * _BYTES * plan.coefficients,
        product_flops=sum(fact.product_flops for fact in found),
        product_bytes=_BYTES * sum(fact.product_entries for fact in found),
    )


def psi_flops(elements: int) -> tuple[int, int]:
    """FLOPs of ψ on so many elements of z, forward and backward.

    Example:
        >>> psi_flops(1000)
        (2000, 4000)
    """
    return _PSI_FORWARD * elements, _PSI_BACKWARD * elements


def batch_of(inputs: ExampleInputs) -> int | None:
    """How many samples example inputs hold: the first axis of the first tensor, or the length of a list of tensors."""
    first = next(iter(inputs.values() if not isinstance(inputs, tuple) else inputs), None)
    if isinstance(first, Tensor):
        return first.shape[0] if first.dim() else None
    return len(first) if isinstance(first, list) else None
