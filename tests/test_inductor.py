"""The backend for torch.compile: what graphs with ψ keep for their backward, and that it computes the same."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import list_backends, lookup_backend
from torch.utils.checkpoint import checkpoint

import bypass_fx
from bypass_fx import activation, fused, inductor
from bypass_fx.psi_op import psi_op
from tests.runs import trainer

can_build = any(map(shutil.which, ("g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()
builds = pytest.mark.skipif(not can_build, reason="Inductor needs a C++ compiler and Python's headers")


class Residual(nn.Module):
    """A block of a ResNet: the sum at its end is used far apart, by the next block's first layer and in its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + x)


def _blocks(count: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), *(Residual() for _ in range(count)))


def _extended(count: int = 3) -> nn.Module:
    model = bypass_fx.extend(_blocks(count))
    with torch.no_grad():
        for site in bypass_fx.sites(model):
            bypass_fx.surgery.delta_of(model, site).fill_(0.1)
    return model


def _step(model: nn.Module, x: Tensor, **how: Any) -> tuple[int, dict[str, Tensor]]:
    """Bytes that a compiled forward keeps for the backward beside the model's own, and the gradients."""
    torch.compiler.reset()
    compiled = torch.compile(model, **how)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = compiled(x).square().mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return sum(size for at, size in kept.items() if at not in own), gradients


@builds
@pytest.mark.parametrize("count", [2, 12])  # of blocks: long chains of sums are another thing to torch
def test_nothing_more_is_kept_than_without_d(count: int) -> None:
    x = torch.randn(4, 3, 8, 8)
    plain, _ = _step(_blocks(count), x)
    extended, gradients = _step(_extended(count), x, backend="bypass_fx")
    numbers = 4 * 8 * 8 * 8 * 4
    assert extended < plain + numbers // 2, "a z of its own was kept"
    _, right = _step(_extended(count), x, backend="eager")
    assert gradients.keys() == right.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, right[name], rtol=1e-3, atol=1e-5), name


@builds
def test_graphs_without_psi_are_inductor_s_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch import config as of_autograd
    from torch._inductor import compile_fx

    seen: list[tuple[dict[str, Any], bool]] = []
    handed: list[int] = []
    original = compile_fx.compile_fx

    def looking(graph: Any, inputs: Any, **how: Any) -> Any:
        if "config_patches" in how:  # it calls itself without them
            seen.append((how["config_patches"], of_autograd.ban_recompute_used_far_apart))
        return original(graph, inputs, **how)

    monkeypatch.setattr(compile_fx, "compile_fx", looking)
    monkeypatch.setattr(inductor, "hand_over_biases", lambda graph: handed.append(len(seen)))
    x, before = torch.randn(2, 3, 8, 8), of_autograd.ban_recompute_used_far_apart
    _step(_blocks(), x, backend="bypass_fx")
    _step(_extended(), x, backend="bypass_fx", options={"realize_reads_threshold": 5, "max_fusion_size": 32})
    _step(_extended(), x, backend="bypass_fx", mode="reduce-overhead")
    (plain, kept), (chosen, apart), (graphs, also) = seen
    assert plain == {} and kept is before and handed == [1, 2]
    assert chosen == {"realize_reads_threshold": 5, "max_fusion_size": 32} and apart is also is False
    assert graphs["realize_reads_threshold"] == inductor.WRITTEN_FROM and graphs["triton.cudagraphs"]
    assert of_autograd.ban_recompute_used_far_apart is before


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"options": {"max_fusion_sise": 8}}, "optimization option max_fusion_sise"),
        ({"options": {"max_fusion_size": "8"}}, "type of attr max_fusion_size, got str should be int"),
        ({"mode": "fastest"}, "mode=fastest"),
    ],
)
def test_settings_that_inductor_does_not_have_are_named(how: dict[str, Any], named: str) -> None:
    with pytest.raises(Exception, match=named):
        _step(_extended(), torch.randn(2, 3, 8, 8), backend="bypass_fx", **how)


@builds
def test_settings_are_named_as_for_inductor() -> None:
    x = torch.randn(2, 3, 8, 8)
    _, gradients = _step(_extended(), x, backend="bypass_fx", options={"max-fusion-size": 8})
    assert gradients


@builds
def test_a_reset_of_the_compiler_gives_cuda_graphs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cudagraph_trees

    calls: list[int] = []
    _step(_extended(1), torch.randn(2, 3, 8, 8), backend="bypass_fx", mode="reduce-overhead")
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: calls.append(1))
    torch.compiler.reset()
    assert calls


def test_torch_knows_it_by_name() -> None:
    assert "bypass_fx" in list_backends()


def test_a_model_is_known_by_what_is_traced_of_it() -> None:
    found: list[bool] = []

    def looking(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(inductor.computes_psi(graph))
        return graph.forward

    model, x = _blocks(), torch.randn(2, 3, 8, 8)
    for change in (None, bypass_fx.extend, bypass_fx.contract):
        if change is not None:
            change(model)
        torch.compiler.reset()
        torch.compile(model, backend=looking)(x)
    assert found == [False, True, False]


class Still(nn.Module):
    """A layer that gradients are switched off around."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return self.layer(x)


class Dense(nn.Module):
    """Dense layers before each activation: with a bias, a frozen one, none, and one whose result goes elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.both, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.bare = nn.Linear(8, 8, bias=False)
        self.frozen.bias.requires_grad_(False)
        self.still, self.act, self.next = Still(), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.next(self.act(self.still(x)))
        y = nn.functional.gelu(self.first(x))
        y = self.bare(torch.relu(self.frozen(y)))
        z = self.both(nn.functional.silu(y))
        return self.last(torch.relu(z)) * z.sigmoid()  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    """A net whose activations are computed again in the backward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.net, x, use_reentrant=False)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("around", [nn.Sequential, Checkpointed])
@pytest.mark.parametrize("shape", [(4, 3, 8), (8,)], ids=str)
def test_psi_takes_the_gradient_of_the_bias_before_it(
    monkeypatch: pytest.MonkeyPatch, autocast: bool, around: Callable[[nn.Module], nn.Module], shape: tuple[int, ...]
) -> None:
    """As on a GPU; here the operator computes with torch's own."""
    torch.manual_seed(0)
    model, x = bypass_fx.extend(around(Dense()), mode="all"), torch.randn(shape)
    for site in bypass_fx.sites(model):
        with torch.no_grad():
            bypass_fx.surgery.delta_of(model, site).normal_()
    monkeypatch.setattr(activation, "_alone", lambda z, delta, channels: True)
    monkeypatch.setattr(fused, "fits", lambda z, name, parameters: fused.kernel_of(name, parameters))
    handed: list[int] = []

    def handing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        assert inductor.computes_psi(graph)
        inductor.hand_over_biases(graph)
        for part in graph.modules():
            if isinstance(part, torch.fx.GraphModule):
                part.graph.lint()
                calls = part.graph.find_nodes(op="call_function", target=psi_op._opoverload)
                handed.extend(len(node.args) for node in calls)
        return lookup_backend("aot_eager")(graph, inputs)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, right = _step(model, x, backend="eager")
        _, gradients = _step(model, x, backend=handing)
    assert handed == [6, 7, 6, 6, 6]
    assert gradients.keys() == right.keys()
    assert [name for name in right if name.endswith("first.bias")] and not [
        n for n in right if n.endswith("frozen.bias")
    ]
    for name, gradient in gradients.items():
        assert (gradient - right[name]).norm() <= (2e-2 if autocast else 1e-5) * right[name].norm(), name


class Mixer(nn.Module):
    """Sums in a long chain, each of which is read, with every activation inside of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "ends"), [(_blocks(), True), (nn.Sequential(Mixer(), Mixer()), False)], ids=["ResNet", "mixer"]
)
def test_chains_of_sums_are_computed_again_only_where_psi_takes_them(model: nn.Module, ends: bool) -> None:
    found: list[bool] = []

    def looking(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append(inductor.ends_a_block(graph))
        return graph.forward

    torch.compiler.reset()
    torch.compile(bypass_fx.extend(model), backend=looking)(torch.randn(2, 3, 8, 8))
    assert found == [ends]


@builds
def test_a_run_is_compiled_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    original = inductor.computes_psi
    monkeypatch.setattr(inductor, "computes_psi", lambda graph: found.append(original(graph)) or found[-1])
    torch.compiler.reset()
    history = trainer(compile="default", train1=1, opt1=1, opt2=1, train3=1, device="cpu").fit()
    assert len(history.records) > 3 and set(found) == {False, True}
