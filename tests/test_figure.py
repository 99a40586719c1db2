"""The picture of a run: both losses, the residual, and the phases in their colours."""

from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from bypass_fx.figure import FIGURES, draw, figure, paper_figure
from bypass_fx.history import Event, History
from bypass_fx.panels import SHADES
from tests.runs import trainer


@pytest.fixture(scope="module")
def history() -> History:
    return trainer(train1=3, opt1=2, opt2=4, train3=1, evaluate_every=1).fit()


def test_the_losses_of_both_arms_start_at_one_point(history: History) -> None:
    lines = {line.get_label(): line.get_xydata() for line in figure(history).axes[0].get_lines()}
    records = {
        phase: [r for r in history.records if (r.phase == "train1") == (phase == "train1")] for phase in ("train1", "")
    }
    assert lines["before θ*"].tolist() == [[record.epoch, record.loss] for record in records["train1"]]
    assert lines["bypass"][1:].tolist() == [[record.epoch, record.loss] for record in records[""]]
    assert lines["baseline"][1:].tolist() == [[record.epoch, record.baseline] for record in records[""]]
    assert lines["bypass"][0].tolist() == lines["baseline"][0].tolist() == lines["before θ*"][-1].tolist()


def test_the_residual_is_drawn_where_the_model_is_out(history: History) -> None:
    (line,) = figure(history).axes[1].get_lines()
    assert line.get_xdata().tolist() == [record.epoch for record in history.records if record.residual]
    assert 3 < line.get_xdata()[0] < line.get_xdata()[-1] < 9


def test_opt1_is_grey_and_opt2_purple_in_epochs(history: History) -> None:
    grey, purple = to_rgb(SHADES["opt1"]), to_rgb(SHADES["opt2"])
    assert len(set(grey)) == 1 and purple[2] > purple[0] > purple[1]
    for axes in figure(history).axes:
        assert axes.get_yscale() == "log"
        shades = [(to_rgb(p.get_facecolor()), p.get_x(), p.get_x() + p.get_width()) for p in axes.patches]
        assert shades == [(grey, 3, 5), (purple, 5, 9)]


def _events(history: History) -> list[Event]:
    return [*history.records, *history.moments, *history.evaluations]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_the_paper_shows_the_runs_numbers(history: History, name: str) -> None:
    picture = paper_figure(name, [_events(history)])
    assert len(picture.axes) == len(FIGURES[name])
    assert all(axes.get_lines() and axes.get_ylabel() and axes.patches for axes in picture.axes)


def test_distance_and_cosines_are_those_of_the_records(history: History) -> None:
    distance, cosines, relative = paper_figure("5", [_events(history)]).axes
    seen = [record for record in history.records if record.geometry]
    lines = {line.get_label(): line.get_ydata().tolist() for line in distance.get_lines()}
    assert lines["bypass"] == [record.geometry.distance for record in seen if record.geometry]
    assert lines["baseline"] == [record.geometry.baseline_distance for record in seen if record.geometry]
    assert [line.get_label() for line in cosines.get_lines()] == ["baseline", "bypass", "relative"]
    assert relative.get_lines()[0].get_ydata().tolist() == cosines.get_lines()[2].get_ydata().tolist()


def test_the_advantage_is_bypass_minus_baseline_at_every_evaluation(history: History) -> None:
    axes = paper_figure("4", [_events(history)]).axes[1]
    line = next(line for line in axes.get_lines() if line.get_label() == "test set")
    scored = sorted((*history.moments, *history.evaluations), key=lambda moment: moment.step)
    gaps = [m.bypass.test_loss - m.baseline.test_loss for m in scored if m.baseline]
    assert line.get_ydata().tolist() == gaps and len(gaps) > 8


def test_several_runs_are_drawn_as_their_mean_and_spread(history: History) -> None:
    other = trainer(train1=3, opt1=2, opt2=4, train3=1, seed=1, evaluate_every=1).fit()
    axes = paper_figure("3", [_events(history), _events(other)]).axes[3]
    line = next(line for line in axes.get_lines() if line.get_label() == "bypass")
    pairs = zip(history.records, other.records, strict=True)
    means = [(a.geometry.distance + b.geometry.distance) / 2 for a, b in pairs if a.geometry and b.geometry]
    assert line.get_ydata().tolist() == pytest.approx(means)
    assert len(axes.collections) == 2


def test_a_run_without_train1_and_opt1_can_be_drawn(tmp_path: Path) -> None:
    draw(trainer(train1=0, opt1=0, train3=0).fit(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
