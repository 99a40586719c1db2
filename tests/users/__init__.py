"""Models as people write them, each small: what their repositories hold, with the habits that make surgery hard."""

from . import images, sequences, vectors
from .registry import USERS

__all__ = ["USERS", "images", "sequences", "vectors"]
