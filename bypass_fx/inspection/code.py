"""The code that the surgery writes: every owner's forward before and after, and what runs in an extended model."""

from __future__ import annotations

import difflib
import linecache
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from bypass_fx.activation import psi
from bypass_fx.extension import root_of
from bypass_fx.passes.extended import made_of
from bypass_fx.passes.folding import fold_names
from bypass_fx.passes.generate import is_extended_owner, original_class, source_of
from bypass_fx.passes.insert import units_of
from bypass_fx.passes.link import Linked
from bypass_fx.passes.plan import Plan, Site


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The methods of owners that share their code, as the same generator writes them without and with ψ."""

    owners: tuple[str, ...]
    module: str
    before: str
    after: str

    @property
    def title(self) -> str:
        """The owners, folded, and their class."""
        names = ", ".join(fold_names([owner or "(model)" for owner in self.owners]))
        times = f" ×{len(self.owners)}" if len(self.owners) > 1 else ""
        return f"{names}{times} ({self.module})"

    def diff(self) -> list[str]:
        """The lines of a unified diff from before to after."""
        before, after = self.before.splitlines(), self.after.splitlines()
        return list(difflib.unified_diff(before, after, "before", "after", lineterm="", n=100))


def rewritten(linked: Linked, plan: Plan) -> list[Rewritten]:
    """The code of every owner of a plan, those that share it together; the model is not changed."""
    owners: dict[str, list[Site]] = {}
    for site in plan.sites:
        owners.setdefault(site.owner, []).append(site)
    groups: dict[tuple[type[nn.Module], str, str], list[str]] = {}
    for path, sites in owners.items():
        units, cls = units_of(linked, sites), type(linked.modules[path])
        before, after = (source_of(cls, made_of(linked, units, some, psi).methods)[0] for some in ([], sites))
        groups.setdefault((cls, before, after), []).append(path)
    return [Rewritten(tuple(paths), key[0].__name__, *key[1:]) for key, paths in groups.items()]


def print_readable(model: nn.Module, print_output: bool = True) -> str:
    """The forwards that run in an extended model, as torch.fx wrote them; owners that share their code stand together.

    Args:
        model: an extended model.
        print_output: whether to print the text too.

    Raises:
        SurgeryError: the model is not extended.

    Example:
        >>> import bypass_fx
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> "psi(_1, _0, delta_1, -1)" in print_readable(bypass_fx.extend(net), print_output=False)
        True
    """
    root = root_of(model)
    classes: dict[type[nn.Module], list[str]] = {}
    for path, module in root.named_modules():
        if is_extended_owner(module):
            classes.setdefault(type(module), []).append(path or "(model)")
    text = "\n".join(
        f"# {', '.join(fold_names(paths))} ({original_class(root.get_submodule(_path(paths[0]))).__name__})\n{code}"
        for cls, paths in classes.items()
        for code in _codes(cls)
    )
    if print_output:
        print(text)
    return text


def _path(name: str) -> str:
    return "" if name == "(model)" else name


def _codes(cls: type[nn.Module]) -> Iterator[str]:
    """The generated source behind a class; its methods stand in one text."""
    files = {method.__code__.co_filename for method in vars(cls).values() if hasattr(method, "__code__")}
    for file in sorted(file for file in files if file.startswith("<bypass_fx")):
        yield "".join(linecache.getlines(file))
