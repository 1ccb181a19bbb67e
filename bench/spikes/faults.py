"""The faults: what each does to the data, the loss, the gradients, the weights or the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikes.models import BATCH, Training

SAMPLE = 3  # of the batch: the one that a fault in one sample changes


@dataclass(frozen=True)
class Fault:
    """One kind of fault, from the step k = 0 on."""

    kind: str
    name: str
    lasting: bool = False  #: it goes on, so that an alarm counts in 40 steps; otherwise in 5
    in_layer: bool = False  #: one parameter is its place
    in_sample: bool = False  #: one sample is its place

    @property
    def window(self) -> int:
        """Number of steps in which an alarm counts as one of the fault."""
        return 40 if self.lasting else 5


FAULTS = (
    Fault("labels", "labels shuffled in a batch"),
    Fault("wrong", "one wrong sample of 16", in_sample=True),
    Fault("huge", "one huge sample of 16", in_sample=True),
    Fault("rate", "learning rate rises to 10 x in 20 steps", lasting=True),
    Fault("scale", "gradient scale 10 x", lasting=True),
    Fault("overflow", "overflow in a layer's gradient", in_layer=True),
    Fault("lost", "gradient of a layer lost", lasting=True, in_layer=True),
    Fault("noise", "weights of a layer + 20 % noise", in_layer=True),
    Fault("element", "one weight = 16", in_layer=True),
    Fault("repeat", "the same 4 batches again and again", lasting=True),
    Fault("none", "none (control)", lasting=True),
)


class Injector:
    """What a fault does to a training, step by step.

    Args:
        number: of the fault among all, which the random numbers and the layer depend on.
    """

    def __init__(self, fault: Fault, number: int, training: Training, seed: int) -> None:
        self.fault, self._training = fault, training
        self._random = torch.Generator().manual_seed(7 * seed + number)
        layers = [(n, p) for n, p in training.model.named_parameters() if p.dim() > 1 and "emb" not in n]
        layers = [(name, p) for name, p in layers if name != "position"]
        self.target, self._weight = layers[(seed + number) % len(layers)]
        self._kept: list[Tensor] = []
        self._k = 0
        if fault.kind in ("overflow", "lost"):
            self._weight.register_hook(self._gradient)

    def rate(self, k: int, rate: float) -> float:
        """Return the learning rate of a step."""
        return rate * 10 ** min(1.0, (k + 1) / 20) if self.fault.kind == "rate" else rate

    @torch.no_grad()
    def weights(self, k: int) -> None:
        """Change the weights before a step."""
        if k == 0 and self.fault.kind == "noise":
            size = self._weight.square().mean().sqrt()
            self._weight.add_(0.2 * size * torch.randn(self._weight.shape, generator=self._random))
        if k == 0 and self.fault.kind == "element":
            self._weight.view(-1)[7] = 16.0

    def ids(self, k: int) -> Tensor:
        """Return the samples of a step's batch."""
        if self.fault.kind != "repeat":
            return self._training.next_ids()
        self._kept = self._kept or [self._training.next_ids() for _ in range(4)]
        return self._kept[k % 4]

    def batch(self, k: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, targets and weights of the samples' losses of a step."""
        x, y, weights, kind = x.clone(), y.clone(), torch.ones(BATCH), self.fault.kind
        if k == 0 and kind == "labels":
            y = y[torch.randperm(BATCH, generator=self._random)]
        if k == 0 and kind == "wrong":
            self._spoil(x, y)
        if k == 0 and kind == "huge":
            if x.is_floating_point():
                x[SAMPLE] *= 20
            else:
                weights[SAMPLE] = 50.0
        return x, y, weights

    def _spoil(self, x: Tensor, y: Tensor) -> None:
        classes = self._training.task.classes
        if y.dim() > 1:  # text: other characters
            x[SAMPLE] = torch.randint(classes, x[SAMPLE].shape, generator=self._random)
            y[SAMPLE] = torch.randint(classes, y[SAMPLE].shape, generator=self._random)
        else:
            y[SAMPLE] = (y[SAMPLE] + 1) % classes

    def loss(self, loss: Tensor) -> Tensor:
        """Return the loss that backward() is called on."""
        return loss * 10 if self.fault.kind == "scale" else loss

    def backward(self, k: int) -> None:
        """Say which step the next backward pass is of."""
        self._k = k

    def _gradient(self, gradient: Tensor) -> Tensor:
        """Change the gradient of the layer within the backward pass, so that whoever reads it sees the fault."""
        if self.fault.kind == "lost":
            return torch.zeros_like(gradient)
        if self._k > 0:
            return gradient
        some = torch.randperm(gradient.numel(), generator=self._random)[: max(1, gradient.numel() // 1000)]
        changed = gradient.clone()
        changed.view(-1)[some] = 100 * gradient.abs().max()
        return changed
