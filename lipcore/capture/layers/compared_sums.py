"""What else than its samples' gradients comes to a model's parameters, as passes show where the sums are compared."""

from __future__ import annotations

from collections.abc import Callable

from lipcore.capture.layers.coverage import ParameterCoverage
from lipcore.capture.layers.layer_pass import LayerPass, LayerRecord
from lipcore.capture.layers.options import LayerOptions
from lipcore.capture.layers.passes import Passes
from lipcore.capture.layers.proved_operations import ProvedOperations
from lipcore.layers.factor import norms_sq_of


class ComparedSums:
    """The comparisons of one model's passes: what the samples' gradients add up to, and the parameters' own.

    Args:
        passes: of the model.
        options: how its layers are tapped.
        on_proof: as of :class:`LayerCapture`.
    """

    def __init__(self, passes: Passes, options: LayerOptions, on_proof: Callable[[str, bool], None]) -> None:
        self._passes, self._options, self._on_proof = passes, options, on_proof
        self._differs = ""  # what else comes to the parameters, when sums were compared last
        self._added_up = False  # in some pass they were the same

    def compare(
        self, run: LayerPass, record: LayerRecord, coverage: ParameterCoverage, operations: ProvedOperations
    ) -> None:
        """Note on a record what else than its samples' gradients comes to the parameters, as a pass in which sums are
        compared has shown. Where it was not so in an earlier one, it may have begun in any pass in between."""
        sums, run.sums = run.sums, None
        if sums is not None:
            if not record.broken and self._passes.came_alone(run, record.task):
                rows = record.norms_sq if self._options.measure is norms_sq_of else {}
                found = sums.difference(record.task, rows, coverage.covered)
                # Of one sample all passes are compared that are not like others: those before were right.
                if found and not self._differs and self._added_up and run.batch.size > 1:
                    self._on_proof(found, False)
                self._differs = self._differs if found is None else found
                self._added_up |= found == ""
                if found == "":
                    operations.note(run)
            sums.remove()
        else:
            operations.note(run)
        record.differs = self._differs
        record.unproved = self._differs or record.unproved
