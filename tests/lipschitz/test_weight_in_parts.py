"""Singular values of a first weight that lies on ranks in parts: what these add up gives those of the whole weight."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipcore import Lipschitz
from lipcore.lipschitz import weight_in_parts
from lipcore.lipschitz.singular_values import SingularValues, singular_values
from lipcore.lipschitz.weight_in_parts import UNASKED, WeightInParts, numbers_of

Cut = tuple[slice, ...]
ROWS: list[Cut] = [(slice(0, 3),), (slice(3, 4),), (slice(4, 4),), (slice(4, None),)]  # uneven, and one of none
COLUMNS: list[Cut] = [(slice(None), slice(0, 2)), (slice(None), slice(2, None))]
GRID: list[Cut] = [(rows[0], columns[1]) for rows in ROWS for columns in COLUMNS]


def layer_of(weight: Tensor) -> nn.Module:
    made = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    made.weight.data = weight
    return made


def together(
    layer: Any, cuts: Sequence[Cut], way: str, *, asked: bool = False, batch_shape: tuple[int, ...] | None = None
) -> SingularValues:
    """What as many ranks find as there are cuts; each part lies on two of them, of which one counts it."""
    weight, total = layer.weight.detach(), torch.zeros(0, dtype=torch.float64)
    for cut in cuts:
        offset = tuple(one.start or 0 for one in cut) + (0,) * (weight.dim() - len(cut))
        found = WeightInParts("w", layer, tuple(weight.shape), offset, weight[cut].clone(), way, asked, batch_shape)
        for counts in (True, False):
            addend = found.addend(counts=counts)
            total = addend.clone() if not total.numel() else total + addend
    return found.singular_values(total).get()


@pytest.mark.parametrize(
    ("shape", "cuts", "way"),
    [
        ((9, 5), ROWS, "inner"),
        ((5, 9), ROWS, "inner"),  # more inputs than outputs: eigenvalues that are 0 are none of W's
        ((5, 9), COLUMNS, "outer"),
        ((9, 5), COLUMNS, "outer"),
        ((9, 5), GRID, "whole"),
        ((6, 6), GRID, "whole"),
    ],
)
def test_those_of_the_whole_matrix(shape: tuple[int, int], cuts: Sequence[Cut], way: str) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(weight)
    found = together(layer_of(weight), cuts, way)
    assert found.largest == pytest.approx(float(values[0]), rel=1e-12)
    assert found.smallest == pytest.approx(float(values[-1]), rel=1e-9)
    assert found.exact
    twice = together(layer_of(weight), [*cuts, cuts[0]], way)
    assert twice.largest != pytest.approx(float(values[0]), rel=1e-3), "the test would not notice"


def test_a_smallest_one_that_the_gram_matrix_has_lost_is_not_known() -> None:
    weight = torch.diag(torch.tensor([1.0, 1e-3, 1e-4], dtype=torch.float64))
    found = together(layer_of(weight), [(slice(0, 1),), (slice(1, 3),)], "inner")
    assert found.largest == pytest.approx(1.0, rel=1e-12)
    assert found.smallest is None
    assert "the smallest one is lost" in found.rule
    assert together(layer_of(weight), [(slice(0, 1),), (slice(1, 3),)], "whole").smallest == pytest.approx(1e-4)
    assert together(layer_of(weight * 0), [(slice(0, 3),)], "inner").largest == 0


def test_a_weight_that_is_not_finite() -> None:
    weight = torch.ones(3, 2, dtype=torch.float64)
    weight[1, 1] = math.inf
    for way in ("inner", "whole"):
        found = together(layer_of(weight), [(slice(0, 1),), (slice(1, 3),)], way)
        assert math.isnan(found.largest)
        assert found.rule == "W_1 is not finite"


@pytest.mark.parametrize("side", [6, 40])
def test_a_convolution_is_put_together(side: int) -> None:
    """From its matrix, and by iteration, as one process does it."""
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dtype=torch.float64)
    shape = (7, 4, side, side)
    assert together(layer, [*ROWS[:2], (slice(4, 6),)], "whole", batch_shape=shape) == singular_values(layer, shape)


def test_samples_of_other_shapes_on_other_ranks() -> None:
    layer = nn.Conv1d(1, 2, 3, dtype=torch.float64)
    part = WeightInParts("w", layer, (2, 1, 3), (0, 0, 0), layer.weight.detach(), "whole", False, None)
    assert part.inputs is None
    part.hear([None, [1, 8]])
    assert part.singular_values(part.addend(counts=True)).get().exact
    part.hear([[1, 8], [1, 9]])
    assert "ranks have samples of the shapes [1, 8] and [1, 9]" in part.singular_values(torch.zeros(6)).get().rule
    part.hear([None, None])
    assert "no sample has shown the shape" in part.singular_values(torch.zeros(6)).get().rule


def test_an_argument_that_is_none() -> None:
    with pytest.raises(TypeError, match="sigma: expected True or False, got 512"):
        Lipschitz(sigma=512)  # type: ignore[arg-type]


def test_what_costs_much_is_taken_where_it_is_asked_for() -> None:
    assert numbers_of((4096, 512), "inner") == UNASKED
    weight = torch.eye(513, dtype=torch.float64) * 2
    found = together(layer_of(weight), [(slice(0, 200),), (slice(200, 513),)], "inner")
    assert math.isnan(found.largest)
    assert "would add up 131,841 numbers in each window for its singular values (1.05 MB" in found.rule
    assert "pass Lipschitz(sigma=True)" in found.rule
    found = together(layer_of(weight), [(slice(0, 200),), (slice(200, 513),)], "inner", asked=True)
    assert found.largest == pytest.approx(2.0, rel=1e-12)


def test_a_window_keeps_no_part_that_is_not_asked_for_and_no_layer() -> None:
    """Parts count against what may wait for the ranks."""

    class Cut:
        """What is read of a DTensor."""

        def __init__(self, shape: tuple[int, int]) -> None:
            self.shape, self.placements, self.here = shape, (), torch.zeros(shape)

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(weight_in_parts, "local_of", lambda weight: weight.here)
        patch.setattr(weight_in_parts, "shard_of", lambda weight: (None, (0, 0)))
        patch.setattr(weight_in_parts, "way_of", lambda layer, weight: "inner")
        for inputs, kept in ((512, 4 * 512 * 600), (520, 0)):
            found = WeightInParts.of("w", nn.Linear(inputs, 600), Cut((600, inputs)), None, asked=False)
            assert found.nbytes == kept
    layer = layer_of(torch.randn(4, 3).double())
    unread = WeightInParts("w", layer, (4, 3), (0, 0), layer.weight.detach(), "whole", asked=False, batch_shape=None)
    later, alive = unread.singular_values(torch.ones(12).double()), weakref.ref(layer)
    del unread, layer
    gc.collect()
    assert alive() is None
    assert later.get().largest is not None
