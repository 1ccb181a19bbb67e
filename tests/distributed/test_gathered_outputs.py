"""A loss over the outputs of all ranks, which are gathered outside of the model: norms, scores and the noise scale are
those of what comes through a sample's own activations, as in one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
from gathered_situations import situations
from rank_runs import Found, run_situations

pytestmark = pytest.mark.ci  # two processes, for 10 s
NAMES = [f"{wrap}.{way}" for wrap in ("ddp", "fsdp2") for way in ("nn", "functional", "own_rows", "detached")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Any:
    """What every rank has found, by situation; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "gathered_situations", 2)


def test_every_situation_is_in_the_table() -> None:
    assert [name for name, *_ in situations(2)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_right(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert isinstance(numbers, dict), numbers
        assert max(numbers["errors"].values()) <= 1e-7, numbers
        assert not numbers["off"]
        assert not numbers["said"] or name.startswith("fsdp2")
