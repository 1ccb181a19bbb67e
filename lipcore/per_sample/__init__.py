"""The metric of single samples' pull: exact norms of their gradients, and what follows from them, the gradient noise
scale (noise/) and statistics per sample id (scores/)."""

from lipcore.per_sample.grad_norms import PerSampleGradNorms

__all__ = ["PerSampleGradNorms"]
