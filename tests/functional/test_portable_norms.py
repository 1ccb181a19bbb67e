"""The torch forms of the per-sample norms without matrices, which serve tensors on other devices than the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import values
from oracle import DTYPES, assert_close, eps_of
from torch import Tensor

from lipcore import functional
from lipcore.functional import portable, reference
from lipcore.functional.outer import _portable as portable_outer

PRECISION = {"eps": eps_of(torch.float64), "k": 4500}  # torch adds float64 one by one
SHAPES = [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1), (3, 17, 5), (2, 129, 65)]
OFFSETS = torch.tensor([0, 2, 2, 9, 17])


def tokens(*shape: int) -> Tensor:
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(0))


def arguments(dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """By operation its arguments and keywords."""
    g, x = values(shape, dtype), values(shape, dtype, 1)
    ids, packed = tokens(*shape[:2]), {"offsets": OFFSETS}
    found = {
        "row_sum_norms_sq": ((g,), {}),
        "row_sum_norms_sq, scale": ((g, x), {}),
        "affine_norms_sq": ((g, x), {}),
        "channel_sum_norms_sq": ((g,), {}),
        "channel_affine_norms_sq": ((g, x), {}),
        "embedding_norms_sq": ((ids, g), {}),
        "embedding_norms_sq, weights": ((ids, g), {"weights": values(shape[:2], dtype, 2), "padding_idx": 3}),
        "tied_cross": ((ids, g, x, values((*shape[:2], 7), dtype, 2)), {"padding_idx": 1}),
        "outer_norms_sq": (([g.flatten(1), x[..., :1].flatten(1)], [x.flatten(1), g.flatten(1)]), {}),
    }
    if shape == (3, 17, 5):
        found |= {
            "affine_norms_sq, packed": ((g[0], x[0]), packed),
            "row_sum_norms_sq, packed": ((g[0],), packed),
            "embedding_norms_sq, packed": ((ids[0], g[0]), packed | {"weights": values((17,), dtype, 2)}),
        }
    return found


def check(name: str, got: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    function = getattr(reference, name.split(",")[0])
    magnitudes = [
        a.double().abs() if isinstance(a, Tensor) and a.is_floating_point() else a for a in (*args, *options.values())
    ]
    positive = magnitudes[: len(args)], dict(zip(options, magnitudes[len(args) :], strict=True))
    assert got.dtype == torch.float64
    assert_close(got, function(*args, **options), scale=function(*positive[0], **positive[1]), **PRECISION)


def torch_form(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    operation = name.split(",")[0]
    if operation == "outer_norms_sq":
        return portable_outer(*args, 1)[0]
    if operation == "tied_cross":
        return portable.tied_cross(*args, options["padding_idx"])
    raise NotImplementedError(operation)


WITH_A_TORCH_FORM = ("outer_norms_sq", "tied_cross")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_form(dtype: str, shape: tuple[int, ...]) -> None:
    for name, (args, options) in arguments(DTYPES[dtype], shape).items():
        if name.startswith(WITH_A_TORCH_FORM):
            check(name, torch_form(name, args, options), args, options)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda(dtype: str, shape: tuple[int, ...]) -> None:
    def to_device(value: Any) -> Any:
        if isinstance(value, list):
            return [v.cuda() for v in value]
        return value.cuda() if isinstance(value, Tensor) else value

    for name, (args, options) in arguments(DTYPES[dtype], shape).items():
        function = getattr(functional, name.split(",")[0])
        got = function(*map(to_device, args), **{key: to_device(value) for key, value in options.items()})
        assert got.is_cuda
        check(name, got, args, options)
