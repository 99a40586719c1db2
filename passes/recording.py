"""While a forward is traced: its reads from modules are reported, its module calls become nodes, its writes are reported.

Setting a hook on torch.nn.Module itself is slow, for every subclass is told of it: hooks are set once for all the forwards
of a model, and those on reads on the classes of its modules alone.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from torch import fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx._symbolic_trace import _new_patcher, _patch_wrapped_functions
from torch.nn.utils import stateless
from torch.utils._python_dispatch import TorchDispatchMode

from .dice import Dice, dice, put_back
from .hooks import Hook, Hooks


class Listener(Protocol):
    """What a running trace does with the events."""

    new_modules: dict[int, nn.Module]  # which the forward has made, and may set attributes of; by id

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """The forward read an attribute; the answer is what it sees."""

    def read_inherited(self, module: nn.Module, name: str, value: Any) -> None:
        """The forward read an attribute that the module has from its class."""

    def read_missing(self, module: nn.Module, name: str) -> None:
        """The forward looked for an attribute that the module does not have."""

    def read_all(self, module: nn.Module) -> None:
        """The forward took the dict of a module's attributes."""

    def is_instance(self, value: Any, classes: Any) -> bool | None:
        """The forward asked isinstance(); None leaves the answer to Python."""

    def wrote(self, module: nn.Module, name: str, value: Any) -> None:
        """The forward sets an attribute; it is set when this returns."""

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward called a module; the answer is the result that it sees."""

    def made(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward made a tensor from nothing; the answer is what it sees."""

    def takes(self, frame: FrameType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The code of the frame calls a function of torch's with these arguments."""

    def refuse(self, reason: str) -> NoReturn:
        """The forward did what no graph can hold; a forward that catches the error has done it all the same."""


class Recorder:
    """Holds the listener of the trace that runs now; without one, modules of these classes behave as ever."""

    def __init__(self, classes: Set[type[nn.Module]]) -> None:
        self.classes = classes
        self.listener: Listener | None = None
        self.thread = threading.get_ident()
        self.depth = 0
        self.hooks = Hooks()
        self._dice: Dice | None = None

    def active(self) -> Listener | None:
        """The listener, where this thread is the one that traces."""
        return self.listener if threading.get_ident() == self.thread else None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks on torch.nn.Module for as long as this lasts; may be nested. Other threads' wait until it ends."""
        if self.depth:
            yield
            return
        with _ONE_THREAD:
            self.depth, self.thread, self._dice = 1, threading.get_ident(), dice()
            try:
                hidden = self.hooks.hidden_from_the_compiler()
                with hidden, _uncompiled(), _on_modules(self), _on_switches(self), _on_factories(self):
                    yield
            finally:
                self.depth = 0

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Send the events of a forward to a listener."""
        with self.installed(), _on_isinstance(self):
            self.listener = listener
            try:
                yield
            finally:
                self.listener = None

    def dice_rolled(self) -> bool:
        """Whether random numbers were drawn since this was asked last, or the hooks are in place; if so, they come again."""
        before = self._dice
        rolled = before is not None and before != dice()
        if before is not None and rolled:
            put_back(before)
        return rolled


_ONE_THREAD = threading.RLock()  # hooks come off in the reverse of the order in which they were set, or some stay


def _uncompiled() -> AbstractContextManager[Any]:
    """Run what is compiled as the Python that it was made of: compiled now, it would keep the hooks for good."""
    known = "torch._dynamo" in sys.modules  # nothing is compiled before it is imported, which takes long
    return torch.compiler.set_stance("force_eager") if known else contextlib.nullcontext()


_OF_EVERY_MODULE = frozenset(dir(nn.Module)) - {"training"}


@contextmanager
def _on_modules(recorder: Recorder) -> Iterator[None]:
    """Reads, calls and writes of torch.nn.Module."""
    original_init, original_setattr, original_call = nn.Module.__init__, nn.Module.__setattr__, nn.Module.__call__

    def calling(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        listener = recorder.active()
        return original_call(module, *args, **kwargs) if listener is None else listener.called(module, args, kwargs)

    def starting(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        listener = recorder.active()
        if listener is not None:
            listener.new_modules[id(module)] = module
        original_init(module, *args, **kwargs)

    def writing(module: nn.Module, name: str, value: Any) -> None:
        listener = recorder.active()
        if listener is not None and id(module) not in listener.new_modules:
            listener.wrote(module, name, value)
        else:
            original_setattr(module, name, value)

    on_modules = recorder.hooks.set(
        (nn.Module, "__init__", starting), (nn.Module, "__call__", calling), (nn.Module, "__setattr__", writing)
    )
    with on_modules, _new_patcher() as patcher:
        _patch_wrapped_functions(patcher)
        # What a forward reads from others than the model's is not noted; a class with its own way may ask nn.Module's.
        own_way = {cls for cls in recorder.classes if not _reads_as_torch_does(cls)}
        own_way |= set() if read_plainly(recorder.classes) else {nn.Module}
        with _on_reads(recorder, own_way or recorder.classes):
            yield


def _reading(recorder: Recorder, way: Callable[[nn.Module, str], Any]) -> Callable[[nn.Module, str], Any]:
    """A `__getattribute__` that reads in that way and reports it."""
    plainly, of_every_module = object.__getattribute__, _OF_EVERY_MODULE  # asked at every read of any module

    def reading(module: nn.Module, name: str) -> Any:
        value = way(module, name)
        if recorder.listener is None or name in of_every_module:
            if name == "__dict__" and recorder.active() and asked_by_a_forward():
                recorder.listener.read_all(module)  # type: ignore[union-attr]  # it is the active one
            return value
        listener = recorder.active()
        if listener is None or issubclass(type(value), fx.Proxy):  # a traced value was reported further in
            return value
        if name not in plainly(module, "__dict__"):
            listener.read_inherited(module, name, value)
            return value
        return listener.read(module, name, value)

    return reading


def _reading_registered(recorder: Recorder, way: Callable[[nn.Module, str], Any]) -> Callable[[nn.Module, str], Any]:
    """A `__getattr__` that reads in that way and reports it."""

    def reading_registered(module: nn.Module, name: str) -> Any:
        listener = recorder.active()
        try:
            value = way(module, name)
        except AttributeError:
            if listener is not None:
                listener.read_missing(module, name)
            raise
        reported = listener is None or issubclass(type(value), fx.Proxy)
        return value if listener is None or reported else listener.read(module, name, value)

    return reading_registered


def read_plainly(classes: Set[type[nn.Module]]) -> bool:
    """Whether attributes of these classes are read in torch's way."""
    ways = {(cls.__getattribute__, cls.__getattr__) for cls in classes}
    return ways <= {(object.__getattribute__, nn.Module.__getattr__)}


def _reads_as_torch_does(cls: type[nn.Module]) -> bool:
    """Whether the class reads attributes as nn.Module or another of torch's classes does: those ask the module within."""
    read, read_registered = cls.__getattribute__, cls.__getattr__
    return read is object.__getattribute__ and str(read_registered.__module__).split(".")[0] == "torch"


@contextmanager
def _on_reads(recorder: Recorder, classes: Set[type[nn.Module]]) -> Iterator[None]:
    """Reads of attributes from modules of these classes, each in the way of its class."""
    ways = {cls: (cls.__getattribute__, cls.__getattr__) for cls in classes}
    made = {way: (_reading(recorder, way[0]), _reading_registered(recorder, way[1])) for way in set(ways.values())}
    hooks = (
        (cls, name, hook)
        for cls, way in ways.items()
        for name, hook in zip(("__getattribute__", "__getattr__"), made[way], strict=True)
    )
    with recorder.hooks.set(*hooks):
        yield


@contextmanager
def _on_switches(recorder: Recorder) -> Iterator[None]:
    """What a forward does outside its values: switching a mode on, asking for one, and autograd functions."""

    def refused(original: Any, reason: str, always: bool = True) -> Callable[..., Any]:
        def refusing(*args: Any, **kwargs: Any) -> Any:
            listener = recorder.active()
            if listener is not None and (always or asked_by_a_forward()):
                listener.refuse(reason)
            return original(*args, **kwargs)

        return refusing

    original_apply = torch.autograd.Function.__dict__["apply"]

    def applying(cls: Any, *args: Any, **kwargs: Any) -> Any:
        listener = recorder.active()
        if listener is not None:
            listener.refuse(f"its forward applies the autograd function {cls.__name__}, which a graph can't hold")
        return original_apply.__get__(None, cls)(*args, **kwargs)

    original_question = torch.overrides.has_torch_function

    def asking(values: Any) -> bool:
        listener, asker = recorder.active(), str(sys._getframe(1).f_globals.get("__name__"))
        if listener is not None and asker.startswith("torch.nn.modules."):
            listener.refuse("its forward may run a fused path of torch's, which takes no traced values")
        return original_question(values)

    hooks: list[Hook] = []
    for cls, reason in _CONTEXTS.items():
        always = cls.__module__.startswith("torch")
        hooks.append((cls, "__enter__", refused(cls.__enter__, f"its forward {reason}", always)))
    reason = "its forward calls a module with other weights (functional_call), which a graph can't hold"
    hooks.append((stateless, "_functional_call", refused(stateless._functional_call, reason)))
    for name in ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"):
        reason = f"its forward asks torch.{name}, which can change between calls"
        hooks.append((torch, name, refused(getattr(torch, name), reason, False)))
    reason = "its forward switches gradients on or off, which a graph can't hold"
    hooks.append((torch.set_grad_enabled, "__init__", refused(torch.set_grad_enabled.__init__, reason, False)))
    hooks.append((torch.overrides, "has_torch_function", asking))
    hooks.append((torch.autograd.Function, "apply", classmethod(applying)))
    with recorder.hooks.set(*hooks):
        yield


_CONTEXTS: dict[Any, str] = {
    torch.autocast: "switches autocast, which a graph can't hold",
    saved_tensors_hooks: "uses activation checkpointing, which a graph can't hold",  # what checkpoints are made with
    contextlib._GeneratorContextManager: "enters a context manager, which a graph can't hold",
    TorchDispatchMode: "enters a dispatch mode, which a graph can't hold",
}


_FACTORY_NAMES = (
    "arange empty eye full linspace logspace ones rand randint randn randperm tensor zeros as_tensor tril_indices"
)
FACTORIES = {getattr(torch, name): name for name in _FACTORY_NAMES.split()}
_OF_DTYPES = {torch.finfo: "finfo", torch.iinfo: "iinfo"}  # they take no traced dtype either


@contextmanager
def _on_factories(recorder: Recorder) -> Iterator[None]:
    """torch.zeros and the like: run now, they would be frozen in, and they take no traced sizes."""

    def made_of(factory: Callable[..., Any]) -> Callable[..., Any]:
        def making(*args: Any, **kwargs: Any) -> Any:
            listener = recorder.active()
            by_forward = listener is not None and asked_by_a_forward()
            if factory in _OF_DTYPES and not any(isinstance(each, fx.Proxy) for each in (*args, *kwargs.values())):
                by_forward = False
            return listener.made(factory, args, kwargs) if listener and by_forward else factory(*args, **kwargs)

        return making

    with recorder.hooks.set(
        *((torch, name, made_of(factory)) for factory, name in {**FACTORIES, **_OF_DTYPES}.items())
    ):
        yield


@contextmanager
def _on_isinstance(recorder: Recorder) -> Iterator[None]:
    """isinstance() by whatever name the code has it; put there for one forward, since it slows down everybody's."""
    original, traced = builtins.isinstance, fx.Proxy

    def asking(value: Any, classes: Any) -> bool:
        if issubclass(type(value), traced):  # quicker than to ask for an instance, which reads the value's __class__
            listener = recorder.active()
            answer = listener.is_instance(value, classes) if listener and asked_by_a_forward() else None
            if answer is not None:
                return answer
        return original(value, classes)

    with recorder.hooks.set((builtins, "isinstance", asking)):
        yield


def asked_by_a_forward() -> bool:
    """Whether what calls the caller of this stands in the user's code, and not in torch's or this compiler's.

    `torch.is_tensor`, in the package's own file, asks on behalf of the user.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") == "contextlib":
        frame = frame.f_back
    return not str(frame.f_globals.get("__name__", "")).startswith(("torch.", f"{__package__}."))
