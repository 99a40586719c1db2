"""The errors that the package raises on purpose; each message names the module path and the fix."""


class BypassError(Exception):
    """Base of every error that bypass_fx raises on purpose."""


class PlanError(BypassError):
    """A plan can't be made, or doesn't fit the model it is applied to."""


class SurgeryError(BypassError):
    """The model is in the wrong state for the operation (extended already, or not extended)."""


class UntraceableError(BypassError):
    """An owner's forward can't be written down as a graph."""


def in_short(error: Exception) -> str:
    """What a user's code raised: its kind, and the first line of what it says.

    Example:
        >>> in_short(ValueError("two\\nlines")), in_short(KeyError())
        ('ValueError: two', 'KeyError: ')
    """
    first, *_ = (*str(error).strip().splitlines(), "")
    return f"{type(error).__name__}: {first}"
