"""What a metric may ask of the layers that are tapped for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from lipcore.capture.graph.graph_ways import GraphWays
from lipcore.capture.layers.batch_of_one import SingleBatches
from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.layer_site import LayerSite
from lipcore.models.tensor_parallel import PartRanks


class TappedLayers(Protocol):
    """All tapped layers of one model, as a metric sees them."""

    @property
    def sites(self) -> Sequence[LayerSite]:
        """Layers with a rule, each with its name, module and parameters."""

    @property
    def fuses(self) -> bool:
        """True where the weight gradients of Linears are lipcore's: with fused=True, unless the model is compiled."""

    @property
    def coverage(self) -> ParameterCoverage:
        """Coverage of the parameters, which says of each whether it is measured."""

    @property
    def graph(self) -> GraphWays:
        """Ways from the autograd graph, for the parameters without a rule."""

    @property
    def single(self) -> SingleBatches:
        """Server of batches of one, which can fill distributions by itself."""

    @property
    def proofs(self) -> object:
        """Proofs of the model's passes; as a text they say when passes are proved or why not."""

    @property
    def skipped(self) -> bool:
        """True where the last forward pass was in a step that is not to be recorded."""

    @property
    def skipped_samples(self) -> int | None:
        """Number of its samples; None where that cannot be told."""

    @property
    def watches(self) -> bool:
        """True while the hooks are on the model and record."""

    @property
    def resting(self) -> bool:
        """True where nothing is recorded until :meth:`wake`."""

    @property
    def parts(self) -> PartRanks | None:
        """The ranks that hold parts of the parameters (tensor parallelism); None where this one has them whole."""

    @property
    def unrecorded(self) -> Mapping[str, int]:
        """Reasons why backward passes were not recorded, each with how many there were."""

    @property
    def active(self) -> bool:
        """True in steps that are to be recorded; may be set."""

    @active.setter
    def active(self, active: bool) -> None: ...

    def flush(self) -> None:
        """Deliver passes whose end no callback tells."""

    def rest(self) -> None:
        """Record nothing until :meth:`wake`, with the hooks off where that may be."""

    def wake(self) -> None:
        """Record again, of the model as it is now."""

    def rebind(self) -> None:
        """Look at the model's layers and parameters anew, and drop the passes under way."""
