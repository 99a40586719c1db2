"""Models by name: built in, from timm, from torchvision, and from a user's own factory."""

import pytest
import torch
from torch import nn

from bypass_fx.models import Fit, ModelError, build, build_empty

CIFAR = Fit((3, 32, 32), 10)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_2c2d_has_the_papers_number_of_parameters() -> None:
    model = build("2c2d", CIFAR)
    assert _parameters(model) == 1_703_370
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("shape", [(64,), (3, 8, 8)])
def test_mlp_fits_vectors_and_images(shape: tuple[int, ...]) -> None:
    assert build("mlp", Fit(shape, 7))(torch.zeros(2, *shape)).shape == (2, 7)


def test_2c2d_fits_other_image_sizes_and_refuses_vectors() -> None:
    assert build("2c2d", Fit((1, 28, 40), 4))(torch.zeros(2, 1, 28, 40)).shape == (2, 4)
    with pytest.raises(ModelError, match="take the model mlp"):
        build("2c2d", Fit((64,), 10))


def test_a_timm_model_is_fitted_to_channels_outputs_and_a_fixed_input_size() -> None:
    model = build("timm:vit_tiny_patch16_224", Fit((1, 32, 32), 5)).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 5)


def test_a_torchvision_model_is_fitted_to_the_outputs_and_needs_three_channels() -> None:
    assert build("torchvision:resnet18", Fit((3, 32, 32), 5)).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(ModelError, match="3 channels"):
        build("torchvision:resnet18", Fit((1, 32, 32), 5))


def test_a_torchvision_model_with_auxiliary_heads_returns_one_tensor_in_training() -> None:
    with torch.device("meta"):
        assert build("torchvision:googlenet", CIFAR).aux1 is None


def test_a_torchvision_model_with_a_backbone_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it asked for weights")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert isinstance(build_empty("torchvision:fcn_resnet50"), nn.Module)


def test_an_empty_model_of_a_library_holds_no_memory() -> None:
    assert all(parameter.is_meta for parameter in build_empty("timm:resnet18").parameters())
    assert not any(parameter.is_meta for parameter in build_empty("mlp").parameters())


def test_a_model_that_reads_back_what_it_makes_is_built_with_weights() -> None:
    assert not any(parameter.is_meta for parameter in build_empty("torchvision:regnet_x_400mf").parameters())
    with pytest.raises(ModelError, match="torchvision has no model"):
        build_empty("torchvision:regnet_x_401mf")


@pytest.mark.parametrize(
    ("name", "offer"),
    [
        ("2c2", "2c2d"),
        ("resnet18", "torchvision:resnet18, timm:resnet18"),
        ("timm:resnet_18", "timm:resnet18"),
        ("torchvision:resnet_18", "torchvision:resnet18"),
        ("no such thing at all", "package.module:factory"),
        (":", "package.module:factory"),
    ],
)
def test_an_unknown_name_offers_the_nearest(name: str, offer: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(name, CIFAR)
    assert offer in str(caught.value)


FACTORIES = """
from torch import nn

def plain():
    return nn.Linear(3, 4)

def fitted(num_classes, in_chans, in_features, input_shape, width=7):
    assert input_shape == (3, 32, 32) and in_chans == 3
    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, num_classes))

def broken():
    raise RuntimeError("no luck")

def number():
    return 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:  # type: ignore[no-untyped-def]
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    return name


def test_a_factory_is_found_in_the_working_folder(factories: str) -> None:
    assert isinstance(build(f"{factories}:plain", CIFAR), nn.Linear)


def test_a_factory_is_handed_what_its_signature_names(factories: str) -> None:
    assert build(f"{factories}:fitted", CIFAR)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("plane", "did you mean plain"),
        ("broken", "RuntimeError: no luck"),
        ("number", "gave a int"),
        ("fitted", "can't be built: TypeError"),
    ],
)
def test_a_factory_that_fails_is_named_with_the_reason(factories: str, attribute: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(f"{factories}:{attribute}")


def test_a_module_that_is_missing_or_imports_what_is_missing_is_told_apart(factories: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match="no module 'no_such_module_here'"):
        build("no_such_module_here:make")
    (tmp_path / "needy.py").write_text("import no_such_module_either")
    with pytest.raises(ModelError, match="needy imports no_such_module_either"):
        build("needy:make")
