"""What users bring: each works, or gets one clear refusal that leaves the model as it was."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bypass_fx
from bypass_fx.surgery import delta_of, is_extended


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def works(net: nn.Module, x: Tensor) -> None:
    """Extend leaves the output, every δ gets a gradient, and contract restores the state dict."""
    keys = list(net.state_dict())
    before = net(x)
    bypass_fx.extend(net, mode="all")
    assert torch.equal(net(x), before)
    net(x).square().sum().backward()
    assert all(delta_of(net, site).grad is not None for site in bypass_fx.sites(net))
    bypass_fx.penalty(net).backward()
    bypass_fx.contract(net)
    assert list(net.state_dict()) == keys and torch.equal(net(x), before)


class Dynamic(nn.Module):
    """Control flow on a value: no graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.act = mlp(), nn.Linear(4, 2), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.body(x)
            if float(x.detach().abs().mean()) > 10:
                break
        return self.head(self.act(x))  # type: ignore[no-any-return]


def test_dynamic_control_flow_keeps_the_sites_of_its_children() -> None:
    net = Dynamic()
    plan = bypass_fx.plan(net, mode="all", example_inputs=(torch.randn(2, 4),))
    assert [site.name for site in plan.sites if site.kind == "strict"] == ["body.1"]
    works(net, torch.randn(2, 4))


def test_a_module_called_twice_has_one_coefficient_per_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))  # type: ignore[no-any-return]

    net = Twice()
    assert [site.name for site in bypass_fx.plan(net)] == ["block.1"]
    works(net, torch.randn(2, 4))


def test_tied_weights_stay_tied() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[4].weight = net[0].weight
    works(net, torch.randn(2, 4))
    assert net[4].weight is net[0].weight


@pytest.mark.parametrize("which", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weights_are_read_as_they_are_used(which: str) -> None:
    net = mlp().double()
    for linear in (net[0], net[2]):
        getattr(parametrizations, which)(linear)
    net.eval()
    bypass_fx.extend(net)
    site = bypass_fx.sites(net)[0]
    with torch.no_grad():
        delta_of(net, site).fill_(0.5)
    expected = torch.linalg.matrix_norm(net[2].weight @ (0.5 * net[0].weight))
    assert torch.allclose(bypass_fx.norms(net)["1"], expected.detach())
    bypass_fx.contract(net)
    assert hasattr(net[0], "parametrizations")


def test_a_frozen_backbone_keeps_its_values() -> None:
    net = nn.Sequential(mlp(), nn.ReLU(), mlp())
    net[0].requires_grad_(False)
    before = copy.deepcopy(net[0].state_dict())
    bypass_fx.extend(net, mode="all")
    with torch.no_grad():
        for site in bypass_fx.sites(net):
            delta_of(net, site).fill_(0.5)
    bypass_fx.contract(net)
    assert all(torch.equal(value, before[name]) for name, value in net[0].state_dict().items())


def script(net: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that scripting will go
        return torch.jit.trace(net, torch.randn(2, 4), check_trace=False)  # type: ignore[no-any-return]


def test_what_is_frozen_after_extend_is_still_called_in_a_new_way() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
            y = self.fc2(torch.relu(self.fc1(x)))
            return y if scale is None else y * scale  # type: ignore[no-any-return]

    net, x = Scaled(), torch.randn(2, 4)
    before = net(x, scale=2.0)
    bypass_fx.extend(net)
    assert [site.constraint for site in bypass_fx.sites(net)] == ["folded"]
    net.fc1.requires_grad_(False)
    net.fc2.requires_grad_(False)
    assert torch.equal(net(x, scale=2.0), before)


def test_a_scripted_module_is_refused() -> None:
    scripted = script(mlp())
    with pytest.raises(bypass_fx.BypassError, match="scripted"):
        bypass_fx.extend(scripted)


def test_a_scripted_child_is_left_alone() -> None:
    net = nn.Sequential(mlp(), script(mlp()), mlp())
    assert {site.owner for site in bypass_fx.plan(net, mode="all")} == {"0", "2"}
    works(net, torch.randn(2, 4))


def test_a_ddp_model_is_extended_inside_its_wrapper_before_or_after_it(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = mlp()
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert bypass_fx.extend(wrapped) is wrapped and is_extended(net)
        wrapped(torch.randn(2, 4)).sum().backward()
        assert net.get_parameter("delta_1").grad is not None
        bypass_fx.contract(wrapped)
        wrapped(torch.randn(2, 4)).sum().backward()  # which awaits no gradient of D
        wrapped = nn.parallel.DistributedDataParallel(bypass_fx.extend(mlp()))
        wrapped(torch.randn(2, 4)).sum().backward()
        assert list(bypass_fx.norms(wrapped)) == ["1"]
        bypass_fx.contract(wrapped)
        assert not is_extended(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_a_lazy_module_is_refused_until_it_has_run() -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(bypass_fx.PlanError, match="run it once"):
        bypass_fx.extend(net)
    net(torch.randn(2, 4))
    works(net, torch.randn(2, 4))


def test_activations_of_complex_values_are_refused_and_the_real_ones_beside_them_work() -> None:
    spectral = nn.Sequential(nn.Linear(4, 8, dtype=torch.complex64), nn.Tanh(), nn.Linear(8, 2, dtype=torch.complex64))
    net = nn.ModuleDict({"real": mlp(), "complex": spectral})
    plan = bypass_fx.plan(net, mode="all")
    assert [site.name for site in plan] == ["real.1"]
    assert [(r.name, r.reason) for r in plan.refusals] == [("complex.1", "its input is complex, and D is real")]
    bypass_fx.extend(net)
    bypass_fx.contract(net)


def test_integer_weights_of_a_quantised_model_are_no_affine_maps() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this will move to torchao
        quantised = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, dtype=torch.qint8)
    plan = bypass_fx.plan(quantised, mode="strict")
    assert not plan.sites and "no affine map" in plan.refusals[0].reason


def test_optional_outputs_dicts_and_several_inputs_work() -> None:
    class Multi(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = mlp(), mlp()

        def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
            left = self.left(batch["a"])
            return {"sum": left + self.right(batch["b"]) * scale, "left": left}

    net, batch = Multi(), {"a": torch.randn(2, 4), "b": torch.randn(2, 4)}
    before = net(batch)
    bypass_fx.extend(net)
    after = net(batch, scale=1.0)
    assert all(torch.equal(before[key], after[key]) for key in before) and len(bypass_fx.sites(net)) == 2
    net(batch, scale=0.5)


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_the_hook_form_of_weight_norm_is_no_affine_map(norm: str, place: int) -> None:
    net = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that the hook form will go
        getattr(nn.utils, norm)(net[place])
    plan = bypass_fx.plan(net, mode="strict")
    assert not plan.sites and "a hook makes anew in every forward" in plan.refusals[0].reason
    assert "parametrizations" in plan.refusals[0].remedy
    assert bypass_fx.plan(net, mode="all").sites[0].kind == "relaxed"


def test_a_dropout_that_stays_on_in_eval_mode_is_named() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.dropout(torch.relu(self.fc1(x))))  # type: ignore[no-any-return]

    plan = bypass_fx.plan(Always(), mode="strict")
    assert not plan.sites and "is on in eval mode too" in plan.refusals[0].reason
    assert "training=self.training" in plan.refusals[0].remedy


def test_a_refusal_asks_for_example_inputs_only_where_there_were_none() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) * sum(range(x.shape[0]))

    net, x = nn.Sequential(nn.Linear(4, 4), Named()), torch.randn(2, 4)
    without, given = bypass_fx.plan(net, mode="all"), bypass_fx.plan(net, mode="all", example_inputs=(x,))
    assert not without.sites and not given.sites
    assert "example_inputs" in without.refusals[0].remedy and "example_inputs" not in given.refusals[0].remedy


def test_a_model_that_raises_an_error_without_a_word_is_refused_as_any_other() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 8), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            if float(self.fc(x).sum()) > -1e9:
                raise RuntimeError("\n")
            return x

    plan = bypass_fx.plan(nn.Sequential(Silent()), mode="all", example_inputs=(torch.randn(3, 4),))
    assert "does not run on them (RuntimeError: )" in plan.refusals[0].reason
