"""bypass_fx: bypass stationary points by model surgery over torch.fx graphs.

`extend` a model whose training has slowed down, let the optimiser walk in the larger space under a `BypassSchedule`,
and `contract` it: the original architecture again.
"""

from typing import TYPE_CHECKING, Any

from .accept import Accept, BeatsForecast, Condition, NotWorse
from .arrival import Total
from .comeback import AugmentedLagrangian, Comeback, Homotopy, Penalty, Proximal, Variety
from .constraint import norms, penalty
from .gamma import Adaptive, Exponential, Linear, PiecewiseLinear
from .passes.errors import BypassError, PlanError, SurgeryError
from .passes.plan import Plan, Refusal, Site
from .probe import ProbeReport, probe
from .schedule import BypassSchedule, NonFiniteError, ScheduleReport
from .stuck import SiteFlow, StuckReport, stuck
from .surgery import ContractionReport, contract, extend, plan, sites

if TYPE_CHECKING:
    from .inspection import print_readable
    from .trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Accept",
    "Adaptive",
    "AugmentedLagrangian",
    "BeatsForecast",
    "BypassError",
    "BypassSchedule",
    "Comeback",
    "Condition",
    "ContractionReport",
    "Exponential",
    "Homotopy",
    "Linear",
    "NonFiniteError",
    "NotWorse",
    "Penalty",
    "PiecewiseLinear",
    "Plan",
    "PlanError",
    "ProbeReport",
    "Proximal",
    "Refusal",
    "ScheduleReport",
    "Site",
    "SiteFlow",
    "StuckReport",
    "SurgeryError",
    "Total",
    "Trainer",
    "Variety",
    "contract",
    "extend",
    "norms",
    "penalty",
    "plan",
    "print_readable",
    "probe",
    "sites",
    "stuck",
]


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # it brings data loading along, which a loop of one's own does not need
        from .trainer import Trainer

        return Trainer
    if name == "print_readable":
        from .inspection import print_readable

        return print_readable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
