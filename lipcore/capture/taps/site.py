"""The taps that share one module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.capture.taps.input_alias import Source
from lipcore.capture.taps.tap import InputTap, Tap

_numbers = itertools.count()


class Site:
    """One tapped module: all its taps share one hook, one gradient and one tensor of numbers."""

    def __init__(self, target: str, fail: Callable[[Exception], None]) -> None:
        self.taps: list[Tap] = []
        self.target = self.name = target
        self.module: nn.Module | None = None  # the first layer is None until it has run
        self.in_place_after = False
        self.lost = False  # no numbers will come
        self.left_alone = ""  # why an output that requires no gradient is not made to
        self.number = next(_numbers)
        self._with_leaf: Tap | None = None
        self._fail = fail

    @property
    def columns(self) -> int:
        return sum(tap.columns for tap in self.taps)

    def resolve(self, name: str, module: nn.Module) -> None:
        for tap in self.taps:
            tap.resolve(name, module)
        self.name, self.module = name, module
        self.in_place_after = all(tap.in_place_after for tap in self.taps)
        self._with_leaf = next((tap for tap in self.taps if tap.has_leaf), None)

    @property
    def optional(self) -> bool:
        """True where the other sites go on when this one is lost."""
        return all(tap.optional for tap in self.taps)

    @property
    def stays(self) -> bool:
        """True where the taps' metrics have something without it beside tensor parallelism."""
        return all(tap.stays for tap in self.taps)

    def lose(self, reason: str) -> None:
        """Give this site up, and tell its taps why."""
        self.lost = True
        for tap in self.taps:
            tap.lost(reason)

    def save(
        self, sources: Mapping[InputTap, Source], module: nn.Module, arguments: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return the tensors and details that reduce() will need beside the gradient."""
        if len(self.taps) == 1:
            return self.taps[0].save_from(sources, module, arguments)
        parts = [tap.save_from(sources, module, arguments) for tap in self.taps]
        return tuple(tensor for part, _ in parts for tensor in part), [(len(part), detail) for part, detail in parts]

    def leaf(self, output: Tensor) -> Tensor | None:
        """Return the leaf that one of the taps wants to get the gradient at the output, if any does."""
        return None if self._with_leaf is None else self._with_leaf.leaf(output)

    def reduce(self, grad: Tensor, extra: Any, saved: tuple[Tensor, ...]) -> Tensor | None:
        """Return the numbers of all taps, one below the other; None where a tap's reduce() raised."""
        if torch.compiler.is_compiling():
            return self._reduce(grad, extra, saved)
        try:
            return self._reduce(grad, extra, saved)
        except Exception as error:
            self._fail(error)
            return None

    def _reduce(self, grad: Tensor, extra: Any, saved: tuple[Tensor, ...]) -> Tensor:
        if len(self.taps) == 1:
            return self.taps[0].reduce(grad, extra, *saved)
        parts, start = [], 0
        for tap, (count, detail) in zip(self.taps, extra, strict=True):
            parts.append(tap.reduce(grad, detail, *saved[start : start + count]))
            start += count
        return torch.cat(parts)
