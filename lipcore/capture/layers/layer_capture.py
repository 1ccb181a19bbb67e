"""LayerCapture: taps every layer with a rule, and hands on one record of per-sample squared norms per backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from lipcore.capture.graph.graph_ways import GraphWays
from lipcore.capture.layers.asked_proof import AskedProof
from lipcore.capture.layers.batch_of_one import SingleBatches
from lipcore.capture.layers.compared_sums import ComparedSums
from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.layer_pass import LayerPass, LayerRecord
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.capture.layers.missed_passes import MissedPasses
from lipcore.capture.layers.options import LayerOptions
from lipcore.capture.layers.passes import Passes
from lipcore.capture.layers.proofs import Proofs
from lipcore.capture.layers.tapped_model import TappedModel
from lipcore.layers.factor_estimate import Signs
from lipcore.models.checks import never_called
from lipcore.models.tensor_parallel import PartRanks
from lipcore.models.torch_internals import compiles_its_call, is_compiled


class LayerCapture:
    """The taps on all layers of one model.

    Args:
        model: the module the training loop calls.
        on_record: gets one record per backward pass that accumulates parameter gradients.
        on_error: gets what would have been raised inside a hook; capturing has stopped then.
        on_unrecorded: gets the number of samples and the reason when a backward pass through trained layers is not
            recorded.
        on_proof: told that a proof was good (""), or why one has failed, which spoils what came since the last good
            one; and whether it was about passes that were served from the gradients.
        options: how the layers are to be tapped.
    """

    def __init__(
        self,
        model: nn.Module,
        on_record: Callable[[LayerRecord], None],
        on_error: Callable[[Exception], None],
        on_unrecorded: Callable[[int, str], None],
        on_proof: Callable[[str, bool], None],
        options: LayerOptions,
    ) -> None:
        self.model = model
        self.passes = Passes(self._deliver, self._stopped, on_unrecorded)
        self._missed = MissedPasses(options, on_unrecorded)
        self._sums = ComparedSums(self.passes, options, on_proof)
        self._on_error, self._on_record, self._on_proof = on_error, on_record, on_proof
        self._options, self._signs = options, Signs()
        self._compiled = any(is_compiled(module) for module in model.modules())
        self.fuses = options.fused and not self._compiled
        self.resting = self._rested = False  # the hooks are off, or record nothing; they were, at some time
        self.tapped = self._look()

    # ---- the life cycle

    def _look(self) -> TappedModel:
        """Find the model's layers and parameters."""
        return TappedModel(
            self.model,
            compiled=self._compiled,
            passes=self.passes,
            missed=self._missed,
            sums=self._sums,
            signs=self._signs,
            on_record=self._on_record,
            on_proof=self._on_proof,
            options=self._options,
        )

    def attach(self) -> None:
        """Register the hooks; raise ValueError when a trainable parameter is not covered."""
        if compiles_its_call(self.model):
            raise ValueError(
                "model: was compiled in place by model.compile(), which leaves no room outside the graph; use "
                "compiled = torch.compile(model) and pass `compiled`"
            )
        self.tapped.attach()

    def rest(self) -> None:
        """Record nothing until :meth:`wake`, with the hooks off. Those of a compiled model, which are in its graph, and
        of a sharded one, whose ranks prove passes together, stay, as in a step that is not to be recorded."""
        self.flush()
        self._rested = True
        self.resting = self.passes.recording  # what has stopped, or is closed, will not go on: it is at nobody's rest
        if self._compiled or self.proofs.sharded:
            self.active = False
            self.proofs.await_call()
            return
        self.tapped.detach()
        self.proofs.withdraw()
        self.passes.forget()
        self.tapped.release_factors()

    def wake(self) -> None:
        """Record again, of the model as it is now."""
        if not self.tapped.is_hooked:
            self.rebind()
        self.resting, self.active = False, True

    def rebind(self) -> None:
        """Look at the model's layers and parameters anew, and drop the passes under way."""
        self.resting = False
        self.tapped.detach()
        self.proofs.withdraw()
        self.passes.forget()
        kept, self.tapped = self.tapped.kept, self._look()
        self.tapped.kept = kept
        self.passes.start_again()
        self.attach()

    def close(self) -> None:
        """Remove every hook; records that were delivered stay."""
        self.flush()
        self.proofs.withdraw()
        self.passes.recording = self.resting = False
        self.tapped.detach()

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()  # a copied or pickled model is not watched

    def _stopped(self, error: Exception) -> None:
        self.proofs.withdraw()
        self._on_error(error)

    def _deliver(self, run: LayerPass, task: int) -> None:
        self.tapped.deliver(run, task)

    # ---- what its owner asks

    @property
    def coverage(self) -> ParameterCoverage:
        """The coverage of the parameters, which says of each whether it is measured."""
        return self.tapped.coverage

    @property
    def sites(self) -> list[LayerSite]:
        """The layers with a rule."""
        return self.tapped.sites

    @property
    def parts(self) -> PartRanks | None:
        """The ranks that hold parts of the parameters; None where this one has them whole."""
        return self.tapped.parts

    @property
    def graph(self) -> GraphWays:
        """The ways from the autograd graph, for the parameters without a rule."""
        return self.tapped.graph

    @property
    def proofs(self) -> Proofs:
        """The proofs of the model's passes."""
        return self.tapped.proofs

    @property
    def single(self) -> SingleBatches:
        """The server of batches of one."""
        return self.tapped.single

    @property
    def active(self) -> bool:
        """True in steps that are to be recorded; may be set."""
        return self.passes.active

    @active.setter
    def active(self, active: bool) -> None:
        self.passes.begin_step(active=active)
        self.single.set_active(active)

    @property
    def skipped(self) -> bool:
        """True where the last forward pass was in a step that is not to be recorded."""
        return self.passes.skipped

    @property
    def skipped_samples(self) -> int | None:
        """The number of its samples; None where that cannot be told."""
        return self._missed.samples

    @property
    def watches(self) -> bool:
        """True while the hooks are on the model and record."""
        return self.passes.recording and self.tapped.is_hooked

    @property
    def records(self) -> int:
        """The number of backward passes that were recorded."""
        return self.passes.records

    @property
    def unrecorded(self) -> dict[str, int]:
        """The reasons why backward passes were not recorded, each with how many there were."""
        return self.passes.unrecorded

    def flush(self) -> None:
        """Deliver the passes whose end no callback tells; see :meth:`Passes.flush`."""
        self.passes.flush()

    @property
    def proves_at_rest(self) -> bool:
        """True where it rests with the hooks on, and keeps what is proved until it wakes."""
        return self.resting and self.watches and self.proofs.sharded

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Take part in proofs in the with block, also at rest."""
        active = self.active
        if self.resting:
            self.active = True
        try:
            yield
        finally:
            if self.resting:
                self.active = active

    @contextmanager
    def proving(self) -> Iterator[AskedProof]:
        """Prove the pass of the model in the with block, which is none of the training's."""
        asked = self.proofs.ask()
        before = self.passes.last
        try:
            yield asked
        finally:
            self.proofs.miss()
            self.proofs.asked = None
            last = self.passes.last
            if last is not None and last is not before:  # the block has raised
                self.passes.drop(last)

    def finish_proof(self, asked: AskedProof, *, together: bool) -> str:
        """Return what a proof has left unproved after its pass, "" for nothing; with passes that all ranks run, if they
        do it `together`."""
        try:
            asked.finish(together=together)
        except Exception as error:
            asked.answer = asked.answer or str(error)
            self.passes.fail(error)
        return asked.answer

    def check_that_something_came(self) -> None:
        """Keep an error when, after some steps, no backward pass has come through the hooks."""
        if not self.records and not self.unrecorded and not self._rested:
            self.passes.fail(ValueError(never_called(self.model)))


def _nothing() -> None:
    return None
