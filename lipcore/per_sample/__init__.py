"""The metrics of single samples' pull: exact norms of their gradients and inner products with given ones, and what
follows from them, the gradient noise scale (noise/) and statistics per sample id (scores/)."""

from lipcore.per_sample.grad_dots import PerSampleGradDots
from lipcore.per_sample.grad_norms import PerSampleGradNorms

__all__ = ["PerSampleGradDots", "PerSampleGradNorms"]
