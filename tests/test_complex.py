"""Complex weights: their map is no W and no A; real activations beside them are sites, those of complex values are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.activation import psi
from bypass_fx.passes.affine import affine_at
from bypass_fx.passes.link import Linked
from bypass_fx.passes.units import Spot, Unit
from bypass_fx.surgery import delta_of

COMPLEX = torch.complex64


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


class Spectral(nn.Module):
    """The lowest modes of the signal times complex weights."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(randn(width, width, modes, dtype=COMPLEX) / width)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        kept = torch.einsum("bim,iom->bom", spectrum[..., : self.modes], self.weight)
        return torch.fft.irfft(F.pad(kept, (0, spectrum.shape[-1] - self.modes)), n=x.shape[-1])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.spectral, self.local = Spectral(width, 3), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.spectral(x) + self.local(x))


class Operator(nn.Module):
    """A small Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift = nn.Sequential(nn.Conv1d(1, 8, 1), nn.GELU(), nn.Conv1d(8, 6, 1))
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Sequential(nn.Conv1d(6, 8, 1), nn.ReLU(), nn.Conv1d(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.lift(x)))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:penalty. after")  # it hands over to the proximal return
@pytest.mark.parametrize("comeback", ["homotopy", "proximal", "penalty", "lagrangian", "variety"])
def test_a_fourier_neural_operator_walks_through_a_bypass(comeback: str) -> None:
    model, x = Operator(), randn(4, 1, 16)
    before, kept, keys = model(x).detach(), dict(model.named_parameters()), list(model.state_dict())
    bypass_fx.extend(model)
    assert [(site.name, site.constraint) for site in bypass_fx.sites(model)] == [
        ("lift.1", "folded"), ("blocks.0.gelu", "zero"), ("blocks.1.gelu", "zero"), ("head.1", "folded")
    ]  # fmt: skip
    assert torch.equal(model(x), before)
    spectral = model.blocks[0].spectral.weight
    start = spectral.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    gamma = bypass_fx.Linear(0.05) if comeback in ("proximal", "penalty") else None
    schedule = bypass_fx.BypassSchedule(model, optimizer, opt1=5, opt2=20, gamma=gamma, comeback=comeback)
    for _ in range(60):
        loss = (model(x) - x.roll(1, -1)).square().mean() + schedule.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if schedule.phase == "done":
            break
    else:
        bypass_fx.contract(model)
    assert dict(model.named_parameters()) == kept and list(model.state_dict()) == keys
    assert spectral.dtype is COMPLEX and not torch.equal(spectral, start)
    fresh = Operator()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x)) and torch.isfinite(model(x)).all()


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=COMPLEX)


class ByFunction(nn.Module):
    """A complex weight that a function takes, then `step`, then a complex map."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.norm, self.last, self.step = (
            nn.Parameter(randn(4, 4, dtype=COMPLEX)),
            None,
            linear(4, 2),
            step,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.step(x, self.weight)))  # type: ignore[no-any-return]


IN_FRONT: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Sequential(linear(4, 8), nn.Tanh(), linear(8, 2)),
    "a wire between": lambda: nn.Sequential(linear(4, 8), nn.Flatten(), nn.Identity(), nn.Tanh(), linear(8, 2)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 8, 1, dtype=COMPLEX), nn.Tanh(), nn.Conv1d(8, 2, 1, dtype=COMPLEX)
    ),
    "F.linear": lambda: ByFunction(F.linear),
    "matmul": lambda: ByFunction(lambda x, w: x @ w),
    "einsum": lambda: ByFunction(lambda x, w: torch.einsum("bi,io->bo", x, w)),
    "product": lambda: ByFunction(lambda x, w: x * w[0]),
}


@pytest.mark.parametrize("mode", ["strict", "relaxed", "auto", "all"])
@pytest.mark.parametrize("which", IN_FRONT)
def test_an_activation_behind_complex_weights_is_refused_in_every_mode(which: str, mode: bypass_fx.Mode) -> None:
    model = IN_FRONT[which]()
    model(randn(3, 4, dtype=COMPLEX))
    plan = bypass_fx.plan(model, mode=mode)
    assert not plan.sites and [refusal.reason for refusal in plan.refusals] == ["its input is complex, and D is real"]
    with pytest.raises(bypass_fx.PlanError, match="complex"):
        bypass_fx.extend(model, mode=mode)


class Magnitude(nn.Module):
    """Real again behind complex weights, and real weights in front of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.mid, self.b = nn.Linear(4, 8), linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.a(x))
        return self.b(torch.sigmoid(self.mid(z.to(COMPLEX)).abs()))  # type: ignore[no-any-return]


def test_a_complex_map_is_no_w_and_no_a_of_the_real_activations_around_it() -> None:
    model, x = Magnitude(), randn(3, 4)
    strict = bypass_fx.plan(model, mode="strict", example_inputs=(x,))
    assert not strict.sites and not any("complex" in refusal.reason for refusal in strict.refusals)
    before = model(x)
    bypass_fx.extend(model, mode="all", example_inputs=(x,))
    assert [(site.call, site.kind) for site in bypass_fx.sites(model)] == [("relu", "relaxed"), ("sigmoid", "relaxed")]
    assert torch.equal(model(x), before)
    with torch.no_grad():
        delta_of(model, bypass_fx.sites(model)[1]).fill_(0.5)
    z = model.mid(torch.relu(model.a(x)).to(COMPLEX)).abs()
    assert torch.allclose(model(x), model.b(torch.sigmoid(z) + 0.5 * z))


@pytest.mark.parametrize("dtype", [torch.float32, COMPLEX])
def test_maps_with_complex_weights_are_no_affine_maps(dtype: torch.dtype) -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(randn(4, 4, dtype=dtype))
            self.linear, self.conv = nn.Linear(4, 4, dtype=dtype), nn.Conv1d(4, 4, 1, dtype=dtype)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.conv(self.linear(x)), self.weight)

    linked = Linked(Maps())
    spots = [Spot(Unit(""), node) for node in linked.graphs[Unit("")].graph.nodes if node.op.startswith("call_")]
    assert [affine_at(linked, spot) is None for spot in spots] == 3 * [dtype is COMPLEX]


def test_attention_with_complex_weights_is_refused() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dtype=COMPLEX)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

    plan = bypass_fx.plan(Attends())
    assert not plan.sites and [refusal.reason for refusal in plan.refusals] == [
        "its weights are complex, and D is real"
    ]


class Opaque(nn.Module):
    """No graph shows that its result is complex."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.complex(x, x)


class Unseen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.opaque = nn.Linear(4, 8), Opaque()

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return torch.tanh(z + self.opaque(z)).abs()


def test_a_run_on_example_inputs_shows_complex_values_that_no_graph_does() -> None:
    plan = bypass_fx.plan(Unseen(), mode="all", example_inputs=(randn(3, 4),))
    assert not plan.sites and "its input is complex" in plan.refusals[0].reason


def test_a_complex_argument_shows_in_the_example_inputs() -> None:
    model = nn.Sequential(nn.Identity(), nn.Tanh())
    plan = bypass_fx.plan(model, mode="all", example_inputs=(randn(3, 4, dtype=COMPLEX),))
    assert not plan.sites and "its input is complex" in plan.refusals[0].reason


def test_without_them_the_forward_says_what_to_do_and_contract_still_works() -> None:
    model, x = Unseen(), randn(3, 4)
    before = model(x)
    bypass_fx.extend(model, mode="all")
    with pytest.raises(bypass_fx.BypassError, match="extend it with example_inputs"):
        model(x)
    bypass_fx.contract(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("sigma", ["silu", nn.Tanh(), torch.tanh(randn(3, 4, dtype=COMPLEX))])
def test_psi_refuses_complex_values(sigma: str | nn.Module | Tensor) -> None:
    with pytest.raises(bypass_fx.BypassError, match="D is real"):
        psi(sigma, randn(3, 4, dtype=COMPLEX), torch.zeros(4), -1)
