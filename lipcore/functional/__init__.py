"""Stateless operations on tensors, most of them one per row of ``csrc/kernels.h``; the float64 twins are in
:mod:`lipcore.reference`.

They take tensors of any strides and of dtype float32, float64, bfloat16 or float16, never touch autograd (results are
detached), and return float64: the results are small and enter sums over millions of steps.
"""

from lipcore.functional.convolution import conv_method, conv_norms_sq
from lipcore.functional.embedding import embedding_norms_sq, tied_cross
from lipcore.functional.linear import linear_method, linear_norms_sq, linear_norms_sq_estimate, linear_weight_grad
from lipcore.functional.outer import outer_and_bias_norms_sq, outer_norms_sq
from lipcore.functional.row_sum import (
    affine_norms_sq,
    channel_affine_norms_sq,
    channel_sum_norms_sq,
    norm_layer_norms_sq,
    row_sum_norms_sq,
)
from lipcore.functional.sample_norms import normalized_norms, sample_norms
from lipcore.functional.sketch import sketch
from lipcore.functional.tensor_stats import tensor_stats
from lipcore.functional.trajectory_step import trajectory_step
from lipcore.functional.update_sums import update_sums

__all__ = [
    "affine_norms_sq",
    "channel_affine_norms_sq",
    "channel_sum_norms_sq",
    "conv_method",
    "conv_norms_sq",
    "embedding_norms_sq",
    "linear_method",
    "linear_norms_sq",
    "linear_norms_sq_estimate",
    "linear_weight_grad",
    "norm_layer_norms_sq",
    "normalized_norms",
    "outer_and_bias_norms_sq",
    "outer_norms_sq",
    "row_sum_norms_sq",
    "sample_norms",
    "sketch",
    "tensor_stats",
    "tied_cross",
    "trajectory_step",
    "update_sums",
]
