"""Per-sample gradient norms and what follows from them.

============== ========================================================================
metric.py      PerSampleGradNorms: the metric, its windows, results and state
arguments.py   what it can be told, checked
methods.py     which layers have several ways to compute their norms
reduction.py   what the loss reduction and the loss scale did to the gradients
factor.py      that, with what only the device knows apart from what the host knows
micro_batch.py the numbers of one backward pass, in total, per layer and per parameter
doubts.py      why norms of a window are not proved
places.py      which layer a parameter's numbers are added to
open_step.py   the micro-batches of a step that may yet be skipped
step.py        one optimizer step's sums, for the gradient noise scale
============== ========================================================================
"""

from lipcore.per_sample.metric import PerSampleGradNorms

__all__ = ["PerSampleGradNorms"]
