"""The kernels of ψ: what they compute, where they are taken, and what happens where they can't be."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F

import bypass_fx
from bypass_fx import activation, fused
from bypass_fx.fused import Trust, kernel_of
from bypass_fx.passes.derivatives import ELEMENTWISE
from bypass_fx.psi_op import psi_backward_op, psi_op

HERE = Path(__file__).parent
KERNELS = [
    ("relu", 0.0, 0.0),
    ("leaky_relu", 0.1, 0.0),
    ("hardtanh", -1.0, 2.0),
    ("silu", 0.0, 0.0),
    ("gelu", 0.0, 0.0),
]


def _can_interpret() -> bool:
    try:
        return Version(version("triton")) >= Version("3.7")
    except PackageNotFoundError:
        return False


with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not on this platform")


@pytest.mark.skipif(not _can_interpret(), reason="Triton's interpreter needs 3.7: before, it takes no current NumPy")
@pytest.mark.parametrize("programs", ["many", "few"])
def test_the_kernels_compute_what_torch_does(programs: str) -> None:
    """In Triton's interpreter, whose exponentials are NumPy's: those are near torch's, all else is equal to the bit."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(
        [sys.executable, HERE / "interpreted.py", programs], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    assert len(found) == 12 and all(backward for _, backward in found.values()), found
    assert all(forward for name, (forward, _) in found.items() if name.split()[0] in ("relu", "leaky_relu", "hardtanh"))


@with_triton
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardtanh", "silu", "gelu", "gelu_tanh"])
def test_the_kernels_can_be_built_for_a_gpu_that_is_not_here(name: str) -> None:
    from triton import compile as built
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bypass_fx import triton_psi

    for kernel in (triton_psi.psi_kernel, triton_psi.psi_backward_kernel):
        by_column = name != "gelu"
        chosen: dict[str, Any] = {"name": name, "by_column": by_column, "high": 16, "wide": 256}
        if kernel is triton_psi.psi_backward_kernel:
            chosen |= {"stages": triton_psi.BACKWARD.stages, "with_bias": by_column}
        kinds = {
            "z_at": "*bf16",
            "g_at": "*bf16",
            "out_at": "*bf16",
            "of_z_at": "*bf16",
            "d_at": "*fp32",
            "sums_at": "*fp32",
        }
        signature = {
            at: "constexpr" if at in chosen else kinds.get(at, "fp32" if at in ("p", "q") else "i32")
            for at in kernel.arg_names
        }
        binary = built(ASTSource(kernel, signature, chosen), target=GPUTarget("cuda", 90, 32))
        assert binary.asm["cubin"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own check reads it
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel[0])
def test_the_operator_is_a_sound_one(kernel: fused.Kernel) -> None:
    z = torch.randn(3, 5, 4, dtype=torch.double, requires_grad=True)
    d = torch.randn(5, dtype=torch.double, requires_grad=True)
    torch.library.opcheck(psi_op, (z, d, 1, *kernel))
    for with_bias in (False, True):
        given = (torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.randn(5), 1, *kernel, with_bias)
        torch.library.opcheck(psi_backward_op, given)
    torch.autograd.gradcheck(lambda z, d: psi_op(z, d, 1, *kernel), (z, d))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel[0])
def test_the_operator_gives_the_bias_before_it_its_gradient(kernel: fused.Kernel) -> None:
    inputs = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((7, 3), (5, 3), (5,), (5,))]

    def call(x: Tensor, weight: Tensor, bias: Tensor, d: Tensor) -> Tensor:
        return psi_op(F.linear(x, weight, bias.detach()), d, 1, *kernel, bias)

    torch.autograd.gradcheck(call, inputs)
    z = F.linear(inputs[0], inputs[1], inputs[2].detach())
    torch.library.opcheck(psi_op, (z.detach().requires_grad_(), inputs[3], 1, *kernel, inputs[2]))


class Dense(nn.Module):
    """Dense layers around each activation that has a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.SiLU(),
            nn.Linear(16, 16), nn.GELU("tanh"), nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.ReLU6(),
            nn.Linear(16, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) to (batch, 4)."""
        return F.hardtanh(self.layers(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_takes_the_operator_between_dense_layers(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """As on a GPU; here the operator computes with torch's own."""
    torch.manual_seed(0)
    model, x = bypass_fx.extend(Dense()), torch.randn(32, 8)
    for site in bypass_fx.sites(model):
        with torch.no_grad():
            bypass_fx.surgery.delta_of(model, site).normal_()
    model(x).square().sum().backward()
    right = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(activation, "_alone", lambda z, delta, channels: True)
    monkeypatch.setattr(fused, "fits", lambda z, name, parameters: kernel_of(name, parameters))
    calls: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        calls.append(sum(node.target is psi_op._opoverload for node in graph.graph.nodes))
        from torch._dynamo import lookup_backend

        return lookup_backend(backend)(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    compiled(x).square().sum().backward()
    assert calls == [6]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and right[name] is not None
        assert torch.allclose(parameter.grad, right[name], rtol=1e-4, atol=1e-5), name


def test_what_disagrees_or_cannot_be_built_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_psi = pytest.importorskip("bypass_fx.triton_psi")
    cpu = torch.device("cpu")

    def forward(z: Tensor, d: Tensor, kernel: fused.Kernel, matrix: Any) -> Tensor:
        return fused.forward(z, d, 1, kernel) + off

    def backward(
        g: Tensor, z: Tensor, d: Tensor, kernel: fused.Kernel, matrix: Any, with_bias: bool
    ) -> tuple[Tensor, Tensor]:
        of_z, sums = fused.backward(g, z, d, 1, kernel, None, with_bias)
        return of_z, torch.cat([sums[:1] * scale, sums[1:] * scale_of_bias])

    monkeypatch.setattr(triton_psi, "forward", forward)
    monkeypatch.setattr(triton_psi, "backward", backward)
    off, scale, scale_of_bias = 0.0, 1.0, 1.001
    assert fused.agreement(KERNELS[0], torch.float32, cpu) == Trust(False, False)
    scale_of_bias = 1.0
    assert fused.agreement(KERNELS[0], torch.float32, cpu) == Trust(True, True)
    off = 1e-7
    assert fused.agreement(KERNELS[0], torch.float32, cpu) == Trust(False, True)
    off, scale = 0.0, 1.001
    assert fused.agreement(KERNELS[0], torch.float32, cpu) == Trust(False, False)
    scale = math.nan
    assert fused.agreement(KERNELS[0], torch.float32, cpu) == Trust(False, False)

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_psi, "forward", broken)
    with pytest.warns(
        UserWarning, match=r"D-activations of relu can't be built for cpu \(RuntimeError: Failed to find C"
    ):
        assert fused._trust.__wrapped__(KERNELS[0], torch.float32, cpu) == Trust(False, False)


def test_each_kernel_is_one_of_the_table() -> None:
    for name, entry in ELEMENTWISE.items():
        kernel = kernel_of(name, entry.defaults)
        if kernel:
            sigma, parameters = fused.torch_s_own(kernel)
            z = torch.randn(100)
            assert torch.equal(sigma.value(z, *parameters), entry.value(z, *entry.defaults)), name
