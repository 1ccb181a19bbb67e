"""A CountSketch of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipcore import _core
from lipcore.functional import library as _library
from lipcore.functional.arguments import resolved
from lipcore.models.arguments import is_integer

_BUCKETS = [2**n for n in range(8, 17)]


def sketch(tensors: Sequence[Tensor], first_index: Sequence[int], *, buckets: int, seed: int) -> Tensor:
    r"""Compute the CountSketch of a list of tensors, a short vector whose norm estimates theirs, in one pass.

    .. math:: y_b = \sum_{i\,:\,h(i) = b} s(i)\, w_i, \qquad E\|y\|^2 = \|w\|^2, \qquad
        \mathrm{sd}(\|y\|^2) \le \|w\|^2 \sqrt{2 / k}

    with k buckets; bucket h(i) and sign s(i) of an element are hashed from its global index i and the seed. The map is
    linear: the difference of two sketches is the sketch of the difference, and inner products are estimated as well as
    norms. Sketches of parts of w, each with its own first index, add up to the sketch of w wherever the cuts are. Sums
    are float64, the same bits for every instruction set and number of threads.

    Args:
        tensors: any shapes, dense; elements are taken in the order in which they lie in memory.
        first_index: global index of each tensor's first element, >= 0. Different elements need different indices.
        buckets: k, a power of two from 256 to 65536.
        seed: chooses the hash, 0 <= seed < 2**64; only sketches with the same k and seed belong together.

    Returns:
        float64 [k], detached; NaN from end to end when an element is not finite.

    Raises:
        TypeError, ValueError: an argument lipcore cannot use; a strided tensor is one.

    Source: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams" (2002); Thorup, Zhang, "Tabulation
    based 4-universal hashing with applications to second moment estimation" (2004).

    >>> w = torch.linspace(-1, 1, 1000)
    >>> parts = sketch([w[:300]], [0], buckets=256, seed=7) + sketch([w[300:]], [300], buckets=256, seed=7)
    >>> torch.allclose(parts, sketch([w], [0], buckets=256, seed=7), rtol=0, atol=1e-12)
    True
    """
    for name, entries in (("tensors", tensors), ("first_index", first_index)):
        if not isinstance(entries, (list, tuple)):
            of = "tensors" if name == "tensors" else "integers"
            raise TypeError(f"{name}: expected a list or tuple of {of}, got {type(entries).__name__}")
    if len(first_index) != len(tensors):
        raise ValueError(f"first_index: expected {len(tensors)} indices, one per tensor, got {len(first_index)}")
    if not is_integer(buckets) or buckets not in _BUCKETS:
        raise ValueError(f"buckets: expected a power of two from {_BUCKETS[0]} to {_BUCKETS[-1]}, got {buckets!r}")
    if not is_integer(seed) or not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an integer from 0 to 2**64 - 1, got {seed!r}")
    if torch.compiler.is_compiling() and tensors:
        signed = seed - 2**64 if seed >= 2**63 else seed  # a schema's int has 64 bits with a sign
        traced: Tensor = torch.ops.lipcore.sketch([tensor.detach() for tensor in tensors], first_index, buckets, signed)
        return traced
    for i, index in enumerate(first_index):
        if not is_integer(index) or not 0 <= index < 2**63:
            raise ValueError(
                f"first_index[{i}]: expected the global index of the tensor's first element, an integer from 0 to "
                f"2**63 - 1, got {index!r}"
            )
    readable = [resolved(tensor, "tensors", i) for i, tensor in enumerate(tensors)]
    out = torch.empty(buckets, dtype=torch.float64, device=readable[0].device if readable else None)
    _core.sketch(readable, first_index, seed, out)
    return out


_library.register(
    "sketch(Tensor[] tensors, SymInt[] first_index, int buckets, int seed) -> Tensor",
    lambda tensors, first_index, buckets, seed: sketch(tensors, first_index, buckets=buckets, seed=seed % 2**64),
    lambda tensors, first_index, buckets, seed: tensors[0].new_empty(buckets, dtype=torch.float64),
)
