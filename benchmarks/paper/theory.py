"""What the paper proves or reckons without a training run: Theorem 2, and the extra cost O(s_W)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bypass_fx
from bypass_fx import surgery
from bypass_fx.models import Fit, TwoConvTwoDense

WIDTHS = (64, 128, 256, 512, 1024)
IN, OUT, EXAMPLES = 32, 16, 64
DRAWS, ROUNDS = 200, 9


def theorem(seed: int) -> dict[str, Any]:
    """The least ‖∇‖ADW‖‖ · ‖(A, D, W)‖ / 3‖ADW‖ of random A, D and W of random shapes, some entries 0, in float64.

    ‖ADW‖ is of degree 3 in (A, D, W), so by Euler's theorem the gradient's product with them is 3‖ADW‖, and by
    Cauchy-Schwarz the ratio is at least 1: a bound by which the theorem holds with room.
    """
    torch.manual_seed(seed)
    least = float("inf")
    for _ in range(DRAWS):
        inputs, width, outputs = (int(torch.randint(1, 12, ())) for _ in range(3))
        model = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs)).double()
        bypass_fx.extend(model, mode="strict")
        (site,) = bypass_fx.sites(model)
        first, last, delta = model[0].weight, model[2].weight, surgery.delta_of(model, site)
        tensors: list[Tensor] = [first, last, delta]  # type: ignore[list-item]
        with torch.no_grad():
            for tensor in tensors:
                tensor.normal_().mul_(torch.rand_like(tensor) < 0.7).mul_(10 ** float(torch.empty(()).uniform_(-3, 3)))
        norm = bypass_fx.penalty(model)
        if norm > 0:
            gradients = torch.autograd.grad(norm, tensors)
            ratio = _length(gradients) * _length(tensors) / (3 * norm)
            least = min(least, ratio.item())
    return {"draws": DRAWS, "least": least}


def cost() -> dict[str, Any]:
    """What the extension and the penalty add, counted by operations over widths, and timed on 2c2d."""
    pointwise, matmul_flops, products = [], [], []
    for width in WIDTHS:
        net = nn.Sequential(nn.Linear(IN, width), nn.ReLU(), nn.Linear(width, OUT))
        plain = _per_example(net)
        bypass_fx.extend(net, mode="strict")
        extended = _per_example(net)
        pointwise.append(extended[0] - plain[0])
        matmul_flops.append(extended[1] - plain[1])
        counted = _counted(lambda net=net: bypass_fx.penalty(net))  # type: ignore[misc]
        products.append(counted[1] / (2 * IN * width * OUT))
    return {
        "widths": [*WIDTHS], "pointwise": pointwise, "matmul_flops": matmul_flops, "products": products, **_times()
    }  # fmt: skip


def _per_example(net: nn.Module) -> tuple[float, float]:
    """Operations of a forward and a backward that grow with the minibatch, for one example more."""

    def loss(examples: int) -> Callable[[], Tensor]:
        return lambda: net(torch.randn(examples, IN)).square().mean()

    small, large = _counted(loss(EXAMPLES)), _counted(loss(2 * EXAMPLES))
    return (large[0] - small[0]) / EXAMPLES, (large[1] - small[1]) / EXAMPLES


class _Elements(TorchDispatchMode):
    """Counts the elements that operations write, views left out, and products of matrices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        if not func.is_view and func.overloadpacket not in products and isinstance(result, Tensor):
            self.count += result.numel()
        return result


def _counted(loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Elements written outside products, and FLOPs in them, forward and backward."""
    with _Elements() as elements:
        loss().backward()  # type: ignore[no-untyped-call]
    with FlopCounterMode(display=False) as flops:
        loss().backward()  # type: ignore[no-untyped-call]
    return elements.count, flops.get_total_flops()


def _times() -> dict[str, float]:
    """A forward and backward of 2c2d in opt1 and in opt2 beside one before the surgery; medians of alternating rounds."""
    plain, extended = (TwoConvTwoDense(Fit((3, 32, 32), 10)) for _ in range(2))
    bypass_fx.extend(extended, mode="strict")
    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))

    def seconds(loss: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        loss().backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - start

    ratios = []
    for _ in range(ROUNDS + 1):
        before = seconds(lambda: F.cross_entropy(plain(x), y))
        walking = seconds(lambda: F.cross_entropy(extended(x), y))
        returning = seconds(lambda: F.cross_entropy(extended(x), y) + bypass_fx.penalty(extended))
        ratios.append((walking / before, returning / before))
    opt1, opt2 = zip(*ratios[1:], strict=True)
    return {"time_opt1": median(opt1), "time_opt2": median(opt2)}


def _length(tensors: Sequence[Tensor]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(torch.cat([tensor.flatten() for tensor in tensors]))
    return length
