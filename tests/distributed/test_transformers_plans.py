"""Models of the transformers library under its own tensor-parallel plan against one process in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
from plan_situations import NAME, RIGHT
from rank_runs import Found, run_situations

pytestmark = pytest.mark.ci
pytest.importorskip("transformers", reason="needs the extra `models` (make test-ci)")


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    return run_situations(tmp_path_factory.mktemp("two"), "plan_situations", 2)


@pytest.mark.parametrize("kind", RIGHT)
def test_right(found: Found, kind: str) -> None:
    for numbers in found[kind]:
        assert isinstance(numbers, dict), numbers
        assert numbers["off"] == {}
        assert numbers["cut"] > 3
        assert numbers["samples"] <= 1e-7
        assert numbers["worst"][0] <= 1e-6, numbers["worst"]


def test_norms_of_heads_are_refused_by_name(found: Found) -> None:
    for numbers in found["heads_normalised"]:
        assert isinstance(numbers, dict), numbers
        assert re.search(
            r"'model.layers.0.self_attn.q_norm.weight': .*whose forward\(\) was replaced.* on_unsupported='skip'",
            numbers["error"],
        )
        assert "total_of_measured" in numbers["skip"]
        assert "total" not in numbers["skip"]
        assert not any("q_norm" in place or "k_norm" in place for place in numbers["skip"])


def test_the_users_proof(found: Found) -> None:
    for numbers in found["proved"]:
        assert numbers == {"said": {NAME: ""}}
