"""Other samples on ranks that hold parts of the parameters are noticed, under the same ids too; parts of sequences that
a plan brings together are the same samples."""

from __future__ import annotations

from typing import Any

import pytest
from input_situations import situations
from rank_runs import Found, run_situations

pytestmark = pytest.mark.ci  # two processes, for 5 s
SAID = "ranks that hold parts of the parameters (tensor parallelism) were given other samples: layer 'a'"


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Any:
    """What every rank has found, by situation; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "input_situations", 2)


def test_every_situation_is_in_the_table() -> None:
    assert [name for name, *_ in situations(2)] == ["same", "halves", "other", "other_order"]


@pytest.mark.parametrize("way", ["same", "halves"])
def test_the_same_samples(found: Found, way: str) -> None:
    for numbers in found[way]:
        assert numbers["said"] == []
        assert not numbers["off"]
        assert numbers["error"] <= 1e-12


@pytest.mark.parametrize("way", ["other", "other_order"])
def test_other_samples(found: Found, way: str) -> None:
    for numbers in found[way]:
        first, second = numbers["said"]
        assert first.startswith(f"per_sample_grad_norm.sync_norms(): {SAID}")
        assert second.startswith(f"per_sample_grad_norm.sync_scores(): {SAID}")
        assert numbers["off"].startswith(SAID)
        assert numbers["numbers"] == 0
