"""Weights load strictly from both formats, or the message names what doesn't fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bypass_fx
from bypass_fx.run_folder import plain
from bypass_fx.weights import WeightsError, load_weights


def _net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_loaded_from_both_formats(tmp_path: Path, suffix: str) -> None:
    model, other = _net(), _net()
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), file)
    load_weights(other, file)
    assert torch.equal(other[0].weight, model[0].weight)


def _prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in _net().state_dict().items()}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            _net(5).state_dict(),
            r"has in another shape 0\.weight \[5, 2\] for \[4, 2\], 0\.bias \[5\] for \[4\] and 1 more",
        ),
        ({**_net().state_dict(), "2.scale": torch.zeros(1)}, r"has beside the model's 2\.scale; give the --model"),
        ({"0.weight": torch.zeros(4, 2)}, r"lacks 0\.bias, 2\.weight and 1 more"),
        (_prefixed("module."), "take DataParallel's prefix 'module.' off"),
        (_prefixed("_orig_mod."), "take torch.compile's prefix '_orig_mod.' off"),
        (bypass_fx.extend(_net()).state_dict(), "call bypass_fx.contract before saving"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_leave_the_model(
    state: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    model = _net()
    before = plain(model.state_dict())
    torch.save(dict(state), tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=message):
        load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_and_missing_files_are_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    with pytest.raises(WeightsError, match="there is no file"):
        load_weights(_net(), file)
    (save_file if suffix == ".safetensors" else torch.save)(_net().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(WeightsError, match="can't be read as weights"):
        load_weights(_net(), file)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds no state dict"):
        load_weights(_net(), tmp_path / "list.pt")
