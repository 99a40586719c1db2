"""What a call of `module.name` runs: a method of its class, or a callable that the module or its class holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

Function = Callable[..., Any]


def function_of(module: nn.Module, name: str) -> Function:
    """The function of (module, *arguments) that a call of `module.name` runs."""
    if name in module.__dict__:
        held: Any = module.__dict__[name]
        bound = isinstance(held, MethodType) and held.__self__ is module
        return held.__func__ if bound else _taking_the_module(held)
    if isinstance(inspect.getattr_static(type(module), name), staticmethod | type(torch.relu)):
        return _taking_the_module(getattr(type(module), name))
    method: Function = getattr(type(module), name)
    return method


def is_held(module: nn.Module, name: str) -> bool:
    """Whether the instance itself holds what it calls by that name (a method of the class alone does not shadow it)."""
    return name in module.__dict__


def signature_of(function: Function) -> inspect.Signature | None:
    """The signature of a function, the module's argument included; None where it is not plain Python code."""
    own = getattr(function, "__signature__", None)
    return own if isinstance(own, inspect.Signature) else _signature(function)


def is_callable_attribute(module: nn.Module, name: str) -> bool:
    """Whether the module or its class holds a callable of this name that is no method, module or class."""
    if name in module.__dict__:
        held = module.__dict__[name]
    else:
        held = inspect.getattr_static(type(module), name, None)
        if not isinstance(held, staticmethod | type(torch.relu)):
            return False
    return callable(held) and not isinstance(held, nn.Module | type) and not hasattr(nn.Module, name)


@cache
def _signature(function: Function) -> inspect.Signature | None:
    if not isinstance(inspect.unwrap(function), FunctionType):
        return None
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    return signature if signature.parameters else None


def _taking_the_module(held: Function) -> Function:
    """The callable with the module as one more argument in front."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return held(*args, **kwargs)

    kind = inspect.Parameter
    try:
        own = list(inspect.signature(held).parameters.values())
    except (TypeError, ValueError):  # one of torch's builtins: it takes the activation's input, and options
        own = [
            kind("input", kind.POSITIONAL_OR_KEYWORD),
            kind("args", kind.VAR_POSITIONAL),
            kind("kwargs", kind.VAR_KEYWORD),
        ]
    own = [p for p in own if p.name != "self"]
    call.__signature__ = inspect.Signature([kind("self", kind.POSITIONAL_ONLY), *own])  # type: ignore[attr-defined]
    call.__wrapped__ = held  # type: ignore[attr-defined]
    return call


def is_leaf(module: nn.Module) -> bool:
    """Whether the module is known by its class: torch's own forward, and no children but its parametrisations."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    forward = getattr(type(module).forward, "__module__", "")
    if "forward" in module.__dict__:
        return False
    return str(forward).startswith("torch.nn.modules") and module._modules.keys() <= {"parametrizations"}


def is_container(module: nn.Module) -> bool:
    """Whether the module is one of torch's lists or dicts, which are not called."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
