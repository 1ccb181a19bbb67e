"""Lipschitz' taps on the first layer and on the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lipcore import _core, functional
from lipcore.capture.taps.input_alias import Source
from lipcore.capture.taps.tap import InputTap, Tap
from lipcore.functional.library import CPU
from lipcore.lipschitz.input_tap import FirstLayer, ModelInputTap
from lipcore.lipschitz.pullback import pull_back
from lipcore.lipschitz.virtual_bias import VirtualBias
from lipcore.models.affine import WeightInUse, is_affine
from lipcore.models.chains import FIRST_LAYER_TYPES
from lipcore.models.gathered import is_there
from lipcore.models.names import class_before_sharding
from lipcore.models.outputs import output_names, picked_output

_SMALL = 4096  # multiplications below which one compiled loop beats torch's matrix product and what surrounds it
_CHEAP = 1 << 20  # multiplications that no training step with a batch worth them would notice
_SPARSE = 32  # above, W_1^T delta costs what the layer's forward does: once in so many passes, below 1 % of a step

#: Why there is no W_1 in a backward pass of a sharded model.
NOT_GATHERED = (
    "the weight of the first layer '{0}' is not there as a whole when the gradient comes to that layer's output "
    "(fully_shard() gathers it later: MixedPrecisionPolicy(output_dtype=), say)"
)

_SMALLEST = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


class FirstLayerTap(FirstLayer):
    """The tap that takes three norms per sample, delta being the gradient at the first layer's output before its
    activation: ||delta||, ||W_1^T delta||, and ||delta|| once more where the second was computed (NaN elsewhere), so
    that both can be averaged over the same samples."""

    argument = "input"
    columns = 3
    in_place_after = True

    def __init__(
        self,
        key: str,
        at_input: ModelInputTap,
        on_resolved: Callable[[], None],
        on_lost: Callable[[str], None],
        pull_back_every: int | None,
        virtual_bias: VirtualBias | None = None,
        *,
        stays: bool = False,
    ) -> None:
        self.key, self.stays = key, stays
        self._at_input = at_input
        self._on_resolved, self._on_lost = on_resolved, on_lost
        self._every = pull_back_every
        self._virtual_bias, self.has_leaf = virtual_bias, virtual_bias is not None
        self.target = ""  #: the name that the user gave; its own input is then what lambda is about
        self.begins = False  #: a plain chain begins with it, so that its input is the model's
        self.weight = WeightInUse()
        self._calls = 0
        self._work: int | None = None  # multiplications of W_1^T delta, once a pass has shown them
        self.name = ""
        self.module: nn.Module | None = None
        self.batch_shape: tuple[int, ...] | None = None  # of the layer's input, as last seen

    def resolve(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, FIRST_LAYER_TYPES):
            raise ValueError(
                f"input: module '{name}' is a {type(module).__name__}; the first layer must be a Linear, Conv1d, "
                "Conv2d, Conv3d or Embedding"
            )
        self.name, self.module = name, module
        self.weight.watch(module)
        self._on_resolved()
        if self._virtual_bias is not None:
            self._virtual_bias.found(name, module)

    def check(self, output: Any) -> None:
        super().check(output)
        dims = 1 if isinstance(self.module, nn.Embedding) else 2 + len(getattr(self.module, "kernel_size", ()))
        if output.dim() < dims:
            raise ValueError(
                f"module '{self.name}' ({type(self.module).__name__}): is called on one sample without a batch "
                f"dimension (its output has the shape {list(output.shape)}); call the model on [1, ...], x.unsqueeze(0)"
            )

    def leaf(self, output: Tensor) -> Tensor | None:
        """Return the leaf of the virtual bias, where that is asked for."""
        return None if self._virtual_bias is None else self._virtual_bias.leaf(output)

    @property
    def named(self) -> bool:
        """True where the user named the layer."""
        return bool(self.target)

    @property
    def optional(self) -> bool:  # type: ignore[override]
        """True where lambda can do without this layer: the user has not named it."""
        return not self.named

    def is_plain(self) -> bool:
        """Return whether the layer will compute W_1 x + b_1 with a W_1 that will be known."""
        if self.module is None:
            return True
        self.weight.watch(self.module)
        return is_affine(self.module, sharded=self._at_input.sharded)

    def close(self) -> None:
        """Stop watching the layer's weight."""
        self.weight.close()

    def lost(self, reason: str) -> None:
        """Report that there is no first layer to tap, or that it is called twice."""
        self._on_lost(reason)
        if self._at_input.sharded:
            self._at_input.refuse(reason)  # nothing else gives lambda there

    def save_from(
        self, sources: Mapping[InputTap, Source], module: nn.Module, arguments: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Say to the tap on the input whether this layer was W_1 x + b_1 of that input, and save W_1 where it was."""
        if not torch.compiler.is_compiling():
            source = sources.get(self._at_input)
            given = arguments[0] if arguments else None
            own = self.named or (self.begins if source is None else source.holds(given))
            affine = is_affine(module, sharded=self._at_input.sharded) and self.weight() is not None
            plain = own and bool(arguments) and affine
            self._at_input.took_input(plain and not (source is not None and source.changed))
        return self.save(module, arguments)

    def save(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Any]:
        shape = arguments[0].shape if arguments else None
        if torch.compiler.is_compiling():  # the batch's size and a counter would be compiled in
            shape = None if shape is None else (1, *shape[1:])
        else:
            self._calls += 1
        self.batch_shape = shape
        compiling = torch.compiler.is_compiling()
        weight = module._parameters.get("weight") if compiling else self.weight()
        if not self._at_input.by_product or shape is None or weight is None:
            return (), None
        if self._at_input.sharded and isinstance(weight, nn.Parameter):  # let go of until the gradient comes
            return (), (shape, self._calls, self._at_input.checks)
        return (weight,), (shape, self._calls, not compiling and self._at_input.checks)

    def _gathered(self) -> Tensor | None:
        """Return the whole W_1, which ranks have gathered for the backward pass under way; None where they have not."""
        weight = self.weight()
        if weight is not None and not hasattr(weight, "placements") and is_there(weight):
            return weight
        self._at_input.refuse(NOT_GATHERED.format(self.name))
        return None

    @property
    def rule(self) -> str:
        """Words for how often lambda is computed."""
        if self._every is not None:
            return f"lambda every {self._every} micro-batches" if self._every > 1 else "lambda every micro-batch"
        if self._work is None:
            limit = f"{_CHEAP:,} multiplications per micro-batch"
            return f"lambda every micro-batch, or every {_SPARSE}nd if the first one shows that it takes over {limit}"
        if self._work <= _CHEAP:
            return "lambda every micro-batch"
        return f"lambda every {_SPARSE} micro-batches, since it takes {self._work:,} multiplications"

    def reduce(self, grad_output: Tensor, extra: Any, *saved: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        weight = saved[0] if saved else None if extra is None else self._gathered()
        if weight is None:
            norms = functional.sample_norms(grad_output)
            # Integers are no vector: what depends on them does so by way of the Embedding's output.
            embedded = not self._at_input.is_vector and isinstance(self.module, nn.Embedding)
            if embedded and not compiling:
                self._work = 0
                if norms.is_cpu:
                    return norms.expand(3, -1)  # the same number three times: no copies in every pass
            return _columns(norms, norms if embedded else None)
        shape, call, checks = extra
        work = grad_output.numel() * weight[0].numel()
        if not compiling:
            self._work = work
        every = 1 if compiling else self._every or (1 if work <= _CHEAP else _SPARSE)
        if every > 1 and call % every != 1 and not checks:
            return _columns(functional.sample_norms(grad_output))
        if work <= _SMALL and grad_output.dim() == 2 and grad_output.is_cpu and not compiling:
            out = torch.empty(3, grad_output.shape[0], dtype=torch.float64, device=CPU)
            _core.first_layer_norms(grad_output, weight, out)
            return out
        # At least float32, whatever autocast made of the gradient: bfloat16 products would carry 4e-3.
        precise = torch.promote_types(grad_output.dtype, torch.float32)
        assert self.module is not None
        pulled = pull_back(self.module, weight.detach().to(precise), grad_output.detach().to(precise), shape)
        return _columns(functional.sample_norms(grad_output), functional.sample_norms(pulled))


def _columns(norms: Tensor, pulled: Tensor | None = None) -> Tensor:
    if pulled is not None:
        return torch.stack([norms, pulled, norms])
    missing = torch.full_like(norms, math.nan)
    return torch.stack([norms, missing, missing])


def last_kind(module: nn.Module) -> str:
    """Return the class name of the module that makes the output of (nested) nn.Sequentials; "" where other wiring hides
    it."""
    last = module
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    return "" if list(last.children()) else class_before_sharding(last).__name__


class OutputTap(Tap):
    """The tap that takes, per sample, |dL/dyhat|, or ||dL/dz|| for quantity="residual"."""

    argument = "output"
    columns = 1

    def __init__(self, key: str, check: Callable[[Tensor], None]) -> None:
        self.key = key
        self.smallest = 0.0  #: gradients below have lost digits in their dtype
        self._check = check
        self.target = ""  #: the name of a module that the user gave
        self.choice: str | Callable[[Any], Any] | None = None  #: of what the model returns
        self.name = ""
        self.module: nn.Module | None = None
        self.kind = ""  # what made the output, as far as it can be seen
        self._dims = 2  # of the output

    def resolve(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.kind = last_kind(module)

    def pick(self, output: Any) -> Any:
        """Return the tensor that is yhat, by its key, its attribute's name or the user's function."""
        return output if self.choice is None else picked_output(output, self.choice)

    def check(self, output: Any) -> None:
        if not isinstance(output, Tensor):
            names = output_names(output)
            hint = f" (of {', '.join(map(repr, names))})" if names else ""
            raise ValueError(
                f"output: {self.place} returns a {type(output).__name__}, not a tensor; name the one that is meant by "
                f"its key or attribute{hint}, or the module whose output is meant: output='<module>'"
            )
        if not self.kind and output.grad_fn is not None and output.grad_fn.name().startswith("Sigmoid"):
            self.kind = "Sigmoid"
        self._dims = output.dim()
        self._check(output)

    @property
    def of_values(self) -> str:
        """Words for what a number is where a sample has several output values."""
        whole = "one number per sample, over all positions and values of its output; " if self._dims > 2 else ""
        return f"residual: {whole}at most the spectral norm of the Jacobian"

    @property
    def place(self) -> str:
        """Last part of the keys, which says which output the numbers refer to: a probability and a logit give different
        ones."""
        if isinstance(self.choice, str):
            return self.choice
        name = self.name or "model"
        return f"{name}:{self.kind}" if self.kind else name

    def reduce(self, grad_output: Tensor, extra: Any, *saved: Tensor) -> Tensor:
        if not grad_output.dim():
            grad_output = grad_output.reshape(1)  # squeezed, so it is the value of a single sample
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.smallest = _SMALLEST.get(grad_output.dtype, 0.0)
        if grad_output.is_cpu and not compiling:
            out = torch.empty(1, grad_output.shape[0], dtype=torch.float64, device=CPU)
            _core.sample_norms(grad_output, out)
            return out
        return functional.sample_norms(grad_output).reshape(1, -1)
