"""The metric TensorStats: what users see."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lipcore.distributed.placed import counts_here, tied_to
from lipcore.distributed.rank_axis import Place
from lipcore.metric.host_reads import OnDevice
from lipcore.metric.plan_lines import PlanLines
from lipcore.metric.protocol import Needs, PlanLine
from lipcore.metric.rank_part import FSDP1_PIECES, Holding, RankPart
from lipcore.metric.rank_states import RankStates
from lipcore.metric.results import MetricResult
from lipcore.metric.standalone import StandaloneMetric
from lipcore.metric.state import check_same, checked_count
from lipcore.models.arguments import check_choice, check_count
from lipcore.models.capturing import is_capturing
from lipcore.models.names import listed
from lipcore.models.ranks import is_fsdp1
from lipcore.tensor_stats.attention import AttentionChoice
from lipcore.tensor_stats.block import Block, Numbers
from lipcore.tensor_stats.describe import add_extras, add_rows, histogram_of
from lipcore.tensor_stats.extra import ROOT, UNREADABLE, Extra, main_tensor, readable
from lipcore.tensor_stats.rank_part import TensorStatsPart
from lipcore.tensor_stats.router import RouterChoice
from lipcore.tensor_stats.watched import QUANTITIES, Names, Watched, Wishes, checked_names
from lipcore.trajectory.groups import Groups, by_block
from lipcore.trajectory.parameters import WatchedParameter, piece_of

_ONLY_NUMBERS = (
    "this TensorStats is a copy, which holds the numbers of compute() and no model; to go on, make a new one and "
    "load_state_dict() of the original"
)
_NO_PASS = (
    "no forward pass came through the model's hooks in the sampled steps: the loop calls another object, without "
    "gradients, in a compiled function or inside an activation checkpoint"
)
_CAPTURED = "tensors inside a CUDA graph that is captured are left out: its replays tell the host nothing"


def _holds(held: Mapping[tuple[str, str], WatchedParameter]) -> list[tuple[str, str, Tensor]]:
    """Return name, group and tensor of each. A window that waits has those of its time, whatever is watched by now."""
    return [(name, group, one.owner[one.key]) for (name, group), one in held.items()]


class TensorStats(StandaloneMetric):
    r"""Statistics of the elements of parameters, of their gradients and of modules' outputs, on every `every_steps`-th
    step.

    For every tensor x, over the elements of all sampled steps of a window together:

    * ``mean``, ``sd`` :math:`\sqrt{M_2/n}`, ``min``, ``max`` and ``kurtosis`` :math:`n M_4/M_2^2` (3 of a normal
      distribution, larger where few elements are large), with :math:`M_k = \sum (x - \bar x)^k` over the n finite
      elements; `Value.count` is n
    * ``zeros``: the share of elements that are 0; ``nonfinite``: how many were NaN or infinite, which enter nothing
      else
    * ``abs_p50`` and ``abs_p99``: quantiles of \|x\| to 1/16 of themselves, from a histogram with eight bins per power
      of two (:meth:`histogram`)

    They stand in the quantities ``parameter`` and ``gradient`` by parameter, by group and in total, and in ``output``
    by module and in total; "(model)" is what the model itself returns. Parameters are looked at after the step;
    gradients at the end of the step's last backward pass, before anything clips, with a GradScaler's scale taken out;
    outputs in every forward pass in grad mode. What an activation checkpoint runs again does not come twice. Of a
    module that returns several tensors, the first floating one is measured, or that called "logits". Outputs inside
    compiled modules cannot be seen: :meth:`plan` and ``details["outputs_unseen"]`` name them, parameters and gradients
    are measured all the same. A step that a GradScaler skips does not count.

    One compiled pass over a tensor's memory gives all of this. Nothing but the numbers is kept: 16 KiB per tensor.

    On the same steps, where asked for (:meth:`plan` says what was found and what was not, and why):

    * ``attention_bound``: per head, :math:`\max_i\|q_i\| \max_j\|k_j\|` times the scale, which no attention logit
      exceeds: one-sided. It is read where the projections return queries and keys, since no hook sees the product. What
      is added to logits (masks, position biases) is not in it. ``attention="auto"`` finds projections by their names;
      what lies between them and the product it cannot see, so these numbers are labelled heuristic
    * ``logsumexp``: of the model's logits, mean and max over all positions
    * ``router_share`` and ``router_entropy``: which share of the tokens each expert of a mixture is chosen for by the
      largest of the router's logits; the entropies (in nats) of each token's softmax, on average, and of the shares.
      Limits of capacity and biases that are added later are not in them

    Args:
        model: only when the metric stands alone.
        parameters, gradients, outputs: which of them: True for all, False for none, or patterns of names, as in the
            shell ("blocks.*.weight"). Without patterns, outputs are those of all modules but nn.Sequential, which
            returns what its last module does.
        exclude: patterns of names that are left out of all three.
        groups: a function from parameter name to group name, default :func:`lipcore.by_block`; or a dict {group:
            regular expression}, as for Trajectory.
        every_steps: look at every k-th step; the others cost next to nothing.
        attention: {module or pattern: (queries, keys, heads) or (queries, keys, heads, scale)} with the names of the
            projections in that module, or (all, heads) for one that returns queries, keys and values as three equal
            parts; the scale is 1/sqrt(features of a head) by default. "auto": find them.
        router: {router or pattern: experts per token}, whose outputs are logits; "auto": find them.
        logits: True: what the model returns are logits; or the name of the module that returns them.
        scaler: a torch.amp.GradScaler, when the metric stands alone (a Monitor has its own).

    Raises:
        TypeError, ValueError: an argument of another kind than described, or a name that the model does not have.

    Source: moments by Chan, Golub, LeVeque (1983) and Pebay (2008); z-loss: Chowdhery et al., PaLM (2022).

    >>> layer = nn.Linear(2, 2)
    >>> with TensorStats(layer, every_steps=1) as stats:
    ...     _ = nn.init.constant_(layer.weight, 3.0)
    ...     layer(torch.ones(5, 2)).sum().backward()
    ...     stats.update()
    >>> stats.compute().parameter["weight"].mean.value, stats.compute().gradient["weight"].mean.value
    (3.0, 5.0)
    """

    name = "tensor_stats"
    _version = 1

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        parameters: Names = True,
        gradients: Names = True,
        outputs: Names = True,
        exclude: str | Sequence[str] = (),
        groups: Groups = by_block,
        every_steps: int = 10,
        attention: AttentionChoice | str | None = None,
        router: RouterChoice | str | None = None,
        logits: bool | str = False,
        scaler: Any = None,
    ) -> None:
        check_count("every_steps", every_steps)
        if not (callable(groups) or isinstance(groups, Mapping)):
            raise TypeError(f"groups: expected a callable or a dict of expressions, got {type(groups).__name__}")
        left_out = checked_names("exclude", exclude)
        if isinstance(left_out, bool):
            raise TypeError(f"exclude: expected a pattern of names or a list of them, got {exclude!r}")
        self._wishes = Wishes(
            checked_names("parameters", parameters),
            checked_names("gradients", gradients),
            checked_names("outputs", outputs),
            [left_out] if isinstance(left_out, str) else left_out,
            groups,
            attention,
            router,
            logits,
        )
        self.every_steps, self._window_blocks = every_steps, 1
        self._model: nn.Module | None = None
        self._watched: Watched | None = None
        self._numbers: MetricResult | None = None  # of a copy, which has nothing else
        self._scaler: Any = None
        self._steps_seen = 0
        self._forget_step()
        self._skipped: deque[int] = deque([0], maxlen=1)  # steps that a GradScaler skipped, by block
        self._notes: dict[str, Any] = {}
        self._untrue = ""  # why gradients are not what they are called
        if model is not None:
            self._watch(model, scaler)

    # ---- binding

    def prepare(self, optimizers: Sequence[Any], scaler: Any, window_blocks: int) -> None:
        """Take the GradScaler and the blocks per window of the Monitor."""
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._window_blocks = window_blocks
        self._skipped = deque([0], maxlen=window_blocks)

    def bind(self, model: nn.Module) -> None:
        """Find what is to be measured."""
        if self._numbers is not None:
            raise RuntimeError(_ONLY_NUMBERS)
        if self._watched is not None:
            raise RuntimeError("this TensorStats is bound to a model already; make one per model")
        self._model = model
        self._look()

    def _look(self) -> None:
        assert self._model is not None
        self._watched = Watched(self._model, self._wishes, self.prefix)
        self._step, self._open = Block(self._watched.size), Block(self._watched.size)
        self._closed: deque[Block] = deque(maxlen=self._window_blocks - 1)
        self._held = {(p.name, p.group): p for p in (*self._watched.parameters, *self._watched.gradients)}
        fsdp1 = is_fsdp1(self._model)
        self._holding = Holding(partial(_holds, self._held), FSDP1_PIECES if fsdp1 else "")
        self._forget_step()
        self._notes = {}

    @property
    def _found(self) -> Watched:
        if self._numbers is not None:
            raise RuntimeError(_ONLY_NUMBERS)
        if self._watched is None:
            raise RuntimeError(
                "this TensorStats has no model; pass one to TensorStats(model) or to Monitor(model, metrics=[...])"
            )
        return self._watched

    def rebind(self) -> None:
        """Look at the model anew; a new window starts."""
        assert self._found is not None
        self._look()

    def needs(self) -> Needs:
        found = self._found
        return Needs(gradients=bool(found.gradients), outputs=found.hooked or None)

    # ---- what it observes

    @property
    def _due(self) -> bool:
        return (self._steps_seen + 1) % self.every_steps == 0

    def _forget_step(self) -> None:
        """Forget what has come of the step under way."""
        self._has_gradients = self._has_outputs = False

    def wants_outputs(self) -> bool:
        if not self._due:
            return False
        for extra in self._found.extras:
            extra.begin()
        self._step.passes += 1
        self._has_outputs = True
        return True

    def observe_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Take what a module has returned."""
        found, tensor = self._found, main_tensor(output)
        if not self._has_outputs:
            return  # the pass began before the step under way
        if tensor is None and name in found.row_of_output:
            self._note(found.row_of_output[name], UNREADABLE)
        if tensor is None or self._is_captured(tensor):
            return
        if name in found.row_of_output:
            self._add([tensor], [found.row_of_output[name]])
        for entry in found.readers.get(name, ()):
            self._read(*entry, name, tensor)

    def _read(self, extra: Extra, sums: slice, most: slice, name: str, output: Tensor) -> None:
        if extra.problem:
            return
        try:
            with torch.no_grad():
                numbers = extra.read(name, output)
        except ValueError as error:
            extra.problem = str(error)
            return
        if numbers is None:
            return
        into = self._step.on(output.device)
        into.sums[sums] += numbers[0].to(into.device)
        if extra.most:
            into.most[most] = torch.maximum(into.most[most], numbers[1].to(into.device))

    def observe_gradients(self) -> None:
        """Take the gradients as a backward pass has left them; of several in one step the last one's, which holds the
        sum."""
        found = self._found
        if not self._due:
            return
        begin = len(found.parameters)
        if self._has_gradients:
            for numbers in self._step.parts:
                numbers.forget(begin, begin + len(found.gradients))
        tensors = self._tensors(found.gradients, begin, of_gradients=True)
        if self._scaler is None:
            self._add(*tensors)
        else:
            scale = self._scaler._scale
            for tensor, place in zip(*tensors, strict=True):  # one at a time: each is a copy
                self._add([_without_scale(tensor, scale)], [place])
        self._has_gradients = True

    def _add(self, tensors: Sequence[Tensor], places: Sequence[int]) -> None:
        for place, why in self._step.observe(tensors, places).items():
            self._note(place, why)

    def _note(self, place: int, why: str) -> None:
        """Note why a tensor has no numbers."""
        quantity, name, _, _ = self._found.rows[place]
        self._notes.setdefault("not_read", {})[f"{quantity} {name}"] = why

    def _tensors(
        self, parameters: Sequence[WatchedParameter], begin: int, *, of_gradients: bool = False
    ) -> tuple[list[Tensor], list[int]]:
        """Return the tensors that are there, and their places."""
        tensors, places = [], []
        for place, parameter in enumerate(parameters, begin):
            tensor: Tensor | None = parameter.owner.get(parameter.key)
            if tensor is not None and of_gradients:
                tensor = tensor.grad
            if tensor is None:
                continue
            values = readable(tensor)
            if values is None:
                self._note(place, UNREADABLE)
            elif not self._is_captured(values):
                tensors.append(values)
                places.append(place)
        return tensors, places

    def _is_captured(self, tensor: Tensor) -> bool:
        captured = is_capturing(tensor)
        if captured:
            self._notes["captured"] = _CAPTURED
        return captured

    def observe_step(self) -> None:
        """Take the parameters, and count the step with what came before it."""
        if self._due:
            self._add(*self._tensors(self._found.parameters, 0))
            self._step.steps = 1
            self._open.merge(self._step)
            self._step.clear()
        elif self._has_gradients or self._has_outputs:
            self._step.clear()
        self._forget_step()
        self._steps_seen += 1

    def observe_skipped_step(self) -> None:
        """Forget what came since the last step."""
        self._skipped[-1] += 1
        self._step.clear()
        self._forget_step()

    def observe_unknown_scale(self, reason: str) -> None:
        self._untrue = reason

    # ---- results

    def plan(self) -> PlanLines:
        """Return what is measured, what was asked for and cannot be seen, and why."""
        if self._numbers is not None:
            return PlanLines([PlanLine("copy", "holds numbers, and watches nothing")])
        found = self._found
        nbytes = found.size.nbytes * (self._window_blocks + 1)
        rule = f"on every {self.every_steps}-th step" if self.every_steps > 1 else "on every step"
        lines = [PlanLine("state", f"{found.size.places} tensors, {rule}", nbytes)]
        for what, names in (
            ("parameters", [p.name for p in found.parameters]),
            ("gradients", [p.name for p in found.gradients]),
            ("outputs", [name or ROOT for name in found.outputs]),
        ):
            if names:
                lines.append(PlanLine(what, f"{len(names)}: {listed(names, 4)}"))
        for why in dict.fromkeys(found.unseen.values()):
            names = [name or ROOT for name, reason in found.unseen.items() if reason == why]
            lines.append(PlanLine("outputs", f"not seen: {listed(names)}: {why}"))
        lines += [PlanLine(extra.kind, f"{extra.place}: {extra.problem or extra.rule}") for extra in found.extras]
        for kind, reasons in found.refused.items():
            lines += [PlanLine(kind, f"{place}: not measured: {why}") for place, why in reasons.items()]
        for kind in ("attention", "router"):
            if getattr(self._wishes, kind) is not None and not any(line.what == kind for line in lines):
                lines.append(PlanLine(kind, "not measured: no module was found by name; name it"))
        return PlanLines(lines)

    def on_device(self) -> list[OnDevice]:
        if self._numbers is not None:
            return []
        return [
            numbers.read
            for block in (*self._closed, self._open)
            for numbers in block.parts
            if numbers.device.type != "cpu"
        ]

    def _window(self) -> tuple[Numbers, int, int]:
        """Return the open window's numbers, sampled steps and forward passes."""
        blocks = (*self._closed, self._open)
        total = Numbers(self._found.size, torch.device("cpu"))
        for block in blocks:
            total.merge(block.on_host())
        return total, sum(block.steps for block in blocks), sum(block.passes for block in blocks)

    def finalize(self) -> MetricResult:
        """Return the open window's numbers; the class's docstring says what they are."""
        if self._numbers is not None:
            return self._numbers
        numbers, steps, passes = self._window()
        result = self._empty_result(steps, passes)
        add_rows(result, self._found.rows, numbers.rows, numbers.bins, self._untrue)
        add_extras(result, self._found, numbers.sums, numbers.most)
        return result

    def _empty_result(self, steps: int, passes: int) -> MetricResult:
        """Return the open window's details without its numbers."""
        found = self._found
        result = MetricResult(self.name, every_steps=self.every_steps, sampled_steps=steps)
        if found.hooked:
            result.details["forward_passes"] = passes
            if steps and not passes:
                result.details["output_off"] = _NO_PASS
        for key, value in self._notes.items():
            result.details[key] = value
        if skipped := sum(self._skipped):
            result.details["skipped_steps"] = skipped
        if found.unseen:
            result.details["outputs_unseen"] = {name or ROOT: why for name, why in found.unseen.items()}
        return result

    def histogram(self, quantity: str, place: str) -> dict[str, list[float] | list[int]]:
        """Return the histogram of the magnitudes of a tensor's finite elements over the open window.

        Args:
            quantity: "parameter", "gradient" or "output".
            place: its name there.

        Returns:
            {"edges": n + 1 magnitudes, "counts": of how many elements the magnitude is in [edges[i], edges[i + 1])},
            from the first bin that is used to the last one, eight per power of two. Zeros are in the bin that begins at
            0.

        Raises:
            ValueError: another quantity; KeyError: it has no such place.
        """
        check_choice("quantity", quantity, QUANTITIES)
        names = {(row[0], row[1]): i for i, row in enumerate(self._found.rows)}
        if (quantity, place) not in names:
            there = [name for kind, name in names if kind == quantity]
            raise KeyError(f"{quantity} has no place {place!r}; it has {listed(there)}")
        return histogram_of(self._window()[0].bins[names[quantity, place]])

    def rank_part(self) -> RankPart | str:
        """Return what the open window adds to that of all ranks."""
        if self._numbers is not None:
            return _ONLY_NUMBERS
        numbers, steps, passes = self._window()
        holding, empty = self._holding if self._held else None, self._empty_result(steps, passes)
        return TensorStatsPart.of(self._found, holding, numbers, passes, self._untrue, empty)

    def reset(self) -> None:
        """Start a new window."""
        assert self._found is not None
        self._open.clear()
        self._closed.clear()
        self._skipped = deque([0], maxlen=self._window_blocks)

    def advance(self) -> None:
        """Slide the window by a block."""
        assert self._found is not None
        if self._closed.maxlen:
            self._closed.append(self._open)
            self._open = Block(self._found.size)
        else:
            self._open.clear()
        self._skipped.append(0)

    # ---- state

    def _settings(self) -> dict[str, Any]:
        found = self._found
        return {
            "version": self._version,
            "every_steps": self.every_steps,
            "places": [list(row[:3]) for row in found.rows],
            "extras": [[extra.kind, extra.place, extra.sums, extra.most] for extra in found.extras],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return settings, counters and the numbers of the open window: tensors, numbers and strings only."""
        blocks = [block.state_dict() for block in (*self._closed, self._open)]
        return {**self._settings(), "steps_seen": self._steps_seen, "blocks": blocks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same model; ValueError naming the first difference, and nothing changed,
        otherwise. What has come of the step under way is forgotten."""
        blocks, steps = self._loaded(state)
        self._step.clear()
        self._forget_step()
        self._steps_seen, self._open = steps, blocks[-1]
        self._closed = deque(blocks[:-1], maxlen=self._window_blocks - 1)

    def _loaded(self, state: Any) -> tuple[list[Block], int]:
        check_same(state, self._settings())
        steps, blocks = checked_count(state, "steps_seen"), state.get("blocks")
        if not isinstance(blocks, list) or not 1 <= len(blocks) <= self._window_blocks:
            what = len(blocks) if isinstance(blocks, list) else type(blocks).__name__
            raise ValueError(f"blocks: expected a list of 1 to {self._window_blocks}, got {what}")
        return [self._open.loaded(block, f"blocks[{i}]") for i, block in enumerate(blocks)], steps

    def split_state(self, state: dict[str, Any], place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return its state with which rows this rank counts: what other ranks hold alike of parameters and gradients
        counts once."""
        held = {name: tensor for name, _, tensor in _holds(self._held)}
        rows = [(quantity, name) for quantity, name, *_ in self._found.rows]
        counted = [i for i, (q, name) in enumerate(rows) if q == "output" or counts_here(held[name], place.rank)]
        tied = next((f"parameter '{n}' {why}" for n, t in held.items() if (why := tied_to(t, place.numbers))), "")
        return {}, state | {"counted": counted, "pieces": self._pieces(), "tied": tied}

    def _pieces(self) -> list[str]:
        return [piece_of(tensor) for _, _, tensor in _holds(self._held)]

    def _outputs(self) -> list[int]:
        return [i for i, (quantity, *_) in enumerate(self._found.rows) if quantity == "output"]

    def empty_state(self, rest: dict[str, Any]) -> dict[str, Any]:
        """Return its state without outputs; without parameters and gradients too, where ranks hold parts of these."""
        blocks, _ = self._loaded(rest)
        kept = [] if any(rest["pieces"]) else sorted({*range(self._found.size.places)} - {*self._outputs()})
        for block in blocks:
            block.keep(kept)
            block.passes = 0
        return rest | {"blocks": [block.state_dict() for block in blocks], "counted": []}

    def add_states(self, begin: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the state with what all of these have seen."""
        blocks, _ = self._loaded(begin)
        in_parts = any(begin["pieces"])
        for state in others:
            for into, block in zip(blocks, self._loaded(state)[0], strict=True):
                steps = into.steps
                block.keep(state["counted"] if in_parts else self._outputs(), sums=True)
                into.merge(block)
                into.steps = steps  # which all ranks have made together
        return begin | {"blocks": [block.state_dict() for block in blocks]}

    def continues(self, rest: dict[str, Any]) -> bool:
        """Return whether this rank holds the parts of parameters that it held then."""
        return bool(rest.get("pieces") == self._pieces())

    def load_ranks(self, saved: RankStates) -> str:
        """Continue from states that ranks have saved, and return what the open window lacks then; "" for nothing."""
        begin, several = saved.alike, saved.place.ranks > 1
        if begin is not None and not (saved.own is not None and self.continues(saved.own)):
            check_same(begin, self._settings())
            if begin["tied"] or (several and any([*begin["pieces"], *self._pieces()])):
                nothing = self.empty_state(begin | {"pieces": ["all"]})
                self.load_state_dict(nothing)
                held = begin["tied"] or "parameters were in other parts"
                return f"{saved.place} goes on from the states of {saved.ranks} ranks, where {held}"
        return super().load_ranks(saved)

    def merge(self, other: TensorStats | dict[str, Any]) -> None:
        """Add the window of another TensorStats of the same places, or its state."""
        blocks, steps = self._loaded(other.state_dict() if isinstance(other, TensorStats) else other)
        for block in blocks:
            self._open.merge(block)
        self._steps_seen += steps

    def __getstate__(self) -> dict[str, Any]:
        """Make what a copy or a pickle has: as it is before it is bound, then the open window's numbers and nothing
        else."""
        if self._watched is None:
            return self.__dict__
        kept = {"every_steps": self.every_steps, "_window_blocks": self._window_blocks, "off": self.off}
        return kept | {"_numbers": self.finalize(), "_watched": None, "_model": None, "_engine": None}


def _without_scale(gradient: Tensor, scale: Tensor | float | None) -> Tensor:
    """Return a gradient without the factor that a GradScaler has put before the loss; in float32 where it has less,
    which holds what float16 would round to 0."""
    if scale is None:
        return gradient
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide / (scale.to(wide.device) if isinstance(scale, Tensor) else scale)
