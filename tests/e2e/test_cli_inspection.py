"""`bypass-fx inspect` and `bypass-fx list` from end to end: what they show, write and refuse, at every width."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import networkx as nx
import pytest
from torch import nn

import bypass_fx
from benchmarks import coverage
from benchmarks.results_file import ResultsFile
from bypass_fx import models, zoo_sites
from tests.browser import data_of
from tests.e2e.test_cli import SHORT, Run
from tests.e2e.test_cli import run as run

MADE = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))


def narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 10))


COMMAND = [sys.executable, "-m", "bypass_fx"]


def in_terminal(width: int, *arguments: str) -> str:
    """What the command prints into a terminal of so many columns."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**env, "TERM": "xterm-256color"},
        start_new_session=True,
    ) as child:
        os.close(terminal)
        parts: list[bytes] = []
        while True:
            try:
                parts.append(os.read(screen, 65536))
            except OSError:  # the child has ended
                break
    os.close(screen)
    assert child.returncode == 0
    return b"".join(parts).decode()


def plain(text: str) -> list[str]:
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines()]


def test_inspect_shows_folded_sites_refusals_and_totals(run: Run) -> None:
    result = run("inspect", "timm:resnet18")
    assert result.code == 0, result.err
    assert re.search(r"^layer1\.\{0-1\}\.act1 +×2 +relaxed +D = 0 +relu +64 ", result.out, re.MULTILINE)
    assert re.search(r"^ +1  it stands in no residual block +mode='all' takes it +act1", result.out, re.MULTILINE)
    assert "16 sites, 3840 coefficients; 1 activation refused; 0.03% of the model's 11689512 parameters" in result.out
    assert "ψ adds 3.01 MFLOP a sample forward (0.08% of the model's)" in result.out
    assert "for an input of 1×3×224×224" in result.out


def test_inspect_takes_a_mode_a_selection_and_an_input(run: Run) -> None:
    result = run("inspect", "2c2d", "--select", "relu*", "--mode", "all")
    assert result.code == 0
    assert re.search(r"strict +A D W = 0 +relu +1024 +fc1 +fc2 +always", result.out)
    elements = 32 * 28 * 28 + 64 * 10 * 10 + 1024
    assert f"ψ adds {2 * elements / 1000:.3g} kFLOP a sample forward" in result.out
    larger = run("inspect", "2c2d", "--input", "3x64x64")  # its fc1 is for 32x32
    assert "1×3×64×64; the run ended early: RuntimeError: " in larger.out and larger.err == ""


def test_inspect_shows_the_code_that_the_surgery_writes(run: Run) -> None:
    result = run("inspect", "mlp", "--code")
    assert re.search(r"^\+ +psi = bypass_fx_activation_psi\(_1, _0, delta_1, -1\)", result.out, re.MULTILINE)
    assert "\x1b[" not in result.out


def test_inspect_writes_a_plan_that_can_be_read(run: Run) -> None:
    result = run("inspect", "mlp", "--mode", "strict", "--json")
    assert bypass_fx.Plan.from_json(result.out) == bypass_fx.plan(models.build("mlp"), mode="strict")


def test_inspect_writes_several_pictures_at_once(run: Run, tmp_path: Path) -> None:
    result = run("inspect", "mlp", "--out", "mlp.html", "--out", "mlp.graphml", "--out", "mlp.dot")
    assert result.code == 0, result.err
    assert data_of((tmp_path / "mlp.html").read_text())["sites"]["1"]["kind"] == "folded"
    assert nx.read_graphml(tmp_path / "mlp.graphml").nodes["(model)#_1"]["site"] == "1"
    assert (tmp_path / "mlp.dot").read_text().startswith("digraph")


def test_inspect_reads_a_run_and_its_norms(run: Run, tmp_path: Path) -> None:
    assert run("train", *SHORT, "--data", "eggholder", "--out", "out").code == 0
    result = run("inspect", "--run", "out", "--out", "page.html")
    assert result.code == 0, result.err
    assert re.search(r"^1 +strict .* +5 +0 +2 +always +\d+\.\d{4} +\d+\.\d{4}$", result.out, re.MULTILINE)
    shown = data_of((tmp_path / "page.html").read_text())["run"]
    recorded = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert shown["steps"] == [row["step"] for row in recorded if row.get("residuals")]
    for index, row in enumerate([row for row in recorded if row.get("residuals")]):
        assert row["residual"] == pytest.approx(sum(values[index] for values in shown["residuals"].values()))
    assert run("inspect", "out").code == 0  # the model of a run, of its data's width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "name a model"),
        (["inspect", "mlpp"], "did you mean"),
        (["inspect", "mlp", "--mode", "strikt"], "is none of"),
        (["inspect", "mlp", "--input", "3xx"], "write 3x224x224"),
        (["inspect", "mlp", "--input", "3:float31"], "write 3x224x224"),
        (["inspect", "mlp", "--out", "mlp.pdf"], "take one of .html"),
        (["inspect", "."], "not that of a run"),
        (["inspect", "mlp", "--run", "nowhere"], "give the folder of a run"),
        (["list", "--kind", "strickt"], "did you mean strict"),
        (["inspect", "tests.e2e.test_cli_inspection:MADE"], "is a model already; name a function that makes it"),
        (["probe", "tests.e2e.test_cli_inspection:narrow"], "the model can't take inputs of shape"),
        (["stuck", "tests.e2e.test_cli_inspection:narrow"], "the model can't take inputs of shape"),
    ],
)
def test_what_can_be_mended_ends_in_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert re.fullmatch(rf"Error: [^\n]*{re.escape(message)}[^\n]*\n", result.err), result.err


def test_a_narrow_table_fits_and_breaks_no_name() -> None:
    lines = plain(shown := in_terminal(80, "inspect", "timm:efficientnet_b0"))
    assert "\x1b[" in shown and max(map(len, lines)) <= 80
    at = next(index for index, line in enumerate(lines) if line.startswith("blocks.5.{1-3}.se.act1"))
    assert re.fullmatch(r"blocks\.5\.\{1-3\}\.se\.act1 +×3 +strict +A D W = 0 +silu +48", lines[at])
    assert lines[at + 1] == "  .conv_reduce → .conv_expand"


def test_a_wide_table_has_a_column_for_everything() -> None:
    lines = plain(in_terminal(200, "inspect", "mlp"))
    assert lines[0].split() == ["site", "kind", "constraint", "activation", "width", "W", "A", "exact"]
    assert lines[1].split() == ["1", "strict", "A", "D", "W", "=", "0", "relu", "5", "0", "2", "always"]
    assert max(map(len, lines)) <= 200


def test_list_names_the_models_that_offer_a_kind(run: Run) -> None:
    result = run("list", "timm:resnet1*", "--kind", "strict")
    assert result.code == 0
    assert re.search(r"^timm:resnet18 +11\.7 M +17 +0 +8 +0 ", result.out, re.MULTILINE)
    assert re.search(r"models; measured with .*timm \d+\.\d+", result.out)
    exact = json.loads(run("list", "timm:*", "--kind", "folded", "--exact", "--json").out)
    assert len(exact) > 300 and all(row["folded"] and row["exact"] for row in exact)


def test_the_listed_models_are_those_of_the_committed_results() -> None:
    assert (Path(zoo_sites.__file__).parent / zoo_sites.FILE).read_text() == coverage.listing(
        ResultsFile("coverage.jsonl")
    )


@pytest.mark.parametrize(
    ("shell", "words", "offered", "not_offered"),
    [
        ("zsh", ["ins"], "inspect", "train"),
        ("bash", ["inspect", "--se"], "--select", "--mode"),
        ("fish", ["inspect", "timm:resnet1"], "timm:resnet18", "timm:resnet50"),
    ],
)
def test_the_shell_completes_commands_options_and_models(
    shell: str, words: list[str], offered: str, not_offered: str
) -> None:
    line = " ".join(("bypass-fx", *words))
    asked = {
        "_BYPASS_FX_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words)),
    }
    code = "import sys; sys.argv = ['bypass-fx']; from bypass_fx.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert offered in done.stdout and not_offered not in done.stdout, done.stderr


def test_help_offers_shell_completion(run: Run) -> None:
    assert "--install-completion" in run("--help").out


@pytest.mark.parametrize("command", ["inspect", "list"])
def test_the_help_has_examples_whose_options_exist(run: Run, command: str) -> None:
    examples = [line.split()[1:] for line in run(command, "--help").out.splitlines() if line.startswith(" bypass-fx ")]
    assert len(examples) >= 2
    known = {line.split()[1] for line in run(command, "--help").out.splitlines() if line.startswith("│ --")}
    assert {word for example in examples for word in example if word.startswith("--")} <= known


def test_looking_leaves_the_collector_of_garbage_as_it_was(run: Run) -> None:
    assert gc.isenabled() and run("inspect", "mlp").code == 0 and gc.isenabled()
