"""bypass_fx: bypass stationary points by model surgery over torch.fx graphs.

`extend` a model whose training has slowed down, let the optimiser walk in the larger space under a `BypassSchedule`,
and `contract` it: the original architecture again.
"""

from .constraint import norms, penalty
from .passes.errors import BypassError, PlanError, SurgeryError
from .passes.plan import Plan, Refusal, Site
from .surgery import ContractionReport, contract, extend, plan, sites

__version__ = "0.1.0"

__all__ = [
    "BypassError",
    "ContractionReport",
    "Plan",
    "PlanError",
    "Refusal",
    "Site",
    "SurgeryError",
    "contract",
    "extend",
    "norms",
    "penalty",
    "plan",
    "sites",
]
