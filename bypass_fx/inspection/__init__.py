"""Seeing a model: its sites with shapes and costs, its graph as a picture, and the code that the surgery writes."""

from .code import Rewritten, print_readable, rewritten
from .export import ExportError, as_networkx, write
from .facts import Costs, Facts
from .inspection import Inspection, inspect
from .picture import Edge, Node, Picture, draw
from .residuals import Residuals, RunError, read_residuals

__all__ = [
    "Costs",
    "Edge",
    "ExportError",
    "Facts",
    "Inspection",
    "Node",
    "Picture",
    "Residuals",
    "Rewritten",
    "RunError",
    "as_networkx",
    "draw",
    "inspect",
    "print_readable",
    "read_residuals",
    "rewritten",
    "write",
]
