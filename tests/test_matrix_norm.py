"""‖A D W‖ by its closed forms: gradients of all orders, precision near zero, many sites at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bypass_fx
from bypass_fx import matrix_norm
from bypass_fx.constraint import residual
from bypass_fx.matrix_norm import gram_is_cheaper, norm_of_product

FEW, MANY = (40, 4, 40), (5, 16, 6)  # (m, n, l): few channels between many, for the Gram form, and the other way


@pytest.fixture(autouse=True)
def _no_size_is_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_norm, "_TINY", 0)


def drawn(shape: tuple[int, int, int], sites: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    (m, n, l), cells = shape, 2  # noqa: E741
    parts = [torch.randn(*sites, cells, *rest, dtype=dtype) for rest in ((m, n), (n,), (n, l))]
    return [part.requires_grad_() for part in parts]


def plain(a: Tensor, d: Tensor, w: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm((a * d.unsqueeze(-2)) @ w, dim=(-3, -2, -1))
    return norm


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode scripts derivatives
@pytest.mark.parametrize("sites", [(), (3,)])
def test_first_and_second_derivatives_are_right(sites: tuple[int, ...]) -> None:
    parts = drawn((3, 2, 4), sites, torch.float64)
    assert "ByProduct" in type(norm_of_product(*parts).grad_fn).__name__
    assert torch.autograd.gradcheck(norm_of_product, parts, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm_of_product, parts)


@pytest.mark.parametrize("shape", [FEW, MANY])
@pytest.mark.parametrize("sites", [(), (3,)])
def test_either_form_is_the_norm_of_the_product(shape: tuple[int, int, int], sites: tuple[int, ...]) -> None:
    parts = drawn(shape, sites)
    assert gram_is_cheaper(parts[0], parts[2]) == (shape == FEW)
    weights = torch.arange(1.0, 1 + (sites or (1,))[0]).reshape(sites)
    found = torch.autograd.grad((norm_of_product(*parts) * weights).sum(), parts)
    expected = torch.autograd.grad((plain(*parts) * weights).sum(), parts)
    assert torch.allclose(norm_of_product(*parts), plain(*parts))
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(found, expected, strict=True))
    twice = [
        torch.autograd.grad(
            sum(g.square().sum() for g in torch.autograd.grad(form(*parts).sum(), parts, create_graph=True)), parts
        )
        for form in (norm_of_product, plain)
    ]
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in zip(*twice, strict=True))


@pytest.mark.parametrize("shape", [FEW, MANY])
def test_a_site_at_zero_has_the_gradient_zero_and_one_that_is_not_finite_does_not_hide_it(
    shape: tuple[int, int, int],
) -> None:
    for form in (norm_of_product, torch.compile(norm_of_product, fullgraph=True, dynamic=False)):
        a, d, w = drawn(shape)
        with torch.no_grad():
            d.zero_()
        norm = form(a, d, w)
        assert float(norm.detach()) == 0
        assert all(bool((gradient == 0).all()) for gradient in torch.autograd.grad(norm, (a, d, w)))
        with torch.no_grad():
            d[0, 0] = float("nan")
        norm = form(a, d, w)
        assert bool(norm.isnan()) and bool(torch.autograd.grad(norm, a)[0].isnan().any())


def test_the_gram_form_is_as_near_to_the_truth_as_the_product_where_almost_all_cancels() -> None:
    """D is led to A D W = 0 with D ≠ 0: what is left there is what an arrival is judged by, against ε as small as 5e-6.

    In float32 the Gram form would be off by about the root of its rounding, 3e-4 of the norms of A, D and W.
    """
    torch.manual_seed(0)
    m, n, l = 64, 6, 72  # noqa: E741
    d = torch.randn(1, n, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    w = basis[:, :3] @ torch.randn(3, l, dtype=torch.float64)  # of rank 3, so that A can be orthogonal to D W
    span = torch.linalg.qr(d.T * w)[0][:, :3]
    a = torch.randn(m, n, dtype=torch.float64)
    a = a - (a @ span) @ span.T
    for left in (0.0, 1e-5, 1e-3, 1e-1):
        parts = [(a + left * torch.randn(m, n))[None].float(), d.float(), w[None].float()]
        truth = float(plain(*(part.double() for part in parts)))
        assert gram_is_cheaper(parts[0], parts[2])
        for value in (float(norm_of_product(*parts)), norm_of_product(*(p.requires_grad_() for p in parts)).item()):
            assert value == pytest.approx(truth, rel=1e-5, abs=1e-6)
        rough = (parts[0].mT @ parts[0] * (parts[2] @ parts[2].mT) @ parts[1].mT)[0].T @ parts[1].T
        if left == 0:
            assert abs(float(rough.detach().clamp(min=0).sqrt()) - truth) > 1e-5
        exact = [part.detach().double().requires_grad_() for part in parts]
        of_truth = torch.autograd.grad(plain(*exact), exact)
        of_gram = torch.autograd.grad(norm_of_product(*parts), parts)
        if left:
            assert all(
                torch.nn.functional.cosine_similarity(x.flatten().double(), y.flatten(), 0) > 0.999
                for x, y in zip(of_gram, of_truth, strict=True)
            )


class Whole(nn.Module):
    """Residual blocks of two shapes with strict and relaxed sites, some augmented."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 8, bias=bias))
            for w, bias in ((12, True), (12, False), (16, True), (12, True), (12, False))
        )
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for mlp in self.mlps:
            x = x + mlp(x)
        for head in self.heads:
            x = x + head(x)
        return x


def walked() -> nn.Module:
    model = bypass_fx.extend(Whole().double(), mode="all")
    with torch.no_grad():
        for site in bypass_fx.sites(model):
            bypass_fx.surgery.delta_of(model, site).copy_(torch.randn(site.width))
    return model


def test_sites_of_one_shape_are_one_batch_with_the_norms_and_gradients_of_single_ones() -> None:
    model, other = walked(), walked()
    found = bypass_fx.sites(model)
    assert {site.constraint for site in found} == {"folded", "augmented", "zero"}
    bypass_fx.penalty(model).backward()
    singly = [residual(other, site) for site in bypass_fx.sites(other)]
    torch.stack(singly).sum().backward()
    assert list(bypass_fx.norms(model).values()) == pytest.approx([norm.item() for norm in singly], rel=1e-12)
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, expected = parameter.grad, theirs[name].grad
        assert (gradient is None) == (expected is None), name
        assert gradient is None or torch.allclose(gradient, expected), name  # type: ignore[arg-type]
    with torch.profiler.profile(acc_events=True) as profile:
        bypass_fx.norms(model)
    products = sum(e.count for e in profile.key_averages() if e.key in ("aten::bmm", "aten::mm"))
    assert products == 4  # two widths, and for the augmented sites the column b_W


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_whole_loss_with_its_penalty_can_be_transformed(transform: str) -> None:
    model = walked()
    x = torch.randn(5, 8, dtype=torch.float64)
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(_WithPenalty(model), {f"model.{k}": v for k, v in parameters.items()}, (x,))

    if transform == "vmap":
        found = torch.vmap(torch.func.grad(loss))(stacked)
        one = torch.func.grad(loss)({name: value[1] for name, value in stacked.items()})
        assert all(torch.allclose(found[name][1], one[name]) for name in one)
    else:
        own = dict(model.named_parameters())
        found = torch.func.grad(loss)({name: p.detach() for name, p in own.items()})
        (model(x).square().sum() + bypass_fx.penalty(model)).backward()
        assert all(torch.allclose(found[name], p.grad) for name, p in own.items())  # type: ignore[arg-type]


class _WithPenalty(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().sum() + bypass_fx.penalty(self.model)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_a_norm_that_is_not_below_epsilon_is_not_said_to_be_whatever_the_size_of_the_weights(scale: float) -> None:
    torch.manual_seed(0)
    m, n, l = 144, 16, 432  # noqa: E741
    for _ in range(20):
        d = torch.randn(1, n, dtype=torch.float64)
        w = scale * torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0][:, :8]
        w = w @ torch.randn(8, l, dtype=torch.float64)
        span = torch.linalg.qr(d.T * w)[0][:, :8]
        a = scale * torch.randn(m, n, dtype=torch.float64)
        parts = [(a - (a @ span) @ span.T)[None].float().requires_grad_(), d.float(), w[None].float()]
        truth = float(plain(*(part.detach().double() for part in parts)))
        norm = norm_of_product(*parts)
        assert norm.item() == pytest.approx(truth, rel=1e-3)
        assert torch.autograd.grad(norm, parts[0])[0].any()


def test_a_penalty_under_autocast_is_taken_in_its_own_precision() -> None:
    model = bypass_fx.extend(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)))
    with torch.no_grad():
        for site in bypass_fx.sites(model):
            bypass_fx.surgery.delta_of(model, site).fill_(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        within = bypass_fx.penalty(model)
    within.backward()  # type: ignore[no-untyped-call]
    assert within.dtype == torch.float32 and torch.equal(within, bypass_fx.penalty(model))
    assert bypass_fx.penalty(model.to("meta")).is_meta


@pytest.mark.parametrize("shape", [FEW, MANY, MANY[::-1]])
def test_many_gradients_at_once_are_those_of_one_after_another(shape: tuple[int, int, int]) -> None:
    parts, factors = drawn(shape), torch.tensor([1.0, -2.0, 3.0])
    single = torch.autograd.grad(norm_of_product(*parts), parts)
    many = torch.autograd.grad(norm_of_product(*parts), parts, factors, is_grads_batched=True)
    for one, batch in zip(single, many, strict=True):
        assert all(torch.allclose(factor * one, each, atol=1e-5) for factor, each in zip(factors, batch, strict=True))
