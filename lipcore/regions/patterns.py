"""Activation patterns of many inputs, packed to bits: regions, their number, and how they change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lipcore.models.checks import check_batch_size, check_input, check_model, check_rows, finite_rows
from lipcore.regions.gates import Gate, Kind
from lipcore.regions.recording import Output, check_batch_axis, record_gates


@dataclass(frozen=True)
class PackedGate:
    """Pattern of one activation for N inputs, a bit for every unit."""

    name: str
    kind: Kind
    width: int  #: units
    slope: NDArray[np.uint8]  #: [N, ceil(width / 8)]; for kind "index" [N, 4 width], the indices' bytes
    second: NDArray[np.uint8] | None = None  #: of kinds "bend" and "fold"
    in_module: bool = True  #: not in the model's own forward, nor in a callable output

    def bits(self, rows: slice | NDArray[np.int64] = slice(None)) -> NDArray[np.uint8]:
        """Unpack the pattern, [rows, width]: 1 where the unit has slope 1; for kind "index" the indices, int32."""
        if self.kind == "index":
            return np.ascontiguousarray(self.slope[rows]).view(np.int32)
        return np.unpackbits(self.slope[rows], axis=1, count=self.width)

    def second_bits(self) -> NDArray[np.uint8] | None:
        """Unpack the second bits, [N, width], for kinds that have two bits per unit."""
        return None if self.second is None else np.unpackbits(self.second, axis=1, count=self.width)

    def take(self, rows: NDArray[np.int64]) -> PackedGate:
        second = None if self.second is None else self.second[rows]
        return replace(self, slope=self.slope[rows], second=second)


@dataclass(frozen=True)
class Patterns:
    r"""Activation patterns :math:`s(x) = (s_1(x), \ldots, s_{d-1}(x))` of N inputs; two inputs with the same one lie in
    the same linear region (the same affine function; a region of inputs with the same pattern is convex)."""

    layers: tuple[PackedGate, ...]
    head: str = ""  #: an operation at the end that is not piecewise linear (a sigmoid); patterns do not see it

    def __len__(self) -> int:
        return len(self.layers[0].slope)

    @property
    def activations(self) -> list[tuple[str, Kind, int]]:
        """Name, kind and width of each activation; patterns can be compared where these are the same."""
        return [(gate.name, gate.kind, gate.width) for gate in self.layers]

    @property
    def codes(self) -> NDArray[np.void]:
        """Opaque value per input, equal where all bits are."""
        parts = [part for gate in self.layers for part in (gate.slope, gate.second) if part is not None]
        joined = np.ascontiguousarray(np.concatenate(parts, axis=1))
        return joined.view(np.dtype((np.void, joined.shape[1])))[:, 0]

    @property
    def regions(self) -> int:
        """Number of distinct regions that hold at least one of the inputs."""
        return len(np.unique(self.codes))

    def region_ids(self) -> NDArray[np.int64]:
        """Number the regions and return that of each input, [N]: inputs of the same region share a number, 0 ...
        regions - 1."""
        return np.unique(self.codes, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Patterns:
        """Return the patterns of some of the inputs."""
        index = np.asarray(rows, dtype=np.int64)
        return Patterns(tuple(gate.take(index) for gate in self.layers), self.head)

    def churn(self, later: Patterns) -> float:
        """Compute the share of the inputs that lie in another region in `later`, which are patterns of the same
        inputs at another time."""
        self._check_same(later)
        return float(np.mean(self.codes != later.codes)) if len(self) else float("nan")

    def flipped(self, later: Patterns) -> dict[str, float]:
        """Compute per activation the share of (input, unit) pairs whose piece changed."""
        self._check_same(later)
        out = {}
        for mine, theirs in zip(self.layers, later.layers, strict=True):
            changed = mine.bits() != theirs.bits()
            if mine.second is not None and theirs.second is not None:
                changed = changed | np.unpackbits(mine.second ^ theirs.second, axis=1, count=mine.width).astype(bool)
            out[mine.name] = float(changed.mean()) if changed.size else float("nan")
        return out

    def activity(self) -> dict[str, NDArray[np.float64]]:
        """Compute per activation, [n_l], the share of inputs on which each unit is active; pooling is left out."""
        return {gate.name: gate.bits().mean(axis=0) for gate in self.layers if gate.kind != "index"}

    def _check_same(self, other: Patterns) -> None:
        mine, theirs = self.activations, other.activations
        if mine != theirs or len(self) != len(other):
            raise ValueError(
                f"later: expected patterns of the same {len(self)} inputs and activations {mine}, got {len(other)} "
                f"inputs and {theirs}"
            )

    def __repr__(self) -> str:
        layers = ", ".join(f"{gate.name}[{gate.width}]" for gate in self.layers)
        return f"Patterns({len(self)} inputs in {self.regions} regions; {layers})"


def activation_patterns(model: nn.Module, x: Tensor, *, output: Output = None, batch_size: int = 1024) -> Patterns:
    """Record the activation patterns of inputs x [N, ...], packed, of any network with ReLU-family activations.

    Recorded are ReLU, LeakyReLU, PReLU, ReLU6, Hardtanh, Threshold, clamp, abs (one or two bits per unit: on which
    linear piece its input lies; exactly on a kink it is the one whose slope torch takes there) and max
    pooling (which element was the largest), whether called as modules or functions. All other operations on values that
    depend on x must be known to be affine in them: a product of two such values, a mask from a comparison or a
    normalisation is refused by name. A smooth head (a sigmoid) is allowed at the very end and named in ``head``. That
    samples do not mix is checked on two of them. The model is run, not changed: buffers get their values back.

    Args:
        model: any wiring (chains, convolutions, residual connections); in eval mode where it has BatchNorm or Dropout.
        x: [N, ...], N >= 1.
        output: which value counts, as in :func:`lipcore.local_lipschitz`; it decides what is the head.
        batch_size: inputs per forward pass.

    Raises:
        ValueError: x is empty, not finite, or not on the model's device; the model's output is not finite; BatchNorm or
            Dropout in train mode; another activation or normalisation (named); samples that mix.
        TypeError: x is not a tensor.

    >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
    >>> activation_patterns(model, torch.tensor([[-1.0], [1.0], [2.0]]))
    Patterns(3 inputs in 2 regions; 1[2])
    """
    check_input(model, x)
    check_batch_size(batch_size)
    if not len(x):
        raise ValueError(f"x: expected shape [N, ...] with N >= 1, got {list(x.shape)}")
    check_model(model)
    check_rows(finite_rows(x), "x", "it")
    parts: list[Patterns] = []
    finite = []
    head = ""
    for batch in x.split(batch_size):
        recording = record_gates(model, batch, output)
        head = recording.head
        finite.append(recording.finite)
        part = Patterns(tuple(_packed(gate) for gate in recording.gates))
        if parts and part.activations != parts[0].activations:
            raise ValueError("model: its activations differ from batch to batch; patterns need the same ones each time")
        parts.append(part)
    check_rows(torch.cat(finite), "model", "its output")
    check_batch_axis(model, x, output)
    layers = []
    for pieces in zip(*(part.layers for part in parts), strict=True):
        second = [piece.second for piece in pieces if piece.second is not None]
        slope = np.concatenate([piece.slope for piece in pieces])
        layers.append(replace(pieces[0], slope=slope, second=np.concatenate(second) if second else None))
    return Patterns(tuple(layers), head)


def _packed(gate: Gate) -> PackedGate:
    width = gate.slope.shape[1]
    if gate.kind == "index":
        indices = np.ascontiguousarray(gate.slope.to(torch.int32).cpu().numpy())
        slope, second = indices.view(np.uint8).reshape(len(indices), -1), None
    else:
        slope = np.packbits(gate.slope.cpu().numpy(), axis=1)
        second = None if gate.second is None else np.packbits(gate.second.cpu().numpy(), axis=1)
    return PackedGate(gate.name, gate.kind, width, slope, second, gate.in_module)
