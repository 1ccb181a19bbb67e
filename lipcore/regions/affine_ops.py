"""Table of operations that are affine in the values they are given, and in which of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Rule:
    factors: tuple[str, ...] = ()  #: multiplied: at most one of them may depend on x
    fixed: tuple[str, ...] = ()  #: none of them may depend on x


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: Affine in all their tensors together: what moves, adds or averages entries.
_JOINTLY = _words(
    """
    view _unsafe_view reshape _reshape_alias t transpose permute squeeze unsqueeze expand alias clone detach contiguous
    _to_copy copy lift lift_fresh slice select narrow split split_with_sizes unsafe_split unsafe_split_with_sizes chunk
    unsafe_chunk unbind cat stack as_strided unfold im2col col2im diagonal diag_embed tril triu view_as_real
    view_as_complex real imag _conj _neg_view affine_grid_generator
    constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d flip roll rot90 repeat pixel_shuffle pixel_unshuffle
    channel_shuffle native_channel_shuffle slice_scatter select_scatter diagonal_scatter as_strided_scatter
    sum mean cumsum add sub rsub neg positive trace fill zero
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa _fft_r2c _fft_c2r _fft_c2c
    """
)
_RULES: dict[str, _Rule] = dict.fromkeys(_JOINTLY, _Rule()) | {
    "mul": _Rule(("self", "other")),
    "mm": _Rule(("self", "mat2")),
    "bmm": _Rule(("self", "mat2")),
    "addmm": _Rule(("mat1", "mat2")),
    "_sparse_mm": _Rule(("sparse", "dense")),
    "_sparse_addmm": _Rule(("mat1", "mat2")),
    "baddbmm": _Rule(("batch1", "batch2")),
    "addbmm": _Rule(("batch1", "batch2")),
    "mv": _Rule(("self", "vec")),
    "addmv": _Rule(("mat", "vec")),
    "addr": _Rule(("vec1", "vec2")),
    "dot": _Rule(("self", "tensor")),
    "vdot": _Rule(("self", "other")),
    "linear": _Rule(("input", "weight")),
    "convolution": _Rule(("input", "weight")),
    "_trilinear": _Rule(("i1", "i2", "i3")),
    "addcmul": _Rule(("tensor1", "tensor2")),
    "addcdiv": _Rule(fixed=("tensor2",)),
    "div": _Rule(fixed=("other",)),
    "lerp": _Rule(fixed=("weight",)),
    "where": _Rule(fixed=("condition",)),
    "masked_fill": _Rule(fixed=("mask",)),
    "masked_scatter": _Rule(fixed=("mask",)),
    "masked_select": _Rule(fixed=("mask",)),
    "repeat_interleave": _Rule(fixed=("repeats",)),
    "embedding": _Rule(("weight", "indices")),  # indices only where x itself is a batch of indices
    "grid_sampler_2d": _Rule(fixed=("grid",)),
    "grid_sampler_3d": _Rule(fixed=("grid",)),
    **dict.fromkeys(
        _words("index _unsafe_index index_put _index_put_impl _unsafe_index_put max_unpool2d max_unpool3d"),
        _Rule(fixed=("indices",)),
    ),
    **dict.fromkeys(
        _words("index_select gather scatter scatter_add index_add index_copy index_fill take put"),
        _Rule(fixed=("index",)),
    ),
    # With running statistics: the same affine map for every sample.
    **dict.fromkeys(
        _words("native_batch_norm cudnn_batch_norm miopen_batch_norm"),
        _Rule(("input", "weight"), fixed=("running_mean", "running_var")),
    ),
}

#: Their output says nothing about the values they are given.
VALUELESS = frozenset(
    _words(
        """
        zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided
        is_same_size sym_size sym_stride sym_numel sym_storage_offset isnan isinf
        """
    )
)

#: With a matrix; none follows a head.
PRODUCTS = frozenset(
    _words("mm bmm addmm baddbmm addbmm mv addmv dot vdot linear convolution _sparse_mm _sparse_addmm")
)

#: Not affine, but smooth: a head may consist of them. What is in no list may have kinks that no pattern records.
SMOOTH = frozenset(
    _words(
        """
        sigmoid tanh softplus log_sigmoid_forward gelu silu mish elu celu selu glu _softmax _log_softmax logsumexp exp
        expm1 log log1p log2 log10 sin cos tan asin acos atan sinh cosh asinh acosh atanh erf erfc erfinv sqrt rsqrt
        reciprocal pow square mul div addcmul addcdiv mm bmm addmm baddbmm addbmm mv addmv addr dot vdot linear
        convolution _trilinear lerp native_layer_norm native_group_norm native_batch_norm _fused_rms_norm var std
        var_mean std_mean prod cumprod mse_loss _scaled_dot_product_flash_attention
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
        _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math
        """
    )
)


def is_affine(op: str, overload: str, given: dict[str, Any], dependent: set[str]) -> bool:
    """Say whether an operation is affine in those of its arguments that depend on x.

    Args:
        op: without the underscore of its in-place form.
        overload: of the operation, as torch calls it.
        given: arguments by their names in the schema.
        dependent: names of the arguments that depend on x.
    """
    rule = _RULES.get(op)
    if rule is None or (op == "view" and overload == "dtype"):  # bits read as another type
        return False
    if given.get("rounding_mode") is not None or given.get("reduce", "sum") not in ("sum", "add", "mean"):
        return False
    if op.endswith("batch_norm") and given.get("training"):
        return False
    return sum(name in dependent for name in rule.factors) <= 1 and not dependent & set(rule.fixed)
