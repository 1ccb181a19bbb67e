"""docs/models.md shows the committed results, of every public architecture in the tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_modules import imported

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with imported(monkeypatch, "models_table") as found:
        yield found


def test_the_page_shows_the_results(table: Any) -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    results = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    assert table.page(results, text) == text, "run python bench/models_table.py --page"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[docs/models.md](docs/models.md) has {len(results['rows'])} public architectures" in readme


def test_the_results_are_right_and_proved(table: Any) -> None:
    rows = json.loads(table.RESULTS.read_text(encoding="utf-8"))["rows"]
    wrong = {name: row for name, row in rows.items() if not (row["proved"] and row["error"] <= 1e-5)}
    assert not wrong


def test_every_architecture_of_the_tests_is_there(table: Any) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from public_models import MODELS

    assert list(json.loads(table.RESULTS.read_text(encoding="utf-8"))["rows"]) == list(MODELS)
