"""The gradient noise scale: unbiased estimators per step, their means over a window, and what these are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipcore import _core
from lipcore.metric.columns import Column
from lipcore.metric.later import Later
from lipcore.metric.results import Value
from lipcore.metric.state import check_version, checked_count, checked_tensor, is_count
from lipcore.models.arguments import check_count
from lipcore.per_sample.noise.estimates import Moments

_BLOCKS = 32  # even; between 16 and 31 are left when they have been joined in pairs
_PENDING = 32  # steps that are taken in together


class NoiseScale:
    r"""The simple noise scale :math:`B_\text{simple} = \operatorname{tr}\Sigma / |G|^2` in several places (layers, the
    total) at once, where G is the true gradient and Sigma the covariance of single samples' gradients.

    After every optimizer step, from the mean m over its B samples of :math:`\|\nabla l_i\|^2` and the squared norm g
    of their mean gradient, the unbiased estimators of McCandlish et al. 2018 (arXiv 1812.06162, appendix A.1, with
    B_small = 1, B_big = B):

    .. math:: |G|^2 \approx \frac{B g - m}{B - 1} \qquad \operatorname{tr}\Sigma \approx \frac{(m - g) B}{B - 1}

    Both are averaged over steps, and the noise scale is the ratio of these averages: the mean of the steps' ratios has
    no expectation. A sampler without replacement makes the samples of a step weakly dependent: with N samples in the
    data set, a term of order tr(Sigma) / N then remains in |G|^2.

    :meth:`finalize` gives three quantities per place, ``noise_scale``, ``gradient_noise`` (tr Sigma) and
    ``gradient_sq`` (:math:`|G|^2`), each with

    * ``mean``: over the window's steps (of the noise scale: the ratio of means), with its standard error;
    * ``lower``, ``upper``: the ends of a confidence interval for it, by Student's t; by Fieller's theorem for the
      ratio, so that `upper` is infinite when the interval of |G|^2 includes 0. NaN below 8 steps;
    * ``ema``: bias-corrected exponential averages over all steps, not only the window's;

    and ``skipped_steps`` (sum): steps of fewer than 2 samples, and steps in which this place's numbers were NaN,
    infinite or negative. Standard errors are those of the means of up to 31 consecutive blocks of equal length, so that
    correlation between steps within a block is in them (below 32 steps a block is one step). A drift of the
    quantity within the window widens the interval.

    Nothing synchronises until :meth:`finalize`; numbers stay on the device they come from.

    Args:
        places: P, how many numbers each step brings.
        decay: of the exponential averages, per step.
        confidence: of the interval between lower and upper.

    >>> noise = NoiseScale(1)
    >>> noise.observe(torch.tensor([5.0]), torch.tensor([2.0]), samples=4)
    >>> numbers = noise.finalize()[0]
    >>> [numbers[name]["mean"].value for name in ("gradient_sq", "gradient_noise", "noise_scale")]
    [1.0, 4.0, 4.0]
    """

    _version = 1

    def __init__(self, places: int, *, decay: float = 0.99, confidence: float = 0.95) -> None:
        check_count("places", places, 0)
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number from 0 to below 1, got {decay!r}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
        self.places, self.decay, self.confidence = places, float(decay), float(confidence)
        # Rows 0-2: the steps' total weight, |G|^2 and tr(Sigma), decaying; row 3: how many steps, not decaying.
        self._ema = torch.zeros(4, places, dtype=torch.float64, device="cpu")
        self._pending: list[Tensor] = []  # [2, P] of steps that are not yet in the sums
        self._samples: float = 0  # 1 / (sum of squared weights) of these steps: B where all weights are equal
        self._start()

    def reset(self) -> None:
        """Start a new window; the exponential averages go on."""
        self._fold()
        self._start()

    def _start(self) -> None:
        # Per block and place: steps used, sum of |G|^2, sum of tr(Sigma). A tensor of its own, as take() gives it away.
        self._sums = torch.zeros(_BLOCKS, 3, self.places, dtype=torch.float64, device=self._ema.device)
        self._sizes: list[int] = []  # steps of each block in use, the last one open
        self._block_steps = 1
        self.skipped = 0  #: steps of this window with fewer than 2 samples

    @property
    def steps(self) -> int:
        """Number of steps in this window, those of fewer than 2 samples left out."""
        return sum(self._sizes) + len(self._pending)

    @torch.no_grad()
    def observe(self, mean_norm_sq: Tensor, batch_grad_sq: Tensor, samples: int) -> None:
        """Add an optimizer step.

        Args:
            mean_norm_sq: [P], mean over the step's samples of ||grad l_i||^2, l_i a single sample's loss.
            batch_grad_sq: [P], ||mean over the same samples of grad l_i||^2, before clipping or weight decay.
            samples: B, how many samples that is, over all micro-batches and ranks.
        """
        for name, values in (("mean_norm_sq", mean_norm_sq), ("batch_grad_sq", batch_grad_sq)):
            if not isinstance(values, Tensor) or values.shape != (self.places,) or not values.is_floating_point():
                what = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"{name}: expected a floating-point tensor of shape [{self.places}], got {what}")
        if mean_norm_sq.device != batch_grad_sq.device:
            raise ValueError(f"batch_grad_sq: on {batch_grad_sq.device}, but mean_norm_sq is on {mean_norm_sq.device}")
        check_count("samples", samples, 0)
        self.observe_weighted(mean_norm_sq, batch_grad_sq, samples, samples)

    @torch.no_grad()
    def observe_weighted(self, mean_norm_sq: Tensor, batch_grad_sq: Tensor, samples: int, effective: float) -> None:
        r"""Add an optimizer step whose samples are in the gradient with weights :math:`v_i` that sum to 1.

        Args:
            mean_norm_sq: [P], :math:`\sum v_i^2 \|\nabla l_i\|^2 / \sum v_i^2`.
            batch_grad_sq: [P], :math:`\|\sum v_i \nabla l_i\|^2`.
            samples: B.
            effective: :math:`1 / \sum v_i^2`, which is B where all weights are equal.
        """
        if samples < 2:
            self.skipped += 1
            return
        if self._pending and (effective != self._samples or mean_norm_sq.device != self._pending[0].device):
            self._fold()
        self._samples = effective
        self._pending.append(torch.stack([mean_norm_sq.double(), batch_grad_sq.double()]))
        if len(self._pending) >= _PENDING:
            self._fold()

    @torch.no_grad()
    def _fold(self) -> None:
        """Take in the pending steps, which are of one size and on one device, together: tens of small operations per
        step would cost more than the numbers are worth."""
        if not self._pending:
            return
        pending, device = self._pending, self._pending[0].device
        self._pending = []
        if device != self._ema.device:
            ahead = device.type != "cpu"  # what comes from a device is read at once
            self._ema, self._sums = (sums.to(device, non_blocking=ahead) for sums in (self._ema, self._sums))
        if device.type == "cpu" and isinstance(self._samples, int):
            steps = torch.empty(len(pending), 3, self.places, dtype=torch.float64, device="cpu")
            _core.noise_steps(pending, self._samples, self.decay, self._ema, steps)
        else:
            steps, self._ema = _on_device(pending, self._samples, self.decay, self._ema)
        while len(steps):
            if self._block_steps == 1 and (new := min(_BLOCKS - len(self._sizes), len(steps))):  # a block for each
                self._sums[len(self._sizes) : len(self._sizes) + new] = steps[:new]
                self._sizes += [1] * new
                steps = steps[new:]
                continue
            room = self._open_block()
            self._sums[len(self._sizes) - 1] += steps[:room].sum(0)
            self._sizes[-1] += len(steps[:room])
            steps = steps[room:]

    def _open_block(self) -> int:
        """Return for how many steps the last block has room; make a new block when it has none."""
        if not self._sizes or self._sizes[-1] >= self._block_steps:
            if len(self._sizes) == _BLOCKS:
                self._sizes, sums = _in_pairs(self._sizes, self._sums)
                self._set_blocks(sums)
                self._block_steps *= 2
            self._sizes.append(0)
        return self._block_steps - self._sizes[-1]

    def _set_blocks(self, sums: Tensor) -> None:
        self._sums = torch.zeros(_BLOCKS, 3, self.places, dtype=torch.float64, device=sums.device)
        self._sums[: len(sums)] = sums

    def merge(self, other: NoiseScale) -> None:
        """Add everything the other one has observed, as if its steps had come after this one's.

        For parts of one run after each other. Ranks make a step together: reduce its three numbers over them and
        observe it once.
        """
        self._check_same({"version": other._version, "places": other.places, "decay": other.decay}, "the other one")
        self._fold()
        other._fold()
        device = self._ema.device
        sums, sizes, block_steps = self._sums[: len(self._sizes)], self._sizes, self._block_steps
        added, added_sizes, added_steps = other._sums[: len(other._sizes)].to(device), other._sizes, other._block_steps
        while block_steps < added_steps:
            sizes, sums = _in_pairs(sizes, sums)
            block_steps *= 2
        while added_steps < block_steps:
            added_sizes, added = _in_pairs(added_sizes, added)
            added_steps *= 2
        sizes, sums = [*sizes, *added_sizes], torch.cat([sums, added])
        while len(sizes) > _BLOCKS:
            sizes, sums = _in_pairs(sizes, sums)
            block_steps *= 2
        theirs = other._ema.to(device)
        faded = self._ema[:3] * self.decay ** theirs[3] + theirs[:3]
        self._ema = torch.cat([faded, self._ema[3:] + theirs[3:]])
        self._sizes, self._block_steps = sizes, block_steps
        self._set_blocks(sums)
        self.skipped += other.skipped

    def copy(self) -> NoiseScale:
        """Return one with the same numbers, bit for bit, that goes its own way from here on."""
        copied = NoiseScale(self.places, decay=self.decay, confidence=self.confidence)
        copied._ema, copied._sums = self._ema.clone(), self._sums.clone()
        copied._pending, copied._samples = list(self._pending), self._samples
        copied._sizes, copied._block_steps, copied.skipped = list(self._sizes), self._block_steps, self.skipped
        return copied

    def take(self) -> NoiseScale:
        """Return this window without the exponential averages, for :meth:`finalize` of a later one, and reset."""
        self._fold()
        taken = NoiseScale(self.places, decay=self.decay, confidence=self.confidence)
        taken._ema = torch.zeros_like(self._ema)
        taken._sums, taken._sizes, taken._block_steps = self._sums, self._sizes, self._block_steps
        taken.skipped = self.skipped
        self._start()
        return taken

    def finalize(self, earlier: Sequence[NoiseScale] = ()) -> list[dict[str, dict[str, Value]]]:
        """Return {quantity: {reducer: Value}} per place; changes nothing. Waits for the device.

        Args:
            earlier: from :meth:`take`, oldest first: the window is these and the open one (a sliding window).
        """
        found = self.columns(earlier)
        return [
            {name: {reducer: column.value(p) for reducer, column in columns.items()} for name, columns in found.items()}
            for p in range(self.places)
        ]

    def columns(self, earlier: Sequence[NoiseScale] = ()) -> dict[str, dict[str, Column]]:
        """Return the same as columns over all places: {quantity: {reducer: column}}."""
        return self.condensed(earlier).get()

    def condensed(self, earlier: Sequence[NoiseScale] = ()) -> Later[dict[str, dict[str, Column]]]:
        """Return the columns as what is made of a few numbers per place when it is read. Waits for the device."""
        if not self.places:
            return Later(dict)
        self._fold()
        window = self
        if earlier:
            window = NoiseScale(self.places, decay=self.decay, confidence=self.confidence)
            for part in (*earlier, self):
                window.merge(part)
        moments = Moments.of(window._sums[: len(window._sizes)].cpu().numpy(), self._ema.cpu().numpy())
        steps, skipped, confidence = window.steps, window.skipped, self.confidence
        return Later(lambda: moments.columns(steps, skipped, confidence), moments.nbytes)

    def state_dict(self) -> dict[str, Any]:
        """Return version, settings, the window's blocks and the exponential averages, on the CPU."""
        self._fold()
        return {
            "version": self._version,
            "places": self.places,
            "decay": self.decay,
            "sums": self._sums[: len(self._sizes)].to("cpu", copy=True),
            "sizes": list(self._sizes),
            "block_steps": self._block_steps,
            "ema": self._ema.to("cpu", copy=True),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; ValueError naming what is wrong, and nothing changed, when it does not fit."""
        check_version(state, self._version, "one")
        self._check_same(state, "the state")
        given: list[Any] = [state.get(key) for key in ("sizes", "block_steps")]
        sizes, block_steps = given
        if not (isinstance(sizes, list) and len(sizes) <= _BLOCKS and all(is_count(size) and size for size in sizes)):
            raise ValueError(f"sizes: expected up to {_BLOCKS} counts of steps, got {sizes!r}")
        if not (is_count(block_steps) and block_steps and block_steps & (block_steps - 1) == 0):
            raise ValueError(f"block_steps: expected a power of two, got {block_steps!r}")
        skipped = checked_count(state, "skipped")
        sums = _float64(state, "sums", (len(sizes), 3, self.places))
        ema = _float64(state, "ema", (4, self.places))
        used = sums[:, 0]
        if not bool(
            ((used >= 0) & (used <= torch.tensor(sizes, device="cpu").reshape(-1, 1)) & (used == used.floor())).all()
        ):
            raise ValueError("sums: the steps used in a block are no count, or more than the block has")
        if not bool(((ema[0] >= 0) & (ema[0] <= 1) & (ema[3] >= 0) & ((ema[0] > 0) == (ema[3] > 0))).all()):
            raise ValueError("ema: the weights and counts are not those of exponential averages")
        device = self._ema.device
        self._pending.clear()
        self._sizes, self._block_steps, self.skipped = list(sizes), block_steps, skipped
        self._ema = ema.to(device, copy=True)
        self._set_blocks(sums.to(device))

    def _check_same(self, theirs: dict[str, Any], whose: str) -> None:
        for key, mine in (("version", self._version), ("places", self.places), ("decay", self.decay)):
            if theirs.get(key) != mine:
                raise ValueError(f"{key}: {whose} has {theirs.get(key)!r}, this one has {mine!r}")


def _float64(state: dict[str, Any], key: str, shape: tuple[int, ...]) -> Tensor:
    value = checked_tensor(key, state.get(key), torch.float64, shape)
    if not bool(value.isfinite().all()):
        raise ValueError(f"{key}: holds numbers that are not finite")
    return value


def _on_device(pending: list[Tensor], samples: float, decay: float, ema: Tensor) -> tuple[Tensor, Tensor]:
    """Return what _core.noise_steps() writes, without waiting for the device."""
    mean, batch = torch.stack(pending, dim=1)  # [steps, P]
    excess = (mean - batch) / (samples - 1)  # of the mean gradient's square over |G|^2: tr(Sigma) / B
    steps = torch.stack([torch.ones_like(mean), batch - excess, excess * samples], dim=1)
    usable = steps.isfinite().all(1) & (mean >= 0) & (batch >= 0)
    steps = torch.where(usable.unsqueeze(1), steps, 0.0)
    passed = usable.cumsum(0).double()  # of integers: torch has no deterministic sum of this kind of floats on a device
    weights = (1 - decay) * decay ** (passed[-1] - passed)  # decay ** 0 is 1, also for decay 0
    faded = ema[:3] * decay ** passed[-1] + (steps * weights.unsqueeze(1)).sum(0)
    return steps, torch.cat([faded, ema[3:] + passed[-1:]])


def _in_pairs(sizes: list[int], sums: Tensor) -> tuple[list[int], Tensor]:
    """Return consecutive blocks joined two by two; an odd last one stays alone."""
    even = len(sizes) // 2 * 2
    joined = sums[:even:2] + sums[1:even:2]
    return [sum(sizes[i : i + 2]) for i in range(0, len(sizes), 2)], torch.cat([joined, sums[even : len(sizes)]])
