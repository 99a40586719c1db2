"""Writes small CIFAR-10 folders in the published format (python version): six pickled batches of protocol 2."""

import pickle
from pathlib import Path

import numpy as np

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write_cifar10(folder: Path, per_batch: int, labels: list[int] | None = None) -> tuple[np.ndarray, list[int]]:
    """Six batches of random images; returns all of them, [6 * per_batch, 3072], with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (len(NAMES) * per_batch, 3072), dtype=np.uint8)
    given = labels or [int(label) for label in random.integers(0, 10, len(images))]
    for number, name in enumerate(NAMES):
        part = slice(number * per_batch, (number + 1) * per_batch)
        batch = {"batch_label": name, "labels": given[part], "data": images[part], "filenames": ["x.png"] * per_batch}
        pickled = pickle.dumps(batch, protocol=2)
        # The published files were written with numpy 1, whose modules have other names.
        (folder / name).write_bytes(pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    return images, given
