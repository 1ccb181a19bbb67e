"""Per-sample gradient norms and what follows from them.

============== ========================================================================
metric.py      PerSampleGradNorms: the metric, its windows, results and state
reduction.py   what the loss reduction and the loss scale did to the gradients
micro_batch.py the numbers of one backward pass, in total, per layer and per parameter
step.py        one optimizer step's sums, for the gradient noise scale
============== ========================================================================
"""

from lipcore.per_sample.metric import PerSampleGradNorms

__all__ = ["PerSampleGradNorms"]
