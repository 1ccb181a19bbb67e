"""Where a step has no gradient norms of samples, the post-mortem says why: the metric may be there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lipcore.metric.results import MetricResult, Window
from lipcore.recording import RunRecord, open_run
from lipcore.recording.batches import Batch

METRIC = "per_sample_grad_norm"


def why(folder: Path, measured: Sequence[int], *, off: str = "", has: bool = True, samples_event: bool = False) -> str:
    """Return what is said of step 40, of 60 steps of which some are measured, in windows of 20."""
    record = RunRecord(folder)
    record.begin(0)
    ones = np.exp(0.05 * np.random.default_rng(0).standard_normal((60, 1)))
    record.add_steps(1, {"logged/loss": ones}, ["total"], ["total"])
    norms = np.ones(2, np.float32)
    record.add_batches([Batch(i, np.arange(2), norms if i in measured else None, None, None) for i in range(1, 61)])
    for index in range(3):
        results = {METRIC: MetricResult(METRIC, mode="exact")} if has and not (off and index) else {}
        offs = {METRIC: off} if off and index else {}
        record.add_window(Window(index, 20 * index + 1, 20 * index + 20, True, "global", results, offs))
    if samples_event:
        record.add_event(30, "samples after an alarm", "after the alarm in step 20: ...", {"alarm": 20})
    record.close()
    with open_run(folder) as run:
        account = run.postmortem(40)
    if not measured:
        assert "their ids alone were recorded, neither gradient norms nor losses" in " ".join(str(account).split())
    return dict(account.missing).get("gradient norms of samples", "")


def test_the_reason_is_said(tmp_path: Path) -> None:
    assert why(tmp_path / "a", [], has=False).startswith("add lipcore.PerSampleGradNorms(")
    assert (
        why(tmp_path / "b", range(1, 30), off="it mixes samples")
        == "lipcore.PerSampleGradNorms was off: it mixes samples"
    )
    assert "was at rest in this step: with Alarms(per_sample=)" in why(tmp_path / "c", [], samples_event=True)
    assert "its backward pass was not recorded" in why(tmp_path / "d", [*range(1, 40), *range(41, 61)])
    assert "it was turned off by then" in why(tmp_path / "e", range(1, 40))
    assert "has measured none of the steps around" in why(tmp_path / "f", [])
    assert why(tmp_path / "g", range(1, 61)) == ""
