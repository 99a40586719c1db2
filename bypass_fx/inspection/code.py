"""The code that the surgery writes: every owner's forward before and after, and what runs in an extended model."""

from __future__ import annotations

import difflib
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from bypass_fx.activation import psi
from bypass_fx.extension import root_of
from bypass_fx.passes.folding import fold_names
from bypass_fx.passes.insert import prepare
from bypass_fx.passes.link import Linked
from bypass_fx.passes.plan import Plan
from bypass_fx.passes.subclass import is_extended_owner, original_class


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
    paths = {id(module): path for path, module in linked.modules.items()}
    groups: dict[tuple[type[nn.Module], str, str], list[str]] = {}
    for edit in prepare(linked, plan, psi):
        path = paths[id(edit.owner)]
        methods = dict.fromkeys(site.method for site in plan.sites if site.owner == path)
        before = "\n".join(_before(linked, path, method) for method in methods)
        groups.setdefault((type(edit.owner), before, "\n".join(_codes(edit.extended))), []).append(path)
    return [Rewritten(tuple(owners), cls.__name__, before, after) for (cls, before, after), owners in groups.items()]


def _before(linked: Linked, path: str, method: str) -> str:
    """The method as traced, one text for each way of calling it; its own source where it has no graph."""
    units = [unit for unit in (*linked.variants(path), *linked.methods(path)) if unit.method == method]
    texts = [linked.graphs[unit].graph.python_code("self").src.strip("\n") + "\n" for unit in units]
    if not texts:
        return textwrap.dedent(inspect.getsource(getattr(type(linked.modules[path]), method)))
    return "\n".join(text.replace("def forward(", f"def {method}(", 1) for text in texts)


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
