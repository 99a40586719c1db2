"""What a step costs the host: nothing is waited for, no graph is made anew, and the constraint may be looked at seldom."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import bypass_fx
from bypass_fx import readout
from bypass_fx.readout import Readout

RETURNS = ("homotopy", "proximal", "penalty", "published", "lagrangian")


def net(blocks: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    inner = [layer for _ in range(blocks - 1) for layer in (nn.ReLU(), nn.Linear(10, 10))]
    return nn.Sequential(nn.Linear(2, 10), *inner, nn.ReLU(), nn.Linear(10, 1))


def begun(comeback: str, opt1: int = 5, opt2: int = 40, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options = {"gamma": bypass_fx.Linear(0.01), "epsilon": 1e-4, **options}
    return model, optimizer, bypass_fx.BypassSchedule(model, optimizer, opt1, opt2, comeback=comeback, **options)


def step(model: nn.Module, optimizer: Any, schedule: Any, seed: int = 0) -> None:
    x = torch.rand(32, 2, generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.mse_loss(model(x), x.prod(1, keepdim=True)) + schedule.penalty()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step(loss)


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings that come a step later, as from a GPU."""
    monkeypatch.setattr(readout, "delays", lambda device: True)


def test_numbers_come_out_a_step_later_where_they_are_delayed() -> None:
    late = Readout(torch.device("cpu"))
    late.delays = True
    assert late.exchange(readout.Sent((1.0,)), "opt1", 1, False) is None
    assert late.exchange(readout.Sent((2.0,)), "opt2", 1, True) == readout.Reading("opt1", 1, False, (1.0,))
    again = Readout(torch.device("cpu"))
    again.load_state_dict(late.state_dict())
    assert late.flush() == again.flush() == readout.Reading("opt2", 1, True, (2.0,))
    assert late.flush() is None and late.state_dict() is None


class Scalars(TorchDispatchMode):
    """Counts the numbers that the host asks for and waits for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("comeback", RETURNS)
def test_a_step_asks_for_no_number_but_by_the_readout(
    comeback: str, delayed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, schedule = begun(comeback, epsilon=1e-12, gamma=bypass_fx.Linear(1e-6))
    asked, counts = list[str](), list[int]()
    plain = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: asked.append("tolist") or plain(self))
    for _ in range(20):
        with Scalars() as scalars:
            penalty = schedule.penalty()
        optimizer.zero_grad()
        (model(torch.rand(4, 2)).square().sum() + penalty).backward()
        optimizer.step()
        asked.clear()
        with scalars:
            schedule.step(penalty.detach())
        assert scalars.count == 0, schedule.phase
        assert len(asked) <= 1 and {*asked} <= {"tolist"}
        counts.append(len(asked))
    assert 0 < sum(counts) <= (6 if comeback == "homotopy" else 17)
    assert schedule.phase == "opt2"


@pytest.mark.parametrize("comeback", RETURNS)
@pytest.mark.filterwarnings("ignore:penalty", "ignore:opt2 ended")
def test_a_bypass_whose_readings_come_late_ends_as_one_whose_come_at_once(comeback: str, delayed: None) -> None:
    model, optimizer, schedule = begun(comeback)
    shapes = {name: value.shape for name, value in net().state_dict().items()}
    while schedule.phase != "done":
        step(model, optimizer, schedule, schedule.steps)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    if comeback != "published":
        assert len(schedule.report.arrivals) == 2 and schedule.report.opt2_steps <= 40


@pytest.mark.filterwarnings("ignore:opt2 ended")
def test_what_is_still_out_when_the_budget_ends_has_the_norm_of_the_last_step() -> None:
    reports = []
    for late in (False, True):
        model, optimizer, schedule = begun("published", epsilon=1e-12, gamma=bypass_fx.Linear(1e-6))
        schedule._bypass.lookout._readout.delays = late
        while schedule.phase != "done":
            step(model, optimizer, schedule, schedule.steps)
        reports.append(schedule.report)
    assert reports[0] == reports[1] and len(reports[0].left_out) == 2


def test_late_readings_find_what_is_not_finite_a_step_later_and_say_when_it_was(delayed: None) -> None:
    model, optimizer, schedule = begun("homotopy")
    before = copy.deepcopy(net().state_dict())
    step(model, optimizer, schedule)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")  # type: ignore[index]
    for _ in range(4):
        step(model, optimizer, schedule)
    assert schedule.phase == "opt2"
    with pytest.raises(bypass_fx.NonFiniteError, match="opt1, step 5"):
        step(model, optimizer, schedule)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_late_readings_are_part_of_the_state(delayed: None) -> None:
    first, second = begun("proximal"), begun("proximal")
    for t in range(15):
        step(*first, t)
    state = copy.deepcopy((first[2].state_dict(), first[0].state_dict(), first[1].state_dict()))
    assert state[0]["bypass"]["under_way"] is not None
    for part, kept in zip((second[2], second[0], second[1]), state, strict=True):
        part.load_state_dict(kept)
    for t in range(15, 25):
        for run in (first, second):
            step(*run, t)
        assert first[2].norms == second[2].norms
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))


@pytest.mark.parametrize("comeback", ["homotopy", "proximal", "penalty"])
@pytest.mark.filterwarnings("ignore:penalty")
def test_the_constraint_may_be_evaluated_in_every_kth_step(comeback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[int]()
    model, optimizer, schedule = begun(comeback, opt1=0, penalty_every=4, epsilon=1e-12)
    measured = type(schedule._bypass)._norms

    def noting(self: Any, *found: Any) -> Tensor:
        taken.append(self.opt2_steps)
        return measured(self, *found)

    monkeypatch.setattr(type(schedule._bypass), "_norms", noting)
    while schedule.phase != "done":
        if comeback == "penalty" and not schedule._course.comeback.ends:
            assert schedule.penalty().requires_grad == (schedule.steps % 4 == 0)
        step(model, optimizer, schedule)
    assert taken == [t for t in range(schedule.report.opt2_steps) if t % 4 == 0 or t == 39]
    assert len(schedule.report.arrivals) == 2


def test_beyond_its_budget_the_penalty_comes_in_every_kth_step_as_before() -> None:
    model, optimizer, schedule = begun("published", opt1=0, opt2=6, penalty_every=4, at_budget="continue")
    with torch.no_grad():
        for site in bypass_fx.sites(model):
            bypass_fx.surgery.delta_of(model, site).fill_(0.5)
    added = []
    for _ in range(16):
        added.append(schedule.penalty().requires_grad)
        step(model, optimizer, schedule)
    assert added == [t % 4 == 0 for t in range(16)]


def test_in_its_step_the_penalty_counts_k_times() -> None:
    terms = []
    for every in (1, 3):
        model, _, schedule = begun("penalty", opt1=0, penalty_every=every)
        with torch.no_grad():
            schedule.gamma.fill_(1.0)
            for site in bypass_fx.sites(model):
                bypass_fx.surgery.delta_of(model, site).fill_(0.5)
        terms.append(schedule.penalty().item())
    assert terms[1] == pytest.approx(3 * terms[0]) and terms[0] > 0


def test_between_two_looks_the_state_holds_what_the_norms_are_taken_to_be() -> None:
    first, second = (begun("proximal", opt1=0, penalty_every=4) for _ in range(2))
    for t in range(6):
        step(*first, t)
    state = copy.deepcopy((first[2].state_dict(), first[0].state_dict(), first[1].state_dict()))
    for part, kept in zip((second[2], second[0], second[1]), state, strict=True):
        part.load_state_dict(kept)
    for t in range(6, 20):
        step(*first, t)
        step(*second, t)
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))


@pytest.mark.parametrize("comeback", ["lagrangian", "variety"])
def test_returns_that_need_the_constraint_in_every_step_say_so(comeback: str) -> None:
    with pytest.raises(bypass_fx.BypassError, match=f"{comeback!r} needs the constraint in every step"):
        begun(comeback, penalty_every=2)
    with pytest.raises(bypass_fx.BypassError, match="penalty_every is 0"):
        begun("homotopy", penalty_every=0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.act, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(self.norm(x))))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at each block's input
@pytest.mark.parametrize("extended", [False, True])
def test_equal_blocks_share_one_compiled_region(extended: bool) -> None:
    model = nn.Sequential(*[Block() for _ in range(6)])
    if extended:
        bypass_fx.extend(model)
    torch.compiler.reset()
    counters.clear()
    for block in model:
        block.compile(backend="aot_eager")
    for _ in range(2):
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
