"""Probes of the compiled forward pass under way, shared by both ways of tapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lipcore.capture.proof import is_proof
from lipcore.capture.training_pass import in_backward
from lipcore.models.outputs import on_backward
from lipcore.models.torch_internals import queue_callback

# Probes of the compiled forward pass under way, by site. As an attribute of a hook a probe would belong to the module
# in torch.compile's eyes, and its size be compiled in: one graph for every size of the batch.
armed: dict[int, Tensor] = {}

_again: set[int] = set()  # sites whose probes are within reach since a backward pass has begun


def await_second_run(output: Any, probes: Mapping[int, Tensor]) -> None:
    """Put the probes of a pass within the region's reach again while its backward pass lasts. A checkpoint around a
    compiled module runs that once more there, and raises where it keeps another number of tensors than before."""

    def arm(_: Any) -> None:
        if is_proof():
            return
        armed.update(probes)
        _again.update(probes)
        queue_callback(end_second_runs)

    on_backward(output, arm)


def end_second_runs() -> None:
    """Take such probes out of reach, those too that a backward pass has left which raised."""
    for number in _again:
        armed.pop(number, None)
    _again.clear()


def forget_second_runs() -> None:
    """Take out of reach what a backward pass has left that raised, as a forward pass begins outside of one."""
    if _again and in_backward() == -1:
        end_second_runs()
