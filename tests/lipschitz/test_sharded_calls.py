"""Proofs of lambda of sharded models, by how these are called: casts, an input that is passed twice, compiled parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded_nets import Net, sharded
from torch import Tensor

from lipcore import Lipschitz, Monitor

dist = torch.distributed
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed"),
    pytest.mark.usefixtures("group_of_one_rank"),
    pytest.mark.filterwarnings("ignore:lipcore turned local_lipschitz off:UserWarning"),
]


class Beside(Net):
    """A second argument goes past the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = torch.nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x) + self.aside(y)


def made(kind: type[Net] = Net) -> Any:
    torch.manual_seed(0)
    return kind()


def constant(monitor: Monitor, model: Any, *batch: Tensor) -> Any:
    """The largest constant of one window of a step on one batch."""
    model.zero_grad()
    model(*batch).square().mean().backward()
    monitor.step()
    window = monitor.close_window()
    assert window is not None
    ((_, values),) = window["lipschitz"].local_lipschitz.items()
    return values.max


def test_a_model_in_half_precision_is_proved() -> None:
    """fully_shard() casts the input before the model's other hooks see it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    x = torch.randn(5, 4)
    expected = constant(Monitor(plain := made(), metrics=[Lipschitz()]), plain, x)
    model = sharded(made(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    monitor = Monitor(model, metrics=[Lipschitz()])
    for batch in (x, {"x": x}):
        assert monitor.prove(batch) == {"lipschitz": ""}
        found = constant(monitor, model, x)
        assert found.label == "exact"
        assert found.value == pytest.approx(expected.value, rel=0.02)


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_an_input_that_is_passed_twice_later(half: bool) -> None:
    """Its constant has both ways, and W_1 shows one: as in one process, an input is that tensor wherever it is."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    x, y = torch.randn(5, 4), torch.randn(5, 4)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None)
    monitor = Monitor(model := sharded(made(Beside), mp_policy=policy), metrics=[Lipschitz()])
    assert monitor.prove((x, y)) == {"lipschitz": ""}
    assert constant(monitor, model, x, y).label == "exact"
    found = constant(monitor, model, x, x)
    assert not found.valid
    assert "had the input in more places of its arguments" in found.note
    why = "stands in more than one place" if half else "by more ways than W_1 x"
    assert why in monitor.prove((x, x))["lipschitz"]
    assert monitor.prove((x, y)) == {"lipschitz": ""}
    assert constant(monitor, model, x, y).valid


@pytest.mark.ci
def test_compiled_parts_have_no_lambda_and_no_proof_of_one() -> None:
    plain = made()
    plain.last.compile(backend="eager")
    monitor = Monitor(model := sharded(plain), metrics=[Lipschitz(input="first")])
    answer = monitor.prove(torch.randn(5, 4))["lipschitz"]
    assert "parts of it are compiled" in answer
    assert constant(monitor, model, torch.randn(5, 4)).note == answer


def test_a_batch_without_samples_proves_nothing() -> None:
    monitor = Monitor(model := sharded(made()), metrics=[Lipschitz()])
    assert monitor.prove(torch.randn(0, 4)) == {"lipschitz": "the batch has no samples"}
    assert monitor.prove(torch.randn(5, 4)) == {"lipschitz": ""}
    assert constant(monitor, model, torch.randn(5, 4)).valid
