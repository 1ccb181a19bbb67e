"""Task 1 of the paper, all frequencies and seeds trained at once: every operation is on a stack of networks.

The recipe is that of tests/data/task1.json. One step of one network is 30 operations of microseconds, so 40 of them
cost the same as one; per step only the first layer's gradient, the loss gradient and the bias are kept, and the epoch's
numbers are computed from them in float64 at its end. tests/project/test_paper.py holds every step against a Monitor's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

TRAIN, TEST, LEARNING_RATE = 100, 30, 1e-3
SIZES = (10, 10, 32, 32, 32, 1)
CURVES = (
    *("traj_grad", "traj_delta", "raw_len", "var", "dist", "lam_step_sum", "lam_avg_end", "lam_max_end"),
    *("train", "test", "eps", "nzero"),
)


@dataclass
class Problems:
    """Data and initial networks of all (frequency, seed) pairs, frequencies first."""

    x: Tensor  #: [R, 100, 10]
    y: Tensor  #: [R, 100]
    x_test: Tensor
    y_test: Tensor
    weights: list[Tensor]  #: of the layers behind the first, [R, out, in]; W_1 is the identity
    biases: list[Tensor]  #: of all layers, [R, out]
    randoms: list[np.random.Generator]  #: one per seed, for the visiting orders
    seeds: int
    basis: Tensor  #: [R, 10, 2]: x = basis s


def build(frequencies: Sequence[float], seeds: Sequence[int]) -> Problems:
    """As the recipe says, in its order of drawing."""
    rows = []
    randoms = []
    for frequency in frequencies:
        for seed in seeds:
            random = np.random.default_rng(seed)
            s, t = (random.uniform(-1, 1, (count, 2)) for count in (TRAIN, TEST))
            q = np.linalg.qr(random.standard_normal((10, 10)) / math.sqrt(10))[0] * 10
            x, x_test = ((points @ q[:, :2].T).astype(np.float32) for points in (s, t))
            y, y_test = (np.prod(np.cos(2 * np.pi * frequency * p), axis=1).astype(np.float32) for p in (s, t))
            torch.manual_seed(seed)
            layers = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
            rows.append((x, y, x_test, y_test, layers, q[:, :2].astype(np.float32)))
            if frequency == frequencies[0]:
                randoms.append(random)
    x, y, x_test, y_test, basis = (torch.from_numpy(np.stack([row[i] for row in rows])) for i in (0, 1, 2, 3, 5))
    every = [row[4] for row in rows]
    depth = range(len(SIZES) - 1)
    weights = [torch.stack([layers[i].weight.detach() for layers in every]) for i in depth[1:]]
    biases = [torch.stack([layers[i].bias.detach() for layers in every]) for i in depth]
    return Problems(x, y, x_test, y_test, weights, biases, randoms, len(seeds), basis)


class Training:
    """One epoch at a time; `arrays` and `restore` make it resumable."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.runs = len(problems.x)
        self.start = problems.biases[0].double()
        self.epochs = 0
        self.grads = torch.empty(TRAIN, self.runs, SIZES[1])  # dL/du of every step
        self.errors = torch.empty(TRAIN, self.runs)  # f - y
        self.path = torch.empty(TRAIN + 1, self.runs, SIZES[1])  # b_1 before and after every step

    @torch.no_grad()
    def epoch(self) -> dict[str, np.ndarray]:
        """One pass in a new order; CURVES, each [R], float64."""
        p = self.problems
        order = torch.from_numpy(np.stack([random.permutation(TRAIN) for random in p.randoms]))
        order = order.repeat(self.runs // p.seeds, 1)
        rows = torch.arange(self.runs)[:, None]
        x, y = p.x[rows, order].transpose(0, 1).contiguous(), p.y[rows, order].T.contiguous()
        first, weights, biases = p.biases[0], p.weights, [b[:, :, None] for b in p.biases[1:]]
        self.path[0] = first
        for i in range(TRAIN):
            hidden = [(x[i] + first).relu_()[:, :, None]]
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                hidden.append(torch.baddbmm(bias, weight, hidden[-1]).relu_())
            output = torch.baddbmm(biases[-1], weights[-1], hidden[-1])
            delta = output - y[i][:, None, None]
            self.errors[i] = delta[:, 0, 0]
            for k in range(len(weights) - 1, -1, -1):
                before = torch.bmm(weights[k].transpose(1, 2), delta).mul_(hidden[k] > 0)
                weights[k].baddbmm_(delta, hidden[k].transpose(1, 2), alpha=-LEARNING_RATE)
                biases[k].add_(delta, alpha=-LEARNING_RATE)
                delta = before
            self.grads[i] = delta[:, :, 0]
            first.add_(delta[:, :, 0], alpha=-LEARNING_RATE)
            self.path[i + 1] = first
        self.epochs += 1
        return self._curves()

    def ratios(self) -> Tensor:
        """r of every step of the last epoch, [100, R]; NaN where the loss gradient was 0."""
        eps = self.errors.double().abs()
        return torch.where(eps > 0, self.grads.double().norm(dim=2) / eps, math.nan)

    def _curves(self) -> dict[str, np.ndarray]:
        eps, ratios, path = self.errors.double().abs(), self.ratios(), self.path.double()
        moves = path.diff(dim=0).norm(dim=2)
        points = path[1:]
        constants = self.constants(self.problems.x)
        displaced = torch.where(eps > 0, moves / (LEARNING_RATE * eps), 0.0)
        found = {
            "traj_grad": ratios.nansum(0),
            "traj_delta": displaced.sum(0),
            "raw_len": moves.sum(0),
            "var": (points - points.mean(0)).square().sum(2).mean(0),
            "dist": (path[-1] - self.start).norm(dim=1),
            "lam_step_sum": ratios.nansum(0),  # W_1 is the identity, so lambda is r
            "lam_avg_end": constants.mean(1),
            "lam_max_end": constants.amax(1),
            "train": eps.square().mean(0) / 2,
            "test": (self.predict(self.problems.x_test).double() - self.problems.y_test).square().mean(1) / 2,
            "eps": eps.mean(0),
            "nzero": (eps == 0).sum(0).double(),
        }
        return {name: value.numpy().copy() for name, value in found.items()}

    def _forward(self, x: Tensor) -> list[Tensor]:
        p = self.problems
        hidden = [(x + p.biases[0][:, None]).relu()]
        for weight, bias in zip(p.weights[:-1], p.biases[1:-1], strict=True):
            hidden.append((hidden[-1] @ weight.mT + bias[:, None]).relu())
        return hidden

    def predict(self, x: Tensor) -> Tensor:
        """Outputs [R, K] at x [R, K, 10]."""
        p = self.problems
        return (self._forward(x)[-1] @ p.weights[-1].mT + p.biases[-1][:, None])[:, :, 0]

    def constants(self, x: Tensor) -> Tensor:
        """Exact local Lipschitz constants [R, K] at x [R, K, 10]."""
        hidden = self._forward(x)
        delta = self.problems.weights[-1].expand(-1, x.shape[1], -1)
        for weight, active in zip(reversed(self.problems.weights[:-1]), reversed(hidden[1:]), strict=True):
            delta = (delta * (active > 0)) @ weight
        return (delta * (hidden[0] > 0)).double().norm(dim=2)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that a continuation needs."""
        p = self.problems
        out = {"epochs": np.array(self.epochs), "start": self.start.numpy()}
        out |= {f"weight{i}": weight.numpy() for i, weight in enumerate(p.weights)}
        return out | {f"bias{i}": bias.numpy() for i, bias in enumerate(p.biases)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Continue; the visiting orders of the epochs that were made are drawn again."""
        for i, weight in enumerate(self.problems.weights):
            weight.copy_(torch.from_numpy(arrays[f"weight{i}"]))
        for i, bias in enumerate(self.problems.biases):
            bias.copy_(torch.from_numpy(arrays[f"bias{i}"]))
        self.start = torch.from_numpy(arrays["start"])
        self.epochs = int(arrays["epochs"])
        for random in self.problems.randoms:
            for _ in range(self.epochs):
                random.permutation(TRAIN)
