"""The same operations as torch.ops.lipcore.*, so that they can stand inside compiled graphs.

Registered with torch.library.Library and not with custom_op, whose wrapper costs 12 us a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("lipcore", "DEF")
_library.define("sample_norms(Tensor x) -> Tensor")
_library.define("normalized_norms(Tensor delta, Tensor output_grad) -> (Tensor, Tensor)")


def sample_norms(x: Tensor) -> Tensor:
    result: Tensor = torch.ops.lipcore.sample_norms(x)
    return result


def normalized_norms(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.lipcore.normalized_norms(delta, output_grad)
    return result


def _sample_norms_kernel(x: Tensor) -> Tensor:
    from lipcore import functional

    return functional.sample_norms(x)


def _normalized_norms_kernel(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    from lipcore import functional

    return functional.normalized_norms(delta, output_grad)


for _key in ("CPU", "CUDA"):
    _library.impl("sample_norms", _sample_norms_kernel, _key)
    _library.impl("normalized_norms", _normalized_norms_kernel, _key)


@torch.library.register_fake("lipcore::sample_norms", lib=_library)  # type: ignore[untyped-decorator]
def _sample_norms_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.float64)


@torch.library.register_fake("lipcore::normalized_norms", lib=_library)  # type: ignore[untyped-decorator]
def _normalized_norms_fake(delta: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    return delta.new_empty(delta.shape[:1], dtype=torch.float64), delta.new_empty((), dtype=torch.int64)
