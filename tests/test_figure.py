"""The picture of a run: both losses, the residual, and the phases in their colours."""

from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from bypass_fx.figure import SHADES, draw, figure
from bypass_fx.history import History
from tests.runs import trainer


@pytest.fixture(scope="module")
def history() -> History:
    return trainer(train1=3, opt1=2, opt2=4, train3=1).fit()


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


def test_a_run_without_train1_and_opt1_can_be_drawn(tmp_path: Path) -> None:
    draw(trainer(train1=0, opt1=0, train3=0).fit(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
