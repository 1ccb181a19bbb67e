"""Ranks whose process group is destroyed and made again, with a new wrapper of the model: what is wrong is said, and
what is said helps."""

from __future__ import annotations

from typing import Any

import pytest
from elastic_situations import situations
from rank_runs import Found, assert_right, run_situations
from rank_situations import STEPS, WINDOW

from lipcore.models.averaging import GONE
from lipcore.models.tensor_parallel import MESH_GONE

pytestmark = pytest.mark.ci  # two processes, for 10 s


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Any:
    """What every rank has found, by situation; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "elastic_situations", 2)


def test_every_situation_is_in_the_table() -> None:
    assert [name for name, *_ in situations(2)] == [
        *("remedy", "left_as_it_is", "rebind", "group", "mesh_plan", "mesh_fsdp2"),
    ]


def test_a_new_monitor_goes_on_from_the_state_of_the_old_one(found: Found) -> None:
    for numbers in found["remedy"]:
        assert_right(numbers)


@pytest.mark.parametrize("way", ["left_as_it_is", "rebind"])
def test_the_wrapper_of_a_group_that_is_gone_is_named_with_the_remedy(found: Found, way: str) -> None:
    assert "load the state into a new one of the model that runs now" in GONE
    for numbers in found[way]:
        assert numbers == {"unrecorded": {GONE: numbers["unrecorded"][GONE]}, "off": GONE, "moved": True}
        assert numbers["unrecorded"][GONE] >= STEPS - WINDOW


def test_a_group_that_is_gone_is_named_with_the_remedy(found: Found) -> None:
    for said in found["group"]:
        assert said.startswith("group: this process group is gone (destroy_process_group()); take monitor.state_dict()")


@pytest.mark.parametrize(("way", "calls"), [("plan", ("sync_norms", "sync_scores")), ("fsdp2", ("Monitor", "rebind"))])
def test_a_mesh_that_is_gone_is_named_with_a_remedy_that_helps(found: Found, way: str, calls: tuple[str, ...]) -> None:
    for numbers in found[f"mesh_{way}"]:
        assert_right(numbers)
        assert numbers["said"] == dict.fromkeys(calls, f"ValueError: model: {MESH_GONE}")
