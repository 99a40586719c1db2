"""Data by name, in the formats in which it lies on disk, and minibatches in an order that a seed fixes."""

import math
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from bypass_fx.data import Data, DataError, load, prepare, size
from bypass_fx.feed import Feed, in_order
from tests.cifar10 import write_cifar10


def test_digits_come_as_vectors_and_as_images_with_one_split() -> None:
    vectors, images = load("digits", vectors=True), load("digits")
    assert vectors.shape == (64,) and images.shape == (3, 32, 32) and vectors.outputs == images.outputs == 10
    assert size(vectors.train) + size(vectors.test) == 1797
    assert torch.equal(vectors.train[:][1], images.train[:][1]) and torch.equal(vectors.test[:][1], images.test[:][1])
    assert images.train[:][0].abs().max() <= 1


def test_eggholder_is_the_papers_function_on_a_hundred_points() -> None:
    data = load("eggholder")
    x, y = data.train[:]
    assert data.task == "regression" and x.shape == (100, 2) and x.abs().max() < 250
    first, second = x[3].tolist()
    by_hand = -first * math.sin(math.sqrt(abs(first - second + 47)))
    by_hand += (-second + 47) * math.sin(math.sqrt(abs(second + first / 2 + 47)))
    assert y[3].item() == pytest.approx(by_hand, rel=1e-4)
    assert torch.equal(load("eggholder").train[:][0], x)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10_is_read_from_its_own_format(tmp_path: Path, inner: str) -> None:
    images, labels = write_cifar10(tmp_path / inner, per_batch=4)
    data = load(f"cifar10:{tmp_path}")
    assert data.shape == (3, 32, 32) and data.outputs == 10 and size(data.train) == 20 and size(data.test) == 4
    x, y = data.train[:]
    assert torch.equal(x, torch.from_numpy(images[:20]).view(-1, 3, 32, 32)) and y.tolist() == labels[:20]
    assert prepare(x).aminmax() == (-1, 1)


def test_cifar10_agrees_with_torchvisions_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    write_cifar10(tmp_path / CIFAR10.base_folder, per_batch=3)
    (tmp_path / CIFAR10.base_folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    theirs = CIFAR10(tmp_path, train=False, download=False)
    x, y = load(f"cifar10:{tmp_path}").test[:]
    assert torch.equal(x.permute(0, 2, 3, 1), torch.from_numpy(theirs.data)) and y.tolist() == theirs.targets


class _Runs:
    """Unpickling it would touch a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, (str(self.path), "w")


def test_a_cifar10_batch_cannot_run_code(tmp_path: Path) -> None:
    write_cifar10(tmp_path, per_batch=2)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps(_Runs(tmp_path / "touched"), protocol=2))
    with pytest.raises(DataError, match="data_batch_2' is no CIFAR-10 batch"):
        load(f"cifar10:{tmp_path}")
    assert not (tmp_path / "touched").exists()


def _without_a_batch(folder: Path) -> None:
    (folder / "data_batch_4").unlink()


def _cut_off(folder: Path) -> None:
    (folder / "test_batch").write_bytes((folder / "test_batch").read_bytes()[:-3000])


def _of_too_few_labels(folder: Path) -> None:
    batch = pickle.loads((folder / "data_batch_1").read_bytes())
    (folder / "data_batch_1").write_bytes(pickle.dumps({**batch, "labels": batch["labels"][:-1]}, protocol=2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_a_batch, "no data_batch_4"),
        (_cut_off, "test_batch' is no CIFAR-10 batch"),
        (_of_too_few_labels, "3 labels and 4 images"),
    ],
)
def test_a_damaged_cifar10_folder_is_refused(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    write_cifar10(tmp_path, per_batch=4)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load(f"cifar10:{tmp_path}")


def test_a_label_out_of_range_is_refused_with_its_place(tmp_path: Path) -> None:
    write_cifar10(tmp_path, per_batch=1, labels=[0, 9, 10, 3, 4, 5])
    with pytest.raises(DataError, match=r"training set.*has the label 10 at example 2; labels must lie in 0 to 9"):
        load(f"cifar10:{tmp_path}")


def _write_images(folder: Path, classes: str = "ab", count: int = 5) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (20, 30), (60 * number, 10 * index, 0)).save(folder / name / f"{index}.png")


def test_an_image_folder_is_split_by_its_folders_where_it_has_them(tmp_path: Path) -> None:
    _write_images(tmp_path / "train", "abc", 4)
    _write_images(tmp_path / "val", "abc", 2)
    data = load(f"imagefolder:{tmp_path}", image_size=16)
    assert (size(data.train), size(data.test), data.outputs, data.shape) == (12, 6, 3, (3, 16, 16))
    (x, y), _ = next(in_order(data.test, 3))
    assert x.shape == (3, 3, 16, 16) and x.dtype is torch.uint8 and y.tolist() == [0, 0, 1]


def test_an_image_folder_without_a_split_gets_a_fixed_one(tmp_path: Path) -> None:
    _write_images(tmp_path)
    first, second = (load(f"imagefolder:{tmp_path}", image_size=8) for _ in range(2))
    assert (size(first.train), size(first.test)) == (8, 2)
    assert first.train.indices == second.train.indices and not {*first.train.indices} & {*first.test.indices}


def test_image_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    _write_images(tmp_path / "one", "a")
    with pytest.raises(DataError, match="at least two"):
        load(f"imagefolder:{tmp_path / 'one'}")
    _write_images(tmp_path / "odd" / "train", "ab")
    _write_images(tmp_path / "odd" / "test", "ac")
    with pytest.raises(DataError, match=r"differ in the class folders \['b', 'c'\]"):
        load(f"imagefolder:{tmp_path / 'odd'}")
    (tmp_path / "bare" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in"):
        load(f"imagefolder:{tmp_path / 'bare'}")


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    _write_images(tmp_path, count=1)
    (tmp_path / "a" / "0.png").write_bytes(b"not a picture")
    data = load(f"imagefolder:{tmp_path}")
    with pytest.raises(DataError, match=r"0\.png' can't be read as an image"):
        [*in_order(data.train, 2), *in_order(data.test, 2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean digits"),
        ("imagefolders:x", "did you mean imagefolder"),
        ("mnist5000", "choose from digits, eggholder"),
        ("cifar10", "write cifar10:DIR"),
        ("cifar10:no/such/folder", "no folder 'no/such/folder'"),
    ],
)
def test_unknown_data_is_refused_with_what_there_is(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(name)


@pytest.mark.parametrize("source", ["cifar10", "imagefolder"])
def test_an_empty_folder_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match="is empty"):
        load(f"{source}:{tmp_path}")


def test_an_empty_set_is_refused() -> None:
    some, none = (TensorDataset(torch.zeros(count, 2), torch.zeros(count, 1)) for count in (3, 0))
    with pytest.raises(DataError, match="the test set of mine is empty"):
        Data("mine", some, none, "regression", 1, (2,))


def _pictures(folder: Path) -> None:
    for split in ("train", "validation"):
        for name, value in (("a", 20), ("b", 200)):
            (folder / split / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (40, 30), (value, 80 * index, 0)).save(folder / split / name / f"{index}.png")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves closing them to Python
def test_whatever_timm_opens_comes_through_the_same_path(tmp_path: Path) -> None:
    _pictures(tmp_path)
    data = load(f"timm:folder:{tmp_path}", image_size=16)
    assert (data.outputs, data.shape, size(data.train), size(data.test)) == (2, (3, 16, 16), 6, 6)
    (x, y), _ = next(in_order(data.test, 6))
    assert x.shape == (6, 3, 16, 16) and x.dtype == torch.uint8 and y.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("source", ["imagefolder", "timm:folder"])
def test_timm_augments_training_images_alone_and_the_same_way_again(tmp_path: Path, source: str) -> None:
    _pictures(tmp_path)
    (tmp_path / "validation").rename(tmp_path / ("val" if source == "imagefolder" else "validation"))
    data = load(f"{source}:{tmp_path}", image_size=16, augment="rand-m9-mstd0.5")
    feed = Feed(data.train, 6, seed=0)
    (first, _), (second, _) = (parts[0] for parts in islice(feed.from_step(0), 2))
    assert (
        first.shape == (6, 3, 16, 16) and first.dtype == torch.float32 and -1.01 <= first.min() <= first.max() <= 1.01
    )
    assert torch.equal(next(feed.from_step(1))[0][0], second)
    assert next(in_order(data.test, 6))[0][0].dtype == torch.uint8


@pytest.mark.parametrize(
    ("name", "augment", "message"),
    [
        ("timm:folder:{}", "cubist", "no augmentation 'cubist'"),
        ("timm:{}", "", "write timm:NAME:DIR"),
        ("timm:hfds/no:{}", "", "can't open"),
    ],
)
def test_what_timm_cannot_open_or_augment_is_named(tmp_path: Path, name: str, augment: str, message: str) -> None:
    _pictures(tmp_path)
    with pytest.raises(DataError, match=message):
        load(name.format(tmp_path), augment=augment)


def test_a_set_without_numbered_examples_is_refused() -> None:
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(DataError, match=r"training set of stream is a Stream.*a map-style data set is needed"):
        Data("stream", Stream(), Stream(), "custom")
