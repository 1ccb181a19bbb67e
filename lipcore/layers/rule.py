"""The contract of a layer rule: from a module's input and the gradient at its output to per-sample gradient factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lipcore.layers.factor import Factor


@dataclass(frozen=True)
class Batch:
    """The place of the samples in the activations of one forward pass."""

    size: int  #: B
    dim: int = 0  #: batch dimension of activations whose features come last; channel layouts always have it first
    offsets: Tensor | None = None  #: packed sequences: int64 [B + 1], sample b is the rows offsets[b]:offsets[b + 1]

    def tokens(self, x: Tensor, features: int = 1) -> Tensor:
        """Return x as [B, T, *features], batch first (T = 1 where there is no sequence), or packed [N, *features].

        Raises:
            ValueError: there are not B samples at the batch dimension.
        """
        self.check(x, features)
        middle = x.dim() - features - 1
        if self.offsets is not None:
            return x.flatten(0, middle) if middle else x
        if not middle:
            return x.unsqueeze(1)
        return x.movedim(self.dim if middle >= self.dim else 0, 0).flatten(1, middle)

    def check(self, x: Tensor, features: int = 1) -> None:
        """Raise ValueError where :meth:`tokens` would."""
        if self.offsets is not None and x.dim() > features:
            return
        dim = self.dim if x.dim() > features + self.dim else 0
        if x.dim() <= features or x.shape[dim] != self.size:
            raise ValueError(
                f"expected {self.size} samples at dimension {dim}, got shape {list(x.shape)}; pass batch_dim= where "
                "the batch is not first, cu_seqlens= for packed sequences, and never flatten batch and sequence; the "
                "first tensor that the model is called with says how many samples there are: let it be one with a row "
                "for each (offsets or padded sequences in place of a list of all rows)"
            )


class Cut(NamedTuple):
    """The dimensions along which a layer's input and the gradient at its output lie in parts on several ranks (from the
    end, negative); None: each rank has the whole."""

    input: int | None = None
    output: int | None = None


#: Methods of a factor whose rows meet each other, or are multiplied out.
GRAM_OR_DIRECT = ("gram", "direct")
BY_SIZES = "Gram or direct, by the sizes"


class Rule(ABC):
    """All that is known of one type of layer. Stateless: one object serves every module of the type.

    A rule must have :meth:`save` and :meth:`factors`. What else there is has defaults that fit most layers.

    Attributes:
        methods: names by which the user may choose how the weight's norms are computed, () where there is one way.
            None, the default: nothing is known, and "gram" or "direct" go to each factor that has a `method`.
        how: that one way in words, as plan() prints it after "by"; "" where factors say it.
        may_mix_samples: in some configuration every output depends on all samples. Then :meth:`refuses` is asked at
            each forward pass, and batches of one are not read from the gradients.
        in_place_after: an in-place activation may follow directly: the layer's backward pass does not need its output,
            which is no part of a tuple. Asked of layers whose forward is torch's own.
        cuts: per parameter that may lie in parts on several ranks (tensor parallelism), by the dimension along which it
            is cut: how input and output lie then, where :meth:`factors` makes of them the gradient of this rank's part.
        beside: for messages, what an output beside the first is, and how to do without it; "" where nothing is known.
    """

    methods: ClassVar[tuple[str, ...] | None] = None
    how: ClassVar[str] = ""
    may_mix_samples: ClassVar[bool] = False
    in_place_after: ClassVar[bool] = True
    cuts: ClassVar[Mapping[str, Mapping[int, Cut]]] = {}
    beside: ClassVar[str] = ""

    def refuses(self, module: nn.Module) -> str:
        """Return why this module, configured as it is, has no per-sample gradients that could be measured, or ""."""
        return ""

    def leaves(self, module: nn.Module) -> str:
        """Return why the rule is not for this module, configured as it is, whose parameters are then measured from the
        autograd graph, or ""."""
        return ""

    def fuses(self, module: nn.Module) -> bool:
        """Return whether the module is y = x W^T + b, whose weight gradient fused=True may compute itself."""
        return False

    def ways(self, module: nn.Module) -> str:
        """Return in words which of several methods is taken on which shapes, as far as that is known before the first
        backward pass."""
        return BY_SIZES if self.methods == GRAM_OR_DIRECT else " or ".join(self.methods or ())

    def feature_dims(self, module: nn.Module) -> int:
        """Return how many of the output's last dimensions are features; those before are rows or the batch."""
        return 1

    def sample_dim(self, module: nn.Module, grad_output: Tensor, batch: Batch) -> int:
        """Return where the samples are in the gradient at the output."""
        return batch.dim if grad_output.dim() > 2 else 0

    @abstractmethod
    def save(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return what factors() needs of a call beside the gradient: tensors, and anything else.

        The tensors become saved tensors, which may not be changed in place before the backward pass: where torch keeps
        none of its own, or a copy, legal code may do that, and a copy is to be returned.

        Raises:
            ValueError: this call cannot be measured.
        """

    @abstractmethod
    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, Factor]:
        """Return, per own trainable parameter (its key in the module), the factor of its per-sample gradient.

        Pure in its tensors; of the module only configuration is read. `extra` is what save() returned.
        """
