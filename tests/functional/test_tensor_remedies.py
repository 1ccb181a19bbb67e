"""Every way out that messages about tensors name is tried: the norms come, and are float64's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from remedies import Remedy, try_it
from torch import Tensor, nn

from lipcore import functional

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def norms(x: Any, of: Tensor = X, rtol: float = 1e-5) -> None:
    """The norm of every row."""
    expected = of.detach().double().flatten(1).norm(dim=1)
    assert torch.allclose(functional.sample_norms(x), expected, rtol=rtol)


class Holder(Tensor):
    """A wrapper around a tensor, as quantised weights are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Holder:
        found: Holder = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(str(function))


def freed() -> Tensor:
    tensor = X.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def lazy(forward: bool) -> Tensor:
    layer = nn.LazyLinear(5)
    if forward:
        layer(X)
    return layer.weight


def in_vmap(inside: bool) -> None:
    if inside:
        torch.vmap(lambda row: functional.sample_norms(row[None]))(X)
    else:
        norms(torch.vmap(lambda row: row * 1)(X))


SETTINGS: dict[str, Any] = {"kernel_size": (1,), "stride": (1,), "padding": (0,), "dilation": (1,)}
COMPLEX = torch.complex(X, X.flip(0))
NESTED = torch.nested.nested_tensor([X[:2], X[2:]], layout=torch.jagged)
COUNTS = torch.arange(20).reshape(5, 4)
QUANTISED = torch.quantize_per_tensor(COUNTS.float(), 1.0, 0, torch.quint8)

TENSORS: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
    "None": (
        lambda: norms(nn.Linear(4, 1).weight.grad),
        "is a gradient missing",
        lambda: norms(_gradient(), _gradient()),
    ),
    "numpy": (
        lambda: norms(X.numpy()),
        r"pass torch\.from_numpy\(array\)",
        lambda: norms(torch.from_numpy(X.numpy())),
    ),
    "a number": (
        lambda: norms(3.0),
        r"pass torch\.tensor\(\[3\.0\]\)",
        lambda: norms(torch.tensor([3.0]), torch.tensor([[3.0]])),
    ),
    "a list of tensors": (
        lambda: norms(list(X)),
        r"for tensors torch\.stack\(\.\.\.\)",
        lambda: norms(torch.stack(list(X))),
    ),
    "a list of numbers": (
        lambda: norms(X.tolist()),
        r"for numbers torch\.tensor\(\.\.\.\)",
        lambda: norms(torch.tensor(X.tolist())),
    ),
    "integers": (lambda: norms(COUNTS), r"pass tensor\.float\(\)", lambda: norms(COUNTS.float(), COUNTS)),
    "complex numbers": (
        lambda: norms(COMPLEX),
        r"pass torch\.view_as_real\(tensor\)",
        lambda: norms(torch.view_as_real(COMPLEX), torch.view_as_real(COMPLEX)),
    ),
    "sparse": (lambda: norms(X.to_sparse()), r"pass tensor\.to_dense\(\)", lambda: norms(X.to_sparse().to_dense())),
    "quantised": (
        lambda: norms(QUANTISED),
        r"pass tensor\.dequantize\(\)",
        lambda: norms(QUANTISED.dequantize(), COUNTS),
    ),
    "on no device": (
        lambda: norms(X.to("meta")),
        "materialise it on a real device first",
        lambda: norms(torch.empty_like(X.to("meta"), device="cpu").copy_(X)),
    ),
    "nested": (
        lambda: norms(NESTED),
        r"pass one dense tensor per component, tensor\.unbind\(\)",
        lambda: [norms(part, of) for part, of in zip(NESTED.unbind(), (X[:2], X[2:]), strict=True)],
    ),
    "a subclass": (
        lambda: norms(Holder(X)),
        "unwrap it to the plain tensor inside",
        lambda: norms(Holder(X).inner),
    ),
    "freed": (lambda: norms(freed()), "pass a tensor with memory", lambda: norms(X)),
    "not made yet": (
        lambda: norms(lazy(False)),
        "run one forward pass first",
        lambda: _of_itself(lazy(True)),
    ),
    "inside vmap": (lambda: in_vmap(True), "call this outside the transform", lambda: in_vmap(False)),
    "no dimension": (
        lambda: norms(torch.tensor(3.0)),
        r"use x\.reshape\(1\)",
        lambda: norms(torch.tensor(3.0).reshape(1), torch.tensor([[3.0]])),
    ),
    "one image": (
        lambda: functional.conv_norms_sq(X, X, **SETTINGS),
        r"x\.unsqueeze\(0\) makes a batch of one sample",
        lambda: _convolved(),
    ),
    "grad elsewhere": (
        lambda: functional.linear_norms_sq(X, X.to("meta")),
        "put both on one device|materialise it",
        lambda: _linear(),
    ),
}


def _gradient() -> Tensor:
    layer = nn.Linear(4, 1)
    layer(X).sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


def _of_itself(tensor: Tensor) -> None:
    norms(tensor, tensor)


def _convolved() -> None:
    x, grad = X.unsqueeze(0), X.flip(1).unsqueeze(0)
    found = functional.conv_norms_sq(x, grad, **SETTINGS)
    expected = (grad[0].double() @ x[0].double().T).square().sum()
    assert torch.allclose(found, expected.reshape(1), rtol=1e-5)


def _linear() -> None:
    expected = X.double().square().sum(1) ** 2
    assert torch.allclose(functional.linear_norms_sq(X, X), expected, rtol=1e-5)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str) -> None:
    try_it(Remedy(*TENSORS[name]))
