"""The same operations as torch.ops.lipcore.*, so that they can stand inside compiled graphs.

Registered with torch.library.Library and not with custom_op, whose wrapper costs 12 us a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")  # named wherever compiled code writes: torch.set_default_device() may be another

_library = torch.library.Library("lipcore", "DEF")
_library.define("sample_norms(Tensor x) -> Tensor")
_library.define("normalized_norms(Tensor delta, Tensor output_grad) -> (Tensor, Tensor)")
_library.define("sketch(Tensor[] tensors, SymInt[] first_index, int buckets, int seed) -> Tensor")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define torch.ops.lipcore.<name of the schema>: `kernel` runs on CPU and CUDA tensors, `fake` gives shapes."""
    name = schema.split("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"lipcore::{name}", fake, lib=_library)


def sample_norms(x: Tensor) -> Tensor:
    result: Tensor = torch.ops.lipcore.sample_norms(x)
    return result


def normalized_norms(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.lipcore.normalized_norms(delta, output_grad)
    return result


def sketch(tensors: list[Tensor], first_index: Sequence[int], buckets: int, seed: int) -> Tensor:
    signed = seed - 2**64 if seed >= 2**63 else seed  # a schema's int has 64 bits with a sign
    result: Tensor = torch.ops.lipcore.sketch(tensors, first_index, buckets, signed)
    return result


def _sample_norms_kernel(x: Tensor) -> Tensor:
    from lipcore import functional

    return functional.sample_norms(x)


def _normalized_norms_kernel(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    from lipcore import functional

    return functional.normalized_norms(delta, output_grad)


def _sketch_kernel(tensors: list[Tensor], first_index: Sequence[int], buckets: int, seed: int) -> Tensor:
    from lipcore import functional

    return functional.sketch(tensors, first_index, buckets=buckets, seed=seed % 2**64)


for _key in ("CPU", "CUDA"):
    _library.impl("sample_norms", _sample_norms_kernel, _key)
    _library.impl("normalized_norms", _normalized_norms_kernel, _key)
    _library.impl("sketch", _sketch_kernel, _key)


@torch.library.register_fake("lipcore::sample_norms", lib=_library)  # type: ignore[untyped-decorator]
def _sample_norms_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.float64)


@torch.library.register_fake("lipcore::normalized_norms", lib=_library)  # type: ignore[untyped-decorator]
def _normalized_norms_fake(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    return delta.new_empty(delta.shape[:1], dtype=torch.float64), delta.new_empty((), dtype=torch.int64)


@torch.library.register_fake("lipcore::sketch", lib=_library)  # type: ignore[untyped-decorator]
def _sketch_fake(tensors: list[Tensor], first_index: Sequence[int], buckets: int, seed: int) -> Tensor:
    return tensors[0].new_empty(buckets, dtype=torch.float64)
