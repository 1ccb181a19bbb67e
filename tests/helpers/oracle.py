"""How far a result may be from the truth, what is bitwise the same, and the same values in many memory layouts.

The tolerance of a number is what the naive torch expression gets wrong on the same input in that dtype, plus `k` eps of
the type the kernel computes in: as good as torch everywhere, and nearly exact on harmless input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def assert_close(
    got: Tensor, truth: Tensor, *, naive: Tensor | None = None, scale: Tensor | None = None, eps: float, k: float = 4
) -> None:
    """|got - truth| <= |naive - truth| + k eps scale, elementwise; NaN and infinities must be where the truth has them.

    scale: what the error is relative to where terms cancel; default |truth|. A naive result that is not finite excuses
    nothing.
    """
    assert got.shape == truth.shape, f"shape {list(got.shape)}, expected {list(truth.shape)}"
    got, truth = got.detach().cpu().double(), truth.detach().cpu().double()
    scale = truth.abs() if scale is None else scale.detach().cpu().double()
    finite = truth.isfinite()
    same = torch.where(finite, got.isfinite(), (got == truth) | (got.isnan() & truth.isnan()))
    assert same.all(), _worst("a non-finite value differs", got, truth, (~same).double())
    allowed = k * eps * scale
    if naive is not None:
        theirs = (naive.detach().cpu().double() - truth).abs()
        allowed = allowed + torch.where(theirs.isfinite(), theirs, 0.0)
    excess = torch.where(finite, (got - truth).abs() - allowed, 0.0)
    assert (excess <= 0).all(), _worst(f"allowed {allowed.flatten()[excess.argmax()]:.3g}", got, truth, excess)


def _worst(what: str, got: Tensor, truth: Tensor, by: Tensor) -> str:
    i = int(by.argmax())
    got, truth = got.flatten()[i], truth.flatten()[i]
    return f"{what}: element {i} of {by.numel()} is {got:.17g}, truth {truth:.17g}, difference {abs(got - truth):.3g}"


def bits(tensor: Tensor) -> Tensor:
    """The memory of a tensor's values, for bitwise comparison. Every NaN counts as the same."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.is_floating_point():
        flat = torch.where(flat.isnan(), torch.full_like(flat, torch.nan), flat)
    return flat.view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same_state(a: object, b: object, path: str = "state") -> None:
    """Two state dicts, bit for bit."""
    assert type(a) is type(b), f"{path}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_state(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}[{i}]")
    elif isinstance(a, Tensor):
        assert same_bits(a, b), f"{path} differs"
    else:
        assert a == b, path


# ---- the same values in other memory


def _transposed(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def _sliced(x: Tensor) -> Tensor:
    """Every second element of something larger, in every dimension."""
    wide = x.new_full([2 * n + 1 for n in x.shape], 77.0)
    view = wide[tuple(slice(1, 2 * n, 2) for n in x.shape)]
    return view.copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """The first entry of the last dimension, repeated without memory: other values than x, where that has several."""
    return x[..., :1].clone().expand(x.shape)


def _offset(x: Tensor) -> Tensor:
    """Begins at an odd element, so that no vector load is aligned."""
    memory = x.new_full([x.numel() + 3], 77.0)
    return memory[3:].view(x.shape).copy_(x)


def _channels_last(x: Tensor) -> Tensor | None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else None


def _requires_grad(x: Tensor) -> Tensor:
    return x.clone().requires_grad_() * 1


def _imag_of_conjugate(x: Tensor) -> Tensor | None:
    """torch keeps this as memory with the opposite sign and a flag, which DLPack does not carry."""
    if x.dtype == torch.bfloat16:
        return None
    view = torch.view_as_complex(torch.stack([torch.zeros_like(x), -x], dim=-1)).conj().imag
    assert view.is_neg()
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": _expanded,
    "offset": _offset,
    "channels_last": _channels_last,
    "requires_grad": _requires_grad,
    "imag_of_conjugate": _imag_of_conjugate,
}


def in_layout(values: Tensor, layout: str) -> Tensor | None:
    """The values in that layout; None where the layout does not exist for them."""
    return LAYOUTS[layout](values)
