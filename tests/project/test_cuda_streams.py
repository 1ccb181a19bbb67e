"""Kernels of each kind on a stream beside the default one, and on a device that is not the current one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import values
from devices import EMULATED
from emulated_core import MODE, emulator
from oracle import assert_close
from torch import Tensor, nn

import lipcore
from lipcore import _core
from lipcore import functional as F
from lipcore.functional.update_rules import UpdateRule

LONG = 3 * 16384 + 5  # chunks: partial sums, and a second launch


def _f(*shape: int, seed: int = 0) -> Tensor:
    return values(shape, torch.float32, seed)


def _empty(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One operation: tensors, or lists of them, by name; what it returns or has written."""

    inputs: Callable[[], dict[str, Any]]
    call: Callable[[dict[str, Any]], Any]


def _written(name: str, call: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def run(a: dict[str, Any]) -> Any:
        call(a)
        return a[name]

    return run


def _steps(a: dict[str, Any]) -> Any:
    """A plan: tables that were made before the step."""
    trajectory = lipcore.Trajectory([("w", a["w"])])
    for _ in range(3):
        a["w"].add_(a["step"])
        trajectory.update()
    rows = trajectory.state_dict()["trackers"]["exact"]["rows"]
    trajectory.close()
    return rows


def _observed(a: dict[str, Any]) -> Any:
    distribution = lipcore.Distribution()
    distribution.observe(a["values"])
    return torch.tensor([distribution.count, distribution.mean, distribution.variance, distribution.max])


_PAIR = {"x": lambda: _f(3, 70, 33), "grad": lambda: _f(3, 70, 20, seed=1)}
_LISTS: dict[str, Callable[[], Any]] = {
    name: lambda seed=seed: [_f(LONG, seed=seed), _f(7, seed=seed)]  # type: ignore[misc]
    for seed, name in enumerate(("params", "prev", "deviation"))
}


def _made(makers: dict[str, Callable[[], Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: make() for name, make in makers.items()}


CASES = {
    "sample_norms": Case(lambda: {"x": _f(3, LONG)}, lambda a: F.sample_norms(a["x"])),
    "row_sum_norms_sq": Case(lambda: {"x": _f(3, 200, 70)}, lambda a: F.row_sum_norms_sq(a["x"])),
    "affine_norms_sq": Case(
        lambda: {"grad": _f(3, 70, 33), "x": _f(3, 70, 33, seed=1)}, lambda a: F.affine_norms_sq(a["grad"], a["x"])
    ),
    **{
        f"linear_norms_sq by {method}": Case(
            _made(_PAIR),
            lambda a, method=method: F.linear_norms_sq(a["x"], a["grad"], method=method),  # type: ignore[misc]
        )
        for method in ("gram", "direct")
    },
    "linear_weight_grad": Case(
        lambda: {name: make() for name, make in _PAIR.items()} | {"total": _f(20, 33, seed=2), "out": _empty(3)},
        _written("total", lambda a: _core.linear_weight_grad(a["x"], a["grad"], None, a["total"], a["out"])),
    ),
    "linear_norms_sq of 16 bits": Case(
        lambda: {name: make().bfloat16() for name, make in _PAIR.items()},
        lambda a: F.linear_norms_sq(a["x"], a["grad"]),
    ),
    **{
        f"conv_norms_sq by {method}{' of 16 bits' * (dtype == torch.bfloat16)}": Case(
            lambda dtype=dtype: {"x": _f(2, 3, 9, 9).to(dtype), "grad": _f(2, 4, 9, 9, seed=1).to(dtype)},  # type: ignore[misc]
            lambda a, method=method: F.conv_norms_sq(  # type: ignore[misc]
                *(a["x"], a["grad"]), kernel_size=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1], method=method
            ),
        )
        for method in ("gram", "direct")
        for dtype in (torch.float32, torch.bfloat16)
    },
    "embedding_norms_sq": Case(
        lambda: {"ids": torch.arange(3 * 70).reshape(3, 70) % 17, "grad": _f(3, 70, 33)},
        lambda a: F.embedding_norms_sq(a["ids"], a["grad"]),
    ),
    "trajectory_step": Case(_made(_LISTS), lambda a: F.trajectory_step(a["params"], a["prev"], a["deviation"], 2)),
    "a trajectory's steps": Case(lambda: {"w": _f(LONG), "step": 0.01 * _f(LONG, seed=1)}, _steps),
    "sketch": Case(lambda: {"x": [_f(LONG), _f(7)]}, lambda a: F.sketch(a["x"], [0, LONG], buckets=4096, seed=1)),
    "square_sums": Case(
        lambda: {"x": [_f(LONG), _f(7)], "out": _empty(2, _core.STEP_COLUMNS)},
        _written("out", lambda a: _core.square_sums(a["x"], a["out"])),
    ),
    "update_sums": Case(
        lambda: {"params": [_f(LONG), _f(7)], "first": [_f(LONG, seed=1), _f(7, seed=1)]},
        lambda a: F.update_sums(a["params"], a["first"], [None, None], [UpdateRule(0.1)] * 2)[0],
    ),
    "fold_means": Case(
        lambda: {
            "last": [_f(LONG), _f(7)],
            "reference": [_f(LONG, seed=2), _f(7, seed=2)],
            "deviation": [_f(LONG, seed=3), _f(7, seed=3)],
            "earlier": [_f(LONG, seed=1).double(), _f(7, seed=1).double()],
            "share": torch.tensor([0.5, 0.25], dtype=torch.float64),
            "gaps": _empty(2),
        },
        _written(
            "gaps",
            lambda a: _core.fold_means(
                *(a[name] for name in ("last", "reference", "deviation", "earlier", "share", "gaps"))
            ),
        ),
    ),
    "tensor_stats": Case(lambda: {"x": [_f(LONG), _f(7)]}, lambda a: F.tensor_stats(a["x"])[0]),
    "distributions": Case(lambda: {"values": _f(LONG).double()}, _observed),
}


def moved(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        name: [tensor.to(device) for tensor in value] if isinstance(value, list) else value.to(device)
        for name, value in inputs.items()
    }


@pytest.mark.gpu
@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_an_operation_on_a_stream_beside_the_default_one(name: str, device: int) -> None:
    """The first device is current throughout; nothing of the device's default stream is waited for."""
    if torch.cuda.device_count() <= device:
        pytest.skip("one CUDA device")
    case = CASES[name]
    expected = case.call(case.inputs())
    side = torch.cuda.Stream(f"cuda:{device}")
    inputs = moved(case.inputs(), f"cuda:{device}")
    side.wait_stream(torch.cuda.current_stream(f"cuda:{device}"))
    with torch.cuda.stream(side), torch.cuda.device(0):
        found = case.call(inputs)
        assert torch.cuda.current_device() == 0
        found = found.cpu()
    assert_close(found, expected.double(), scale=expected.double().abs() + expected.double().abs().max(), eps=1e-6, k=1)


@pytest.mark.gpu
@pytest.mark.skipif(not EMULATED, reason="gives the emulated devices different capabilities")
def test_what_a_device_can_do_is_asked_of_the_tensors_device() -> None:
    emulator.set_capability_of(1, 75)
    assert _core.cuda_multiplies_16_bit(0)
    assert not _core.cuda_multiplies_16_bit(1)
    x = torch.randn(3, 2050).bfloat16()
    first, second = (F.sample_norms(x.to(device)).cpu() for device in ("cuda:0", "cuda:1"))
    assert not torch.equal(first, second)  # the second is slow in float64
    assert_close(first, second, eps=1e-7, k=1)
    pair = [torch.randn(2, 40, 64).bfloat16() for _ in range(2)]
    norms = [F.linear_norms_sq(*(part.to(f"cuda:{i}") for part in pair)).cpu() for i in range(2)]
    assert_close(norms[0], norms[1], eps=1e-5, k=1)


@pytest.mark.gpu
@pytest.mark.skipif(not EMULATED, reason="a GPU would hand the memory out again, sooner or later")
@pytest.mark.parametrize("waits", [True, False])
def test_a_trajectory_is_closed_behind_its_steps(waits: bool) -> None:
    """docs/cuda.md: the stream on which it was made has to wait for that of the steps."""
    if MODE != "plain" and not waits:
        pytest.skip("the sanitizer ends the process instead")
    model = nn.Linear(5, 3).cuda()
    trajectory = lipcore.Trajectory(model)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        trajectory.update()
    if waits:
        main.wait_stream(side)
    trajectory.close()
    del trajectory
    gc.collect()
    main.synchronize()
    found = emulator.take_findings()
    assert bool(found) == (not waits), found
    assert all("touched an address in no device memory" in text for text in found)
