"""Checkpoints: whole or not at all, checked before they are used, and the one before where one is damaged."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from bypass_fx.checkpoint import CheckpointError, Checkpoints
from bypass_fx.packing import PackingError, pack, unpack

STATE: dict[str, Any] = {
    "weights": {"0.weight": torch.randn(3, 2), "half": torch.ones(2, dtype=torch.bfloat16), "empty": torch.ones(0)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"betas": (0.9, 0.999), "lr": 1e-3}]},
    "odd": [None, True, "§tensor", float("inf"), {"§tensor": 1}, {7: -0.0}],
}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and one == other


def _folder(tmp_path: Path, steps: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in range(1, steps + 1):
        checkpoints.save(step, {**STATE, "step": step})
    return checkpoints


def test_a_state_comes_back_as_it_was_through_strict_json() -> None:
    tree, tensors = pack(STATE)
    assert all("torch" not in type(value).__module__ for value in tree.values())
    assert _same(unpack(json.loads(json.dumps(tree, allow_nan=False)), tensors), STATE)


def test_what_only_pickle_could_hold_is_named() -> None:
    with pytest.raises(PackingError, match="/groups/0/fn holds a function"):
        pack({"groups": [{"fn": lambda: None}]})


def test_the_last_checkpoints_stay_and_the_newest_is_used(tmp_path: Path) -> None:
    checkpoints = _folder(tmp_path, steps=5)
    assert checkpoints.steps() == [3, 4, 5]
    found = checkpoints.newest()
    assert found and found[0] == 5 and _same(found[1], {**STATE, "step": 5})
    assert not any(path.suffix in (".pt", ".pkl", ".bin") for path in tmp_path.rglob("*"))


def test_where_none_was_saved_there_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere").newest() is None


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors", "checksums.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints = _folder(tmp_path)
    file = tmp_path / "step-000000003" / name
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[random.Random(name).randrange(len(content) // 2, len(content) - 2)] ^= 1
        file.write_bytes(content)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.warns(UserWarning, match=r"step-000000003.* is damaged.*; trying the one before it"):
        found = checkpoints.newest()
    assert found and found[0] == 2 and _same(found[1], {**STATE, "step": 2})


def test_where_all_are_damaged_nothing_is_begun_anew_in_silence(tmp_path: Path) -> None:
    checkpoints = _folder(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"none")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(CheckpointError, match="can be used; start a new"),
    ):
        checkpoints.newest()


def test_what_a_killed_process_had_begun_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    checkpoints = _folder(tmp_path, steps=1)
    (tmp_path / ".step-000000002.99999").mkdir()
    assert checkpoints.steps() == [1]
    checkpoints.save(3, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000003"]


def test_a_write_that_fails_midway_leaves_the_ones_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = _folder(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bypass_fx.checkpoint.sync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
        checkpoints.save(4, STATE)
    assert checkpoints.steps() == [1, 2, 3] and not list(tmp_path.glob(".*"))


def test_another_versions_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = _folder(tmp_path)
    monkeypatch.setattr("bypass_fx.checkpoint.FORMAT", 2)
    with pytest.raises(CheckpointError, match="another version's format"):
        checkpoints.load(3)
