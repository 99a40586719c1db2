"""The README's commands and code do what it says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)\n```$", README, re.DOTALL | re.MULTILINE)


def test_the_python_blocks_run() -> None:
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = [block for language, block in BLOCKS if not language]
    assert len(commands) == 2 and commands[1] in (ROOT / ".ci" / "run").read_text()


def test_every_file_that_the_readme_points_to_is_there() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
