"""ψ as one step of autograd: the values, gradients and higher derivatives of σ(z) + D z, and what is kept for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import bypass_fx
from bypass_fx import activation
from bypass_fx.activation import Within, psi
from bypass_fx.passes.derivatives import ELEMENTWISE

NAMES = sorted(ELEMENTWISE)


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "_TINY", 0)


def named(name: str) -> Any:
    """ψ as one step, and as σ with D z added behind it."""
    entry = ELEMENTWISE[name]
    return (
        lambda z, delta, axis=-1: psi(name, z, delta, axis, *entry.defaults),
        lambda z, delta, axis=-1: psi(entry.value(z, *entry.defaults), z, delta, axis),
    )


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(shape, dtype=dtype)).requires_grad_()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode scripts derivatives
@pytest.mark.parametrize("name", NAMES)
def test_all_derivatives_of_first_and_second_order_are_right(name: str) -> None:
    torch.manual_seed(0)
    z, delta = leaf(3, 5), leaf(5)
    one_step, _ = named(name)
    assert "Within" in type(one_step(z, delta).grad_fn).__name__
    assert torch.autograd.gradcheck(one_step, (z, delta), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(one_step, (z, delta))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_dtype_and_layout_are_those_of_the_activation_with_d_behind_it(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = leaf(2, 6, 3, 4, dtype=dtype).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    delta = leaf(6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    one_step, behind = (call(z, delta, 1) for call in named(name))
    assert torch.equal(one_step, behind) and one_step.dtype == dtype
    assert one_step.is_contiguous(memory_format=torch.channels_last)
    g = torch.randn_like(behind)
    (of_z, of_d), (its_z, its_d) = (torch.autograd.grad(out, (z, delta), g) for out in (one_step, behind))
    near = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(of_z, its_z, **near) and of_z.dtype == dtype  # type: ignore[arg-type]
    assert torch.allclose(of_d, its_d, **near) and of_d.dtype == delta.dtype  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_the_dtype_is_the_activations_own(name: str) -> None:
    lin, delta = nn.Linear(4, 6), leaf(6, dtype=torch.float32)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        one_step, behind = (call(lin(x), delta) for call in named(name))
    assert torch.equal(one_step, behind) and one_step.dtype == torch.bfloat16
    one_step.float().sum().backward()
    assert delta.grad is not None and delta.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", ["relu", "gelu", "leaky_relu"])
def test_function_transforms_see_through_it(name: str) -> None:
    torch.manual_seed(0)
    z, deltas = leaf(3, 5).detach(), leaf(4, 5).detach()
    one_step, behind = named(name)
    for transform in (
        lambda call: torch.vmap(call, (None, 0))(z, deltas),
        lambda call: torch.vmap(torch.func.grad(lambda z, d: call(z, d).square().sum(), (0, 1)), (None, 0))(z, deltas),
        lambda call: torch.func.hessian(lambda d: call(z, d).square().sum())(deltas[0]),
        lambda call: torch.func.jvp(call, (z, deltas[0]), (z, deltas[1])),
        lambda call: torch.func.jacrev(call, 1)(z, deltas[0]),
    ):
        found, expected = (torch.utils._pytree.tree_leaves(transform(call)) for call in (one_step, behind))
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_the_gradient_of_a_large_tensor_is_summed_in_pieces() -> None:
    torch.manual_seed(0)
    for shape, axis in (((700, 1000), -1), ((40, 8, 50, 50), 1), ((8, 90_000), 0)):
        z, delta = leaf(*shape), leaf(shape[axis])
        one_step, behind = (torch.autograd.grad(call(z, delta, axis).sin().sum(), delta)[0] for call in named("relu"))
        assert torch.allclose(one_step, behind, rtol=1e-10)


def kept_bytes(run: Any) -> int:
    """Bytes of the storages that a forward keeps for its backward, parameters included, each once."""
    storages: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(size for _, size in storages.values())


@pytest.mark.parametrize("sigma", [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.ReLU(inplace=True), nn.Hardswish(inplace=True)])
def test_it_keeps_z_and_no_result_of_the_activation(sigma: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(8, 64), sigma, nn.Linear(64, 4))
    x = torch.randn(256, 8)
    z_and_psi = 2 * 256 * 64 * 4
    small = x.numel() * 4 + 256 * 4 * 4 + 4 * sum(p.numel() for p in net.parameters())
    bypass_fx.extend(net)
    assert z_and_psi <= kept_bytes(lambda: net(x)) <= z_and_psi + small + 4 * 64


class InPlace(nn.Module):
    """An in-place activation of a value that others see too: `where` says who."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.where = where
        self.a, self.act, self.b = nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if self.where == "view":
            first = z[:, :4]
            return self.b(self.act(z)) + torch.cat([first, first], -1)
        y = self.act(z)
        return self.b(y) + z if self.where == "reader" else self.b(y)


@pytest.mark.parametrize("where", ["reader", "view", "nobody"])
def test_whoever_sees_a_z_that_is_overwritten_goes_on_seeing_it_overwritten(where: str) -> None:
    net, x = InPlace(where), torch.randn(3, 4)
    plain = copy.deepcopy(net)
    bypass_fx.extend(net)
    assert torch.equal(net(x), plain(x))
    code = bypass_fx.print_readable(net, print_output=False)
    assert ("clone" in code) == (where != "nobody")
    with torch.no_grad():
        bypass_fx.surgery.delta_of(net, bypass_fx.sites(net)[0]).fill_(0.5)
    z = plain.a(x)
    seen = F.relu(z)
    beside = {"reader": seen, "view": torch.cat([seen[:, :4]] * 2, -1), "nobody": 0}[where]
    assert torch.allclose(net(x), plain.b(seen + 0.5 * z) + beside)


def test_a_caller_goes_on_seeing_what_the_block_did_to_its_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.b = nn.ReLU(inplace=True), nn.Linear(8, 8)

        def forward(self, z: Tensor) -> Tensor:
            return self.b(self.act(z))  # type: ignore[no-any-return]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.block = nn.Linear(4, 8), Block()

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            return self.block(z) + z  # type: ignore[no-any-return]

    net, x = Net(), torch.randn(3, 4)
    before = net(x)
    bypass_fx.extend(net, mode="all")
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_on_the_activation_go_on_running(inplace: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace), nn.Linear(8, 2))
    bypass_fx.extend(net)
    with torch.no_grad():
        bypass_fx.surgery.delta_of(net, bypass_fx.sites(net)[0]).fill_(0.5)
    x = torch.randn(3, 4)
    before, seen = net(x), list[Tensor]()
    handle = net[1].register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    assert torch.allclose(net(x), before)
    assert len(seen) == 1 and torch.equal(seen[0], F.relu(net[0](x)))
    handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    net(x)
    everywhere.remove()
    assert net[1] in seen


@pytest.mark.parametrize(
    "call",
    [
        F.relu, lambda z: z.relu(), lambda z: F.gelu(z, approximate="tanh"),
        lambda z: F.leaky_relu(z, 0.3), lambda z: F.elu(z, alpha=0.7), lambda z: F.hardtanh(z, -0.2, 0.3),
        lambda z: F.silu(input=z), lambda z: F.relu(z, inplace=True), torch.relu_,
        lambda z: F.relu6(z, inplace=True),
    ],
)  # fmt: skip
def test_functions_and_methods_keep_their_arguments(call: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(call(self.a(x)))  # type: ignore[no-any-return]

    net, x = Net(), torch.randn(5, 4)
    before = net(x)
    bypass_fx.extend(net)
    after = net(x)
    assert torch.equal(after, before)
    assert "clone" not in bypass_fx.print_readable(net, print_output=False)
    reached = list[str]()
    todo = [after.grad_fn]
    while todo:
        node = todo.pop()
        reached.append(type(node).__name__)
        todo += [before for before, _ in node.next_functions if before is not None]  # type: ignore[union-attr]
    assert f"{Within.__name__}Backward" in reached


def test_frozen_d_and_inputs_without_gradient_get_none() -> None:
    z, delta = leaf(3, 5), leaf(5)
    assert torch.autograd.grad(psi("gelu", z, delta.detach(), -1, "none").sum(), z)[0].shape == (3, 5)
    assert torch.autograd.grad(psi("gelu", z.detach(), delta, -1, "none").sum(), delta)[0].shape == (5,)
    assert not psi("relu", z.detach(), delta.detach(), -1).requires_grad


def test_a_compiled_model_has_one_kernel_for_the_activation_and_d_and_no_product_of_them() -> None:
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    net = bypass_fx.extend(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)))
    compiled, x = torch.compile(net, fullgraph=True), torch.randn(8, 16)
    _, (forward, backward) = run_and_get_code(lambda: compiled(x).square().sum().backward())
    assert forward.count("async_compile.cpp_pybinding") == 1 and "addcmul" in forward and "gelu" in forward
    # σ'(z) g + d g is written over g, and Σ g z summed from what is read: nothing of z's size is made
    assert "empty_strided_cpu((8, 64)" not in backward.replace(
        "empty_strided_cpu((8, 64), (64, 1), torch.float32)", "", 1
    )
    fused = next(line for line in backward.splitlines() if "gelu_backward" in line and "async_compile" in line)
    assert "mul" in fused and "sum" in fused


def test_equal_blocks_share_one_compiled_region() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.second(self.act(self.first(x)))
            return out

    def regions(model: nn.Module) -> int:
        torch.compiler.reset()
        counter = CompileCounter()
        for block in model.children():
            block.compile(backend=counter, fullgraph=True)
        model(torch.randn(3, 8, requires_grad=True)).sum().backward()
        return int(counter.frame_count)

    blocks = nn.Sequential(*(Block() for _ in range(4)))
    assert regions(blocks) == regions(bypass_fx.extend(blocks)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_one_example_without_a_batch(name: str) -> None:
    torch.manual_seed(0)
    z, delta = leaf(5), leaf(5)
    one_step, apart = named(name)
    found, expected = (torch.autograd.grad(way(z, delta).square().sum(), (z, delta)) for way in (one_step, apart))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_in_batches_and_checkpoints_that_keep_the_activation() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    torch.manual_seed(0)
    model = bypass_fx.extend(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)))
    x = torch.randn(2, 4)
    jacobian = torch.autograd.functional.jacobian(model, x, vectorize=True)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(model, x))  # type: ignore[no-untyped-call]

    def keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op is torch.ops.aten.gelu.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    loss = checkpoint(
        model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keep)
    ).sum()
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_class_whose_forward_was_replaced_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, z: z.sigmoid())
    model, x = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3)), torch.randn(2, 4)
    before = model(x)
    assert torch.equal(bypass_fx.extend(model, mode="all", example_inputs=(x,))(x), before)


def test_small_inputs_are_left_to_torchs_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "_TINY", 16)
    made = {rows: psi("relu", leaf(rows, 4), leaf(4), -1).grad_fn for rows in (3, 4)}
    assert {rows: "Within" in type(step).__name__ for rows, step in made.items()} == {3: False, 4: True}
    wide = psi("relu", leaf(3, 4, dtype=torch.bfloat16), leaf(4, dtype=torch.float32), -1)
    assert "Within" in type(wide.grad_fn).__name__  # where δ is wider, its gradient is


@pytest.mark.parametrize(
    ("channels", "width"), [(1, 3), (2, 5), (-1, 7), (-2, 5), ((3, 1, 7), 21), ((3, 5, 1), 15)], ids=str
)
def test_a_compiler_sees_psi_in_the_order_of_memory(channels: Any, width: int) -> None:
    """Values that lie token by token, as attention's heads do; along whatever axis δ lies."""
    z, delta = torch.randn(2, 5, 3, 7).transpose(1, 2), torch.randn(width)
    activated = torch.randn(2, 5, 3, 7).transpose(1, 2)
    seen: list[tuple[int, ...]] = []

    def looking(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.extend(node.meta["example_value"].stride() for node in graph.graph.nodes if node.target is torch.addcmul)
        return graph.forward

    torch.compiler.reset()
    found = torch.compile(psi, backend=looking, fullgraph=True)(activated, z, delta, channels)
    right = psi(activated, z, delta, channels)
    assert torch.equal(found, right) and found.stride() == right.stride()
    assert seen == [(105, 21, 7, 1)]
