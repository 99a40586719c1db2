"""plan, extend, sites, project and contract as the user calls them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import bypass_fx
from bypass_fx.models import Fit, TwoConvTwoDense
from bypass_fx.passes import fold
from bypass_fx.surgery import delta_of, is_extended, project


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


def test_2c2d_has_the_papers_numbers_of_parameters_and_coefficients() -> None:
    net = TwoConvTwoDense(Fit((3, 32, 32), 10))
    assert sum(parameter.numel() for parameter in net.parameters()) == 1_703_370
    plan = bypass_fx.plan(net)
    assert plan.coefficients == 1024 and plan.sites[0].constraint == "folded"


@pytest.mark.parametrize("train", [False, True])
def test_resnet18_relaxed_has_16_sites_and_the_same_outputs(train: bool) -> None:
    net = resnet().train(train)
    keys = list(net.state_dict())
    x = torch.randn(4, 3, 64, 64)
    state = copy.deepcopy(net.state_dict())
    before = net(x)
    net.load_state_dict(state)
    bypass_fx.extend(net, mode="relaxed")
    assert len(bypass_fx.sites(net)) == 16 and sum(site.width for site in bypass_fx.sites(net)) == 3840
    assert isinstance(net, torchvision.models.ResNet)
    assert [key for key in net.state_dict() if "delta" not in key] == keys
    assert torch.equal(net(x), before)


def test_a_deep_copy_of_an_extended_model_is_independent() -> None:
    net = bypass_fx.extend(mlp())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        delta_of(twin, bypass_fx.sites(twin)[0]).fill_(1.0)
    assert not bool(delta_of(net, bypass_fx.sites(net)[0]).any())
    bypass_fx.contract(twin)
    assert is_extended(net) and not is_extended(twin)


def test_a_compiled_model_is_rewritten_for_another_way_of_calling() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            z = self.fc1(x) * 2
            return self.fc2(torch.tanh(z if shift is None else z + shift))  # type: ignore[no-any-return]

    net = bypass_fx.extend(Optional(), mode="all")
    with torch.no_grad():
        net.get_parameter("delta_tanh").fill_(0.5)
    x, shift = torch.randn(3, 4), torch.randn(8)
    expected = net(x), copy.deepcopy(net)(x, shift)
    compiled = torch.compile(net, backend="eager")
    assert torch.allclose(compiled(x), expected[0]) and torch.allclose(compiled(x, shift), expected[1])


def test_the_import_leaves_torchs_compiler_alone() -> None:
    code = "import sys, torch; before = set(sys.modules); import bypass_fx; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {
        "torch._dynamo",
        "networkx",
        "timm",
        "torchvision",
        "transformers",
        "accelerate",
        "matplotlib",
        "sklearn",
        "rich",
    }
    assert "bypass_fx" in loaded and not heavy & set(loaded)


def test_a_compiled_model_follows_extend_and_contract() -> None:
    net = mlp()
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(5, 4)
    plain = compiled(x)
    assert bypass_fx.extend(compiled) is compiled
    with torch.no_grad():
        for site in bypass_fx.sites(compiled):
            delta_of(compiled, site).fill_(0.5)
    assert torch.allclose(compiled(x), net(x)) and not torch.allclose(compiled(x), plain)
    bypass_fx.contract(compiled)
    assert torch.allclose(compiled(x), net(x)) and not torch.allclose(compiled(x), plain)
    assert type(net) is nn.Sequential


def test_extended_resnet_runs_under_inductor() -> None:
    block = bypass_fx.extend(torchvision.models.resnet.BasicBlock(4, 4).eval())
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        for site in bypass_fx.sites(block):
            delta_of(block, site).fill_(0.5)
    assert torch.allclose(torch.compile(block)(x), block(x), atol=1e-5)


def test_contract_folds_the_constant_into_the_bias() -> None:
    """D ≠ 0 on the variety A D W = 0: the outputs stay, and b_A takes A D b_W in (eq. 15)."""
    net = mlp().double()
    with torch.no_grad():
        net[0].weight[1] = net[0].weight[0]
        net[2].weight[:, 1] = -net[2].weight[:, 0]
    bypass_fx.extend(net, select="1")
    with torch.no_grad():
        delta_of(net, bypass_fx.sites(net)[0])[:2] = 0.7
    x = torch.randn(50, 4, dtype=torch.float64)
    before, bias = net(x).detach(), net[2].bias.detach().clone()
    report = bypass_fx.contract(net)
    assert report.residual < 1e-15 and report.sites[0].bias_shift > 1e-3
    assert not torch.allclose(net[2].bias, bias)
    assert float(((net(x).detach() - before) / before).abs().max()) < 1e-12


def test_project_brings_single_sites_back_and_keeps_the_insertion() -> None:
    net = bypass_fx.extend(mlp())
    first, second = bypass_fx.sites(net)
    with torch.no_grad():
        delta_of(net, first).fill_(0.5)
        delta_of(net, second).fill_(0.5)
    bias = net[2].bias.detach().clone()
    shift = net[2].weight @ (0.5 * net[0].bias)
    project(net, [first.name])
    assert torch.allclose(net[2].bias, bias + shift)
    assert not bool(delta_of(net, first).any()) and bool(delta_of(net, second).any())
    with pytest.raises(bypass_fx.SurgeryError, match="no site is called"):
        project(net, ["nowhere"])


def test_a_chain_of_sites_folds_front_to_back() -> None:
    """The first site's A is the second one's W: its b_A must be complete before the second fold reads it."""
    net = mlp().double()
    with torch.no_grad():
        for w, a in ((net[0], net[2]), (net[2], net[4])):
            w.weight[1] = w.weight[0]
            a.weight[:, 1] = -a.weight[:, 0]
        net[2].weight[1] = net[2].weight[0]
    bypass_fx.extend(net)
    with torch.no_grad():
        for site in bypass_fx.sites(net):
            delta_of(net, site)[:2] = 0.7
    assert all(value < 1e-14 for value in bypass_fx.norms(net).values())
    x = torch.randn(50, 4, dtype=torch.float64)
    before = net(x)
    bypass_fx.contract(net)
    assert torch.allclose(net(x), before, rtol=1e-12, atol=1e-12)


def test_select_takes_patterns_and_predicates() -> None:
    assert [site.name for site in bypass_fx.plan(mlp(), select="3")] == ["3"]
    assert [site.name for site in bypass_fx.plan(mlp(), select=["1", "9"])] == ["1"]
    assert [site.name for site in bypass_fx.plan(mlp(), select=lambda site: site.width == 6)] == ["3"]


def test_sequential_bypasses_work() -> None:
    net = mlp()
    x = torch.randn(3, 4)
    before = net(x)
    for _ in range(3):
        bypass_fx.extend(net)
        bypass_fx.contract(net)
    assert torch.equal(net(x), before)


def test_equal_blocks_share_one_generated_class() -> None:
    net = nn.Sequential(*(torchvision.models.resnet.BasicBlock(4, 4) for _ in range(3)))
    bypass_fx.extend(net)
    assert len({type(block) for block in net}) == 1
    again = bypass_fx.extend(torchvision.models.resnet.BasicBlock(4, 4))
    assert type(again) is type(net[0])


def test_half_precision_models_keep_delta_in_float32() -> None:
    net = bypass_fx.extend(mlp().bfloat16())
    assert delta_of(net, bypass_fx.sites(net)[0]).dtype == torch.float32
    assert net(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_channels_last_stays_channels_last() -> None:
    block = torchvision.models.resnet.BasicBlock(4, 4).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    assert bypass_fx.extend(block)(x).is_contiguous(memory_format=torch.channels_last)


def test_forward_hooks_keep_working() -> None:
    net = mlp()
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda _, __, result: seen.append(result))
    bypass_fx.extend(net)(torch.randn(2, 4))
    assert len(seen) == 1


def test_optional_arguments_keep_working() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.fc2(torch.relu(self.fc1(x)))
            return y if mask is None else y * mask

    net, x, mask = Net(), torch.randn(2, 4), torch.ones(4)
    before = net(x, mask)
    bypass_fx.extend(net, example_inputs=(x, mask))
    assert torch.equal(net(x, mask=mask), before)
    with torch.no_grad():
        delta_of(net, bypass_fx.sites(net)[0]).fill_(0.5)
    masked = net(x, mask)
    assert torch.equal(net(x), masked) and torch.equal(net(x, 2 * mask), 2 * masked)
    bypass_fx.contract(net)
    assert type(net) is Net


def test_a_call_in_which_a_strict_site_is_none_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, both: bool = False) -> Tensor | tuple[Tensor, Tensor]:
            y = torch.relu(self.fc1(x))
            return (self.fc2(y), y) if both else self.fc2(y)

    net, x = bypass_fx.extend(Net()), torch.randn(2, 4)
    with pytest.raises(bypass_fx.SurgeryError, match="no strict site"):
        net(x, both=True)
    assert net(x).shape == (2, 4)
    bypass_fx.contract(net)
    bypass_fx.extend(net, example_inputs={"x": x, "both": True}, mode="all")
    assert len(net(x, both=True)) == 2


def test_extending_twice_and_contracting_a_plain_model_are_refused() -> None:
    net = bypass_fx.extend(mlp())
    with pytest.raises(bypass_fx.SurgeryError, match="extended already"):
        bypass_fx.extend(net)
    with pytest.raises(bypass_fx.SurgeryError, match="extended already"):
        bypass_fx.plan(net)
    for call in (bypass_fx.contract, bypass_fx.sites, bypass_fx.norms, bypass_fx.penalty):
        with pytest.raises(bypass_fx.SurgeryError, match="not extended"):
            call(mlp())


def test_a_model_without_a_site_is_refused_with_the_reason_and_the_way_out() -> None:
    with pytest.raises(bypass_fx.PlanError, match="no element-wise activation"):
        bypass_fx.extend(nn.Linear(2, 2))
    with pytest.raises(bypass_fx.PlanError, match="mode='all'"):
        bypass_fx.extend(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(bypass_fx.PlanError, match="names no site"):
        bypass_fx.extend(mlp(), select="nothing*")
    with pytest.raises(bypass_fx.PlanError, match="none of"):
        bypass_fx.plan(mlp(), mode="loose")  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", [{"mode": "all"}, {"select": "1"}, {"select": lambda site: True}], ids=str)
def test_a_plan_and_a_choice_of_sites_are_one_too_many(choice: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = bypass_fx.plan(net)
    with pytest.raises(bypass_fx.PlanError, match="leave them out, or the plan"):
        bypass_fx.extend(net, plan, **choice)
    assert not bypass_fx.surgery.is_extended(net)


def test_a_plan_for_another_model_is_refused_by_name() -> None:
    plan = bypass_fx.plan(mlp())
    with pytest.raises(bypass_fx.PlanError, match="plan this model anew"):
        bypass_fx.extend(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 2)), plan)
    with pytest.raises(bypass_fx.PlanError):
        bypass_fx.extend(resnet(), plan)


def test_wrappers_and_scripts_are_refused_or_seen_through() -> None:
    assert is_extended(bypass_fx.extend(nn.DataParallel(mlp())))
    with pytest.raises(bypass_fx.PlanError, match=r"torch\.nn\.Module"):
        bypass_fx.extend(torch.relu)  # type: ignore[type-var]


def test_pickling_an_extended_model_says_what_to_do() -> None:
    with pytest.raises(bypass_fx.SurgeryError, match="state_dict"):
        pickle.dumps(bypass_fx.extend(mlp()))


def test_meta_models_are_planned_extended_and_contracted_without_memory() -> None:
    with torch.device("meta"):
        net = torchvision.models.resnet18()
    bypass_fx.extend(net)
    assert bypass_fx.contract(net).residual == 0.0


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_torch_transformers_are_bypassed_in_their_helper_methods(batch_first: bool, train: bool) -> None:
    """The encoder layer's forward does not trace where a fused inference path would skip the rewritten method."""
    layers = (nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first) for _ in range(4))
    net = nn.Sequential(*layers).train(train)
    x = torch.randn(3, 5, 16)
    torch.manual_seed(0)
    before = net(x)
    bypass_fx.extend(net, mode="strict")
    names = [site.name for site in bypass_fx.sites(net)]
    relu = "0._ff_block.relu" if batch_first else "0.relu"  # without batch_first no fused path is asked about
    assert names[:2] == [relu, "0.self_attn.attention"] and len(names) == 8
    torch.manual_seed(0)
    assert torch.equal(net(x), before)
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.allclose(net(x), before, atol=1e-5)
        for site in bypass_fx.sites(net):
            delta_of(net, site).fill_(0.5)
        torch.manual_seed(0)
        assert not torch.allclose(net(x), before, atol=1e-2)
    bypass_fx.contract(net)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert {(site.activation, site.kind) for site in bypass_fx.plan(net)} == {
        ("relu", "relaxed"),
        ("attention", "strict"),
    }


def test_ragged_batches_of_a_padded_transformer_keep_working() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 5, 16), torch.tensor([[False] * 4 + [True]] * 3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its nested tensors a prototype
        before = net(x, src_key_padding_mask=mask)
        bypass_fx.extend(net)
        assert torch.allclose(net(x, src_key_padding_mask=mask), before, atol=1e-5)


def test_a_flag_that_the_rewritten_forward_would_not_follow_can_not_be_set() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.scale, self.note = nn.Linear(4, 8), nn.Linear(8, 4), 2.0, ""

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x) * self.scale))  # type: ignore[no-any-return]

    net = bypass_fx.extend(Flagged(), mode="all")
    net.scale, net.note = 2.0, "seen"
    with pytest.raises(bypass_fx.SurgeryError, match="contract the model, set it"):
        net.scale = 3.0
    assert net.eval().scale == 2.0
    bypass_fx.contract(net)
    net.scale = 3.0


def test_extend_and_contract_undo_what_they_began_where_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(mlp(), mlp())
    plan = bypass_fx.plan(nn.Sequential(mlp(), mlp()), mode="strict")
    net[1].register_buffer("delta_1", torch.zeros(1))
    with pytest.raises(bypass_fx.PlanError, match="delta_1 already"):
        bypass_fx.extend(net, plan)
    assert type(net[0]) is nn.Sequential and not any("delta" in name for name, _ in net.named_parameters())

    net = bypass_fx.extend(mlp())
    first, second = bypass_fx.sites(net)
    with torch.no_grad():
        delta_of(net, first).fill_(0.5)
    bias = net[2].bias.detach().clone()
    whole = fold.fold

    def failing(model: nn.Module, site: bypass_fx.Site, delta: Tensor) -> Tensor | None:
        if site == second:
            raise RuntimeError("no memory")
        return whole(model, site, delta)

    monkeypatch.setattr(fold, "fold", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        bypass_fx.contract(net)
    assert torch.equal(net[2].bias, bias) and is_extended(net)
