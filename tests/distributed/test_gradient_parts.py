"""What of a gradient belongs to a rank's part of a parameter, on every rank of a mesh, in one process without any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lipcore import TensorStats, Trajectory
from lipcore.distributed.gradient_parts import gradient_part
from lipcore.per_sample.layer_index import LayerIndex
from lipcore.per_sample.noise.noise_sums import NoiseSums

Places = Sequence[Placement]
R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


@contextmanager
def as_rank(rank: int, *mesh: int) -> Iterator[Any]:
    """Be this rank of a mesh on which nobody else is: a collective would do nothing. torch's own caches tell the ranks
    apart by the mesh's names."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(mesh))
    try:
        yield init_device_mesh("cpu", mesh, mesh_dim_names=[f"{dim} of rank {rank}" for dim in range(len(mesh))])
    finally:
        dist.destroy_process_group()


def placed(whole: Tensor, mesh: Any, placements: Places) -> DTensor:
    """A DTensor with this rank's part of a tensor by torch's rule, from the outermost dimension of the mesh on; what is
    partial is all here."""
    local = whole
    for i, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = list(local.chunk(mesh.size(i), placement.dim))
            nothing = local.narrow(placement.dim, 0, 0)
            local = (parts + [nothing] * mesh.size(i))[mesh.get_coordinate()[i]]
    return DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def on_every_rank(own: Places, its: Places, shape: tuple[int, ...], mesh: tuple[int, ...]) -> list[Any]:
    """The part of the gradient on each rank, and what it is to be: what a gradient placed as the parameter has."""
    found: list[Any] = []
    whole = torch.arange(float(math.prod(shape))).view(shape)
    for rank in range(math.prod(mesh)):
        with as_rank(rank, *mesh) as on:
            parameter = nn.Parameter(placed(torch.zeros(shape), on, own))
            found.append((gradient_part(parameter, placed(whole, on, its)), placed(whole, on, own)._local_tensor))
    return found


@pytest.mark.parametrize("shape", [(8, 6), (5, 3), (1, 7), (6, 1)])
@pytest.mark.parametrize(
    ("own", "its", "mesh"),
    [
        ([S0], [S0], (2,)),
        ([S0], [R], (2,)),
        ([S1], [R], (4,)),
        ([S0, S1], [R, S1], (2, 2)),
        ([S0, S1], [R, R], (2, 2)),
        ([S0, S0], [R, R], (2, 2)),
        ([R, S0], [R, R], (2, 2)),
        ([R, S0], [P, R], (1, 2)),  # along a dimension of one rank there is nobody to ask
    ],
)
def test_the_part_of_the_parameter(own: Places, its: Places, shape: tuple[int, ...], mesh: tuple[int, ...]) -> None:
    for part, expected in on_every_rank(own, its, shape, mesh):
        assert torch.equal(part, expected)


@pytest.mark.parametrize(
    ("own", "its", "mesh"),
    [
        ([R], [P], (2,)),
        ([S0], [P], (2,)),
        ([R], [S0], (2,)),
        ([S1], [S0], (2,)),
        ([S0, S0], [S0, R], (2, 2)),
        ([S0, S0], [R, S0], (2, 2)),  # the first half of the second half is not in the first half
        ([R, S0], [P, R], (2, 2)),
    ],
)
def test_no_rank_knows_its_part(own: Places, its: Places, mesh: tuple[int, ...]) -> None:
    """Of one row too, which a rank that has it all could take for its part while others could not."""
    for shape in ((8, 6), (1, 7)):
        assert [part for part, _ in on_every_rank(own, its, shape, mesh)] == [None] * math.prod(mesh)


def test_plain_tensors_and_those_on_other_meshes() -> None:
    with as_rank(0, 2) as mesh:
        other = init_device_mesh("cpu", (1, 2))
        plain, parts = nn.Parameter(torch.ones(4)), nn.Parameter(placed(torch.ones(4), mesh, [S0]))
        gradient = torch.ones(4)
        assert gradient_part(plain, gradient) is gradient
        assert gradient_part(plain, placed(gradient, mesh, [R])) is not None
        assert gradient_part(plain, placed(gradient, mesh, [P])) is None
        assert gradient_part(parts, gradient) is None  # nothing says that other ranks have the same
        assert gradient_part(parts, placed(gradient, other, [R, R])) is None


class Words(nn.Module):
    """A vocabulary in two parts, and what each rank has whole."""

    def __init__(self, mesh: Any, its: Places) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Parameter(placed(torch.randn(5, 4, generator=generator), mesh, [S0]))
        self.norm = nn.Parameter(placed(torch.ones(4), mesh, [R]))
        self.words.grad = placed(gradient_of_words(), mesh, [R])
        self.norm.grad = placed(torch.ones(4), mesh, its)


def gradient_of_words() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_all_that_read_gradients_count_a_part_once() -> None:
    norms, samples, counts = [], [], []
    for rank in range(2):
        with as_rank(rank, 2) as mesh:
            model = Words(mesh, [R])
            trajectory = Trajectory(model, stats=["grad_norm", "clipped_grad_norm"])
            trajectory.observe_gradients()
            trajectory.update()
            result = trajectory.compute()
            norms.append([result[stage]["words"].last.value for stage in ("grad_norm", "clipped_grad_norm")])
            statistics = TensorStats(model, every_steps=1, outputs=[])
            statistics.observe_gradients()
            statistics.update()
            counts.append(statistics.compute()["gradient"]["words"].mean.count)
            sums = NoiseSums(LayerIndex({"words": "words"}), lambda: {"words": model.words})
            sums.read_gradients()
            samples.append(float(sums.step_sums().gradient[0]))  # type: ignore[index]
    square = float(gradient_of_words().double().square().sum())
    assert torch.tensor(norms, dtype=torch.float64).square().sum(0).tolist() == pytest.approx([square] * 2, rel=1e-6)
    assert sum(samples) == pytest.approx(square, rel=1e-6)
    assert counts == [12, 8]


def test_what_nobody_has_added_up_has_no_number_and_a_reason() -> None:
    with as_rank(1, 2) as mesh:
        model = Words(mesh, [P])
        trajectory = Trajectory(model, stats=["grad_norm", "clipped_grad_norm"])
        trajectory.observe_gradients()
        trajectory.update()
        with pytest.warns(UserWarning, match=r"grad_norm lacks steps: the gradient of parameter 'norm' is placed") as w:
            result = trajectory.compute()
        assert not any("no backward pass was seen" in str(each.message) for each in w)
        assert not list(result)
        assert result.details["grad_norm_off"] == result.details["clipped_grad_norm_off"]
        trajectory.reset()
        assert "grad_norm_off" not in trajectory.compute().details
        statistics = TensorStats(model, every_steps=1, outputs=[])
        statistics.observe_gradients()
        statistics.update()
        assert list(statistics.compute().details["not_read"]) == ["gradient norm"]
        places = LayerIndex({"words": "words", "norm": "norm"})
        sums = NoiseSums(places, lambda: dict(model.named_parameters()))
        sums.read_gradients()
        assert "'norm' is placed as (Partial(sum))" in sums.step_sums().wrong
