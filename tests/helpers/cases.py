"""The tables that tests of operations iterate over: a new operation is one entry of OPS, a new size one number."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import DTYPES, LAYOUTS, assert_same_state
from torch import Tensor, nn

import lipcore
from lipcore import _core
from lipcore import functional as F
from lipcore.functional.update_rules import UpdateRule

ODD_SIZES = (0, 1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 129)
# Of other dtypes than float32: how a kernel ends is the same code, what differs is how it reads whole and cut vectors.
FEW_SIZES = (0, 1, 17, 129)
FEW_LAYOUTS = ("contiguous", "transposed", "sliced")
CHUNK = 65536  # elements of one unit of work (kChunk); four of them are one task (kSoloElements)

# Shapes [B, ...] of row-wise operations: every size of a row and of a batch, every number of dimensions, large ones.
ROW_SIZES = [*[(3, n) for n in ODD_SIZES], *[(n, 5) for n in ODD_SIZES]]
FEW_ROW_SIZES = [*[(3, n) for n in FEW_SIZES], *[(n, 5) for n in FEW_SIZES]]
ROW_SHAPES = [(7,), (0, 4, 3), (3, 65), (3, 1, 17), (2, 3, 5, 7), (2, 3, 5, 7, 2)]
LARGE_ROW_SHAPES = [(129, 600), (2, CHUNK + 1), (CHUNK + 1, 1), (1, 4 * CHUNK + 3)]

# Shapes of the tensors of one trajectory step: solo tasks, groups of large ones, and both in one list.
STEP_LISTS = {
    "none": [],
    **{f"{n}": [(n,)] for n in ODD_SIZES},
    "0-dim": [()],
    "mixed": [(3, 5), (), (0, 4), (17,), (2, 3, 5, 7), (129,)],
    "150_small": [(16,)] * 150,
    "over_a_chunk": [(7,), (CHUNK + 1,), (3,)],
    "over_a_task": [(4 * CHUNK + 3,), (5, 13), (513, 513)],
}
FEW_STEP_LISTS = (*(f"{n}" for n in FEW_SIZES), "mixed", "over_a_chunk")


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def thinned(cases: Iterable[Any], few: Iterable[Any], dtypes: Iterable[str] = DTYPES) -> list[Any]:
    """(case, dtype): all cases in float32, a few of them in the other dtypes."""
    few = list(few)
    return [
        pytest.param(case, dtype, id=f"{case if isinstance(case, str) else shape_id(case)}-{dtype}")
        for case, dtype in itertools.product(cases, dtypes)
        if dtype == "f32" or case in few
    ]


def triples(sizes: Iterable[int]) -> list[tuple[int, int, int]]:
    """Shapes of three dimensions: every size in every place."""
    sizes = list(sizes)
    return [*[(2, n, 5) for n in sizes], *[(2, 3, n) for n in sizes], *[(n, 2, 3) for n in sizes]]


def row_cases(shapes: list[tuple[int, ...]], layouts: Iterable[str] = LAYOUTS) -> list[Any]:
    """(shape, dtype, layout): all of them in float32, a few sizes and layouts in the other dtypes."""
    return [
        pytest.param(shape, DTYPES[dtype], layout, id=f"{shape_id(shape)}-{dtype}-{layout}")
        for shape, dtype, layout in itertools.product(shapes, DTYPES, layouts)
        if not (layout == "channels_last" and len(shape) not in (4, 5))
        and (dtype == "f32" or (layout in FEW_LAYOUTS and (shape not in ROW_SIZES or shape in FEW_ROW_SIZES)))
    ]


@functools.lru_cache(maxsize=256)
def _values(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * math.prod(shape) + len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 10 ** (6 * torch.rand(shape, generator=generator, dtype=torch.float64) - 4)
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Gaussian values over six decades, some of them zero."""
    return _values(shape, seed).to(dtype, copy=True)


# ---- operations, for tests of what they refuse


@dataclass(frozen=True)
class Op:
    """One operation with good arguments, and the places where a tensor goes."""

    name: str
    arguments: Callable[[], dict[str, Any]]
    call: Callable[[dict[str, Any]], Any]
    tensors: tuple[str, ...] = ()  #: arguments that are a tensor
    lists: tuple[str, ...] = ()  #: arguments that are a list of tensors
    optional: tuple[str, ...] = ()  #: arguments that may be None
    at_least_1d: tuple[str, ...] = ()
    state: tuple[str, ...] = ()  #: arguments that are written to
    full_check: bool = True  #: False for the compiled core below, which leaves sign and storage to Python

    @property
    def slots(self) -> list[str]:
        return [*self.tensors, *(f"{name}[{i}]" for name in self.lists for i in range(2))]


def put(arguments: dict[str, Any], slot: str, value: Any) -> dict[str, Any]:
    """The arguments with one of them replaced."""
    name, _, index = slot.partition("[")
    if not index:
        return arguments | {name: value}
    replaced = list(arguments[name])
    replaced[int(index[:-1])] = value
    return arguments | {name: replaced}


def get(arguments: dict[str, Any], slot: str) -> Any:
    name, _, index = slot.partition("[")
    return arguments[name][int(index[:-1])] if index else arguments[name]


def _float64(*shape: int) -> Tensor:
    return torch.full(shape, 7.0, dtype=torch.float64)


def _step_arguments() -> dict[str, Any]:
    shapes = [(4, 6), (5,)]
    lists = {name: [values(s, torch.float32, seed) for s in shapes] for seed, name in enumerate(("params", "prev"))}
    return lists | {"deviation": [torch.zeros(s) for s in shapes], "count": 2, "out": _float64(2, 5)}


def _update_arguments() -> dict[str, Any]:
    shapes = [(4, 6), (5,)]
    lists = {
        n: [values(s, torch.float32, i).abs() for s in shapes] for i, n in enumerate(("params", "first", "second"))
    }
    rules = [UpdateRule(0.1, eps=1e-8, adaptive=True), UpdateRule(0.1, 0.09)]
    asked = {n: [values(s, torch.float32, i) for s in shapes] for i, n in enumerate(("gradients", "previous"))}
    return lists | asked | {"rules": rules, "rows": _float64(2, 5), "squares": _float64(5, 2)}


def _update_sums_of_core(a: dict[str, Any]) -> None:
    names = "params", "first", "second", "rules", "rows", "squares", "gradients", "previous"
    _core.update_sums(*(a[name] for name in names))


def _step_of_core(a: dict[str, Any]) -> None:
    _core.trajectory_step(a["params"], a["prev"], a["deviation"], a["count"], a["out"])


def _step_of_trajectory(a: dict[str, Any]) -> None:
    """A Trajectory that was bound to good parameters meets other ones in the module."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(4, 6))
    trajectory = lipcore.Trajectory(model)
    trajectory.update()
    before = trajectory.state_dict()
    model._parameters["w"] = a["w"]
    try:
        trajectory.update()
    except Exception:
        after = trajectory.state_dict()
        assert_same_state(after, before)
        raise


def _sketch_arguments() -> dict[str, Any]:
    tensors = [values((4, 6), torch.float32), values((5,), torch.float32, 1)]
    return {"tensors": tensors, "first_index": [0, 24], "out": _float64(256)}


def _token_arguments() -> dict[str, Any]:
    names = ("grad", "x", "grad_embedding", "grad_head")
    return {"ids": torch.tensor([[1, 1, 0]] * 2)} | {
        name: values((2, 3, 4), torch.float32, seed) for seed, name in enumerate(names)
    }


def _stats_arguments() -> dict[str, Any]:
    tensors = [values((4, 6), torch.float32), values((5,), torch.float32, 1)]
    return {"tensors": tensors, "rows": _float64(2, 9), "bins": torch.zeros(2, 2048, dtype=torch.int64)}


def _pair_arguments() -> dict[str, Any]:
    return {name: [values((2, n), torch.float32, n) for n in (3, 5)] for name in ("x", "grad")}


_ROWS = {"arguments": lambda: {"x": values((4, 6), torch.float32), "out": _float64(4)}, "tensors": ("x", "out")}
_RATIOS = {"delta": lambda: values((4, 6), torch.float32), "output_grad": lambda: values((4,), torch.float32, 3)}

OPS = [
    Op(
        "sample_norms",
        call=lambda a: F.sample_norms(a["x"], out=a["out"]),
        optional=("out",),
        at_least_1d=("x",),
        state=("out",),
        **_ROWS,
    ),
    Op(
        "normalized_norms",
        lambda: {name: make() for name, make in _RATIOS.items()},
        lambda a: F.normalized_norms(a["delta"], a["output_grad"]),
        tensors=("delta", "output_grad"),
        at_least_1d=("delta",),
    ),
    Op(
        "trajectory_step",
        _step_arguments,
        lambda a: F.trajectory_step(a["params"], a["prev"], a["deviation"], a["count"], out=a["out"]),
        tensors=("out",),
        lists=("params", "prev", "deviation"),
        optional=("out",),
        state=("prev[0]", "prev[1]", "mean[0]", "mean[1]", "out"),
    ),
    Op(
        "update_sums",
        _update_arguments,
        lambda a: F.update_sums(
            a["params"], a["first"], a["second"], a["rules"], gradients=a["gradients"], previous=a["previous"]
        ),
        lists=("params", "first", "second"),
    ),
    Op(
        "sketch",
        _sketch_arguments,
        lambda a: F.sketch(a["tensors"], a["first_index"], buckets=256, seed=1),
        lists=("tensors",),
    ),
    Op(
        "tensor_stats",
        _stats_arguments,
        lambda a: F.tensor_stats(a["tensors"], into=(a["rows"], a["bins"])),
        tensors=("rows",),
        lists=("tensors",),
        state=("rows",),
    ),
    Op(
        "outer_norms_sq",
        _pair_arguments,
        lambda a: F.outer_norms_sq(a["x"], a["grad"]),
        lists=("x", "grad"),
    ),
    Op(
        "affine_norms_sq",
        _token_arguments,
        lambda a: F.affine_norms_sq(a["grad"], a["x"]),
        tensors=("grad", "x"),
        at_least_1d=("grad",),
    ),
    Op(
        "norm_layer_norms_sq",
        _token_arguments,
        lambda a: F.norm_layer_norms_sq(a["grad"], a["x"], eps=1e-5),
        tensors=("grad", "x"),
        at_least_1d=("grad",),
    ),
    Op(
        "row_sum_norms_sq",
        _token_arguments,
        lambda a: F.row_sum_norms_sq(a["grad"], a["x"]),
        tensors=("grad", "x"),
        optional=("x",),
        at_least_1d=("grad",),
    ),
    Op(
        "channel_affine_norms_sq",
        _token_arguments,
        lambda a: F.channel_affine_norms_sq(a["grad"], a["x"]),
        tensors=("grad", "x"),
        at_least_1d=("grad",),
    ),
    Op(
        "embedding_norms_sq",
        _token_arguments,
        lambda a: F.embedding_norms_sq(a["ids"], a["grad"]),
        tensors=("grad",),
        at_least_1d=("grad",),
    ),
    Op(
        "tied_cross",
        _token_arguments,
        lambda a: F.tied_cross(a["ids"], a["grad_embedding"], a["x"], a["grad_head"]),
        tensors=("grad_embedding", "x", "grad_head"),
    ),
    Op(
        "Distribution.observe_all",
        lambda: {"values": _float64(3)},
        lambda a: _core.Distribution().observe_all(a["values"]),
        tensors=("values",),
        full_check=False,
    ),
    Op(
        "Trajectory.bind",
        lambda: {"w": torch.zeros(4, 6)},
        lambda a: lipcore.Trajectory([("w", a["w"])]),
        tensors=("w",),
    ),
    Op(
        "Trajectory.update",
        lambda: {"w": torch.zeros(4, 6)},
        _step_of_trajectory,
        tensors=("w",),
    ),
    Op("core.sample_norms", call=lambda a: _core.sample_norms(a["x"], a["out"]), full_check=False, **_ROWS),
    Op(
        "core.normalized_norms",
        lambda: {name: make() for name, make in _RATIOS.items()} | {"r": _float64(4)},
        lambda a: _core.normalized_norms(a["delta"], a["output_grad"], a["r"]),
        tensors=("delta", "output_grad", "r"),
        full_check=False,
    ),
    Op(
        "core.trajectory_step",
        _step_arguments,
        _step_of_core,
        tensors=("out",),
        lists=("params", "prev", "deviation"),
        full_check=False,
    ),
    Op(
        "core.update_sums",
        _update_arguments,
        _update_sums_of_core,
        tensors=("rows", "squares"),
        lists=("params", "first", "second"),
        full_check=False,
    ),
    Op(
        "core.sketch",
        _sketch_arguments,
        lambda a: _core.sketch(a["tensors"], a["first_index"], 1, a["out"]),
        tensors=("out",),
        lists=("tensors",),
        full_check=False,
    ),
    Op(
        "core.tensor_stats",
        _stats_arguments,
        lambda a: _core.tensor_stats(a["tensors"], [0, 1], a["rows"], a["bins"]),
        tensors=("rows",),
        lists=("tensors",),
        full_check=False,
    ),
    Op(
        "core.first_layer_norms",
        lambda: {
            "delta": values((4, 3), torch.float32),
            "weight": values((3, 5), torch.float32),
            "out": _float64(3, 4),
        },
        lambda a: _core.first_layer_norms(a["delta"], a["weight"], a["out"]),
        tensors=("delta", "weight", "out"),
        full_check=False,
    ),
    Op(
        "core.observe_ratios",
        lambda: {"numerators": _float64(2, 4), "output_grad": _float64(1, 4)},
        lambda a: _core.observe_ratios(a["numerators"], a["output_grad"], [_core.Distribution() for _ in range(2)], 0),
        tensors=("numerators", "output_grad"),
        full_check=False,
    ),
]
