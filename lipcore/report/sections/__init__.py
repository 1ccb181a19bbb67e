"""The sections of the page, one file each, in the order in which they stand there."""

from __future__ import annotations

from lipcore.report.section import Make
from lipcore.report.sections.bands import update_bands
from lipcore.report.sections.lipschitz import lipschitz
from lipcore.report.sections.movement import most_changed, way
from lipcore.report.sections.noise import noise_scale
from lipcore.report.sections.samples import sample_norms
from lipcore.report.sections.tensors import tensor_statistics
from lipcore.report.sections.theory import theory

SECTIONS: tuple[Make, ...] = (
    most_changed,
    update_bands,
    way,
    noise_scale,
    sample_norms,
    tensor_statistics,
    lipschitz,
    theory,
)
