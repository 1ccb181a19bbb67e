"""The samples that rows of a gradient belong to, kept over several proofs of passes of one kind."""

from __future__ import annotations

import torch
from torch import Tensor

from lipcore.capture.proof import MIXED, NO_GRADIENT, NOT_FINITE


class SampleIds:
    """The sample of every row of the gradient at one call of a layer.

    A row without a gradient, or with one that is not finite, gets its sample from a later proof.

    Attributes:
        ids: int64 [N], or negative: NO_GRADIENT, MIXED or NOT_FINITE of :mod:`lipcore.capture.proof`.
        size: how many samples there are.
        steady: every proof has found the same samples at the same rows (a shuffle in the model finds others).
    """

    def __init__(self, ids: Tensor, size: int) -> None:
        self.ids, self.size, self.steady = ids.clone(), size, True

    def add(self, other: SampleIds) -> None:
        """Take in what a later proof of a pass with as many samples has found."""
        if other.ids.shape != self.ids.shape or other.size != self.size:
            self.steady = False
            self.ids, self.size = other.ids.clone(), other.size
            return
        unknown, theirs = self._unknown, other._unknown
        self.steady &= other.steady and bool((unknown | theirs | (self.ids == other.ids)).all())
        # What is newer counts where rows move from pass to pass.
        self.ids = torch.where(theirs & ~unknown, self.ids, other.ids)

    @property
    def _unknown(self) -> Tensor:
        return (self.ids == NO_GRADIENT) | (self.ids == NOT_FINITE)

    @property
    def known(self) -> bool:
        """True where the sample of every row is known, and each row is of one sample alone."""
        return bool((self.ids >= 0).all())

    @property
    def mixed(self) -> bool:
        """True where a row has parts of several samples."""
        return bool((self.ids == MIXED).any())

    @property
    def in_order(self) -> bool:
        """True where every row is known to be of the sample of its own number (modulo the number of samples)."""
        return bool((self.ids == torch.arange(len(self.ids), device="cpu") % max(1, self.size)).all())

    @property
    def is_permutation(self) -> bool:
        """True where every sample is known to have one row."""
        return len(self.ids) == self.size and torch.equal(self.ids.sort()[0], torch.arange(self.size, device="cpu"))

    def rows_of_samples(self, rows: Tensor) -> Tensor:
        """Return numbers [..., N] that come by row in the order of the samples, [..., B]; raise ValueError where the
        rows are no permutation of the samples."""
        if not self.is_permutation:
            raise ValueError(f"rows: {len(self.ids)} of them are no permutation of {self.size} samples")
        return rows[..., self.ids.argsort().to(rows.device)]
