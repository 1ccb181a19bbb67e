"""The check of an input tap in a model whose parts gather their parameters when they run (fully_shard): backward passes
that all ranks run in the same passes, or none does; and the proof that a user asks for.

No alias stands in for the input there: behind an input that requires gradients fully_shard() reduces a layer at another
time, and ranks that do not all have one would reduce in different orders. So the weight of the first layer alone gives
numbers, as the backward pass has gathered it. What the check compares with is made right behind the forward pass, from
the outputs of two samples to the output of that layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from lipcore.capture.once_only import why_once_only
from lipcore.capture.proof import own_backward
from lipcore.capture.proof_ranks import Ranks
from lipcore.capture.taps.collector import Collector, MicroBatch
from lipcore.capture.taps.graph import Operations, operations_of
from lipcore.capture.taps.input_alias import Source
from lipcore.capture.taps.site import Site
from lipcore.capture.taps.tap import InputTap
from lipcore.capture.taps.trial import Question, Trial, all_but, trial, two_of
from lipcore.capture.taps.views import Part
from lipcore.models.affine import is_affine
from lipcore.models.chains import FIRST_LAYER_TYPES
from lipcore.models.gathered import let_go, nothing_reduced
from lipcore.models.inputs import places_of
from lipcore.models.names import class_before_sharding, named_modules
from lipcore.models.restored import all_put_back
from lipcore.models.torch_internals import has_backward_hooks, is_compiled

_EARLY, _LONGEST = (1, 2, 4), 4096  # passes; behind them 64, 128, 256 ... and every 4096th
_ALONE = (
    "not compared with the gradients of single samples: the model is sharded, and its ranks have not run that pass "
    "together; every rank needs this metric, and graphs that can be gone through twice"
)
#: Why a proof has not shown that the first layer's weight gives the numbers.
PAST = (
    "the output depends on the model's input by more ways than W_1 x + b_1 of the first layer that runs, or that layer "
    "is given something else (a cast, by a MixedPrecisionPolicy of that layer alone), and no rank of a sharded model "
    "can take the gradient at the input by itself; name a layer, input='<module>', or call lipcore.local_lipschitz on "
    "a copy that is not sharded"
)
_NOT_PLAIN = (
    "the first layer ({0}) may return something else than W_1 x + b_1: it has hooks of others, a forward of its own, "
    "or is no layer of torch's own; take these off and call monitor.prove(batch) on all ranks, name another layer, "
    "input='<module>', or call lipcore.local_lipschitz on a copy that is not sharded"
)
#: Why a proof does not hold any more.
OTHER_OPERATIONS = (
    "a pass has done other operations than that of monitor.prove(batch), or had the input in more places of its "
    "arguments, and that has shown that the output depends on the input by way of the first layer alone: call it again "
    "on all ranks, of the model as it is called now, or name the layer that lambda is to be at, input='<module>'"
)
#: Why there is no proof, and no lambda, where parts of a sharded model are compiled.
COMPILED = (
    "the model's parameters are sharded over ranks (fully_shard) and parts of it are compiled: W_1 is there as a whole "
    "inside of the training's own backward pass alone, and nothing shows there that it stands alone on the input; "
    "lipcore.local_lipschitz on a copy that is not sharded, and not compiled, gives lambda at any points"
)
_OTHER_RANKS = "another rank was given a batch on which there is nothing to prove"
_CAST_APART = (
    "the input stands in more than one place of the model's arguments, and fully_shard() casts each of these to a "
    "tensor of its own (MixedPrecisionPolicy), so that no gradient is that at the input; pass it once"
)
_MIXES = "the output of a sample depends on other samples of the batch"
_VECTOR = "not compared with the gradients of single samples: the output has several values per sample"
_MIXED = "not compared with the gradients of single samples: the batch mixes them"


def why_not_alone(layer: nn.Module | None) -> str:
    """Return why the weight of a sharded model's first layer gives no numbers, where it does not."""
    if layer is None or is_affine(layer, sharded=True):
        return PAST
    return _NOT_PLAIN.format(class_before_sharding(layer).__name__)


class ShardedCheck:
    """The checks of one input tap of a sharded model.

    Args:
        model: whose ranks have to run the same passes.
        tap: on its input, or on that of its first layer.
    """

    def __init__(self, model: nn.Module, tap: InputTap, collector: Collector) -> None:
        self._model, self._tap, self._collector = model, tap, collector
        self.ranks = Ranks(model, "input")
        self.passes = 0
        self._asked = self._proofs = 0
        self._look: Look | None = None
        self._proved: set[tuple[Operations, int]] = set()  # and in how many places the input stood

    @staticmethod
    def _is_due(number: int) -> bool:
        doubled = number >= 64 and number & (number - 1) == 0 and number <= _LONGEST
        return number in _EARLY or doubled or number % _LONGEST == 0

    def start(self) -> None:
        """Have the next pass checked, as all ranks do that start here."""
        self._asked = self.passes + 1
        self.ranks.announce(self._asked)
        self._tap.unproved = _ALONE

    def begin(self, first: Site | None, last: Site | None) -> Look | None:
        """Count a pass, and return what looks at it where it is to be checked."""
        self.passes += 1
        self._look = None
        due = self._is_due(self.passes) or self.passes == self._asked
        wanted = due and self._tap.stands_alone and not self._tap.off
        if wanted:
            # As early as may be: on devices, and where a pass gathers nothing, no rank waits for the others in it.
            self.ranks.announce(next(filter(self._is_due, itertools.count(self.passes + 1))))
            if first is not None and last is not None:
                self._look = Look(first, last, self._tap, self._collector)
        self._tap.begin_sharded(checks=self._look is not None)
        return self._look

    def end(self, micro: MicroBatch, *, raised: bool) -> None:
        """Run the check of a pass that has ended, where all ranks run it."""
        look, self._look = self._look, None
        if look is None:
            self.ranks.skip(self.passes)  # lambda was refused since it was announced, and the others would wait
            return
        number = str(self.passes)
        try:
            if raised or not self.ranks.agree(self.passes):
                return
            able = (
                bool(self._tap.by_product)
                and not self._tap.off
                and look.is_ready
                and not has_backward_hooks(self._model)
            )
            if self.ranks.settle(number, "check" if able else "") and able:
                look.run(self._model, micro)
        finally:
            look.forget()
            self.ranks.miss(number)

    @property
    def is_proved(self) -> bool:
        """True where the user has asked for a proof, which has succeeded."""
        return bool(self._proved)

    def compare(self, output: Any, x: Source | None) -> None:
        """Refuse lambda where a pass has done other operations than those of a proof that the user has asked for.

        Args:
            output: the tensor that is meant, of what the model has returned.
            x: the model's input.
        """
        if not isinstance(output, Tensor) or output.grad_fn is None:
            return
        node, places = (None, 1) if x is None else (x.node, x.places)
        if (operations_of(output.grad_fn, () if node is None else (node,)), places) not in self._proved:
            self._tap.refuse(OTHER_OPERATIONS)

    def prove(
        self,
        at: nn.Module,
        first: nn.Module | None,
        pick: Callable[[Any], Any],
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> str:
        """Prove, in passes that all ranks run, that the first layer's weight is all that stands between the input and
        the rest; return why not, or "".

        Args:
            at: the module whose input is meant.
            first: the layer; None where it is yet to be found.
            pick: returns the tensor of the model's output that is meant.
            arguments, keywords: of a call of the model.
        """
        tap = self._tap
        self._proofs += 1
        proof, off = f"asked/{self._proofs}", tap.off
        tap.off = ""
        try:
            if any(map(is_compiled, self._model.modules())):
                raise ValueError(COMPILED)
            choose = tap.choose if at is self._model else None
            x = None if choose is None else choose(arguments, keywords)
            if choose is not None and x is None:  # integers: numbers are by the gradient at an Embedding's output
                return ""
            places = 1 if x is None else places_of(x, arguments, keywords)
            layers = [m for _, m in named_modules(self._model) if isinstance(m, FIRST_LAYER_TYPES)]
            asked = Question(
                self._model, at, choose, arguments, keywords, pick, tuple(layers) if first is None else (first,)
            )
            found = self._tried(asked, proof)
        except Exception as error:
            tap.off = off
            tap.refuse(str(error))
            return str(error)
        finally:
            for part in (f"{proof}/forward", proof):
                self.ranks.miss(part)
            let_go(self._model)
        if places != found.places and not found.refusal:
            found = found._replace(refusal=_CAST_APART)
        plain = not found.past and found.layer is not None and is_affine(found.layer, sharded=True)
        tap.off = found.refusal or ("" if plain else why_not_alone(found.layer))
        if tap.off:
            self._proved.discard((found.operations, found.places))
            return tap.off
        self._proved.add((found.operations, found.places))
        tap.allow()
        self.start()
        tap.mixing = tap.mixing or found.mixes
        return _MIXES if found.mixes else ""

    def _tried(self, asked: Question, proof: str) -> Trial:
        if not self.ranks.settle(f"{proof}/forward", "forward"):
            return Trial(_OTHER_RANKS)
        with torch.inference_mode(False), torch.enable_grad():
            return trial(asked._replace(agree=lambda passes: self.ranks.settle(proof, passes)))

    def withdraw(self) -> None:
        """Take part in no further check."""
        self.ranks.withdraw(self.passes)


class Look:
    """A look at one pass: its first layer's output and its own, and the gradients that the check brings there."""

    def __init__(self, first: Site, last: Site, tap: InputTap, collector: Collector) -> None:
        self._first, self._last, self._tap, self._collector = first, last, tap, collector
        self._nodes: dict[Site, tuple[Any, int]] = {}
        self._values: dict[Site, Tensor] = {}
        self._saved: tuple[Any, tuple[Tensor, ...]] = (None, ())
        self._part: Part | None = None
        self._runs = False
        self._found: Tensor | None = None

    def take(
        self, site: Site, made: Tensor, output: Tensor, part: Part | None, extra: Any, saved: tuple[Tensor, ...]
    ) -> None:
        """Take the output of a site; `made`: the tensor whose node made it, of which it is a part."""
        self._nodes[site] = made.grad_fn, made.output_nr
        self._values[site] = output.detach()
        if site is self._first:
            self._saved, self._part = (extra, saved), part
            made.register_hook(self._arrived)  # behind the one that gathers the layer's parameters

    @property
    def is_ready(self) -> bool:
        """True where another backward pass can be run between the two outputs."""
        return len(self._nodes) == 2 and bool(len(self._rows)) and not why_once_only(self._nodes[self._last][0])

    @property
    def _rows(self) -> Tensor:
        output = self._values[self._last]
        return output if output.dim() else output.reshape(1)

    def run(self, model: nn.Module, micro: MicroBatch) -> None:
        """Take the constants of two samples, for the record of the pass to be compared with; leave the training as it
        is."""
        output = self._rows
        size, some = len(output), two_of(len(output))
        seed = torch.zeros_like(output)
        seed[some] = 1
        under_way, ends = self._collector.under_way, [GradientEdge(*self._nodes[s]) for s in (self._last, self._first)]
        under_way.checking = self._runs = True
        try:
            with (
                all_put_back(model, random=True, writes=False),
                nothing_reduced(model),
                own_backward(ends[0].node),
                torch.autocast(output.device.type, enabled=False),
            ):
                torch.autograd.grad(
                    ends[:1], ends[1:], [seed.reshape(self._values[self._last].shape)], retain_graph=True,
                    allow_unused=True,
                )  # fmt: skip
        finally:
            under_way.checking = self._runs = False
        found = self._found
        if found is None or found.shape[1] != size:
            return
        others = all_but(some, size, found.device)
        at = sum(tap.columns for tap in self._first.taps[: self._first.taps.index(self._tap.first)])
        if bool(torch.nan_to_num(found[at, others], 0.0, 0.0, 0.0).any()):
            self._tap.mixing, self._tap.unproved = True, _MIXED
        elif output.numel() != size:
            self._tap.unproved = _VECTOR
        else:
            micro.checks[self._tap.trial_key] = found[at + 1].masked_fill(others, float("nan"))

    def _arrived(self, gradient: Tensor) -> None:
        if self._runs:
            gradient = gradient.detach() if self._part is None else self._part.of(gradient.detach())
            self._found = self._first.reduce(gradient, *self._saved)

    def forget(self) -> None:
        """Let go of the pass's graph."""
        self._nodes, self._values, self._saved = {}, {}, (None, ())
