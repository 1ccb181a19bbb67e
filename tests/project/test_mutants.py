"""The planted faults of tests/mutants still have a place to be planted in, and tests that are to see them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from alarm_faults import ALARM_MUTANTS
from faults import MUTANTS, Mutant
from kernel_faults import KERNEL_MUTANTS

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "mutant", [*MUTANTS, *ALARM_MUTANTS, *KERNEL_MUTANTS], ids=lambda mutant: mutant.name.replace(" ", "_")
)
def test_a_fault_can_be_planted(mutant: Mutant) -> None:
    source = (_ROOT / mutant.file).read_text()
    assert mutant.applied(source) != source
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert re.search(rf"^def {function}\(", (_ROOT / "tests" / file).read_text(), re.MULTILINE) or not function


def test_there_are_thirty_with_names_of_their_own() -> None:
    named = [mutant.name for mutant in (*MUTANTS, *ALARM_MUTANTS)]
    assert len(set(named)) == len(named) >= 30


def test_every_kernel_has_faults_of_its_own() -> None:
    assert len({mutant.name for mutant in KERNEL_MUTANTS}) == len(KERNEL_MUTANTS)
    kernels = {f"csrc/cuda/{file.name}" for file in (_ROOT / "csrc" / "cuda").glob("*.cu")}
    assert kernels <= {mutant.file for mutant in KERNEL_MUTANTS}


def test_a_text_that_is_not_there_exactly_once_is_said() -> None:
    mutant = Mutant("name", "file.py", "x = 1", "x = 2", ())
    assert mutant.applied("y, x = 1") == "y, x = 2"
    for source, times in (("", 0), ("x = 1\nx = 1\n", 2)):
        with pytest.raises(ValueError, match=rf"^name: file\.py has this text {times} times, expected once"):
            mutant.applied(source)
