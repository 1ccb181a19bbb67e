"""What a rank sends of a window: how large it is, and that it comes back from being packed as it was."""

from __future__ import annotations

import pytest
import torch

from lipcore.trajectory.shard_sums import ShardSums

LARGE = 291  # parameters of a Llama of 7B


def sums(steps: int, parameters: int, stages: tuple[str, ...]) -> ShardSums:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    gradients = {stage: numbers(steps, parameters) for stage in stages}
    missing = {stage: torch.tensor([float(i)], dtype=torch.float64) for i, stage in enumerate(stages)}
    return ShardSums(
        numbers(steps, parameters, 2), numbers(parameters, 4), numbers(parameters, 4), numbers(7), gradients, missing
    )


@pytest.mark.parametrize(("stages", "most"), [((), 5e6), (("grad_norm", "clipped_grad_norm"), 10e6)])
def test_a_window_of_a_large_model_is_small(stages: tuple[str, ...], most: float) -> None:
    packed = sums(1000, LARGE, stages).packed()
    assert sum(tensor.nbytes for tensor in (*packed.sums, *packed.largest)) <= most


def test_packed_and_back() -> None:
    stages = ("grad_norm", "clipped_grad_norm")
    before = sums(5, 3, stages)
    (after,) = ShardSums.of_packed(before.packed(), stages)
    for name in ("steps", "added", "largest", "paths"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    for stage in stages:
        assert torch.equal(after.gradients[stage], before.gradients[stage])
        assert torch.equal(after.no_gradients[stage], before.no_gradients[stage])


def test_columns_that_another_rank_counts_are_the_identity() -> None:
    before = sums(4, 3, ("grad_norm",))
    after = before.spread([4, 0, 2], [0, 2], 5)
    assert torch.equal(after.steps[:, [4, 2]], before.steps[:, [0, 2]])
    assert torch.equal(after.gradients["grad_norm"][:, [4, 2]], before.gradients["grad_norm"][:, [0, 2]])
    assert torch.equal(after.added[[4, 2]], before.added[[0, 2]])
    assert not after.steps[:, [0, 1, 3]].any()
    assert not after.added[[0, 1, 3]].any()
    assert (after.largest[[0, 1, 3]] == -torch.inf).all()
