"""An inspection: a model, its plan, and what is known of every value and site of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx, nn

from bypass_fx.passes.activation_calls import Calls
from bypass_fx.passes.elementwise import activation_input
from bypass_fx.passes.errors import PlanError
from bypass_fx.passes.link import Linked
from bypass_fx.passes.match import match
from bypass_fx.passes.multihead import is_multihead_site
from bypass_fx.passes.plan import Mode, Plan, Site
from bypass_fx.passes.units import ExampleInputs, Spot
from bypass_fx.passes.value_shapes import ValueShapes
from bypass_fx.surgery import Select, linked_plan
from bypass_fx.usual_inputs import as_inputs, usual_inputs

from .facts import Costs, Facts, Shape, batch_of, costs, facts


@dataclass(frozen=True)
class Inspection:
    """What can be said about a model before the surgery; nothing of it is changed, and nothing is computed.

    Attributes:
        inputs: what the shapes are for; None where nothing tells the model's inputs.
    """

    name: str
    model: nn.Module
    linked: Linked
    plan: Plan
    inputs: ExampleInputs | None

    @cached_property
    def spots(self) -> dict[str, Spot]:
        """Where every activation call stands, by the name of its site or refusal."""
        return {name: spot for name, spot, _ in Calls(self.linked, self.inputs).all()}

    @cached_property
    def run(self) -> ValueShapes | None:
        """The shapes of all values, from one run on tensors without data."""
        values = [Spot(unit, node) for unit, owned in self.linked.graphs.items() for node in owned.graph.nodes]
        return ValueShapes(self.linked, values, self.inputs) if self.inputs is not None else None

    @cached_property
    def run_to_sites(self) -> ValueShapes | None:
        """As `run`, for the inputs of the sites alone, which takes a part of the time."""
        if self.inputs is None or "run" in self.__dict__:
            return self.run
        return ValueShapes(self.linked, filter(None, map(self.z, self.plan.sites)), self.inputs)

    def z(self, site: Site) -> Spot | None:
        """The value that a site's activation reads, or one of the same positions: the call itself, where what it reads is
        no traced value, and the values that a torch.nn.MultiheadAttention is called with.

        None where the site stands in code without a graph.
        """
        spot = self.spots.get(site.name)
        if spot is not None:
            return Spot(spot.unit, activation_input(spot.node) or spot.node)
        if not is_multihead_site(self.linked, site):
            return None
        caller = self.linked.callers[site.owner][0]
        value = caller.node.args[2] if len(caller.node.args) > 2 else caller.node.kwargs.get("value")
        return Spot(caller.unit, value) if isinstance(value, fx.Node) else None

    def shape(self, spot: Spot) -> Shape | None:
        """The shape of a value; None where no run reached it."""
        return self.run.shapes.get(spot) if self.run else None

    @cached_property
    def facts(self) -> dict[str, Facts]:
        """Shapes and costs of every site, by name."""
        shapes = self.run_to_sites.shapes if self.run_to_sites else {}
        known = {site.name: shapes.get(z) for site in self.plan.sites if (z := self.z(site))}
        return {site.name: facts(self.linked.model, site, known.get(site.name)) for site in self.plan.sites}

    @cached_property
    def costs(self) -> Costs:
        """What the plan adds to the model."""
        batch = batch_of(self.inputs) if self.inputs is not None else None
        flops = self.run_to_sites.flops if self.run_to_sites else None
        return costs(self.linked.model, self.plan, self.facts.values(), batch, flops)

    @cached_property
    def not_strict(self) -> dict[str, str]:
        """Why a call is no strict site, by name."""
        return {refusal.name: refusal.reason for refusal in match(self.linked, "strict", self.inputs).refusals}


def inspect(
    model: nn.Module,
    name: str = "",
    *,
    mode: Mode = "auto",
    select: Select | None = None,
    example_inputs: ExampleInputs | None = None,
    plan: Plan | None = None,
) -> Inspection:
    """Look at a model: where it can be bypassed and why not elsewhere, with shapes and costs.

    Args:
        model: any module, on any device (meta included); it is not changed.
        name: what the pictures call it; its class if empty.
        mode, select, example_inputs: as for `bypass_fx.plan`. The shapes are for the example inputs, or for the usual
            inputs of timm's and torchvision's models.
        plan: a plan made before, shown instead of a new one.

    Raises:
        PlanError, SurgeryError: as `bypass_fx.plan`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inspect(net, example_inputs=(torch.zeros(3, 4),)).facts["1"].z
        (3, 8)
    """
    linked, found = linked_plan(model, mode, select, example_inputs)
    if plan is not None:
        _check_fit(found, plan)
    given = as_inputs(example_inputs)
    inputs = given if given is not None else usual_inputs(linked.model)
    return Inspection(name or type(linked.model).__name__, model, linked, plan or found, inputs)


def _check_fit(found: Plan, plan: Plan) -> None:
    known = {site.name for site in found.sites} | {refusal.name for refusal in found.refusals}
    missing = next((site.name for site in plan.sites if site.name not in known), None)
    if missing is not None:
        raise PlanError(f"the model has no activation call {missing!r} as in the plan; plan this model anew")
