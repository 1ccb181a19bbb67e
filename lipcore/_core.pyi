# mypy: disable-error-code="type-arg"
"""
Compiled core of lipcore.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['BINS', 'BLOCK_STEPS', 'BackwardHook', 'CHECKED', 'CONTINUES', 'Distribution', 'GRADIENTS_EXPECTED', 'GRADIENTS_NOTHING', 'GRADIENTS_OTHERS', 'GRADIENTS_STRIDED', 'GradientList', 'LEDGER_COLUMNS', 'Ledger', 'OBSERVED_COLUMNS', 'OBSERVE_RATIOS', 'OBSERVE_ROOTS', 'OBSERVE_VALUES', 'SERVED', 'SINGLE_ADDED', 'SINGLE_CALLS', 'SINGLE_ELSEWHERE', 'SINGLE_GRAPH', 'SINGLE_STOPPED', 'STEP_COLUMNS', 'SingleBatch', 'SingleSampleHooks', 'SketchPlan', 'TENSOR_BINS', 'TENSOR_STATS', 'TrajectoryPlan', 'UPDATE_SQUARES', 'accumulates_everything', 'advise_huge_pages', 'bin_middle', 'bin_of', 'check_storage', 'conv_norms_sq', 'cuda_built', 'cuda_device_count', 'cuda_multiplies_16_bit', 'describe_distributions', 'embedding_norms', 'first_layer_norms', 'float16_to_float', 'fold_means', 'is_plain_run', 'is_training_forward', 'isa', 'linear_norms', 'linear_suits_torch', 'linear_uses_gram', 'linear_weight_grad', 'merge_tensor_stats', 'noise_steps', 'normalized_norms', 'observe_ratios', 'observe_recent', 'observe_roots', 'observe_rows', 'observe_squares', 'outer_norms', 'pause', 'paused', 'place_sums', 'pool_size', 'recent_quantiles', 'register_passes', 'register_torch', 'reset_distributions', 'row_sum_norms', 'sample_norms', 'sketch', 'square_sums', 'step_norms', 'tensor_bin_low', 'tensor_stats', 'tied_cross', 'trajectory_step', 'update_sums', 'use_isa', 'use_torch_threads']
class BackwardHook:
    """
    Calls once per backward pass.
    """
    @staticmethod
    def __new__(type: typing.Any, *args: typing.Any, **kwargs: typing.Any) -> BackwardHook:
        ...
    def __call__(self, *args: typing.Any, **kwargs: typing.Any) -> None:
        ...
    def __reduce__(self) -> tuple[type[BackwardHook], tuple[()]]:
        """
        A copy does nothing.
        """
    def forget(self) -> None:
        """
        Makes the next call a first one.
        """
class Distribution:
    """
    Moments and quantile histogram of a stream of values >= 0.
    """
    def __init__(self) -> None:
        ...
    def bins(self) -> list[int]:
        ...
    def merge(self, other: Distribution) -> None:
        ...
    def observe(self, value: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    def observe_all(self, values: typing.Any) -> None:
        ...
    def quantile(self, q: typing.SupportsFloat | typing.SupportsIndex) -> float:
        ...
    def reset(self) -> None:
        ...
    def set_state(self, count: typing.SupportsFloat | typing.SupportsIndex, mean: typing.SupportsFloat | typing.SupportsIndex, m2: typing.SupportsFloat | typing.SupportsIndex, min: typing.SupportsFloat | typing.SupportsIndex, max: typing.SupportsFloat | typing.SupportsIndex, missing: typing.SupportsInt | typing.SupportsIndex, invalid: typing.SupportsInt | typing.SupportsIndex, bins: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    @property
    def count(self) -> int:
        ...
    @property
    def invalid(self) -> int:
        ...
    @property
    def m2(self) -> float:
        ...
    @property
    def max(self) -> float:
        ...
    @property
    def mean(self) -> float:
        ...
    @property
    def min(self) -> float:
        ...
    @property
    def missing(self) -> int:
        ...
class Ledger:
    """
    Scalars of a trajectory: tensors, groups and the total.
    """
    def __init__(self, rows: typing.Any, recent: typing.Any, cursor: typing.Any, tensors: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def observe(self, sums: typing.Any) -> None:
        ...
class TrajectoryPlan:
    """
    Parameters, their copies and the ledger of their movement.
    """
    def __init__(self, entries: collections.abc.Sequence[tuple], ledger: Ledger) -> None:
        ...
    def step(self) -> bool:
        ...
    @property
    def block(self) -> int:
        ...
    @block.setter
    def block(self, arg0: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def captured(self) -> bool:
        ...
class SketchPlan:
    """
    Parameters and the tensors that their sketches and weights are written to.
    """
    def __init__(self, entries: collections.abc.Sequence[tuple], sketches: typing.Any, weights: typing.Any, seed: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def step(self) -> None:
        ...
class GradientList:
    """
    Parameters whose gradients are read.
    """
    def __init__(self, entries: collections.abc.Sequence[tuple[dict, str, typing.Any]]) -> None:
        ...
    def read(self, out: typing.Any) -> bool:
        ...
class SingleSampleHooks:
    """
    r and lambda of single samples from two bias gradients.
    """
    def __init__(self, first: typing.Any, last: typing.Any, distributions: collections.abc.Sequence[typing.Any], on_change: typing.Any, on_check: typing.Any, on_error: typing.Any) -> None:
        ...
    def before_forward(self, module: typing.Any, arguments: tuple) -> None:
        ...
    @property
    def abandoned(self) -> int:
        ...
    @property
    def after_backward(self) -> typing.Any:
        ...
    @property
    def own_hooks(self) -> int:
        ...
    @own_hooks.setter
    def own_hooks(self, arg1: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    @property
    def served(self) -> int:
        ...
class SingleBatch:
    """
    Hooks of a model whose batches of one are read from gradients.
    """
    active: bool
    def __init__(self, places: collections.abc.Sequence[tuple[dict, str, typing.Any, bool, bool]], links: collections.abc.Sequence[tuple[dict, str, typing.Any]], sizes: collections.abc.Sequence[tuple[dict, typing.SupportsInt | typing.SupportsIndex]], calls: collections.abc.Sequence[typing.Any], batch_dim: typing.SupportsInt | typing.SupportsIndex, passes: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def after_forward(self, module: typing.Any, arguments: typing.Any, output: typing.Any) -> None:
        ...
    def before_forward(self, module: typing.Any, arguments: tuple, keywords: dict) -> None:
        ...
    def remove_sink(self) -> None:
        ...
    def set_sink(self, index: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], distributions: collections.abc.Sequence[Distribution], factor_sq: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    def stop(self) -> bool:
        ...
    def take(self) -> None:
        ...
    @property
    def pending(self) -> bool:
        ...
    @property
    def squares(self) -> list[float]:
        ...
    @property
    def task(self) -> int:
        ...
    @property
    def total(self) -> float:
        ...
def accumulates_everything() -> bool:
    """
    Whether the backward pass under way accumulates the gradients of all leaves.
    """
def advise_huge_pages(tensor: typing.Any) -> None:
    ...
def bin_middle(bin: typing.SupportsInt | typing.SupportsIndex) -> float:
    ...
def bin_of(value: typing.SupportsFloat | typing.SupportsIndex) -> int:
    ...
def check_storage(tensor: typing.Any, name: str, index: int = -1) -> bool:
    """
    True if the negative bit is set; ValueError if the storage is too small.
    """
def conv_norms_sq(x: typing.Any, grad: typing.Any, kernel_size: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], stride: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], padding: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], dilation: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], groups: typing.SupportsInt | typing.SupportsIndex, gram: bool, out: typing.Any) -> None:
    ...
def cuda_device_count() -> int:
    ...
def cuda_multiplies_16_bit(device: typing.SupportsInt | typing.SupportsIndex) -> bool:
    ...
def describe_distributions(distributions: collections.abc.Sequence[Distribution], quantiles: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], out: typing.Any) -> None:
    ...
def embedding_norms(indices: typing.Any, order: typing.Any, grad: typing.Any, weights: typing.Any, padding: typing.SupportsInt | typing.SupportsIndex | None, offsets: typing.Any, out: typing.Any) -> None:
    ...
def first_layer_norms(delta: typing.Any, weight: typing.Any, out: typing.Any) -> None:
    ...
def float16_to_float(bits: typing.SupportsInt | typing.SupportsIndex) -> float:
    ...
def fold_means(mean: typing.Any, earlier: typing.Any, share: typing.Any, gap_sq: typing.Any) -> None:
    ...
def is_plain_run() -> bool:
    """
    Whether no transform of torch.func, forward AD, tracing, fake tensors or pause() are at work.
    """
def is_training_forward() -> bool:
    """
    Whether a forward pass that begins or ends now is the training's.
    """
def isa() -> str:
    ...
def linear_norms(x: typing.Any, grad: typing.Any, offsets: typing.Any, method: typing.SupportsInt | typing.SupportsIndex, out: typing.Any) -> None:
    ...
def linear_suits_torch(samples: typing.SupportsInt | typing.SupportsIndex, tokens: typing.SupportsInt | typing.SupportsIndex, inputs: typing.SupportsInt | typing.SupportsIndex, outputs: typing.SupportsInt | typing.SupportsIndex, tensor_cores: bool) -> bool:
    ...
def linear_uses_gram(tokens: typing.SupportsInt | typing.SupportsIndex, inputs: typing.SupportsInt | typing.SupportsIndex, outputs: typing.SupportsInt | typing.SupportsIndex) -> bool:
    ...
def linear_weight_grad(x: typing.Any, grad: typing.Any, offsets: typing.Any, total: typing.Any, out: typing.Any) -> None:
    ...
def merge_tensor_stats(other_rows: typing.Any, other_bins: typing.Any, places: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], rows: typing.Any, bins: typing.Any) -> None:
    ...
def noise_steps(pending: typing.Any, samples: typing.SupportsInt | typing.SupportsIndex, decay: typing.SupportsFloat | typing.SupportsIndex, ema: typing.Any, out: typing.Any) -> None:
    ...
def normalized_norms(delta: typing.Any, output_grad: typing.Any, r: typing.Any) -> int:
    """
    r[b] = ||delta[b]||_2 / |output_grad[b]|; returns how many were skipped.
    """
def observe_ratios(numerators: typing.Any, output_grad: typing.Any, distributions: collections.abc.Sequence[Distribution], smallest: typing.SupportsFloat | typing.SupportsIndex) -> None:
    ...
def observe_recent(recent: typing.Any, begin: typing.SupportsInt | typing.SupportsIndex, end: typing.SupportsInt | typing.SupportsIndex, distributions: collections.abc.Sequence[Distribution]) -> None:
    ...
def observe_roots(squares: typing.Any, distributions: collections.abc.Sequence[Distribution]) -> None:
    ...
def observe_rows(values: typing.Any, what: typing.SupportsInt | typing.SupportsIndex, gradient: typing.Any, smallest: typing.SupportsFloat | typing.SupportsIndex, rows: typing.Any, bins: typing.Any) -> None:
    ...
def observe_squares(squares: typing.Any, table: typing.Any) -> None:
    ...
def outer_norms(x: typing.Any, grad: typing.Any, out: typing.Any) -> None:
    """
    out[0, l, b] = ||x_l[b]||^2 ||grad_l[b]||^2, out[1, l, b] = ||grad_l[b]||^2.
    """
def pause(by: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def paused() -> bool:
    ...
def place_sums(squares: typing.Any, index: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], known: bool, out: typing.Any) -> None:
    ...
def pool_size() -> int:
    ...
def recent_quantiles(recent: typing.Any, begin: typing.SupportsInt | typing.SupportsIndex, end: typing.SupportsInt | typing.SupportsIndex, quantiles: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex], out: typing.Any) -> None:
    ...
def register_passes(torch: collections.abc.Sequence[typing.Any]) -> None:
    ...
def register_torch(tensor: typing.Any, parameter: typing.Any, refuse: typing.Any, accepts: typing.Any) -> None:
    ...
def reset_distributions(distributions: collections.abc.Sequence[Distribution]) -> None:
    ...
def row_sum_norms(grad: typing.Any, x: typing.Any, offsets: typing.Any, terms: typing.SupportsInt | typing.SupportsIndex, out: typing.Any, eps: typing.SupportsFloat | typing.SupportsIndex | None = None, center: bool = True) -> None:
    ...
def sample_norms(x: typing.Any, out: typing.Any) -> None:
    """
    out[b] = ||x[b]||_2; x [B, ...], out float64 [B].
    """
def sketch(tensors: typing.Any, first_index: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], seed: typing.SupportsInt | typing.SupportsIndex, out: typing.Any) -> None:
    ...
def square_sums(tensors: typing.Any, out: typing.Any) -> None:
    ...
def step_norms(recent: typing.Any, begin: typing.SupportsInt | typing.SupportsIndex, end: typing.SupportsInt | typing.SupportsIndex, first: typing.Any, second: typing.Any) -> None:
    ...
def tensor_bin_low(bin: typing.SupportsInt | typing.SupportsIndex) -> float:
    ...
def tensor_stats(tensors: typing.Any, places: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], rows: typing.Any, bins: typing.Any) -> None:
    ...
def tied_cross(indices: typing.Any, grad_embedding: typing.Any, x: typing.Any, grad_head: typing.Any, padding: typing.SupportsInt | typing.SupportsIndex | None, out: typing.Any) -> None:
    ...
def trajectory_step(params: typing.Any, prev: typing.Any, ref: typing.Any, mean: typing.Any, count: typing.SupportsInt | typing.SupportsIndex, out: typing.Any) -> None:
    ...
def update_sums(params: typing.Any, first: typing.Any, second: typing.Any, rules: typing.Any, rows: typing.Any, squares: typing.Any, gradients: typing.Any = None, previous: typing.Any = None) -> None:
    ...
def use_isa(name: str) -> None:
    ...
def use_torch_threads(path: str) -> bool:
    ...
BINS: int = 32768
BLOCK_STEPS: int = 512
CHECKED: int = 2
CONTINUES: float = -1.0
GRADIENTS_EXPECTED: int = 1
GRADIENTS_NOTHING: int = 0
GRADIENTS_OTHERS: int = 2
GRADIENTS_STRIDED: int = 3
LEDGER_COLUMNS: int = 20
OBSERVED_COLUMNS: int = 7
OBSERVE_RATIOS: int = 2
OBSERVE_ROOTS: int = 1
OBSERVE_VALUES: int = 0
SERVED: int = 1
SINGLE_ADDED: int = 1
SINGLE_CALLS: int = 5
SINGLE_ELSEWHERE: int = 3
SINGLE_GRAPH: int = 2
SINGLE_STOPPED: int = 4
STEP_COLUMNS: int = 6
TENSOR_BINS: int = 2048
TENSOR_STATS: int = 9
UPDATE_SQUARES: int = 5
cuda_built: bool = False
