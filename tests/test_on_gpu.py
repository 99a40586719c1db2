"""What only a GPU can show: nothing waits for it, precisions and CUDA graphs, and the same results as on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import bypass_fx
from bypass_fx.comeback import COMEBACKS
from bypass_fx.history import History
from bypass_fx.replicas import Replicas
from bypass_fx.schedule import BypassSchedule
from tests.runs import trainer

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:opt2 ended", "ignore:variety", "ignore:lagrangian", "ignore:penalty"),
    # What torch says of itself: of its search for waits, of the first graph that it captures, and of TF32.
    pytest.mark.filterwarnings(
        "ignore:Synchronization debug", "ignore:The CUDA Graph is empty", "ignore:TensorFloat32"
    ),
]


class Block(nn.Module):
    """A dense part, attention and a convolution behind a normalisation: sites of every kind."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.conv, self.norm, self.back = nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 1)
        self.dropout, self.activation = nn.Dropout(0.1), activation

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, 16) to the same."""
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.dropout(self.fc2(self.activation(self.fc1(x))))
        image = x.transpose(1, 2).unflatten(2, (8, -1))
        return x + self.back(self.activation(self.norm(self.conv(image)))).flatten(2).transpose(1, 2)


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.Sequential(Block(activation), Block(activation)), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, 16) to (batch, 10)."""
        return self.head(self.blocks(x).mean(1))  # type: ignore[no-any-return]


def _batch(size: int = 64, tokens: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, tokens, 16, generator=generator)
    return x.to(DEVICE), torch.randint(10, (size,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [F.gelu, F.relu, F.silu, torch.tanh])
def test_extend_changes_no_bit_and_contract_gives_the_model_back(
    dtype: torch.dtype, activation: Callable[[Tensor], Tensor]
) -> None:
    model = Net(activation).to(DEVICE, dtype).eval()
    x = _batch()[0].to(dtype)
    before, state = model(x), copy.deepcopy(model.state_dict())
    bypass_fx.extend(model)
    assert len(bypass_fx.sites(model)) == 6
    assert torch.equal(model(x), before)
    bypass_fx.contract(model)
    assert torch.equal(model(x), before) and model.state_dict().keys() == state.keys()


def _moved(model: nn.Module) -> nn.Module:
    for site in bypass_fx.sites(model):
        delta = bypass_fx.surgery.delta_of(model, site)
        with torch.no_grad():
            delta.copy_(torch.linspace(-0.5, 0.5, len(delta)))
    return model


@pytest.mark.parametrize("activation", [F.gelu, F.relu, F.silu, torch.tanh])
def test_values_and_gradients_are_those_of_a_cpu_in_double_precision(
    activation: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which convolutions do unasked
    exact = _moved(bypass_fx.extend(Net(activation).double().eval()))
    model = _moved(bypass_fx.extend(Net(activation).eval())).to(DEVICE)
    x, classes = _batch()
    for one, inputs, targets in ((exact, x.double().cpu(), classes.cpu()), (model, x, classes)):
        (F.cross_entropy(one(inputs), targets) + 0.1 * bypass_fx.penalty(one)).backward()
    for (name, found), (_, right) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        assert found.grad is not None and right.grad is not None, name
        off = (found.grad.cpu().double() - right.grad).norm() / right.grad.norm()
        assert off < 1e-4, (name, off)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_leaves_delta_in_full_precision(precision: torch.dtype) -> None:
    model = _moved(bypass_fx.extend(Net().eval())).to(DEVICE)
    x, classes = _batch()
    F.cross_entropy(model(x), classes).backward()
    right = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast(DEVICE, precision):
        F.cross_entropy(model(x), classes).backward()
    for site in bypass_fx.sites(model):
        found, expected = bypass_fx.surgery.delta_of(model, site).grad, right[site.parameter]
        assert found is not None and expected is not None and found.dtype == torch.float32
        assert (found - expected).norm() / expected.norm() < 0.05, site.name


@pytest.mark.parametrize("comeback", [name for name in COMEBACKS if name != "variety"])  # its decompositions wait
def test_the_host_waits_for_nothing_in_a_step(comeback: str) -> None:
    model = Net().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    schedule = BypassSchedule(
        model, optimizer, 4, 40, gamma=bypass_fx.Linear(1e-6), epsilon=1e-12, comeback=comeback, snapshot=None
    )
    x, classes = _batch()

    def step(waits: str) -> None:
        torch.cuda.set_sync_debug_mode(waits)
        try:
            loss = F.cross_entropy(model(x), classes) + schedule.penalty()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for number in range(20):
        first_of_a_phase = number in (0, 3, 4)
        step("default" if first_of_a_phase else "error")
    assert schedule.phase == "opt2"
    schedule.step()  # without a loss, too


def test_random_numbers_go_on_as_if_no_one_had_looked() -> None:
    model, (x, _) = Net().to(DEVICE).train(), _batch()
    torch.cuda.manual_seed(3)
    right = torch.rand(4, device=DEVICE)
    torch.cuda.manual_seed(3)
    bypass_fx.extend(model, example_inputs=(x,))
    assert torch.equal(torch.rand(4, device=DEVICE), right)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_computes_the_same(mode: str) -> None:
    torch.compiler.reset()
    counters.clear()
    model = _moved(bypass_fx.extend(Net().eval())).to(DEVICE)
    x, classes = _batch()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for run in (model, compiled, compiled, compiled):
        model.zero_grad()
        loss = F.cross_entropy(run(x), classes) + 0.1 * bypass_fx.penalty(model)
        loss.backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if run is model:
            right = found
        for name, gradient in found.items():
            assert (gradient - right[name]).norm() <= 1e-3 * right[name].norm() + 1e-7, name
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def _losses(history: History) -> list[float]:
    return [record.loss for record in history.records]


def test_a_run_is_that_of_a_cpu() -> None:
    on_gpu, on_cpu = (_losses(trainer(device=device).fit()) for device in (DEVICE, "cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "bf16", "compile": "default", "fused": True},
        {"precision": "fp16", "compile": "default", "fused": True, "accumulate": 2},
        {"compile": "reduce-overhead", "fused": True},
        {"compile": "reduce-overhead", "precision": "bf16", "comeback": "penalty", "gamma": "0.5", "epsilon": 0.05},
        {"tf32": True, "channels_last": True},
    ],
    ids=str,
)
def test_a_run_in_another_precision_or_compiled_ends_near_the_plain_one(settings: dict[str, Any]) -> None:
    way = {name: value for name, value in settings.items() if name in ("comeback", "gamma", "epsilon")}
    torch.compiler.reset()
    plain = _losses(trainer(device=DEVICE, **way).fit())
    counters.clear()
    run = trainer(device=DEVICE, **settings)
    assert _losses(run.fit()) == pytest.approx(plain, rel=0.03)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 3
    assert {value.dtype for value in run.model.state_dict().values()} == {torch.float32}
    torch.set_float32_matmul_precision("highest")


def test_a_run_goes_on_from_a_checkpoint_on_the_gpu(tmp_path: Path) -> None:
    """Stopped in opt2, resumed; the rest is that of the undisturbed run."""
    from bypass_fx.data import load
    from bypass_fx.trainer import Trainer
    from tests.runs import mlp, short

    data = load("digits", vectors=True)

    class StopError(Exception):
        pass

    def stop(event: object) -> None:
        if getattr(event, "phase", "") == "opt2" and not seen:
            seen.append(event)
            raise StopError

    settings = short(device=DEVICE, checkpoint_seconds=0.0)
    right = Trainer(mlp(data), data, settings).fit()
    seen: list[object] = []
    with pytest.raises(StopError):
        Trainer(mlp(data), data, settings, folder=tmp_path / "run", on_event=stop).fit()
    again = Trainer(mlp(data), data, settings, folder=tmp_path / "run").fit()
    assert _losses(again) == pytest.approx(_losses(right), rel=1e-5)


@pytest.mark.parametrize("comeback", ["homotopy", "published"])
def test_replicas_do_what_each_would_alone(comeback: str) -> None:
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)).to(DEVICE)

    def begin(model: nn.Module, optimizer: torch.optim.Optimizer) -> BypassSchedule:
        return BypassSchedule(
            model, optimizer, 3, 6, gamma=bypass_fx.Linear(0.1), comeback=comeback, epsilon=1e-3, snapshot=None
        )

    def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    x, y = torch.randn(3, 32, 4, device=DEVICE), torch.randn(3, 32, 1, device=DEVICE)
    models, alone = ([net(seed) for seed in range(3)] for _ in range(2))
    together = Replicas(models, [torch.optim.Adam(model.parameters()) for model in models])
    together.lead(begin)
    optimizers = [torch.optim.Adam(model.parameters()) for model in alone]
    schedules = [begin(model, optimizer) for model, optimizer in zip(alone, optimizers, strict=True)]
    for _ in range(12):
        together.step(together.backward(mse, (x, y)))
        for row, (model, optimizer, schedule) in enumerate(zip(alone, optimizers, schedules, strict=True)):
            loss = mse(model, (x[row], y[row]))
            (loss + schedule.penalty()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step(loss)
    for one, other in zip(models, alone, strict=True):
        for own, its in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(own, its, rtol=1e-4, atol=1e-6)
