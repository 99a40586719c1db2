"""Channels that have stopped learning: the activation lets no gradient through them, whatever the example."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bypass_fx import surgery
from bypass_fx.activation import psi
from bypass_fx.measured import LossFn, expect_loss, loss_of
from bypass_fx.numeric import is_above
from bypass_fx.passes.derivatives import Parameter
from bypass_fx.passes.dice import unrolled
from bypass_fx.passes.errors import BypassError
from bypass_fx.passes.plan import Mode, Plan
from bypass_fx.passes.units import ExampleInputs

THRESHOLD = 1e-3


@dataclass(frozen=True, slots=True)
class SiteFlow:
    """What the activation of one site does to the gradient of each of its channels, [width].

    `shares` are ‖σ'(z) g‖ / ‖g‖ over all examples and places, where g is the loss's gradient in σ(z): 0 where nothing
    comes through, 1 where σ leaves it as it is, NaN where none arrives. `stuck` are the channels whose share is below the
    threshold.
    """

    name: str
    shares: tuple[float, ...]
    stuck: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StuckReport:
    """Where gradients end; nothing of the look at it is left in the model.

    `plan` holds the sites with stuck channels, and lets D move in these only: pass it to `BypassSchedule`. It has no site
    where no channel is stuck: there is nothing to bypass then, in this sense.
    """

    plan: Plan
    sites: tuple[SiteFlow, ...]

    @property
    def stuck(self) -> int:
        """How many channels are stuck, over all sites."""
        return sum(len(site.stuck) for site in self.sites)

    @property
    def channels(self) -> int:
        """How many channels there are, over all sites."""
        return sum(len(site.shares) for site in self.sites)


def stuck(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    threshold: float = THRESHOLD,
    mode: Mode = "auto",
    example_inputs: ExampleInputs | None = None,
    plan: Plan | None = None,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> StuckReport:
    """Find the channels through which the loss sends a gradient that the activation stops: dead ReLUs, and saturated units.

    The channel's own weights in W do not move any more, unless other layers happen to move its input. D z does not stop
    there (eq. 7), so that D, and with it W, can move. One forward and backward for each batch; parameters, their
    gradients, buffers and random numbers are bit for bit as before when it is over, or fails.

    Args:
        model: the model at θ*, not extended, in the mode it is trained in.
        loss_fn: (model, batch) → loss, a 0-dim tensor.
        batches: what is looked at, read once: enough to tell a dead unit from a rare one, best the whole training set.
        threshold: a channel is stuck where less than this share of the gradient comes through. An optimiser that divides
            by the gradient's size, such as Adam, still moves what gets a small one.
        mode, example_inputs: as for `plan`.
        plan: the sites to look at; those of `plan(model, mode)` if None.
        total: the sum of a tensor over all processes, where each has a share of the batches.

    Raises:
        BypassError: an argument doesn't fit, there is no site or no batch, or a loss is no 0-dim tensor or has no gradient;
            the model is as it was.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].bias.copy_(torch.tensor([0.0, -100.0, 100.0]))  # the second never gets above 0
        >>> batch = torch.randn(32, 4), torch.randn(32, 1)
        >>> report = stuck(net, lambda net, batch: (net(batch[0]) - batch[1]).square().mean(), [batch])
        >>> report.sites[0].stuck, report.plan.sites[0].moving, report.sites[0].shares[1:]
        ((1,), (1,), (0.0, 1.0))
    """
    expect_loss(loss_fn, batches)
    if not is_above(threshold, 0):
        raise BypassError(f"threshold is {threshold!r}; give a share above 0, such as 1e-3")
    if not (plan is None or isinstance(plan, Plan)):
        raise BypassError(f"plan is a {type(plan).__name__}; give what bypass_fx.plan(model) makes, or None")
    plan = plan or surgery.plan(model, mode=mode, example_inputs=example_inputs)
    if not plan.sites:
        surgery.extend(model, plan)  # raises, with the reasons
    flow = _Flow()
    model = surgery.unwrapped(model)  # DDP would wait for gradients that don't come
    with _undone(model), surgery.extended_with(model, plan, _watched, example_inputs):
        flow.names = {id(surgery.delta_of(model, site)): site.name for site in plan}
        sums = {site.name: torch.zeros(2, site.width, device=surgery.delta_of(model, site).device) for site in plan}
        seen = False
        for batch in batches:
            seen = True
            _add(sums, flow, model, loss_fn, batch)
    if not seen:
        raise BypassError("batches is empty; give at least one batch to look at")
    flows = {name: _site_flow(name, total(both), threshold) for name, both in sums.items()}
    moving = tuple(replace(site, moving=flows[site.name].stuck) for site in plan if flows[site.name].stuck)
    return StuckReport(Plan(moving, plan.refusals, plan.mode), tuple(flows.values()))


@dataclass(slots=True)
class _Flow:
    """Pairs of z and σ(z) that a forward leaves, with the δ they belong to and its channels."""

    names: dict[int, str] = field(default_factory=dict)
    pairs: list[tuple[Tensor, Tensor, Tensor, int | tuple[int, ...]]] = field(default_factory=list)


class _Watching(threading.local):
    """What a forward leaves its pairs in, in the thread that looks."""

    flow: _Flow | None = None


_watching = _Watching()


def _watched(
    sigma: Tensor | nn.Module | str, z: Tensor, delta: Tensor, channels: int | tuple[int, ...], *parameters: Parameter
) -> Tensor:
    """ψ with D = 0, which notes z and σ(z)."""
    entering = z if isinstance(sigma, Tensor) else z.clone()  # σ may work in place
    result = sigma if isinstance(sigma, Tensor) else psi(sigma, entering.clone(), delta, channels, *parameters)
    if _watching.flow and result.requires_grad and entering.requires_grad:
        _watching.flow.pairs.append((entering, result, delta, channels))
        return result.clone()  # what follows may write into it
    return result


def _add(sums: dict[str, Tensor], flow: _Flow, model: nn.Module, loss_fn: LossFn, batch: Any) -> None:
    """Add the squared gradients in front of σ and behind it, summed for each channel, of one batch."""
    flow.pairs.clear()
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        before, _watching.flow = _watching.flow, flow
        try:
            loss = loss_of(loss_fn, model, batch)
        finally:
            _watching.flow = before
        if not loss.requires_grad:
            raise BypassError(
                "the loss has no gradient: let loss_fn return the loss as for training, not detached nor made under no_grad, "
                "of a model with parameters that are not frozen"
            )
        if loss.is_meta:
            raise BypassError("the model is on the meta device, where gradients have no values; load its weights first")
        if not flow.pairs:
            return
        arriving = torch.autograd.grad(loss, [pair[1] for pair in flow.pairs], allow_unused=True, retain_graph=True)
        for (entering, result, delta, channels), g in zip(flow.pairs, arriving, strict=True):
            if g is None:
                continue
            (through,) = torch.autograd.grad(result, entering, g, allow_unused=True, retain_graph=True)
            through = g if through is None else through  # σ overwrote z: what comes through can't be told
            both = [_by_channel(each, delta, channels) for each in (through, g)]
            sums[flow.names[id(delta)]] += torch.stack(both)
    flow.pairs.clear()


def _by_channel(gradient: Tensor, delta: Tensor, channels: int | tuple[int, ...]) -> Tensor:
    """The squares of a gradient, summed over all but the channels, in float32."""
    squares = gradient.detach().float().square()
    spread = torch.zeros_like(delta, dtype=torch.float32, requires_grad=True)
    with torch.enable_grad():
        total = psi(torch.zeros_like(squares), squares, spread, channels).sum()
    return torch.autograd.grad(total, spread)[0]


def _site_flow(name: str, both: Tensor, threshold: float) -> SiteFlow:
    through, arrived = both.double().sqrt()
    shares = (through / arrived).tolist()  # NaN where nothing arrived
    return SiteFlow(name, tuple(shares), tuple(index for index, share in enumerate(shares) if share < threshold))


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Buffers and random numbers are as before, whatever happens inside."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with unrolled(model.parameters()):
        try:
            yield
        finally:
            for module, own in buffers:  # a forward may set another one in its place
                module._buffers.clear()
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, value in values:
                    if not _overlaps_itself(buffer):  # torch lets nobody write into one that does
                        buffer.copy_(value)


def _overlaps_itself(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and any(
        step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True)
    )
