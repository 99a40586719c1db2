"""Attributes of Python's, torch's and a model's classes that are others for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

Hook = tuple[Any, str, Any]  # of what, the attribute's name, and what it is meanwhile
_INHERITED = object()


class Hooks:
    """The hooks that are set now."""

    def __init__(self) -> None:
        self._set: list[tuple[Any, str, Any, Any]] = []

    @contextmanager
    def set(self, *hooks: Hook) -> Iterator[None]:
        """Set hooks for as long as this lasts."""
        count = len(self._set)
        try:
            for thing, name, hook in hooks:
                self._set.append((thing, name, vars(thing).get(name, _INHERITED), hook))
                setattr(thing, name, hook)
            yield
        finally:
            while len(self._set) > count:
                _take_off(*self._set.pop()[:3])

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Take all hooks off for as long as this lasts."""
        for thing, name, original, _ in reversed(self._set):
            _take_off(thing, name, original)
        try:
            yield
        finally:
            for thing, name, _, hook in self._set:
                setattr(thing, name, hook)

    @contextmanager
    def hidden_from_the_compiler(self) -> Iterator[None]:
        """Let torch's compiler, where a forward is the first to need it, find all as it is: it keeps what it finds."""
        imports = _CompilerImports(self)
        sys.meta_path.insert(0, imports)
        try:
            yield
        finally:
            sys.meta_path.remove(imports)


def _take_off(thing: Any, name: str, original: Any) -> None:
    if original is _INHERITED:
        delattr(thing, name)
    else:
        setattr(thing, name, original)


class _CompilerImports(MetaPathFinder, Loader):
    """Imports torch's compiler without the hooks."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self.loader: Any = None

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "torch._dynamo":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        spec = module.__spec__
        spec.loader = module.__loader__ = self.loader
        with self.hooks.lifted():
            self.loader.exec_module(module)
