"""Recorder of what each operation of a forward pass does to what depends on x: the pieces of activations, and where
linearity ends.

Operations, not modules: functional calls (``F.relu``, ``x.clamp(min=0)``) are seen too. Each tensor that depends on x
is followed from operation to operation. An operation on such tensors must be an activation whose pieces are recorded or
affine (:mod:`lipcore.regions.affine_ops`): a list of the known, since a list of the forbidden would take anything it
had not heard of for linear. Operations on weights, masks and position codes are nobody's concern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipcore.models.torch_internals import TorchDispatchMode, tree_leaves
from lipcore.regions.affine_ops import PRODUCTS, SMOOTH, VALUELESS, is_affine
from lipcore.regions.gates import KNOWN, Gate, Pieces, is_max_pooling, pieces_of


@dataclass(frozen=True)
class Bent:
    """First operation on the way to a tensor that is neither affine nor recorded."""

    op: str
    where: str
    smooth: bool

    def refusal(self) -> str:
        if self.smooth:
            return (
                f"model: {self.op} in {self.where} is not piecewise linear, so the model has no linear regions; "
                f"patterns need ReLU-family activations ({KNOWN}) and no normalisation but BatchNorm in eval mode "
                "before the head"
            )
        return (
            f"model: {self.where} calls {self.op} on values that depend on x, whose linear pieces are not recorded; "
            f"activation patterns know {KNOWN}, and operations that are affine in what depends on x"
        )


class Followed:
    """Record of every tensor that depends on x and of what bent it; None: it is piecewise linear in x. By storage,
    so that views share it."""

    def __init__(self) -> None:
        self._states: dict[int, tuple[Any, Bent | None]] = {}

    @staticmethod
    def _key(tensor: Tensor) -> tuple[int, Any]:
        if tensor.layout != torch.strided:
            return id(tensor), tensor
        storage = tensor.untyped_storage()
        return storage._cdata, storage

    def __contains__(self, tensor: Tensor) -> bool:
        return self._key(tensor)[0] in self._states

    def __getitem__(self, tensor: Tensor) -> Bent | None:
        return self._states[self._key(tensor)[0]][1]

    def add(self, tensor: Tensor, state: Bent | None) -> None:
        key, owner = self._key(tensor)  # kept alive, so that no other tensor gets its address
        known = self._states.get(key, (owner, None))[1]
        self._states[key] = owner, known or state

    def among(self, value: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf in self]


class Recorder(TorchDispatchMode):
    def __init__(self, path: list[str], keep_inputs: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gates: list[Gate] = []
        self.inputs: list[Tensor] = []  # of the gates, where they are kept
        self.followed = Followed()
        self._path, self._keep_inputs = path, keep_inputs
        self._used: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket.__name__
        op = op if op.startswith("__") else op.removesuffix("_")
        given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        given |= dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(op, given):
            raise ValueError(
                f"model: {self.where()} calls {op}, so its output is random; call model.eval(), or leave it out"
            )
        dependent = {name: found for name, value in given.items() if (found := self.followed.among(value))}
        if not dependent or op in VALUELESS:
            return func(*args, **kwargs)
        tensors = [tensor for found in dependent.values() for tensor in found]
        affine = is_affine(op, func._overloadname, given, set(dependent))
        # Read before the call, which may be in place.
        alone = set(dependent) == {"self"}
        pooling = alone and is_max_pooling(op)
        pieces = pieces_of(op, given) if alone else None
        active = pooling or pieces is not None
        state = self._state(op, tensors, known=affine or active)
        if state is not None and (active or op in PRODUCTS) and any(self.followed[t] is not None for t in tensors):
            raise ValueError(state.refusal())
        if active and self._keep_inputs:
            self.inputs.append(given["self"].detach().clone())
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs and result is not None:
            raise ValueError(self.refused_reading(f"{op}: item(), bool() or an if"))
        for output in outputs:
            rounded = not is_continuous(output) and any(map(is_continuous, tensors))  # or an index
            self.followed.add(output, state or (Bent(op, self.where(), False) if rounded else None))
        if pooling:
            pieces = Pieces("index", outputs[1].detach())
        if pieces is not None:
            self._add(pieces)
        return result

    def _state(self, op: str, tensors: list[Tensor], *, known: bool) -> Bent | None:
        """Find what bent the operation's result: the first operation that left linearity, and one with hidden kinks
        before a smooth one."""
        found = [state for tensor in tensors if (state := self.followed[tensor]) is not None]
        if not known:
            found.append(Bent(op, self.where(), op in SMOOTH))
        return min(found, key=lambda state: state.smooth, default=None)

    def where(self) -> str:
        """Name the module that runs, in words."""
        return f"module '{self._path[-1]}'" if self._path and self._path[-1] else "the model's own forward"

    def refused_reading(self, how: str) -> str:
        return (
            f"model: {self.where()} reads a value that depends on x ({how}), and patterns do not see what it decides; "
            "leave the branch out"
        )

    def _add(self, pieces: Pieces) -> None:
        module = self._path[-1] if self._path else ""
        name = module or "model"  # as a module may be called too: they are counted together
        self._used[name] = again = self._used.get(name, 0) + 1
        second = None if pieces.second is None else _rows(pieces.second)
        name = name if again == 1 else f"{name}#{again}"
        self.gates.append(Gate(name, pieces.kind, _rows(pieces.slope), second, bool(module)))


def is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _rows(values: Tensor) -> Tensor:
    count = len(values) if values.dim() else 1
    return values.reshape(count, values.numel() // max(1, count))


def _draws(op: str, given: dict[str, Any]) -> bool:
    """Say whether an operation may draw random numbers."""
    if op.startswith("_scaled_dot_product"):
        return bool(given.get("dropout_p"))
    return bool(given.get("training", given.get("train", True)))
