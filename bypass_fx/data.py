"""Data by name: digits, Eggholder, CIFAR-10, image folders and whatever timm can open; and data of the user's own."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from bypass_fx.nearest import did_you_mean
from bypass_fx.passes.errors import BypassError

TaskKind = Literal["classification", "regression", "next-token", "custom"]
Examples = Dataset[Any]

NAMES = ("digits", "eggholder", "cifar10:DIR", "imagefolder:DIR", "timm:NAME:DIR")
SOURCES = tuple(name.partition(":")[0] for name in NAMES)
SPLIT_SEED = 0


class DataError(BypassError):
    """Data can't be found or read, or doesn't hold what a training run needs."""


@dataclass(frozen=True, slots=True)
class Data:
    """A training set, a test set and what a model must know of them.

    Attributes:
        name: for messages and folders.
        train, test: map-style data sets. For the tasks with a name they yield pairs (x, y): y is a class index, the
            target values of a regression, or the tokens that follow. Images may be kept as bytes; see `prepare`.
        task: which loss and metrics, see `bypass_fx.task`; "custom" with a `loss_fn` given to the trainer.
        outputs: how many numbers the model must return for an example; None checks none.
        shape: the shape of one x; None where it is not one tensor.
        collate: makes a minibatch of a list of examples.

    Raises:
        DataError: a set is empty or has no length, or a label is no class.
    """

    name: str
    train: Examples
    test: Examples
    task: TaskKind
    outputs: int | None = None
    shape: tuple[int, ...] | None = None
    collate: Callable[[list[Any]], Any] = default_collate

    def __post_init__(self) -> None:
        for part, examples in (("training", self.train), ("test", self.test)):
            if not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")):
                raise DataError(
                    f"the {part} set of {self.name} is a {type(examples).__name__}, of which no example can be asked for by "
                    "its number; a map-style data set is needed, or a list"
                )
            if size(examples) == 0:
                raise DataError(f"the {part} set of {self.name} is empty; add examples to it")
            if self.task == "classification" and self.outputs and isinstance(examples, TensorDataset):
                _expect_classes(examples.tensors[1], self.outputs, f"the {part} set of {self.name}")


def load(name: str, vectors: bool = False, image_size: int = 64, augment: str = "") -> Data:
    """Load the data called `name`: "digits", "eggholder", "cifar10:DIR", "imagefolder:DIR" or "timm:NAME:DIR".

    Args:
        name: what to load, and from which folder; "timm:NAME:DIR" opens whatever timm's `create_dataset` can.
        vectors: digits come as vectors of 64 features; otherwise as images, 3x32x32.
        image_size: side in pixels to which the images of an image folder are scaled and cropped.
        augment: how timm augments the training images of an image folder or of its own, "rand-m9-mstd0.5", say, or "flip"
            for crops and flips alone.

    Raises:
        DataError: the name is unknown (the nearest names are offered), the folder is missing, empty or holds no such
            data, or a label is out of range.

    Example:
        >>> data = load("digits", vectors=True)
        >>> data.shape, data.outputs, size(data.train), size(data.test)
        ((64,), 10, 1437, 360)
    """
    source, _, folder = name.partition(":")
    if image_size < 1:
        raise DataError(f"image_size is {image_size}; give a number of pixels from 1 up")
    if name == "digits":
        return _digits(vectors)
    if name == "eggholder":
        return _eggholder()
    if source in ("cifar10", "imagefolder", "timm"):
        kind, _, folder = folder.partition(":") if source == "timm" else ("", "", folder)
        if not folder:
            raise DataError(f"{source} needs a folder; write {next(form for form in NAMES if form.startswith(source))}")
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise DataError(f"there is no folder {folder!r}; give the folder that holds the {source} data")
        if not any(path.iterdir()):
            raise DataError(f"the folder {folder!r} is empty; give the folder that holds the {source} data")
        if source == "cifar10":
            return _cifar10(name, path)
        if source == "timm":
            return _from_timm(name, kind, path, image_size, augment)
        return _imagefolder(name, path, image_size, augment)
    raise DataError(f"unknown data {name!r}; {did_you_mean(source, SOURCES)} choose from {', '.join(NAMES)}")


def size(examples: Examples) -> int:
    """How many examples a set holds."""
    return len(cast(Any, examples))


def prepare(x: Tensor) -> Tensor:
    """A batch as a model reads it: bytes become floats in [−1, 1], floats stay as they are.

    Example:
        >>> prepare(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    return x.float().div_(127.5).sub_(1.0) if x.dtype is torch.uint8 else x


def eggholder(x: Tensor) -> Tensor:
    """The Eggholder function of the paper's Sec. V-A, [points, 2] → [points, 1].

    Example:
        >>> eggholder(torch.tensor([[0.0, 0.0]])).item()  # 47 sin √47
        25.460...
    """
    first, second = x[:, :1], x[:, 1:]
    return -first * (first - second + 47).abs().sqrt().sin() + (47 - second) * (
        (second + first / 2 + 47).abs().sqrt().sin()
    )


def _eggholder() -> Data:
    generator = torch.Generator().manual_seed(SPLIT_SEED)

    def points(count: int) -> TensorDataset:
        x = torch.rand(count, 2, generator=generator) * 500 - 250
        return TensorDataset(x, eggholder(x))

    return Data("eggholder", points(100), points(1000), "regression", outputs=1, shape=(2,))


def _digits(vectors: bool) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    train_x, test_x = (torch.as_tensor(part, dtype=torch.float32) / 8 - 1 for part in split[:2])
    train_y, test_y = (torch.as_tensor(part, dtype=torch.long) for part in split[2:])
    if not vectors:
        train_x, test_x = _as_images(train_x), _as_images(test_x)
    shape = tuple(train_x.shape[1:])
    return Data("digits", TensorDataset(train_x, train_y), TensorDataset(test_x, test_y), "classification", 10, shape)


def _as_images(x: Tensor) -> Tensor:
    images = torch.nn.functional.interpolate(x.view(-1, 1, 8, 8), size=(32, 32), mode="bilinear")
    return images.expand(-1, 3, -1, -1).contiguous()


def _cifar10(name: str, folder: Path) -> Data:
    inner = folder / "cifar-10-batches-py"
    root = inner if inner.is_dir() else folder
    train = [_cifar10_batch(root / f"data_batch_{number}") for number in range(1, 6)]
    test = _cifar10_batch(root / "test_batch")
    train_set = TensorDataset(torch.cat([x for x, _ in train]), torch.cat([y for _, y in train]))
    return Data(name, train_set, TensorDataset(*test), "classification", 10, (3, 32, 32))


class _ArraysOnly(pickle.Unpickler):
    """Reads the arrays of a CIFAR-10 batch and refuses every other object, so that a foreign file can't run code."""

    allowed = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
            *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
            *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        # The published files name numpy's modules as numpy 1 did.
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)


def _cifar10_batch(path: Path) -> tuple[Tensor, Tensor]:
    """One file of the python version of CIFAR-10, as torchvision reads it: bytes, [N, 3, 32, 32], and labels."""
    fix = "unpack cifar-10-python.tar.gz again"
    if not path.is_file():
        raise DataError(f"there is no {path.name} in {str(path.parent)!r}; {fix}, all six batches are needed")
    try:
        entry = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        x = torch.as_tensor(entry["data"]).reshape(-1, 3, 32, 32)
        y = torch.as_tensor(entry["labels"] if "labels" in entry else entry["fine_labels"], dtype=torch.long)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{str(path)!r} is no CIFAR-10 batch ({type(error).__name__}: {error}); {fix}") from error
    if x.dtype is not torch.uint8 or y.shape != (len(x),):
        raise DataError(f"{str(path)!r} holds {len(y)} labels and {len(x)} images of {x.dtype}, not bytes; {fix}")
    return x, y


def _imagefolder(name: str, folder: Path, image_size: int, augment: str) -> Data:
    held_out = next((folder / part for part in ("val", "test") if (folder / part).is_dir()), None)
    if (folder / "train").is_dir() and held_out:
        train, test = _images(folder / "train", image_size, augment), _images(held_out, image_size)
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise DataError(f"{name}: train and {held_out.name} differ in the class folders {odd}; give both the same")
        classes = train.classes
    else:
        augmented, plain = _images(folder, image_size, augment), _images(folder, image_size)
        classes = plain.classes
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        cut = max(1, len(order) // 5)
        train, test = Subset(augmented, order[cut:]), Subset(plain, order[:cut])
    if len(classes) < 2:
        raise DataError(f"{name} has one class folder, {classes[0]!r}; a classification needs at least two")
    return Data(name, train, test, "classification", len(classes), (3, image_size, image_size))


def _images(folder: Path, image_size: int, augment: str = "") -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(folder, transform=_transform(image_size, augment), loader=_open_image)
    except FileNotFoundError as error:
        raise DataError(f"no images in {str(folder)!r}: {error} Lay them out as CLASS/IMAGE.png") from error


def _transform(image_size: int, augment: str = "") -> Any:
    """An image as bytes, scaled and cropped; or augmented by timm, as floats in [−1, 1]."""
    from torchvision.transforms import v2

    if not augment:
        return v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])
    from timm.data import create_transform

    policy = None if augment == "flip" else augment
    half = (0.5, 0.5, 0.5)
    try:
        return create_transform(image_size, is_training=True, auto_augment=policy, mean=half, std=half)
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(
            f"timm knows no augmentation {augment!r} ({error}); give rand-m9-mstd0.5 or flip, say"
        ) from error


def _from_timm(name: str, kind: str, folder: Path, image_size: int, augment: str) -> Data:
    from timm.data import create_dataset

    sets = []
    for split, training in (("train", True), ("validation", False)):
        try:
            examples = create_dataset(kind, root=str(folder), split=split, is_training=training)
        except Exception as error:  # timm and the readers behind it raise kinds of their own
            raise DataError(f"timm can't open {kind!r} in {str(folder)!r} ({type(error).__name__}: {error})") from error
        if not hasattr(examples, "__getitem__"):
            raise DataError(f"{name} can only be read from its start on, which a run can't be resumed with; unpack it")
        examples.transform = _transform(image_size, augment if training else "")
        sets.append(examples)
    named: Any = getattr(getattr(sets[0], "reader", None), "class_to_idx", None) or getattr(sets[0], "classes", ())
    classes = len(named)
    if classes < 2:
        raise DataError(f"{name} names {classes} classes; a classification needs at least two")
    return Data(name, sets[0], sets[1], "classification", classes, (3, image_size, image_size))


def _open_image(path: str) -> Any:
    from PIL import Image

    try:
        with Path(path).open("rb") as file:
            return Image.open(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path!r} can't be read as an image ({error}); repair or remove it") from error


def _expect_classes(labels: Tensor, classes: int, where: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        at = int((labels == bad).nonzero()[0])
        raise DataError(f"{where} has the label {bad} at example {at}; labels must lie in 0 to {classes - 1}")
