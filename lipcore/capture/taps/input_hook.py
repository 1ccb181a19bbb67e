"""The gradient at a module's input: an alias of the user's tensor goes into the forward pass in those passes that a tap
asks for, and a hook on the alias' node takes the numbers."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, increment_version

from lipcore.capture.compiled import armed
from lipcore.capture.once_only import why_once_only
from lipcore.capture.taps.collector import Collector, MicroBatch
from lipcore.capture.taps.compile_probes import batch_in
from lipcore.capture.taps.graph import goes_past
from lipcore.capture.taps.graph_check import GraphCheck
from lipcore.capture.taps.identity import Probed
from lipcore.capture.taps.input_alias import Source, alias_of
from lipcore.capture.taps.sharded_input import FROZEN, SHARDED, ShardedInput
from lipcore.capture.taps.site import Site
from lipcore.capture.taps.tap import InputTap
from lipcore.capture.taps.trial import Question, Trial, exchanges, trial
from lipcore.capture.training_pass import in_backward, is_plain_run
from lipcore.models.affine import is_affine, is_parametrized
from lipcore.models.chains import modules_in_order
from lipcore.models.gathered import gathers_by_part
from lipcore.models.inputs import exchanged
from lipcore.models.ranks import EXCHANGES, has_dtensors, under_process_group, world_size
from lipcore.models.torch_internals import has_backward_hooks

_OTHER_ROWS = (
    "the layer {0} is called on {1} rows for {2} samples; both must have the batch as first dimension (was it "
    "flattened with another one?). Name an argument of the model, input='<argument>', or a layer before that"
)
_UNPROVED = (
    "not compared with the gradients of single samples: the model's graph cannot be gone through twice ({0}), and a "
    "pass of lipcore's own shows nothing where it {1}"
)


@dataclass
class _Pass:
    """One forward pass whose input is aliased."""

    micro: MicroBatch
    check: bool
    given: Tensor | None = None  # the user's tensor
    alias: Tensor | None = None
    node: Any = None
    undo: list[Callable[[], None]] = field(default_factory=list)


class _UnderWay(threading.local):
    """The forward pass under way in this thread, when its input is aliased; and what is to be put back after one that a
    checkpoint runs again."""

    passing: _Pass | None = None
    again: list[Callable[[], None]] | None = None


class InputHook:
    """The hook of one input tap around the model's forward pass.

    Args:
        model: what the loop calls.
        at: the module whose input is meant, the model itself or one inside it.
        first: where the output of the first layer is tapped; None where that is nowhere.
        last: where that of the model is.
    """

    def __init__(
        self,
        tap: InputTap,
        model: nn.Module,
        at: nn.Module,
        collector: Collector,
        first: Site | None,
        last: Site | None,
    ) -> None:
        self.tap = tap
        self.at = at
        self.site = Site(f"input of {type(at).__name__}", self._failed)
        self.site.taps.append(tap)
        self.site.in_place_after = True  # in a compiled region the layer may work on its input in place
        self._first, self._last = first, last
        self._pick = functools.partial(_picked, last)
        self._model, self._collector = model, collector
        self._anchor = torch.empty(0, requires_grad=True, device="cpu")
        self._tried = self._hooked = False
        self._now = _UnderWay()
        tap.sharded = gathers_by_part(model) and under_process_group()
        self._sharded: ShardedInput | None = None
        if tap.sharded:
            self._sharded = ShardedInput(tap, model, at, collector, first, last, self._pick)
        self.leaves_alone = FROZEN if tap.sharded else ""  #: why no output inside the model may begin gradients

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()

    def _failed(self, error: Exception) -> None:
        self.tap.refuse(str(error))

    # ---- the forward pass

    def begin(
        self, micro: MicroBatch, arguments: tuple[Any, ...], keywords: dict[str, Any], *, compiled: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a forward pass of the model: return its arguments with the alias among them, or None to leave them."""
        self._now.passing = None
        if self._sharded is not None:
            self._sharded.begin(micro, arguments, keywords, compiled=compiled)
            return None
        if self.tap.off:
            return None
        try:
            self.tap.prepare()
            x = None
            if self.at is self._model:
                x = self.tap.choose(arguments, keywords)
                if x is None:
                    self._look_for_exchanges(arguments, keywords, compiled=compiled)
                    return None
                micro.sources[self.tap] = Source(x)
            if self._collector.compares:
                return None
            asked, check = self.tap.asks()
            if check and self._tried and not self._hooked and has_backward_hooks(self._model):
                self._tried = False  # hooks that came later
            if not asked or not self._allowed(micro, x, arguments, keywords, compiled):
                return None
            if compiled and (self.tap.by_product or x is None):
                if not self.tap.by_product:  # a probe inside takes the place of an alias
                    micro.probed = (*micro.probed, self.site)
                return None
            self._now.passing = _Pass(micro, check)
            return None if x is None else self._aliased(x, arguments, keywords)
        except Exception as error:
            self._give_up(error)
            return None

    def enter(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Begin the forward pass of a module inside the model: return its arguments with the alias, or None to leave
        them."""
        if torch.compiler.is_compiling():
            return self._trace(arguments, keywords)
        if self._sharded is not None:
            return self._sharded.enter(arguments, keywords)
        under_way = self._now.passing
        if in_backward() != -1:
            return self.begin_again(arguments, keywords)
        if under_way is None or under_way.alias is not None:
            return None
        if not torch.is_grad_enabled() or not is_plain_run():
            return None
        try:
            x = self.tap.choose(arguments, keywords)
            return None if x is None else self._aliased(x, arguments, keywords)
        except Exception as error:
            self._give_up(error)
            return None

    def _trace(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Put an identity with a probe on the layer's input, in a compiled region and a pass that has a probe."""
        probe = armed.get(self.site.number)
        if probe is None:
            return None
        name = next(iter(keywords), "")
        x = arguments[0] if arguments else keywords.get(name)
        if not isinstance(x, Tensor):
            return None
        x = Probed.apply(x, probe, self.site, None)  # type: ignore[no-untyped-call]
        return ((x, *arguments[1:]), keywords) if arguments else ((), {**keywords, name: x})

    def begin_again(
        self, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a forward pass that a checkpoint runs again in the backward pass. It must keep as many tensors as the
        first run, so what was aliased there is aliased here."""
        self.end_again()
        if not self._collector.aliases or not torch.is_grad_enabled() or not is_plain_run():
            return None
        try:
            x = self.tap.choose(arguments, keywords)
            if x is None:
                return None
            micro = self._collector.run_again(lambda one: self._aliased_in(one, x))
            if micro is None or self.site not in micro.probed:
                return None
            alias = alias_of(x, self._anchor)
            undo = self._now.again = []
            return exchanged(arguments, x, alias, undo), exchanged(keywords, x, alias, undo)
        except Exception as error:
            self.end_again()
            self.tap.refuse(str(error))
            return None

    def _aliased_in(self, micro: MicroBatch, x: Tensor) -> bool:
        return self.site in micro.aliased and micro.aliased[self.site]() is x

    def end_again(self) -> None:
        """Put the user's objects back after a forward pass that a checkpoint has run again."""
        undo, self._now.again = self._now.again, None
        for back in undo or ():
            back()

    def _allowed(
        self,
        micro: MicroBatch,
        x: Tensor | None,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        compiled: bool,
    ) -> bool:
        """Return whether the pass may be differentiated by the input. A pass of lipcore's own tries that before the
        first one; a plain sequence of torch's own layers needs no trial."""
        if self._tried:
            return True
        if has_dtensors(self._model):
            self.tap.refuse(SHARDED)
            return False
        self._tried, self._hooked = True, has_backward_hooks(self._model)
        by_graph = not compiled and not self._hooked  # which the check will go through once more
        if by_graph and self.at is self._model and modules_in_order(self._model) is not None:
            return True
        layer = self._first.module if compiled and self._first is not None else None
        layers = () if layer is None else (layer,)
        choose = None if x is None else self.tap.choose
        found = trial(Question(self._model, self.at, choose, arguments, keywords, self._pick, layers))
        if found.exchanges:
            self._collector.fail(ValueError(EXCHANGES))
            return False
        if found.refusal:
            self.tap.refuse(found.refusal)
            return False
        self.tap.tried(found)
        if compiled:  # a graph cannot be looked through
            self._check_rows(found, x, batch_in([*arguments, *keywords.values()]))
            affine = layer is not None and is_affine(layer) and not is_parametrized(layer)
            self.tap.by_product = affine and not found.past
        if not by_graph:
            constants = None if compiled and found.random else found.constants
            if constants is not None:
                micro.checks[self.tap.trial_key] = constants
            self.tap.unproved = _UNPROVED.format(
                "it is compiled" if compiled else "its modules have hooks on gradients",
                "draws random numbers" if compiled and found.random else "has several values per sample",
            )
        return not self.tap.off

    def _look_for_exchanges(self, arguments: tuple[Any, ...], keywords: dict[str, Any], *, compiled: bool) -> None:
        """Stop where the pass of a model that is called with integers exchanges activations with other ranks, as a
        trial finds of others."""
        if self._tried or compiled or world_size() == 1 or has_dtensors(self._model):
            return
        self._tried = True
        if exchanges(self._model, arguments, keywords):
            self._collector.fail(ValueError(EXCHANGES))

    def _check_rows(self, found: Trial, x: Tensor | None, batch: Tensor | None) -> None:
        """Give up what has other rows than samples in a compiled model, in which probes have room for those alone."""
        samples = 0 if batch is None else len(batch)
        if not samples:
            return
        if self._first is not None and found.layer_rows not in (0, samples):
            reason = _OTHER_ROWS.format(f"'{self._first.name}'", found.layer_rows, samples)
            if self._first.optional:
                self._collector.lose(self._first, reason)
            else:
                self._collector.fail(ValueError(f"input: {reason}"))
        elif x is None and found.rows not in (0, samples):
            self.tap.refuse(_OTHER_ROWS.format("named", found.rows, samples))

    def _aliased(
        self, x: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        under_way = self._now.passing
        assert under_way is not None
        micro, collector, site = under_way.micro, self._collector, self.site
        alias = alias_of(x, self._anchor)
        under_way.given, under_way.alias, under_way.node = x, alias, alias.grad_fn
        micro.sources[self.tap] = Source(alias)
        micro.probed = (*micro.probed, site)
        micro.aliased[site], collector.aliases = weakref.ref(x), True

        def came_back(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[0]
            if grad is None or micro.delivered or not collector.recording or collector.under_way.checking:
                return
            if not collector.counts(micro):
                return
            norms = site.reduce(grad, None, ())
            if norms is not None:
                micro.columns[site] = micro.columns[site] + norms if site in micro.columns else norms
            collector.arrived(micro)

        under_way.node.register_prehook(came_back)
        undo = under_way.undo
        return exchanged(arguments, x, alias, undo), exchanged(keywords, x, alias, undo)

    def _give_up(self, error: Exception) -> None:
        if self._now.passing is not None:
            self._put_back(self._now.passing)
            self._now.passing = None
        self.tap.refuse(str(error))

    @staticmethod
    def _put_back(under_way: _Pass) -> None:
        for back in under_way.undo:
            back()
        under_way.undo.clear()

    def end(self, output: Any, *, compiled: bool) -> None:
        """End a forward pass of the model: put the user's objects back, and arrange for the check; `output`: what it
        returns, None where it has raised."""
        raised = output is None
        if self._sharded is not None:
            self._sharded.end(self._collector.under_way.micro, output)
            return
        under_way, self._now.passing = self._now.passing, None
        if under_way is None or under_way.alias is None:
            return
        if not raised and self.tap.by_product is None:
            self.tap.seen(True)  # no first layer has run
        try:
            self._put_back(under_way)
            source = under_way.micro.sources.get(self.tap)
            if source is not None and source.changed and under_way.given is not None:
                increment_version(under_way.given)  # the model worked on the user's memory in place
            if not raised and not compiled:
                self._look(under_way)
        except Exception as error:
            self._give_up(error)

    @property
    def before_casts(self) -> Callable[..., None] | None:
        """Hook that looks at a sharded model's input before fully_shard() casts it; None where there is none."""
        return self._sharded.count_places if self._sharded is not None and self.at is self._model else None

    @property
    def is_sharded(self) -> bool:
        """True in a model whose parts gather their parameters when they run."""
        return self._sharded is not None

    def withdraw(self) -> None:
        """Take part in no further check of a sharded model."""
        if self._sharded is not None:
            self._sharded.withdraw()

    def prove(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
        """Prove, in passes that all ranks of a sharded model run, that the first layer's weight is all that stands
        between the input and the rest; return why not, or ""."""
        assert self._sharded is not None
        return self._sharded.prove(arguments, keywords)

    def _look(self, under_way: _Pass) -> None:
        nodes = under_way.micro.nodes
        made = nodes.get(self._last) if self._last is not None else None
        if made is None:
            return
        layer = nodes.get(self._first) if self._first is not None else None
        if layer is not None and self.at is self._model:
            self.tap.seen(goes_past(made[0], under_way.node, layer[0]))
        if under_way.check and why_once_only(made[0]):
            self.tap.check_later()
        elif under_way.check and not has_backward_hooks(self._model):
            ends = GradientEdge(*made), GradientEdge(under_way.node, 0)
            who = self._model, self.tap, self._collector
            self._collector.check = GraphCheck(*who, under_way.micro, self._last, *ends)


def _picked(last: Site | None, output: Any) -> Any:
    """Return the tensor of the model's output that is meant."""
    return output if last is None or last.target else last.taps[0].pick(output)


def _nothing() -> None:
    """Return None, which a copied model gets in the place of the hook."""
