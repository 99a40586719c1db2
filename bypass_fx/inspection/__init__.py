"""Seeing a model: its sites with shapes and costs, its graph as a picture, and the code that the surgery writes."""

from .facts import Costs, Facts
from .inspection import Inspection, inspect

__all__ = ["Costs", "Facts", "Inspection", "inspect"]
