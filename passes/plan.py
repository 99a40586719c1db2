"""What a surgery will do, as plain data: affine maps, sites, refusals and the plan that holds them; JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from . import plan_text
from .errors import PlanError

Kind = Literal["strict", "relaxed"]
Constraint = Literal["folded", "augmented", "zero"]
Exact = Literal["always", "eval"]
Mode = Literal["auto", "strict", "relaxed", "all"]

MODES: tuple[Mode, ...] = ("auto", "strict", "relaxed", "all")
FORMAT = 2
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Affine:
    """One affine map beside an activation: W in front of it, or A behind it.

    `weight` and `bias` are qualified names in the model. The weight is read as a matrix per tap and group; `stored`
    says how its axes lie: "out_in" (Linear and convolutions), "in_out" (a transposed matrix, and transposed
    convolutions). `norm` names a BatchNorm that belongs to the map in eval mode. `part` names the outputs that belong to
    the site, as ranges (start, stop) in the order of its channels, where it is not all of them: of a fused q, k, v
    projection the last third. A weight or a bias that ends before these ranges belongs to the site alone.
    """

    name: str
    op: Literal["linear", "conv", "conv_transpose"]
    weight: str
    bias: str | None = None
    stored: Literal["out_in", "in_out"] = "out_in"
    groups: int = 1
    taps: int = 1
    norm: str | None = None
    part: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Site:
    """One call of an element-wise activation σ that becomes ψ(z) = σ(z) + D z (eq. 7 of the paper).

    `name` is the path of the call: the owner's path and the call's name in its `method` (its forward, but for owners
    whose forward has no graph). `constraint` says what must hold at contraction: "folded" (A D W = 0, with b_A + A D b_W
    folded in), "augmented" (A D [W b_W] = 0), or "zero" (D = 0). `width` is the number of coefficients δ and
    `channel_dim` the axis of z along which they lie. `exact` is "always", or "eval" where the fold is exact in eval mode
    only (a BatchNorm or an active dropout stands inside the pattern).

    Attention is an activation of its values: ψ(V) = Attn(V) + D V, with W the value projection and A the output
    projection. The channels of V lie along two axes, heads and the channels of a head: `view` is then the shape of δ
    against V, such as (heads, 1, head channels); `channel_dim` is -1. Behind a flatten each channel spans a run of
    the last axis; `view` is then (channels, -1).

    `moving` are the channels whose coefficients a `BypassSchedule` lets move, in ascending order; the others stay at 0.
    Empty stands for all.
    """

    name: str
    owner: str
    method: str
    call: str
    kind: Kind
    constraint: Constraint
    activation: str
    width: int
    channel_dim: int
    delta: str
    first: Affine | None = None
    second: Affine | None = None
    exact: Exact = "always"
    view: tuple[int, ...] = ()
    moving: tuple[int, ...] = ()

    @property
    def parameter(self) -> str:
        """Qualified name of the site's δ in the extended model."""
        return f"{self.owner}.{self.delta}" if self.owner else self.delta


@dataclass(frozen=True, slots=True)
class Refusal:
    """One activation call that gets no D-activation, with the reason and what would change it."""

    name: str
    owner: str
    activation: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """The sites of a model and the refusals, in the order in which the model defines them.

    A plan prints as a table, repeated blocks folded into one line; notebooks show it as an HTML table.

    Example:
        >>> import torch, bypass_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> plan = bypass_fx.plan(net)
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    sites: tuple[Site, ...]
    refusals: tuple[Refusal, ...] = field(default=())
    mode: Mode = "auto"

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __repr__(self) -> str:
        return plan_text.as_text(self)

    def _repr_html_(self) -> str:
        return plan_text.as_html(self)

    @property
    def coefficients(self) -> int:
        """How many numbers δ the extension adds."""
        return sum(site.width for site in self.sites)

    def to_json(self) -> str:
        """The plan as text; `Plan.from_json` reads it back to an equal plan."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a plan that `to_json` wrote.

        Raises:
            PlanError: the text is no plan, or one of another format.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            written = data.pop("format")
            if written != FORMAT:
                raise PlanError(
                    f"the plan has format {written}, this version reads format {FORMAT}; plan the model anew"
                )
            sites = tuple(_site(entry) for entry in data["sites"])
            refusals = tuple(_expect_typed(Refusal(**entry)) for entry in data["refusals"])
            return _expect_typed(cls(sites, refusals, data["mode"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"this is not a plan written by Plan.to_json: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from a JSON file.

        Raises:
            PlanError: as `from_json`; a file that is not there is an OSError.
        """
        return cls.from_json(Path(path).read_text())


def _site(entry: dict[str, Any]) -> Site:
    affine = {key: _affine(entry[key]) if entry[key] else None for key in ("first", "second")}
    view, moving = tuple(entry["view"]), tuple(entry.get("moving", ()))
    return _expect_typed(Site(**{**entry, **affine, "view": view, "moving": moving}))


def _affine(entry: dict[str, Any]) -> Affine:
    return _expect_typed(Affine(**{**entry, "part": tuple((start, stop) for start, stop in entry["part"])}))


def _expect_typed(made: Made) -> Made:
    """What was read, if every field is of the type that it was declared with."""
    cls: type = type(made)
    for name, kind in _kinds(cls).items():
        if not _is_a(getattr(made, name), kind):
            raise TypeError(f"{name} is {getattr(made, name)!r}")
    return made


@cache
def _kinds(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_a(value: Any, kind: Any) -> bool:
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return value in inner
    if isinstance(kind, UnionType):
        return any(_is_a(value, each) for each in inner)
    if get_origin(kind) is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_a, value, kinds))
    return type(value) is kind
