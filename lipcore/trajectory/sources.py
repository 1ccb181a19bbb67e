"""Where the update dw of a step comes from: the optimizer's own state, a copy of a moment, or the caller.

All sources give the same: what :func:`lipcore.functional.update_sums` says of every parameter. None keeps anything per
element between steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lipcore import _core
from lipcore.functional.update_rules import DIFFERENCE, GIVEN, Scalar, UpdateRule
from lipcore.metric.optimizers import hooked_before
from lipcore.models.device_index import DeviceIndices
from lipcore.trajectory.closed_forms import CLOSED_FORMS, HELD, Move, move_of, supported
from lipcore.trajectory.source_sums import Asked, Parameter, Sums, look_up, refuse_twins, sums_of


class Moves(NamedTuple):
    """Parameters after a step, and what has moved each."""

    params: list[Tensor]
    first: list[Tensor | None]
    second: list[Tensor | None]
    rules: list[UpdateRule]


def supported_here(optimizer: Any) -> str | None:
    """Return why the updates of an optimizer cannot be had in lipcore's hook at the end of its step; None when they
    can."""
    reason = supported(optimizer)
    if reason is None and hooked_before(optimizer):
        return (
            f"{type(optimizer).__name__} has a step hook that is not lipcore's and is called before it, so that "
            "gradients and settings may be others than those of the step; register it after the Monitor is made"
        )
    return reason


class OptimizerSource:
    """Source of updates that computes every step's from the optimizer's state and hyper-parameters right after it.

    It is the step the optimizer meant. What the rounding of the parameter to its dtype swallows (a bfloat16 parameter
    does not move below half an ulp), what another hook or clipping of the weights does afterwards, and an assignment
    from outside are not in it; a difference of parameters would show them. Momentum and moments are taken as they are
    stored: with bfloat16 state the number carries that state's 3 digits.

    Call :meth:`sums` in a post-step hook of the optimizer: there gradients, hyper-parameters and a GradScaler's verdict
    are still those of the step. A parameter whose `.grad` is None then, or which has no state, was not stepped: its
    update is 0. (Hence gradients must not be cleared earlier: SGD without momentum knows its step from `.grad` alone.)
    Everything is looked up afresh at every call, so load_state_dict(), add_param_group() and a schedule are seen.

    Args:
        optimizers: exactly torch.optim.SGD, Adam or AdamW each, in whatever implementation (for-loop, foreach, fused,
            capturable, differentiable).
        parameters: (name, owner, key) with owner[key] the parameter; each tensor once.
        ratios: read the gradients too, for their ratio to the second moment.

    Raises:
        ValueError: an optimizer without a closed form, a parameter in none of the optimizers or in two, one that is
            listed twice.
    """

    def __init__(
        self, optimizers: Optimizer | Sequence[Optimizer], parameters: Sequence[Parameter], *, ratios: bool = False
    ) -> None:
        self._ratios = ratios
        self._groups: list[tuple[Optimizer, dict[str, Any], list[Tensor]]] = []
        self._found: dict[int, tuple[Optimizer, dict[str, Any]]] = {}  # the places, while the groups are those
        self._grouped: tuple[list[Tensor], dict[int, Any], list[tuple[Optimizer, dict[str, Any], list[int]]]] | None = (
            None
        )
        self._optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self._stepped: set[int] = set()  # those whose own step was read since the last finish()
        self._parameters = list(parameters)
        for i, optimizer in enumerate(self._optimizers):
            if (reason := supported(optimizer)) is not None:
                raise ValueError(f"optimizers[{i}]: {reason}; use snapshots or pass the updates yourself")
        tensors = look_up(self._parameters)
        refuse_twins(self._parameters, tensors)
        for (name, _, _), tensor in zip(self._parameters, tensors, strict=True):
            if hasattr(tensor, "placements"):
                raise ValueError(
                    f"source: 'optimizer' is for parameters that are plain tensors, and '{name}' is a DTensor "
                    "(fully_shard(), tensor parallelism); pass mode='updates', mode='exact' or source='snapshot'"
                )
            _core.check_storage(tensor, name)
        places = self._places()
        absent = [name for (name, _, _), t in zip(self._parameters, tensors, strict=True) if id(t) not in places]
        if absent:
            shown = ", ".join(repr(name) for name in absent[:5]) + (", ..." if len(absent) > 5 else "")
            raise ValueError(
                f"optimizers: {len(absent)} of {len(tensors)} parameters are in none of them ({shown}), so their "
                "updates are unknown; pass every optimizer that moves them, or leave those parameters out"
            )
        device = tensors[0].device if tensors else None
        self._indices = DeviceIndices()
        self._rows = torch.zeros(len(tensors), _core.STEP_COLUMNS, dtype=torch.float64, device=device)
        self._mixes: list[Scalar] = [0.0] * len(tensors)
        self._squares = self._rows.new_full((_core.UPDATE_SQUARES, len(tensors)), torch.nan)

    def describe(self) -> list[str]:
        """Return, per parameter, the optimizer that moves it, as a plan says it: "AdamW, closed form"."""
        places = self._places()
        tensors = look_up(self._parameters)
        return [f"{type(places[id(t)][0]).__name__}, closed form" for t in tensors]

    def kinds(self) -> list[str]:
        """Return, per parameter, what its optimizer keeps, by name: "AdamW", "SGD", "SGD without momentum"."""
        places = self._places()
        found = []
        for tensor in look_up(self._parameters):
            optimizer, group = places.get(id(tensor), (None, {}))
            without = " without momentum" if isinstance(optimizer, SGD) and not group["momentum"] else ""
            found.append(f"{type(optimizer).__name__}{without}")
        return found

    def sums(self, only: Optimizer | None = None, *, previous: Sequence[Tensor] | None = None) -> Sums:
        """Return rows and squares of the step that was just made; valid until the next call.

        Args:
            only: where several optimizers step one after the other, the one whose hook this is. The rows of the others'
                parameters keep the values of their own call, and :meth:`finish` ends the step. Without it, of all.
            previous: the parameters before the step, for what they did beside it.

        Raises:
            ValueError: a parameter was removed, or replaced by one that is not the optimizer's; a shape, device or
                layout that does not fit.
        """
        weights, chosen, moves, skipped = self._read(only)
        if only is not None:
            self._stepped.add(id(only))
        for i, move in zip(chosen, moves, strict=True):
            self._mixes[i] = move[2].mix
        names = [self._parameters[i][0] for i in chosen]
        params = [weights[i] for i in chosen]
        # Where only the GPU knows whether a step was skipped, the GPU chooses.
        verdicts = [skipped[i] for i in chosen]
        unsure = any(isinstance(verdict, Tensor) for verdict in verdicts)
        asked = Asked([w.grad for w in params] if self._ratios else None, previous and [previous[i] for i in chosen])
        if len(chosen) == len(weights) and not unsure:
            return sums_of(names, params, moves, (self._rows, self._squares), asked)
        if chosen:
            found = sums_of(names, params, moves, asked=asked)
            if unsure:
                held = sums_of(names, params, [HELD] * len(params), asked=asked)
                stays = torch.stack([_flag(verdict, self._rows) for verdict in verdicts])
                found = torch.where(stays.unsqueeze(1), held[0], found[0]), torch.where(stays, held[1], found[1])
            self._take(chosen, found)
        return self._rows, self._squares

    def finish(self, *, previous: Sequence[Tensor] | None = None) -> Sums:
        """Return rows and squares of a step that is over: where :meth:`sums` was called for optimizers one by one, what
        it found of them, and of the others, which made no step (a GradScaler skipped it), that their parameters stayed;
        else as :meth:`sums` of all.

        Args:
            previous: as there.

        Raises:
            ValueError: see there.
        """
        stepped, self._stepped = self._stepped, set()
        if not stepped:
            return self.sums(previous=previous)
        if any(id(optimizer) not in stepped for optimizer in self._optimizers):
            weights, places = look_up(self._parameters), self._places()
            held = [i for i, w in enumerate(weights) if id(w) in places and id(places[id(w)][0]) not in stepped]
            if held:
                names, params = [self._parameters[i][0] for i in held], [weights[i] for i in held]
                asked = Asked(previous=previous and [previous[i] for i in held])
                self._take(held, sums_of(names, params, [HELD] * len(held), asked=asked))
        return self._rows, self._squares

    def _take(self, places: Sequence[int], found: Sums) -> None:
        """Put what was found of some parameters beside that of the others."""
        index = self._indices.on(self._rows.device, places)
        self._rows.index_copy_(0, index, found[0])
        self._squares.index_copy_(1, index, found[1])

    def moves(self) -> Moves | None:
        """Return what has moved every parameter in the step that was just made; None where only a GPU knows whether
        there was one. As :meth:`sums` otherwise, which says what is wrong in words.

        Raises:
            ValueError: see there.
        """
        weights, places = look_up(self._parameters), self._places()
        if any(isinstance(_found_inf(optimizer), Tensor) for optimizer in self._optimizers):
            return None
        moves: list[Move] = [HELD] * len(weights)
        memo: dict[Any, Any] = {}
        for optimizer, group, members in self._by_group(weights, places):
            # What move_of() does, with what a group's parameters have in common looked up once.
            fused, form, states = group["fused"], CLOSED_FORMS[type(optimizer)], optimizer.state
            for i in () if _found_inf(optimizer) else members:
                w = weights[i]
                grad = w.grad
                if grad is not None:
                    moves[i] = (
                        move_of(optimizer, group, w, memo) if fused else form(group, grad, states.get(w) or {}, memo)
                    )
        return Moves(weights, *(list(part) for part in zip(*moves, strict=True)))

    def _by_group(
        self, weights: list[Tensor], places: dict[int, tuple[Optimizer, dict[str, Any]]]
    ) -> list[tuple[Optimizer, dict[str, Any], list[int]]]:
        """Return the places of the parameters of every group that has some."""
        if self._grouped is not None:
            before, known, found = self._grouped
            if known is places and all(map(is_, weights, before)):
                return found
        members: dict[int, tuple[Optimizer, dict[str, Any], list[int]]] = {}
        for i, w in enumerate(weights):
            place = places.get(id(w))
            if place is None:
                self._refuse_stranger(i)
            optimizer, group = place
            members.setdefault(id(group), (optimizer, group, []))[2].append(i)
        self._grouped = weights, places, list(members.values())
        return self._grouped[2]

    def _read(self, only: Optimizer | None) -> tuple[list[Tensor], list[int], list[Move], list[bool | Tensor]]:
        """Return all parameters, which of them are of that optimizer, what has moved those, and of each of all whether
        its step was skipped."""
        weights = look_up(self._parameters)
        places = self._places()
        found_inf = {id(optimizer): _found_inf(optimizer) for optimizer in self._optimizers}
        memo: dict[Any, Any] = {}
        chosen: list[int] = []
        moves: list[Move] = []
        skipped: list[bool | Tensor] = []
        for i, w in enumerate(weights):
            place = places.get(id(w))
            if place is None:
                self._refuse_stranger(i)
            optimizer, group = place
            verdict = found_inf[id(optimizer)]
            skipped.append(verdict)
            if only is not None and optimizer is not only:
                continue
            chosen.append(i)
            try:
                moves.append(HELD if verdict is True else move_of(optimizer, group, w, memo))
            except ValueError as error:
                raise ValueError(f"trajectory: parameter {self._parameters[i][0]!r}: {error}") from None
        return weights, chosen, moves, skipped

    def mixes(self) -> list[Scalar]:
        """Return, each once, the factors other than 0 of what the last step read as second tensors of linear rules."""
        found = {id(mix) if isinstance(mix, Tensor) else mix: mix for mix in self._mixes}
        return [mix for mix in found.values() if isinstance(mix, Tensor) or mix != 0]

    def _refuse_stranger(self, i: int) -> NoReturn:
        raise ValueError(
            f"trajectory: parameter {self._parameters[i][0]!r} of the model is not the optimizer's any more: it was "
            "replaced in its module or taken out of the optimizer; build the optimizer anew from the model's "
            "parameters, then this metric"
        )

    def _places(self) -> dict[int, tuple[Optimizer, dict[str, Any]]]:
        """Return the optimizer and group of every parameter, by its id, as things are now."""
        groups = [(optimizer, group) for optimizer in self._optimizers for group in optimizer.param_groups]
        if len(groups) == len(self._groups) and all(
            optimizer is owner
            and group is before
            and len(group["params"]) == len(held)
            and all(map(is_, group["params"], held))
            for (optimizer, group), (owner, before, held) in zip(groups, self._groups, strict=True)
        ):
            return self._found
        places: dict[int, tuple[Optimizer, dict[str, Any]]] = {}
        for optimizer, group in groups:
            for parameter in group["params"]:
                if id(parameter) in places:
                    self._refuse_shared(parameter)
                places[id(parameter)] = (optimizer, group)
        # Held: an id is of one tensor as long as that is there.
        self._groups = [(optimizer, group, list(group["params"])) for optimizer, group in groups]
        self._found = places
        return places

    def _refuse_shared(self, parameter: Tensor) -> None:
        name = next((n for n, owner, key in self._parameters if owner.get(key) is parameter), None)
        what = f"parameter {name!r}" if name else f"a parameter of shape {list(parameter.shape)}"
        raise ValueError(
            f"optimizers: {what} is in two of them (or twice in one), and what one step moved cannot be told from the "
            "other's; give every parameter to one optimizer"
        )


class SnapshotSource:
    """Source of updates for any optimizer: a copy of the parameters before the step, gone after it.

    Peak memory: the parameters' bytes once more, from :meth:`before` to :meth:`sums`; nothing in between steps. Unlike
    the optimizer's own numbers this is what the parameters did, their rounding included; of the optimizer nothing is
    known, so the squares are NaN.

    Args:
        parameters: (name, owner, key) with owner[key] the parameter; each tensor once.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = list(parameters)
        refuse_twins(self._parameters, look_up(self._parameters))
        self._before: list[tuple[Tensor, Tensor]] | None = None

    def describe(self) -> list[str]:
        """Return, per parameter, what is done with it."""
        return ["difference to a copy made before the step"] * len(self._parameters)

    @property
    def peak_bytes(self) -> int:
        """Bytes that the copies take while a step runs."""
        return sum(t.numel() * t.element_size() for t in look_up(self._parameters))

    def before(self) -> None:
        """Copy the parameters: in a pre-step hook, on steps that are looked at."""
        self._before = None  # the old copies go before new ones come
        self._before = [(t, t.detach().clone()) for t in look_up(self._parameters)]

    def sums(self) -> Sums:
        """Return rows and squares of the step since before(); the copies are freed, also when this raises.

        Raises:
            RuntimeError: no before() since the last call.
            ValueError: a parameter was removed or replaced.
        """
        before, self._before = self._before, None
        if before is None:
            raise RuntimeError("SnapshotSource.sums() needs before() ahead of the same step (a pre-step hook)")
        tensors = look_up(self._parameters)
        names = [name for name, _, _ in self._parameters]
        for name, tensor, (original, _) in zip(names, tensors, before, strict=True):
            if tensor is not original:
                raise ValueError(
                    f"trajectory: parameter {name!r} was replaced during the step, so nothing was measured"
                )
        return sums_of(names, tensors, [(copy, None, DIFFERENCE) for _, copy in before])


class GivenSource:
    """Source of updates that the caller has: dw itself, tensor by tensor.

    Args:
        parameters: (name, owner, key) with owner[key] the parameter.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = list(parameters)

    def describe(self) -> list[str]:
        """Return, per parameter, what is done with it."""
        return ["updates given"] * len(self._parameters)

    def sums(self, updates: Mapping[str, Tensor | None]) -> Sums:
        """Return rows of the updates w - w_prev by parameter name; None for a parameter that did not move. The squares
        are NaN.

        Raises:
            TypeError, ValueError: names that are not the parameters', or tensors that do not fit them.
        """
        if not isinstance(updates, Mapping):
            raise TypeError(
                f"updates: expected a mapping from parameter names to tensors, got {type(updates).__name__}"
            )
        names = [name for name, _, _ in self._parameters]
        for what, wrong in (("lacks", set(names) - set(updates)), ("has no parameter", set(updates) - set(names))):
            if wrong:
                shown = ", ".join(repr(name) for name in sorted(wrong)[:5])
                raise ValueError(
                    f"updates: {what} {shown}{', ...' if len(wrong) > 5 else ''}; pass one tensor per parameter of the "
                    "trajectory, None for one that did not move"
                )
        moves = [HELD if updates[n] is None else (updates[n], None, GIVEN) for n in names]
        return sums_of(names, look_up(self._parameters), moves)


def _found_inf(optimizer: Optimizer) -> bool | Tensor:
    """Return whether a GradScaler told a fused optimizer to leave its parameters alone; a tensor where the GPU
    knows."""
    found: Any = getattr(optimizer, "found_inf", None)
    if not isinstance(found, Tensor):
        return False
    return bool(found) if found.is_cpu else found


def _flag(verdict: bool | Tensor, like: Tensor) -> Tensor:
    """Return the verdict as a tensor of no dimension: whether a step was skipped."""
    if isinstance(verdict, Tensor):
        return verdict.reshape(()) != 0
    return torch.full((), verdict, device=like.device)
