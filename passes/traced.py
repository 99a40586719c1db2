"""What a forward gets in place of its values: its steps become nodes, and questions that have no answer yet end the trace."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, fx

from .errors import UntraceableError
from .facts import is_size
from .messages import makes_error, says_something
from .recording import asked_by_a_forward
from .source import is_tried, reads_class
from .splice import part_of_size, parts_of
from .unpacked import unpacked_into

if TYPE_CHECKING:
    from .tracer import OwnerTracer


_NUMBER, _SIZE = "needs the number that a value holds", "needs the number that a size is, as `range(x.shape[1])` does"

_AXES = {"ndim", "dim", "ndimension"}

# What a value says of itself that a write in place changes.
_CHANGING = {"shape", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn", "_version", "data", "T", "mT", "H", "mH"}


class Traced(fx.Proxy):
    """What a forward gets in place of a value: what it does with it becomes a node, or is refused."""

    __array_priority__ = torch.Tensor.__array_priority__  # NumPy's numbers leave `np.sqrt(2) * x` to x

    # Made by fx's own __init__: what compiles a forward looks into a frame of ours, and asks for the class of what is not yet
    # made.

    @property  # type: ignore[misc]  # nobody sets it
    def __class__(self) -> type:
        """To a forward that reads it, the type of the value that this stands for."""
        tracer = cast("OwnerTracer", self.__dict__["tracer"])
        asked = tracer.recorder.active() is tracer and reads_class(sys._getframe(1)) and asked_by_a_forward()
        return tracer.python_type(self) if asked else type(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if asked_by_a_forward():
            self.refuse(f"sets the attribute `{name}` of a traced value")
        super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __getattr__(self, k: str) -> Any:
        tracer: Any = self.tracer
        if type(self) is TracedValue and tracer.containers.get(self.node) is Tensor and not hasattr(Tensor, k):
            raise AttributeError(f"'Tensor' object has no attribute {k!r}")
        if str(sys._getframe(1).f_globals.get("__name__")).startswith("numpy."):
            self.refuse("hands a traced value to NumPy")
        if k in _AXES and (rank := tracer.sizes.known(self.node)) is not None:
            return rank if k == "ndim" else lambda: rank
        attribute = TracedAttribute(self, k)
        if k in _CHANGING:
            _ = attribute.node  # read now: it may be another where it is used (`unsqueeze_`, `requires_grad_`)
        return attribute

    def __iter__(self) -> Iterator[Any]:
        value: Any = self
        names = unpacked_into(sys._getframe(1))
        if names is None:
            return self.tracer.iter(self)
        before, after = names
        if after is None:
            return (value[index] for index in range(before))
        if part_of_size(self.node) is None:
            return self.tracer.iter(self)
        middle = self.tracer.iter(value[before : -after or None])
        return iter([*(value[i] for i in range(before)), *middle, *(value[i] for i in range(-after, 0))])

    def __len__(self) -> int:
        """How many parts it is cut into, or the number of axes that this trace is made for; Python asks for it too, before
        it runs over the items.
        """
        if not asked_by_a_forward():
            return self.refuse(_NUMBER)
        names = unpacked_into(sys._getframe(1))
        if names is not None and names[1] is None:
            return names[0]
        parts = parts_of(self.node, surely=True)
        if parts is None and parts_of(self.node) is not None:
            raise TypeError("a batch may have fewer rows than parts were asked for")  # list() goes on without a length
        count = cast("OwnerTracer", self.tracer).sizes.length(self.node) if parts is None else parts
        return self.refuse(_NUMBER) if count is None else count

    def refuse(self, reason: str) -> NoReturn:
        """End the trace."""
        cast("OwnerTracer", self.tracer).refuse(f"its forward {reason}, which a graph can't hold")

    def give_up(self, reason: str) -> NoReturn:
        """End the trace where the error reaches it: torch's functions try whether a size is a number, drop the error, and
        take the size as the traced value that it is.
        """
        if is_tried(sys._getframe(2), cast("OwnerTracer", self.tracer).trying):
            self.refuse(reason)
        raise UntraceableError(f"its forward {reason}, which a graph can't hold")


def _refusing(name: str, what: str) -> Callable[..., Any]:
    original = getattr(fx.Proxy, name, None)

    def answer(self: Any, *args: Any) -> Any:
        if original is not None and not asked_by_a_forward():
            return original(self, *args)
        tracer, frame = cast("OwnerTracer", self.tracer), sys._getframe(1)
        if name == "__int__" and makes_error(frame) and not is_tried(frame, tracer.trying):
            return tracer.numbers.standing_for(self.node)
        reason = _SIZE if what is _NUMBER and is_size(self.node) else what
        return self.give_up(reason) if name == "__index__" else self.refuse(reason)

    return answer


for _names, _what in {
    ("__hash__",): "uses a traced value as a key",
    ("__int__", "__float__", "__complex__", "__index__", "__array__"): _NUMBER,
    ("__copy__", "__deepcopy__"): "copies a traced value as an object",
}.items():
    for _name in _names:
        setattr(Traced, _name, _refusing(_name, _what))


def _text(self: Any, *form: Any) -> str:
    if asked_by_a_forward() and not says_something(sys._getframe(1)):
        self.refuse("makes a text of a traced value")
    return f"<{self.node}>"


for _name in ("__str__", "__repr__", "__format__"):
    setattr(Traced, _name, _text)


def _augmented(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """`x += y` overwrites x; fx.Proxy itself would fall back to `x = x + y`."""
    operation = getattr(operator, name)

    def assign(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return assign


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(Traced, f"__{_name}__", _augmented(_name))


class TracedAttribute(Traced, fx.proxy.Attribute):
    """`x.shape`, `x.dtype`, `x.view`: a traced value, or a method about to be called."""


class TracedValue(Traced):
    """A traced value."""


class StoredTensor(Traced):
    """A parameter or buffer: a traced value whose shape is known; that it was asked for is noted."""

    def __init__(self, node: fx.Node, tracer: OwnerTracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.__dict__.update(stored=tensor)

    @property
    def shape(self) -> torch.Size:
        tracer: Any = self.tracer
        tracer.asked_for_shape(str(self.node.target), self.stored)
        return cast(Tensor, self.stored).shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]
