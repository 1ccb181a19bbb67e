"""Convolutions: the per-sample gradient correlates input and output gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import functional as F
from lipcore.functional.convolution import ConvMethod, chosen
from lipcore.functional.linear import shapes_in_words
from lipcore.layers.factor import Factor
from lipcore.layers.factor_products import CHUNK, alike, gram_of_slices


class Patches(Factor):
    r"""The weight gradient of a convolution of x [B, C, \*space] with gradient grad [B, O, \*space] at its output.

    Args:
        method: as of :func:`lipcore.functional.conv_norms_sq`, None for its cost rule.
    """

    def __init__(
        self,
        x: Tensor,
        grad: Tensor,
        kernel_size: Sequence[int],
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int = 1,
        method: ConvMethod | None = None,
    ) -> None:
        self.x, self.grad, self.kernel_size = x, grad, tuple(kernel_size)
        self.stride, self.padding, self.dilation = tuple(stride), tuple(padding), tuple(dilation)
        self.groups, self.method = groups, method
        self.shape = torch.Size((grad.shape[1], x.shape[1] // groups, *self.kernel_size))

    @property
    def samples(self) -> int:
        return self.x.shape[0]

    @property
    def how(self) -> str:
        way = self.method or chosen(self.x, self.grad, self.kernel_size, self.padding, self.groups)
        return f"{way} ({shapes_in_words(self.grad.shape[2:].numel(), self.shape)})"

    def norms_sq(self) -> Tensor:
        return F.conv_norms_sq(
            self.x,
            self.grad,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            method=self.method,
        )

    def dense(self, sample: int) -> Tensor:
        x, grad = (t[sample : sample + 1].detach().double() for t in (self.x, self.grad))
        return self._summed(x, grad, self.groups)

    def _summed(self, x: Tensor, grad: Tensor, groups: int) -> Tensor:
        """Return the weight's gradient, summed over samples."""
        # A transposed convolution may have fewer output gradients than its stride leaves room for: the rest are zero.
        fill = []
        for d in reversed(range(len(self.kernel_size))):
            reach = x.shape[2 + d] + 2 * self.padding[d] - self.dilation[d] * (self.kernel_size[d] - 1) - 1
            fill += [0, reach // self.stride[d] + 1 - grad.shape[2 + d]]
        weight = x.new_empty(grad.shape[1], x.shape[1] // groups, *self.kernel_size)
        grads = torch.ops.aten.convolution_backward(
            torch.nn.functional.pad(grad, fill) if any(fill) else grad,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(fill[::2]),
            groups,
            [False, True, False],
        )
        gradient: Tensor = grads[1]
        return gradient

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        x, grad = alike(self.x, self.grad)
        by_sample = coefficients.to(grad.device, grad.dtype).reshape(-1, *[1] * (grad.dim() - 1))
        return self._summed(x, grad * by_sample, self.groups)

    def dots(self, references: Tensor) -> Tensor:
        x, grad, weights = alike(self.x, self.grad, references)
        none, rows = [0] * len(self.kernel_size), []
        for weight in weights:
            y = torch.convolution(
                x, weight, None, self.stride, self.padding, self.dilation, False, none, self.groups
            )  # where the gradient ends before it, there is none
            for dim, length in enumerate(grad.shape[2:], 2):
                y = y.narrow(dim, 0, length)
            rows.append(torch.linalg.vecdot(y.flatten(1), grad.flatten(1)).double())
        return torch.stack(rows)

    def gram(self) -> Tensor:
        x, grad = alike(self.x, self.grad)
        samples, groups = self.samples, self.groups
        # As groups of one sample's convolution; every group's outputs a few at a time.
        x = x.reshape(1, -1, *x.shape[2:])
        grad = grad.unflatten(1, (groups, -1))
        size = samples * groups * self.shape[1:].numel()
        parts = (
            self._summed(x, part.reshape(1, -1, *part.shape[3:]), samples * groups).reshape(samples, -1)
            for part in (grad.split(max(1, CHUNK // max(1, size)), 2) if samples else ())
        )
        return gram_of_slices(parts, samples, x.device)
