"""Convolutions: squared norms of per-sample weight gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import library as _library
from lipcore.functional import portable
from lipcore.functional.arguments import result_beside
from lipcore.functional.linear import Method
from lipcore.models.arguments import check_choice, check_count, is_integer

ConvMethod = Literal[Method, "portable"]
_METHODS: tuple[ConvMethod, ...] = get_args(ConvMethod)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def conv_norms_sq(
    x: Tensor,
    grad: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    method: ConvMethod | None = None,
) -> Tensor:
    r"""Compute the squared norms of the per-sample weight gradients of a convolution.

    .. math:: n_b^2 = \Big\|\frac{\partial L_b}{\partial W}\Big\|_F^2 = \sum_{o,i,\delta} \Big(\sum_t g_{b,o,t}\,
        x_{b,i,\,t\cdot stride + \delta\cdot dilation - padding}\Big)^2

    Float32 sums of at most 1024 products, float64 from there on (on a CUDA device float32 sums of all products);
    samples whose result float32 cannot hold are done again in float64. No patches are written. The number is what grad
    is: under a mean-reduced loss it carries 1/B^2.
    A transposed convolution is this one with input and gradient in each other's place.

    Args:
        x: [B, C, \*space], the layer's input, one to three spatial dimensions, any strides.
        grad: [B, O, \*space], the gradient at its output; fewer positions than the output has stand for zeros.
        kernel_size: one number per spatial dimension, as of nn.Conv2d.
        stride: one number per spatial dimension.
        padding: zeros on both sides, one number per spatial dimension.
        dilation: one number per spatial dimension.
        groups: a divisor of C and of O.
        method: "direct" makes every entry of the weight gradient and squares it, "gram" multiplies pixels of the input
            (on a CUDA device patches) with each other and gradients with each other (small maps with many channels;
            float32 samples that cancel are done again directly), "portable" is torch's own operations, None is
            :func:`conv_method`.

    Returns:
        float64 [B], detached.

    Raises:
        TypeError, ValueError: an argument lipcore cannot use, or shapes that do not fit; the message names it.

    >>> conv_norms_sq(torch.ones(1, 1, 3), torch.ones(1, 2, 2), kernel_size=[2], stride=[1], padding=[0], dilation=[1])
    tensor([16.], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.lipcore.conv_norms_sq(
            x.detach(), grad.detach(), kernel_size, stride, padding, dilation, groups, method
        )
        return traced
    if _core.check_storage(x, "x"):
        x = x.resolve_neg()
    if _core.check_storage(grad, "grad"):
        grad = grad.resolve_neg()
    _check(x, grad, kernel_size, stride, padding, dilation, groups, method)
    if not x.numel() or not grad.numel():
        return x.new_zeros(x.shape[0], dtype=torch.float64)
    if method == "portable":
        return portable.conv_norms_sq(x, grad, kernel_size, stride, padding, dilation, groups)
    if method is None:
        method = chosen(x, grad, kernel_size, padding, groups)
    out = result_beside(x, x.shape[0])
    _core.conv_norms_sq(x, grad, kernel_size, stride, padding, dilation, groups, method == "gram", out)
    return out


def conv_method(
    x_shape: Sequence[int],
    grad_shape: Sequence[int],
    *,
    kernel_size: Sequence[int],
    padding: Sequence[int],
    groups: int = 1,
    device: torch.device | str = "cpu",
) -> Method:
    """Return the faster method of :func:`conv_norms_sq` on a device, "direct" or "gram", by counting multiplications:
    those of pixels on the CPU, on a CUDA device those of patches, which it reads in place.

    Raises:
        ValueError: sizes that are not of one to three spatial dimensions, the same in all; groups below 1.

    >>> conv_method([64, 512, 4, 4], [64, 512, 4, 4], kernel_size=[3, 3], padding=[1, 1])
    'gram'
    """
    check_count("groups", groups)
    n = len(x_shape) - 2
    if not 1 <= n <= 3:
        raise ValueError(f"x_shape: expected [B, C, *space], one to three spatial dimensions, got {list(x_shape)}")
    if len(grad_shape) != n + 2:
        raise ValueError(
            f"grad_shape: expected [B, O, *space] with the {n} spatial dimensions of x_shape, got {list(grad_shape)}"
        )
    for name, numbers in (("kernel_size", kernel_size), ("padding", padding)):
        if len(numbers) != n:
            raise ValueError(
                f"{name}: expected {n} integers, one per spatial dimension of x_shape, got {list(numbers)}"
            )
    on_cpu = torch.device(device).type == "cpu"
    return _cheaper(x_shape, grad_shape, kernel_size, padding, groups, on_cpu)


def chosen(x: Tensor, grad: Tensor, kernel_size: Sequence[int], padding: Sequence[int], groups: int) -> Method:
    """Return :func:`conv_method` of these tensors where they are."""
    return _cheaper(x.shape, grad.shape, kernel_size, padding, groups, x.is_cpu)


def _cheaper(
    x_shape: Sequence[int],
    grad_shape: Sequence[int],
    kernel_size: Sequence[int],
    padding: Sequence[int],
    groups: int,
    on_cpu: bool,
) -> Method:
    inputs, outputs = x_shape[1] // groups, grad_shape[1] // groups
    gram = _core.conv_uses_gram(x_shape[2:], grad_shape[2:], kernel_size, padding, inputs, outputs, on_cpu)
    return "gram" if gram else "direct"


def _check(
    x: Tensor,
    grad: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    method: ConvMethod | None,
) -> None:
    for name, tensor in (("x", x), ("grad", grad)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}; "
                f"convert with {name}.float()"
            )
    check_choice("method", method, _METHODS, optional=True)
    n = x.dim() - 2
    if not 1 <= n <= 3:
        raise ValueError(
            f"x: expected [B, C, *space] with one to three spatial dimensions, got shape {list(x.shape)}; "
            "x.unsqueeze(0) makes a batch of one sample"
        )
    sizes = (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    for name, numbers, least in sizes:
        if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != n:
            raise ValueError(
                f"{name}: expected {n} integers, one per spatial dimension of x of shape {list(x.shape)}, "
                f"got {numbers!r}"
            )
        if min(numbers) < least:
            raise ValueError(f"{name}: expected integers of at least {least}, got {list(numbers)}")
    if not is_integer(groups) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[1]} channels of x, got {groups}")
    if grad.dim() != x.dim() or grad.shape[0] != x.shape[0] or grad.shape[1] % groups:
        raise ValueError(
            f"grad: expected [{x.shape[0]}, O, *space] with {n} spatial dimensions and O a multiple of {groups} "
            f"groups, as x has shape {list(x.shape)}, got shape {list(grad.shape)}; pass the gradient at the "
            "convolution's output"
        )
    if grad.device != x.device:
        raise ValueError(
            f"grad: expected a tensor on {x.device} like x, got one on {grad.device}; use grad.to(x.device)"
        )
    most = [
        max(0, (size + 2 * p - d * (k - 1) - 1) // s + 1)
        for size, k, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    if any(have > full for have, full in zip(grad.shape[2:], most, strict=True)):
        raise ValueError(
            f"grad: expected at most the {most} positions of the convolution's output, got shape "
            f"{list(grad.shape)}; check kernel_size, stride, padding and dilation against the layer's"
        )


_library.register(
    "conv_norms_sq(Tensor x, Tensor grad, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "int groups=1, str? method=None) -> Tensor",
    lambda x, grad, kernel_size, stride, padding, dilation, groups=1, method=None: conv_norms_sq(
        x,
        grad,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        method=method,
    ),
    lambda x, grad, kernel_size, stride, padding, dilation, groups=1, method=None: x.new_empty(
        x.shape[0], dtype=torch.float64
    ),
)
