"""Which linear piece every activation of a forward pass was on, read from the operations as they run.

Operations, not modules: functional calls (``F.relu``, ``x.clamp(min=0)``) are seen too, and an activation without
linear pieces is refused wherever it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from lipcore.capture import paused
from lipcore.names import named_modules, unwrap
from lipcore.pointwise import refuse_mixing

#: step: slope 0 or 1, one bit. leaky: slope a or 1, one bit. bend: as step, with a second bit for the upper flat piece.
#: index: which element of a pooling window was the largest.
Kind = Literal["step", "leaky", "bend", "index"]


@dataclass(frozen=True)
class Gate:
    """One activation's pattern for a batch."""

    name: str
    kind: Kind
    slope: Tensor  #: bool [B, n], or int [B, n] for kind "index"
    above: Tensor | None = None  #: bool [B, n], on the upper flat piece


_SMOOTH = frozenset(
    (
        *("gelu", "silu", "mish", "elu", "celu", "selu", "softplus", "tanh", "sigmoid", "hardswish", "hardsigmoid"),
        *("log_sigmoid_forward", "_softmax", "_log_softmax", "rsqrt", "sqrt", "exp", "log", "pow", "sin", "cos", "erf"),
        *("native_layer_norm", "native_group_norm", "_fused_rms_norm", "reciprocal", "softshrink"),
    )
)
_KINKED = frozenset(
    (
        *("maximum", "minimum", "fmax", "fmin", "where", "max", "min", "amax", "amin", "topk", "sort", "median"),
        "hardshrink",
    )
)
_LINEAR = frozenset(("mm", "addmm", "bmm", "baddbmm", "convolution", "mv", "addmv", "dot", "linear"))


def _rule(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Kind, Tensor, Tensor | None] | None:
    x = args[0]
    if op == "relu" or (op == "threshold" and args[2] == 0):
        return "step", x > (args[1] if op == "threshold" else 0), None
    if op in ("leaky_relu", "_prelu_kernel", "prelu", "rrelu_with_noise", "abs"):
        return "leaky", x > 0, None
    if op in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        given = dict(zip(_LIMITS[op], args[1:], strict=False)) | kwargs
        low = given.get("min_val", given.get("min", -1.0 if op == "hardtanh" else None))
        high = given.get("max_val", given.get("max", 1.0 if op == "hardtanh" else None))
        inside = torch.ones_like(x, dtype=torch.bool)
        if low is not None:
            inside &= x > low
        if high is None:
            return "step", inside, None
        return "bend", inside & (x < high), x >= high
    return None


_LIMITS = {
    "hardtanh": ("min_val", "max_val"),
    "clamp": ("min", "max"),
    "clamp_min": ("min",),
    "clamp_max": ("max",),
}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gates: list[Gate] = []
        self.path: list[str] = []
        self.smooth = ""  # the last operation without linear pieces, which only a head may be
        self.used: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket.__name__
        op = op if op.startswith("__") else op.removesuffix("_")
        floating = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()
        where = f"module '{self.path[-1]}'" if self.path and self.path[-1] else "the model's own forward"
        if floating and (op in _KINKED or (op == "threshold" and args[2] != 0)):
            raise ValueError(
                f"model: {where} calls {op}, whose linear pieces are not recorded; activation patterns know ReLU, "
                "LeakyReLU, PReLU, ReLU6, Hardtanh, clamp, abs and max pooling"
            )
        rule = _rule(op, args, kwargs) if floating else None  # before the call: it may be in place
        pooling = op.startswith(("max_pool", "adaptive_max_pool", "fractional_max_pool"))
        if floating and self.smooth and (rule is not None or pooling or op in _LINEAR):
            raise ValueError(
                f"model: {self.smooth} is not piecewise linear, so the model has no linear regions; patterns need "
                "ReLU-family activations (ReLU, LeakyReLU, PReLU, ReLU6, Hardtanh, max pooling) and no normalisation "
                "but BatchNorm in eval mode before the head"
            )
        if floating and (op in _SMOOTH or op.startswith("_scaled_dot_product")):
            self.smooth = f"{op} in {where}"
        result = func(*args, **kwargs)
        if floating and pooling and isinstance(result, tuple):
            self._add("index", result[1].detach(), None)
        if rule is not None:
            self._add(*rule)
        return result

    def _add(self, kind: Kind, slope: Tensor, above: Tensor | None) -> None:
        name = self.path[-1] if self.path else ""
        self.used[name] = again = self.used.get(name, 0) + 1
        name = name or "model"
        flat = slope.reshape(len(slope), -1)
        above = None if above is None else above.reshape(len(above), -1)
        self.gates.append(Gate(name if again == 1 else f"{name}#{again}", kind, flat, above))


def check_model(model: nn.Module) -> None:
    """ValueError where a sample's pattern would depend on other samples or on chance."""
    refuse_mixing(model)
    for name, module in named_modules(model):
        if isinstance(module, (_DropoutNd, nn.RReLU)) and module.training and getattr(module, "p", 1) > 0:
            raise ValueError(
                f"model: module '{name}' is a {type(module).__name__} in train mode, whose pattern is random; call "
                "model.eval()"
            )


@contextmanager
def _following(model: nn.Module, path: list[str]) -> Iterator[None]:
    """While it lasts, `path` ends with the name of the module that runs."""
    handles = []
    try:
        for name, module in named_modules(model):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name)))
            handles.append(module.register_forward_hook(lambda *_: path.pop() and None, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_gates(model: nn.Module, x: Tensor) -> tuple[list[Gate], str]:
    """The gates of one forward pass in the order they ran, and the head without linear pieces, if there is one."""
    model = unwrap(model)
    recorder = _Recorder()
    # With gradients on: without them max_pool1d runs a kernel that keeps no indices.
    with torch.enable_grad(), paused(), _following(model, recorder.path):
        point = x.detach().clone().requires_grad_(x.is_floating_point())
        with recorder:
            model(point)
    if not recorder.gates:
        raise ValueError(
            "model: no ReLU-family activation ran in its forward pass"
            + (f" ({recorder.smooth} did)" if recorder.smooth else "")
            + ", so it has no linear regions to tell apart"
        )
    for gate in recorder.gates:
        if len(gate.slope) != len(x):
            raise ValueError(
                f"model: activation '{gate.name}' has {len(gate.slope)} rows for {len(x)} samples; the batch must stay "
                "the first dimension"
            )
    return recorder.gates, recorder.smooth
