"""The three models, their data and optimizers, and a training of them that can be continued in several ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from small_transformer import SmallTransformer
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 16
_WARM_UP = 50  # steps in which the learning rate rises
_ALPHABET, _LENGTH, _TEXTS = 32, 32, 2048

Data = tuple[Tensor, Tensor]  # inputs and targets, [N, ...]
Rate = Callable[[int], float]  # learning rate by steps made


@dataclass(frozen=True)
class Task:
    """One model with what it learns."""

    name: str
    words: str
    model: Callable[[], nn.Module]
    data: Callable[[int], Data]
    losses: Callable[[Tensor, Tensor], Tensor]  #: of each sample [B], from outputs and targets
    optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
    rate: float
    outputs: tuple[str, ...]  #: modules whose activations are looked at
    classes: int


def _text(seed: int) -> Data:
    """Draw texts of which each character follows from the two before it, by a sum of what each of them favours."""
    generator = torch.Generator().manual_seed(seed)
    last, one_before = (2.5 * torch.randn(_ALPHABET, _ALPHABET, generator=generator) for _ in range(2))
    tokens = torch.randint(_ALPHABET, (_TEXTS, _LENGTH + 1), generator=generator)
    for t in range(2, _LENGTH + 1):
        chances = (last[tokens[:, t - 1]] + one_before[tokens[:, t - 2]]).softmax(-1)
        tokens[:, t] = torch.multinomial(chances, 1, generator=generator).squeeze(1)
    return tokens[:, :-1], tokens[:, 1:]


def _digits(seed: int) -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    return torch.tensor(digits.images[order] / 16, dtype=torch.float32), torch.tensor(digits.target[order])


def _rows_and_parity(seed: int) -> Data:
    images, labels = _digits(seed)
    return images.flatten(1), (labels % 2).float()


def _pictures(seed: int) -> Data:
    images, labels = _digits(seed)
    return images[:, None], labels


def _of_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return each.view(targets.shape).mean(1)


def _of_logit(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits[:, 0], targets, reduction="none")


def _of_classes(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def _cnn() -> nn.Module:
    convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 10))


def _adamw(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, rate, weight_decay=0.01)


def _sgd(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, rate, momentum=0.9)


TASKS = {
    task.name: task
    for task in (
        Task(
            "transformer",
            "2 layers of 32, 16 x 32 characters of a second-order Markov chain, AdamW 3e-3",
            lambda: SmallTransformer(32),
            _text,
            _of_tokens,
            _adamw,
            3e-3,
            ("layers.0", "layers.1"),
            32,
        ),
        Task(
            "mlp",
            "64-64-64-1, parity of 8 x 8 digits, AdamW 1e-3",
            _mlp,
            _rows_and_parity,
            _of_logit,
            _adamw,
            1e-3,
            ("0", "2"),
            2,
        ),
        Task(
            "cnn",
            "two 3 x 3 convolutions of 8 and 16 channels and a Linear, 8 x 8 digits, SGD 0.02 with momentum 0.9",
            _cnn,
            _pictures,
            _of_classes,
            _sgd,
            0.02,
            ("0", "2"),
            10,
        ),
    )
}


class Training:
    """A model in training, with its optimizer and the order of its data.

    Args:
        rate: learning rate by steps made; default the task's, after a warm-up.
    """

    def __init__(self, task: Task, seed: int, rate: Rate | None = None) -> None:
        torch.manual_seed(seed)
        self.task, self.model, self.steps = task, task.model(), 0
        self.optimizer = task.optimizer(list(self.model.parameters()), task.rate)
        self.x, self.y = task.data(seed)
        self.rate = rate or (lambda step: task.rate * min(1.0, (step + 1) / _WARM_UP))
        self._order = torch.Generator().manual_seed(1000 + seed)
        self._waiting: list[int] = []

    def next_ids(self) -> Tensor:
        """Draw the samples of a batch, each once per epoch."""
        if len(self._waiting) < BATCH:
            self._waiting = torch.randperm(len(self.x), generator=self._order).tolist()
        ids, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        return torch.tensor(ids)

    def fork(self) -> Training:
        """Make a training that goes on from here by itself."""
        x, y = self.x, self.y
        self.x = self.y = torch.empty(0)
        other = copy.deepcopy(self)
        self.x, self.y = other.x, other.y = x, y
        return other
