"""Figures 1a-c and 2a-b for Task 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from figures import Panel, bands, smooth
from task1_training import TRAIN


def figure1(curves: dict[str, np.ndarray], frequencies: list[float], path: Path) -> None:
    """And, beside them, cumulative length against training loss, where the early reversal of the order is gone."""
    epochs = np.arange(1, curves["train"].shape[2] + 1)
    length = curves["traj_grad"] / TRAIN
    train = smooth(curves["train"])
    panels = [
        Panel("1a: training loss", "epoch", epochs, train, True),
        Panel("1b: normalised length per epoch / N", "epoch", epochs, smooth(length)),
        Panel("1c: test loss", "epoch", epochs, curves["test"], True),
        Panel("cumulative length / N", "training loss", train, np.cumsum(length, axis=2), True),
    ]
    bands(panels, [f"frequency {frequency:g}" for frequency in frequencies], path)


def figure2(curves: dict[str, np.ndarray], frequencies: list[float], learning_rate: float, path: Path) -> None:
    epochs = np.arange(1, curves["var"].shape[2] + 1)
    scaled = smooth(curves["var"] / learning_rate**2)
    panels = [
        Panel("2a: variance of the bias per epoch / lr²", "epoch", epochs, scaled, True),
        Panel("2b: distance of the bias from its start", "epoch", epochs, curves["dist"]),
    ]
    bands(panels, [f"frequency {frequency:g}" for frequency in frequencies], path)
