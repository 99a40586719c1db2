"""The ways back to the original architecture, one file for each."""

from .base import Comeback, Moment
from .homotopy import Homotopy
from .lagrangian import AugmentedLagrangian
from .paths import PATHS, Descent
from .penalty import Penalty
from .proximal import Proximal
from .table import COMEBACKS, resolve
from .variety import Variety

__all__ = [
    "COMEBACKS",
    "PATHS",
    "AugmentedLagrangian",
    "Comeback",
    "Descent",
    "Homotopy",
    "Moment",
    "Penalty",
    "Proximal",
    "Variety",
    "resolve",
]
