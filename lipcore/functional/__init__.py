"""Stateless operations on tensors, one per row of ``csrc/kernels.h``; the float64 twins are in
:mod:`lipcore.reference`.

They take tensors of any strides and of dtype float32, float64, bfloat16 or float16, never touch autograd (results are
detached), and return float64: the results are small and enter sums over millions of steps.
"""

from lipcore.functional.statistics import normalized_norms, sample_norms, sketch, trajectory_step, update_sums

__all__ = ["normalized_norms", "sample_norms", "sketch", "trajectory_step", "update_sums"]
