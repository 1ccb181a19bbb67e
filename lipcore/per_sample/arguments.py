"""What metrics of single samples' gradients can be told, checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from lipcore.capture.layers.options import LayerOptions
from lipcore.models.arguments import check_choice, check_count, is_integer
from lipcore.models.named_output import check_output_choice
from lipcore.per_sample.loss_reduction import Reduction

OnUnsupported = Literal["error", "skip"]
Offsets = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]


def layer_options(
    reduction: Reduction,
    *,
    batch_dim: int,
    cu_seqlens: Any,
    broadcast: Sequence[str],
    on_unsupported: OnUnsupported,
    prove: bool,
    output: Any,
    max_replay_bytes: int,
    max_replay_flops: int | None,
    **others: Any,
) -> LayerOptions:
    """Return how the layers are tapped, from what the user has given; `others` goes there as it is."""
    check_output_choice(output)
    max_bytes, max_flops = _whole(max_replay_bytes), _whole(max_replay_flops)
    check_count("max_replay_bytes", max_bytes, least=0)
    check_count("max_replay_flops", max_flops, least=0, optional=True)
    return LayerOptions(
        batch_dim=batch_dim,
        offsets_of=offsets_of(cu_seqlens),
        broadcast=tuple(broadcast),
        skip_uncovered=on_unsupported == "skip",
        prove=prove,
        output=output,
        note_of=reduction.note_of,
        loss_of=reduction.loss_of,
        max_replay_bytes=max_bytes,
        max_replay_flops=max_flops,
        **others,
    )


def _whole(value: Any) -> Any:
    """Return a float that is whole, such as 1e9, as an integer; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_arguments(
    every_steps: Any, on_unsupported: Any, batch_dim: Any, broadcast: Any, methods: Any, alone: bool
) -> None:
    """Raise TypeError or ValueError naming the argument that is not possible. `alone`: without a Monitor."""
    check_count("every_steps", every_steps)
    if every_steps > 1 and alone:
        raise ValueError(
            f"every_steps: {every_steps} counts an optimizer's steps, which a metric that stands alone does not see; "
            "leave out model= and give the metric to Monitor(model, optimizer, metrics=[...])"
        )
    check_choice("on_unsupported", on_unsupported, get_args(OnUnsupported))
    if not is_integer(batch_dim) or batch_dim not in (0, 1):
        raise ValueError(f"batch_dim: expected 0 or 1, got {batch_dim!r}")
    if isinstance(broadcast, str):
        raise TypeError(f"broadcast: expected a sequence of layer names, got the string {broadcast!r}")
    if broadcast and batch_dim == 1:
        raise ValueError(
            "broadcast: layers without the batch dimension are expanded in front, which batch_dim=1 does not allow; "
            "give them inputs of shape [T, B], or put the batch first"
        )
    if methods is not None and not isinstance(methods, Mapping):
        raise TypeError(f"methods: expected a dict of layer names to methods, got {methods!r}")


def offsets_of(cu_seqlens: Any) -> Offsets | None:
    """Return the function that finds the boundaries of packed sequences."""
    if cu_seqlens is None or (callable(cu_seqlens) and not isinstance(cu_seqlens, Tensor)):
        function: Offsets | None = cu_seqlens
        return function
    if not isinstance(cu_seqlens, str):
        raise TypeError(
            "cu_seqlens: expected the name of the model's keyword argument that has the boundaries, or a function, got "
            f"{type(cu_seqlens).__name__}"
        )
    return _Keyword(cu_seqlens)


class _Keyword:
    """Function that takes the boundaries from a keyword argument; a class, since a function in a function cannot be
    pickled."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        found = keywords.get(self._name)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"cu_seqlens: the model must be called with a keyword argument {self._name!r}, int [B + 1]; got "
                f"{type(found).__name__}"
            )
        return found
