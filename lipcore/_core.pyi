# mypy: disable-error-code="type-arg"
"""
Compiled core of lipcore.
"""
from __future__ import annotations
import collections.abc
import typing
__all__: list[str] = ['AfterBackward', 'BINS', 'CHECKED', 'Distribution', 'LEDGER_COLUMNS', 'SERVED', 'STEP_COLUMNS', 'SingleSampleHooks', 'TrajectoryPlan', 'advise_huge_pages', 'bin_middle', 'bin_of', 'check_storage', 'cuda_built', 'cuda_device_count', 'first_layer_norms', 'float16_to_float', 'isa', 'normalized_norms', 'observe_ratios', 'pool_size', 'register_torch', 'sample_norms', 'trajectory_step', 'use_isa', 'use_torch_threads']
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
class AfterBackward:
    def __call__(self, bias: typing.Any) -> None:
        ...
class SingleSampleHooks:
    """
    r and lambda of single samples from two bias gradients.
    """
    def __init__(self, first: typing.Any, last: typing.Any, distributions: collections.abc.Sequence[typing.Any], grad_enabled: typing.Any, on_change: typing.Any, on_check: typing.Any, on_error: typing.Any) -> None:
        ...
    def before_forward(self, module: typing.Any, arguments: tuple) -> None:
        ...
    @property
    def abandoned(self) -> int:
        ...
    @property
    def after_backward(self) -> AfterBackward:
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
class TrajectoryPlan:
    """
    Parameters, their state and the ledger of their movement.
    """
    def __init__(self, entries: collections.abc.Sequence[tuple], groups: typing.SupportsInt | typing.SupportsIndex, ledger: typing.Any) -> None:
        ...
    def step(self) -> None:
        ...
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
def cuda_device_count() -> int:
    ...
def first_layer_norms(delta: typing.Any, weight: typing.Any, out: typing.Any) -> None:
    ...
def float16_to_float(bits: typing.SupportsInt | typing.SupportsIndex) -> float:
    ...
def isa() -> str:
    ...
def normalized_norms(delta: typing.Any, output_grad: typing.Any, r: typing.Any) -> int:
    """
    r[b] = ||delta[b]||_2 / |output_grad[b]|; returns how many were skipped.
    """
def observe_ratios(numerators: typing.Any, output_grad: typing.Any, distributions: collections.abc.Sequence[Distribution]) -> None:
    ...
def pool_size() -> int:
    ...
def register_torch(tensor: typing.Any, parameter: typing.Any, refuse: typing.Any, accepts: typing.Any) -> None:
    ...
def sample_norms(x: typing.Any, out: typing.Any) -> None:
    """
    out[b] = ||x[b]||_2; x [B, ...], out float64 [B].
    """
def trajectory_step(params: typing.Any, prev: typing.Any, ref: typing.Any, mean: typing.Any, count: typing.SupportsInt | typing.SupportsIndex, out: typing.Any) -> None:
    ...
def use_isa(name: str) -> None:
    ...
def use_torch_threads(path: str) -> bool:
    ...
BINS: int = 32768
CHECKED: int = 2
LEDGER_COLUMNS: int = 18
SERVED: int = 1
STEP_COLUMNS: int = 6
cuda_built: bool = False
