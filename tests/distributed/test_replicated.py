"""Numbers of two ranks whose model torch's composable replicate() replicates, against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_rank import one_rank
from rank_runs import Found, assert_right, run_situations
from rank_situations import Net
from replicate_situations import WAYS, WORKS, situations
from torch import nn

from lipcore import Lipschitz, Monitor
from lipcore.models.names import class_before_sharding

_PLACE = "model"


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    """What every rank has found; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "replicate_situations", 2)


@pytest.mark.ci
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["movement", "norms", "constants", "proved_constants"])
def test_numbers_are_those_of_one_process(found: Found, what: str, way: str) -> None:
    for numbers in found[f"{what}_{way}"]:
        assert_right(numbers)
        for details in numbers.get("details", ()) if "constants" in what else ():
            assert details["first_bias"]["optimizer"] == "torch.optim.sgd.SGD"
            assert "local_lipschitz_off" not in details


@pytest.mark.ci
@pytest.mark.parametrize("way", WAYS)
def test_norms_are_exact_where_ranks_prove_a_batch_together(found: Found, way: str) -> None:
    """By DistributedDataParallel's hooks no other forward pass can be made, and who asks is told what to take."""
    for numbers in found[f"proved_norms_{way}"]:
        (answer,) = numbers["answer"].values()
        assert numbers["label"] == ("heuristic" if way == "hooks" else "exact")
        assert ("DistributedDataParallel in the place of the composable replicate()" in answer) is (way == "hooks")


@pytest.mark.ci
@pytest.mark.parametrize("way", WAYS)
def test_the_training_is_bit_for_bit_the_same(found: Found, way: str) -> None:
    assert found[f"bits_{way}"] == [True, True]


@pytest.mark.ci
def test_parameters_that_nobody_reduces_have_no_noise_scale(found: Found) -> None:
    for numbers in found["part_of_the_model"]:
        assert "nobody knows whose samples are in its gradient" in numbers["noise_scale_off"]


def test_every_situation_is_in_the_table() -> None:
    named = [f"{what}_{way}" for what in WORKS for way in WAYS]
    assert sorted(name for name, *_ in situations(2)) == sorted([*named, "part_of_the_model"])


@pytest.mark.parametrize("way", WAYS.values())
def test_layers_keep_their_class_in_what_is_told_of_them(way: Callable[[Any], Any]) -> None:
    with one_rank():
        model = way(Net())
        assert class_before_sharding(model) is Net
        assert class_before_sharding(model.a) is nn.Linear


@pytest.mark.parametrize("replicates", [False, True])
def test_a_first_layer_that_is_found_while_its_bias_is_gathered(replicates: bool) -> None:
    """Of a model as a whole: what the optimizer steps is not what stands in the layer then."""
    from torch.distributed._composable.replicate_with_fsdp import replicate
    from torch.distributed.fsdp import fully_shard

    with one_rank():
        torch.manual_seed(0)
        model = (replicate if replicates else fully_shard)(Net().double())
        optimizer = torch.optim.SGD([{"params": p, "lr": 0.1 * (n > 0)} for n, p in enumerate(model.parameters())])
        with Monitor(model, optimizer, [Lipschitz()], window_steps=3) as monitor:
            for _ in range(3):
                model(torch.randn(4, 6).double()).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            details = monitor.history[0]["lipschitz"].details
    assert details["first_bias"]["optimizer"] == "torch.optim.sgd.SGD"
    assert details["first_bias"]["learning_rate"] == [0.1, 0.1]
    assert "first_weight_moved" not in details
