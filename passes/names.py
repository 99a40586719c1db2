"""The paths of a model's modules and tensors."""

from __future__ import annotations

from torch import Tensor, nn


class ModelNames:
    """The paths of a model's modules and tensors, by identity; one that stands in several places has several.

    `first` holds each module by the first of its paths.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[int, list[str]] = {}
        self.tensors: dict[int, list[str]] = {}
        self.first: dict[str, nn.Module] = {}
        places: list[tuple[str, nn.Module]] = []
        _list_modules("", model, places)
        for path, module in places:
            self.modules.setdefault(id(module), []).append(path)
            if len(self.modules[id(module)]) == 1:
                self.first[path] = module
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.tensors.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
        self._shared = [paths for paths in (*self.modules.values(), *self.tensors.values()) if len(paths) > 1]
        self._aliased = {path: paths[0] for paths in self._shared for path in paths}

    def aliases(self, owner: str) -> frozenset[tuple[str, ...]]:
        """What stands below the owner under several names: graphs call it by the first."""
        below = (tuple(name for path in paths if (name := _below(owner, [path])) is not None) for paths in self._shared)
        return frozenset(names for names in below if len(names) > 1)

    def module(self, owner: str, module: nn.Module) -> str | None:
        """The first path of a module below the owner ("" for the owner itself); None where it stands elsewhere."""
        return _below(owner, self.modules.get(id(module), []))

    def tensor(self, owner: str, tensor: Tensor) -> str | None:
        """The first path of a parameter or buffer below the owner; None where it stands elsewhere."""
        return _below(owner, self.tensors.get(id(tensor), []))

    def first_name(self, name: str) -> str:
        """The first of a module's or a tensor's names."""
        return self._aliased.get(name, name)

    def holders(self, tensor: Tensor) -> int:
        """Under how many names the model holds the tensor."""
        return len(self.tensors.get(id(tensor), []))


def _list_modules(path: str, module: nn.Module, places: list[tuple[str, nn.Module]]) -> None:
    """Note a module and all below it with their paths, as often as they stand somewhere."""
    places.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _list_modules(f"{path}.{name}" if path else name, child, places)


def _below(owner: str, paths: list[str]) -> str | None:
    if not owner:
        return paths[0] if paths else None
    for path in paths:
        if path == owner:
            return ""
        if path.startswith(owner) and path[len(owner)] == ".":
            return path[len(owner) + 1 :]
    return None
