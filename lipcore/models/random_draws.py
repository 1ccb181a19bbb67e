"""The random numbers that a pass draws, drawn again by a pass on more samples, so that both leave out the same layers.

A model that leaves layers out at random (LayerDrop) draws a number for each, between the dropouts of the others. In a
pass on more samples dropout draws more numbers, and those that come later would be others. So a first pass, on as many
samples, notes the states of all generators wherever a module or one of torch's functions is called, and the pass on
more samples gets them back there.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lipcore.models.random_numbers import RandomNumbers

#: A module, whether it is entered or left, and how often that was so before.
_Place = tuple[int, bool, int]
_BEGIN: _Place = (0, True, 0)


class _Draw(NamedTuple):
    """One call of a function that has drawn numbers: its name, its result's shape, and the generators' states after."""

    name: str
    shape: tuple[int, ...]
    after: list[Any]


class Draws:
    """The random numbers that one pass of a model draws.

    Args:
        random: the generators.
        begun: their states when that pass began.
    """

    def __init__(self, random: RandomNumbers, begun: list[Any]) -> None:
        self.random, self._begun = random, begun
        self.states: dict[_Place, list[Any]] = {}
        self.calls: defaultdict[_Place, list[_Draw]] = defaultdict(list)

    @property
    def any(self) -> bool:
        """True where the noted pass has drawn a number."""
        return any(not self.random.are_same(self._begun, states) for states in self.states.values())

    def put_back(self) -> None:
        """Give the generators the states that the pass began with."""
        self.random.set(self._begun)

    @contextmanager
    def noted(self, model: nn.Module) -> Iterator[None]:
        """Note what a forward pass in this with block draws, which is to be the very pass."""
        with self._seen(model, _Noting(self, self._begun)):
            yield

    @contextmanager
    def again(self, model: nn.Module, samples: int) -> Iterator[None]:
        """Have a forward pass in this with block go on, wherever the noted one of so many samples had drawn numbers,
        as that did."""
        with self._seen(model, _Following(self, self._begun, samples)):
            yield

    @contextmanager
    def _seen(self, model: nn.Module, mode: _Mode) -> Iterator[None]:
        self.put_back()
        handles = []
        try:
            for module in model.modules():
                reach = mode.reach  # functions of lipcore's, as hooks are asked whose they are
                handles.append(module.register_forward_pre_hook(functools.partial(_entered, reach), prepend=True))
                handles.append(module.register_forward_hook(functools.partial(_left, reach)))
            with mode:
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Mode(TorchFunctionMode):
    """The observer of the calls of modules and functions in one pass."""

    def __init__(self, draws: Draws, begun: list[Any]) -> None:
        super().__init__()
        self.draws, self.states, self.place = draws, begun, _BEGIN
        self._met: Counter[tuple[int, bool]] = Counter()

    def reach(self, module: nn.Module, entered: bool) -> None:
        """Note that a module is entered or left."""
        key = id(module), entered
        self.place = (*key, self._met[key])
        self._met[key] += 1
        self.at_module()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name != "__get__":  # an attribute
            random = self.draws.random
            now = random.now()
            if not random.are_same(self.states, now):
                self.has_drawn(_Draw(name, tuple(result.shape) if isinstance(result, Tensor) else (), now))
        return result

    def at_module(self) -> None:
        raise NotImplementedError

    def has_drawn(self, draw: _Draw) -> None:
        raise NotImplementedError


class _Noting(_Mode):
    """The observer that notes the states."""

    def at_module(self) -> None:
        random = self.draws.random
        now = random.now()
        if not random.are_same(self.states, now):
            self.states = now  # else the same list: a state is some kilobytes
        self.draws.states[self.place] = self.states

    def has_drawn(self, draw: _Draw) -> None:
        self.states = draw.after
        self.draws.calls[self.place].append(draw)


class _Following(_Mode):
    """The observer that gives the states back."""

    def __init__(self, draws: Draws, begun: list[Any], samples: int) -> None:
        super().__init__(draws, begun)
        self._samples, self._next = samples, 0

    def at_module(self) -> None:
        self._next = 0
        self._go_on(self.draws.states.get(self.place))

    def has_drawn(self, draw: _Draw) -> None:
        noted = self.draws.calls.get(self.place, [])[self._next : self._next + 1]
        if noted and noted[0].name == draw.name and self._fits(noted[0].shape, draw.shape):
            self._next += 1
            self._go_on(noted[0].after)
        else:  # one of the further sample's own
            self._go_on(self.states)

    def _fits(self, shape: tuple[int, ...], more: tuple[int, ...]) -> bool:
        each = zip(shape, more, strict=False)
        return len(shape) == len(more) and all(n == m or n * (self._samples + 1) == m * self._samples for n, m in each)

    def _go_on(self, states: list[Any] | None) -> None:
        if states is None:
            self.states = self.draws.random.now()
        else:
            self.draws.random.set(states)
            self.states = states


def _entered(reach: Callable[[nn.Module, bool], None], module: nn.Module, arguments: Any) -> None:
    reach(module, True)


def _left(reach: Callable[[nn.Module, bool], None], module: nn.Module, arguments: Any, output: Any) -> None:
    reach(module, False)
