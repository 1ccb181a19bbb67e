"""The open window of Lipschitz: how it starts, slides and becomes a state, and whether W_1 has moved in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.lipschitz.bias_steps import BiasSteps
from lipcore.lipschitz.input_tap import ModelInputTap
from lipcore.lipschitz.taps import FirstLayerTap
from lipcore.lipschitz.virtual_bias import VirtualBias
from lipcore.metric.blocks import BlockWindow, added_blocks, empty_blocks
from lipcore.metric.handed_out import HandedOut
from lipcore.metric.host_reads import TensorRead
from lipcore.metric.standalone import StandaloneMetric
from lipcore.metric.state import check_version
from lipcore.models.dtensors import local_of
from lipcore.models.gathered import part_of


class LipschitzWindow(StandaloneMetric):
    """Base of :class:`Lipschitz` that keeps its open window. What it refers to is made by the metric."""

    _version = 1
    _model: nn.Module | None
    _first: FirstLayerTap
    _at_input: ModelInputTap
    _quantity: str
    _resolved: str  # the quantity; "" until the first output has settled "auto"
    _bias: BiasSteps
    _virtual_bias: VirtualBias | None
    _open: BlockWindow
    _handed_out: HandedOut  # results with values that the shortcut may have to take back
    _unchecked: HandedOut  # results with lambdas that no check has come after yet
    _taken_back: int  # of this window
    _doubt: str  # why lambdas that were merged into this window are not shown to be right
    _mixed: bool  # a BatchNorm in train mode was seen in this window
    _moved: bool  # W_1 had moved within the window before its state was loaded
    _weight_before: Tensor | None
    _weight_stood: TensorRead

    def rebind(self) -> None:
        """Bind the same model again, after its modules have changed."""
        self._open.mark()  # a check to come is about another model
        self._unchecked.settle()
        self._handed_out.settle()
        if self._model is not None:
            self.bind(self._model)

    def reset(self) -> None:
        """Start a new window."""
        self._open.reset()
        self._mixed, self._moved, self._doubt = False, False, ""
        self._taken_back = 0
        self._at_input.start_window()
        self._bias.reset()
        if self._virtual_bias is not None:
            self._virtual_bias.reset()
        self._remember_weight()

    def advance(self) -> None:
        """Slide the window by a block. Its labels (mixed samples, a first layer that moved) count from the first block
        that they were true of."""
        if self._open.blocks == 1:
            self.reset()
            return
        self._open.advance()
        self._at_input.start_window()
        self._moved = self._weight_moved()
        self._bias.advance()
        if self._virtual_bias is not None:
            self._virtual_bias.advance()
        self._bias.find(self._model, self._first.module)

    def _remember_weight(self) -> None:
        """Keep W_1 at the window's start, to tell at its close whether Theorem 1 can be stated with one W_1."""
        weight = local_of(part_of(self._model, self._first.weight()))
        self._weight_before = weight.detach().clone() if weight is not None else None
        self._bias.find(self._model, self._first.module)

    def _weight_moved(self) -> bool:
        known = self._weight_before is not None and self._first.weight() is not None
        return self._moved or (known and not self._weight_is_as_before())

    def _weight_is_as_before(self) -> bool:
        return bool(self._weight_stood.on_host())

    def _compare_weights(self) -> Tensor:
        """Return 1 where W_1 is what it was at the window's start, else 0; of a sharded one, where this rank's part is:
        DTensors would ask the other ranks."""
        weight: Tensor | None = local_of(self._first.weight())
        before = self._weight_before
        if weight is None or before is None or weight.shape != before.shape or weight.device != before.device:
            return torch.zeros((), dtype=torch.float64, device="cpu" if weight is None else weight.device)
        if weight.is_cpu:
            return torch.scalar_tensor(torch.equal(before, weight.detach()), dtype=torch.float64, device="cpu")
        return (before == weight.detach()).all().double()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the window: its version, distributions, labels and the bias' steps."""
        virtual = {} if self._virtual_bias is None else {"virtual_bias": self._virtual_bias.state_dict()}
        return virtual | {
            "version": self._version,
            "quantity": self._resolved or "auto",
            "mixed": self._mixed,
            "weight_moved": self._weight_moved(),
            "doubt": self._at_input.unproved or self._doubt,
            **self._open.state_dict("distributions"),
            "bias_steps": self._bias.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; where it does not fit, raise ValueError and change nothing."""
        check_version(state, self._version, "metric")
        quantity, own = state.get("quantity"), self._resolved or self._quantity
        known = ("auto", "scalar", "residual") if own == "auto" else ("auto", own)
        if quantity not in known:
            raise ValueError(f"quantity: the state has {quantity!r}, this metric has {own!r}")
        for key in ("mixed", "weight_moved"):
            if not isinstance(state.get(key), bool):
                raise ValueError(f"{key}: expected True or False, got {state.get(key)!r}")
        doubt = state.get("doubt", "")  # likewise
        if not isinstance(doubt, str):
            raise ValueError(f"doubt: expected words, got {doubt!r}")
        loaded = self._open.loaded(state, "distributions")
        bias_steps = state.get("bias_steps", [])  # a state of an earlier lipcore has none
        if not isinstance(bias_steps, list) or not all(map(_are_steps, bias_steps)):
            raise ValueError(f"bias_steps: expected [steps, lowest, highest rate] per block, got {bias_steps!r}")
        if self._virtual_bias is not None:
            self._virtual_bias.load_state_dict(state.get("virtual_bias", {}))
        self._open.become(loaded)
        if quantity != "auto":
            self._resolved = str(quantity)
        self._mixed, self._moved, self._doubt = state["mixed"], state["weight_moved"], doubt
        self._bias.load(bias_steps)
        self._remember_weight()

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return its state without samples."""
        return {**rest, "mixed": False, "weight_moved": False, "doubt": "", **empty_blocks(rest, "distributions")}

    def add_states(self, begin: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state with the samples of all of these, which is worth what the least of them is."""
        found = [begin, *others]
        labels = {key: any(state[key] for state in found) for key in ("mixed", "weight_moved")}
        known = [state["quantity"] for state in found if state["quantity"] != "auto"]
        quantity = known[0] if known else "auto"
        doubt = next((state["doubt"] for state in found if state.get("doubt")), "")
        return {**begin, **labels, "doubt": doubt, "quantity": quantity, **added_blocks(found, "distributions")}


def _are_steps(block: Any) -> bool:
    """Return whether a value is a block's number of steps with its lowest and highest rate."""
    numbers = isinstance(block, (list, tuple)) and all(isinstance(number, (int, float)) for number in block)
    return numbers and len(block) == 3 and math.isfinite(block[0]) and block[0] >= 0
