"""Which samples of a step stand out, by their gradient norms and by their losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lipcore.report.source import SamplesOfStep

_BEFORE = 32  # steps whose samples a step's are compared with
_TIMES = 2.0  # the greatest of all samples before: a sample beyond stands out
_SHOWN = 5
_MANY = 0.3  # of a batch: it is the batch then, not single samples
_HIGHER = 3.0  # times the median before: so is the whole batch

Verdict = Literal["single", "batch", "usual", "unknown"]
_ORDER: tuple[Verdict, ...] = ("batch", "single", "usual")


@dataclass(frozen=True)
class Sample:
    """One sample of a step; None for what was not recorded."""

    id: int
    norm: float | None
    loss: float | None


@dataclass(frozen=True)
class Ranking:
    """Samples of a step by one of their numbers.

    Attributes:
        by: "gradient norm" or "loss".
        top: those with the largest one, values that are not finite first (last where there is a doubt); none where none
            of the step is finite.
        median: of the step.
        usual: median of the samples of the steps before; NaN where there are none.
        outstanding: how many are more than twice as large as every sample of the steps before, or not finite.
        share: of the first sample in the sum of the losses; 0 where that says nothing.
        verdict: whether single samples stand out, the whole batch, or nothing; "unknown" without steps before.
        doubt: why gradient norms are not known, not proved to be single samples', or not of all parameters; "" where
            they are exact. Those that are not finite say nothing then.
    """

    by: str
    top: Sequence[Sample]
    median: float
    usual: float
    outstanding: int
    verdict: Verdict
    share: float = 0.0
    doubt: str = ""


@dataclass(frozen=True)
class Samples:
    """Samples of a step: how many there were, and their rankings, those by gradient norm first."""

    step: int
    count: int
    rankings: Sequence[Ranking]
    has_generator: bool  #: the state of a random generator was recorded

    @property
    def verdict(self) -> Verdict:
        """Verdict of the rankings together."""
        said = [ranking.verdict for ranking in self.rankings]
        return next((verdict for verdict in _ORDER if verdict in said), "unknown")

    @property
    def doubt(self) -> str:
        """Doubt about the verdict: "" where a ranking without one has come to it."""
        return self._doubt_of(self.verdict)

    @property
    def doubt_of_suspects(self) -> str:
        """Doubt about :attr:`suspects`, likewise."""
        return self._doubt_of("single")

    def _doubt_of(self, verdict: Verdict) -> str:
        doubts = [ranking.doubt for ranking in self.rankings if ranking.verdict == verdict]
        return "" if "" in doubts else next(iter(doubts), "")

    @property
    def suspects(self) -> list[int]:
        """Ids of the samples that stand out: by a ranking without a doubt, where there is one."""
        doubt = self.doubt_of_suspects
        single = [one for one in self.rankings if one.verdict == "single" and one.doubt == doubt]
        return list(dict.fromkeys(s.id for one in single for s in one.top[: one.outstanding]))


def samples_of(batches: Sequence[SamplesOfStep], step: int) -> Samples | None:
    """Return the samples of a step among those of several; None where nothing was recorded of it."""
    here = next((one for one in batches if one.step == step), None)
    if here is None or here.ids is None:
        return None
    before = [one for one in batches if step - _BEFORE <= one.step < step]
    rankings = []
    for by, own, attribute in (("gradient norm", here.norms, "norms"), ("loss", here.losses, "losses")):
        if own is not None:
            doubt = here.doubt if attribute == "norms" else ""
            # With exact norms only such are compared: those with a doubt may be of other parameters.
            alike = [one for one in before if attribute != "norms" or doubt or not one.doubt]
            arrays = [getattr(one, attribute) for one in alike]
            usual = np.concatenate([a for a in arrays if a is not None] or [np.empty(0)]).astype(np.float64)
            rankings.append(_ranking(by, here, np.asarray(own, np.float64), usual, doubt))
    return Samples(step, len(here.ids), rankings, here.rng_state is not None)


def _ranking(by: str, here: SamplesOfStep, own: Any, usual: Any, doubt: str) -> Ranking:
    usual = usual[np.isfinite(usual)]
    finite = np.isfinite(own)
    # Of norms that are not known those that are not finite are nothing that a sample has done.
    order = np.argsort(np.where(finite, -own, np.inf if doubt else -np.inf), kind="stable")[:_SHOWN]
    assert here.ids is not None
    numbers = [[None] * len(own) if a is None else a.tolist() for a in (here.norms, here.losses)]
    top = [Sample(int(here.ids[i]), numbers[0][i], numbers[1][i]) for i in order]
    top = top if finite.any() or len(own) == 1 else []  # which of them come first would say nothing
    median = float(np.median(own[finite])) if finite.any() else float("nan")
    adds_up = by == "loss" and finite.all() and len(own) > 1 and own.min() >= 0 and own.sum() > 0
    share = float(own.max() / own.sum()) if adds_up else 0.0
    away = np.zeros(len(own), bool) if doubt else ~finite
    lost = int(away.sum())
    if not len(usual) or (doubt and not finite.any()):
        verdict: Verdict = "single" if 0 < lost <= _MANY * len(own) else "unknown"
        return Ranking(by, top, median, float("nan"), lost, verdict, share, doubt)
    middle = float(np.median(usual))
    out = away | (finite & (own > _TIMES * float(usual.max())))
    verdict = "usual"
    if out.mean() > _MANY or (median > _HIGHER * middle and median > _HIGHER * abs(middle)):
        verdict = "batch"
    elif out.any():
        verdict = "single"
    return Ranking(by, top, median, middle, int(out.sum()), verdict, share, doubt)
