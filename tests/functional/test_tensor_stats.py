"""tensor_stats against the float64 specification: layouts, sizes, what is not finite, merging."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CHUNK, FEW_LAYOUTS, ODD_SIZES, values
from devices import EMULATED, sized
from oracle import DTYPES, LAYOUTS, assert_close, eps_of, in_layout, same_bits
from ways import assert_same_in_all_ways

from lipcore import _core, functional
from lipcore.functional import reference
from lipcore.functional.tensor_stats import empty_tensor_stats, merge_tensor_stats
from lipcore.functional.tensor_stats_rows import add_on_device, merged_rows

BLOCK = 1024  # elements that the kernel takes together
PAIRS = 8192  # from so many on its histogram counts pairs of elements
COUNT, MEAN, M2, M3, M4, MIN, MAX, ZEROS, NONFINITE = range(9)
EXACT = [COUNT, MIN, MAX, ZEROS, NONFINITE]


def assert_rows(got, truth, tensors, k=200):
    """Counts and extremes as they are; sums of powers up to k eps of what they would be without signs."""
    rows, bins = (table.cpu() for table in got)
    assert torch.equal(rows[:, EXACT], truth[0][:, EXACT])
    assert torch.equal(bins, truth[1])
    assert torch.equal(bins.sum(1).double(), rows[:, COUNT])
    for row, exact, tensor in zip(rows, truth[0], tensors, strict=True):
        x = tensor.detach().cpu().double().flatten()
        d = (x[x.isfinite()] - exact[MEAN]).abs()
        largest = x[x.isfinite()].abs().sum() / max(len(d), 1)
        scale = torch.stack([largest, *((d + largest * 1e-16).pow(power).sum() for power in (2, 3, 4))])
        assert_close(row[[MEAN, M2, M3, M4]], exact[[MEAN, M2, M3, M4]], scale=scale, eps=eps_of(torch.float64), k=k)


def check(tensors, k=200):
    got = functional.tensor_stats(tensors)
    assert [table.dtype for table in got] == [torch.float64, torch.int64]
    assert_rows(got, reference.tensor_stats([t.cpu() for t in tensors]), tensors, k)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype, isa):
    """Each in a list of all, so that a tensor's numbers are no neighbour's."""
    sizes = (*ODD_SIZES, BLOCK - 1, BLOCK, BLOCK + 17, PAIRS - 1, PAIRS + 3)
    check([values((n,), DTYPES[dtype]) for n in sizes])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    layouts = LAYOUTS if dtype == "f32" else FEW_LAYOUTS
    shapes = ((2, 3, 5, 7), (129,), (3, 65), (0, 4))
    tensors = [in_layout(values(shape, DTYPES[dtype]), layout) for shape in shapes for layout in layouts]
    check([tensor for tensor in tensors if tensor is not None])


def test_many_tensors_at_once():
    shapes = [(), (0,), (7,), (CHUNK + 1,), (3, 5), (2 * CHUNK + 3,), *[(16,)] * 50]
    check([values(shape, dtype, i) for i, shape in enumerate(shapes) for dtype in (torch.float32, torch.bfloat16)])


def test_ways():
    tensors = [values((n,), dtype) for n in (5, 2 * CHUNK + 77, 4097) for dtype in DTYPES.values()]
    assert_same_in_all_ways(lambda: list(functional.tensor_stats(tensors)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_counted_and_left_out(dtype, isa):
    x = values((3 * BLOCK + 5,), DTYPES[dtype])
    bad = x.clone()
    for i, value in zip((0, 7, BLOCK - 1, BLOCK, 3 * BLOCK + 4), itertools.cycle((math.nan, math.inf, -math.inf))):
        bad[i] = value
    nothing = torch.full((40,), math.nan, dtype=x.dtype)
    rows, bins = check([bad, nothing, x])
    assert rows[:, NONFINITE].tolist() == [5, 40, 0]
    assert rows[1, :NONFINITE].tolist() == [0] * 8
    assert not bins[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(dtype, isa):
    """Both zeros, subnormal numbers, the largest ones; each in its own bin."""
    info = torch.finfo(DTYPES[dtype])
    small = [0.0, -0.0, info.smallest_normal / 2, -info.smallest_normal / 4, info.smallest_normal, info.eps]
    tensors = [torch.tensor([x] * 3 + small, dtype=DTYPES[dtype]) for x in (1.0, -3.0)]
    check(tensors)
    large = torch.tensor([info.max, -info.max, 0.0], dtype=DTYPES[dtype])
    rows, bins = functional.tensor_stats([large])
    assert rows[0, [COUNT, MIN, MAX, ZEROS, NONFINITE]].tolist() == [3, -info.max, info.max, 1, 0]
    assert bins[0].sum() == 3
    assert bins[0, 0] == 1


def long_runs():
    """Of several blocks, where elements are counted by pairs in a window of bins."""
    generator = torch.Generator().manual_seed(0)
    count, length = 20, 20 * BLOCK + 77
    x = torch.randn(length, generator=generator)
    scales = torch.ones(length)
    yield "all alike", x
    yield "many zeros", x.clamp(min=0)
    yield "zeros behind each other", torch.where(torch.arange(length) % 700 < 600, 0.0, x)
    yield "each of another size", x * 2.0 ** torch.randint(-60, 60, (length,), generator=generator)
    for i in range(count):
        scales[i * BLOCK : (i + 1) * BLOCK] = 2.0 ** (-40 if i % 2 else 40)
    yield "every second block far below", x * scales
    for i in range(count):
        scales[i * BLOCK : (i + 1) * BLOCK] = 2.0 ** (6 * (i // 5))
    yield "blocks that grow", x * scales
    yield "blocks that shrink", (x * scales).flip(0)
    few = x.clone()
    few[::1500] = 1e-30
    few[1::1400] = -0.0
    yield "a few far below", few
    yield "the largest", x.sign() * torch.finfo(torch.float32).max
    yield "the smallest", x * 1e-40
    yield "beyond float32", x.double() * 1e60
    yield "in pairs", torch.cat([torch.zeros(PAIRS), x[:PAIRS]]).view(2, -1).t().flatten()


@pytest.mark.parametrize("kind", [kind for kind, _ in long_runs()])
def test_histograms_of_long_runs(kind, isa):
    """Every element is in its bin, whatever the elements around it are."""
    x = dict(long_runs())[kind]
    rows, bins = functional.tensor_stats([x])
    truth = reference.tensor_stats([x])
    assert torch.equal(bins, truth[1])
    assert torch.equal(rows[:, EXACT], truth[0][:, EXACT])


def test_numbers_that_a_processor_takes_for_zero():
    """A call in a thread that flushes subnormal numbers leaves nothing behind for the next one."""
    tensors = [torch.full((100,), 1e-40), values((9000,), torch.float32) * 1e-40]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        bins = functional.tensor_stats(tensors)[1]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bins, reference.tensor_stats(tensors)[1])
    check([values((50,), torch.float32)])


def test_a_constant_has_no_deviation(isa):
    for dtype, value in itertools.product(DTYPES.values(), (0.1, -3e-5, 0.0)):
        row = functional.tensor_stats([torch.full((BLOCK + 3,), value, dtype=dtype)])[0][0]
        assert row[[M2, M3, M4]].tolist() == [0, 0, 0]
        assert row[MEAN] == row[MIN] == row[MAX]


def test_a_far_mean(isa):
    """Deviations of 1e-3 about 1e4, where sums of powers about zero would leave nothing. The mean's own rounding is
    1e-11 of the fourth."""
    x = 1e4 + 1e-3 * torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    row, truth = functional.tensor_stats([x])[0][0], reference.tensor_stats([x])[0][0]
    assert_close(row[[M2, M4]], truth[[M2, M4]], eps=1e-10, k=1)


def test_bins_are_those_of_the_distribution():
    x = values((4000,), torch.float32).abs()
    bins = torch.zeros(2048, dtype=torch.int64)
    for value in x.tolist():
        bins[_core.bin_of(value) // 16] += 1
    assert torch.equal(functional.tensor_stats([x])[1][0], bins)
    lows = torch.tensor([_core.tensor_bin_low(b) for b in range(2040)], dtype=torch.float64)
    found = functional.tensor_stats([lows.float()])[1][0]
    assert found[:2040].tolist() == [1] * 2040


# ---- merging


def parts_of(x, cuts):
    return x.tensor_split(cuts)


@pytest.mark.parametrize("cuts", [[1], [0, 5000], [1000, 1001, 4321], list(range(0, 6000, 250))])
def test_parts_merge_to_the_whole(cuts):
    x = values((6000,), torch.float64)
    x[77] = math.nan
    table = empty_tensor_stats(3, torch.device("cpu"))
    rows, counts = table[0][1], torch.zeros(2048, dtype=torch.int64)
    for part in parts_of(x, cuts):
        assert functional.tensor_stats([part], into=table, places=[2])[0] is table[0]
        alone = functional.tensor_stats([part])
        rows, counts = merged_rows(rows, alone[0][0]), counts + alone[1][0]
    truth = reference.tensor_stats([x])
    for found in ((table[0][2:], table[1][2:]), (rows[None], counts[None])):
        assert_rows(found, truth, [x])
    assert not table[0][:2].any()
    assert not table[1][:2].any()


def test_tables_merge_by_place():
    tensors = [values((n,), torch.float32, n) for n in (5, 70, 0, 300)]
    into, other = empty_tensor_stats(2, torch.device("cpu")), functional.tensor_stats(tensors)
    merge_tensor_stats(into, other, [1, 0, 1, 1])
    merge_tensor_stats(into, other, [-1, -1, -1, -1])
    whole = [tensors[1], torch.cat([tensors[0], tensors[3]])]
    assert_rows(into, reference.tensor_stats(whole), whole)
    for places, words in (
        ([0, 0, 0], "places: expected 4 places"),
        ([0, 0, 0, 2], r"places\[3\]: expected less than 2"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_tensor_stats(into, other, places)
    with pytest.raises(ValueError, match="rows: is written to but shares memory"):
        merge_tensor_stats(other, other, [0, 1, 2, 3])
    moved = empty_tensor_stats(2, torch.device("cpu"))
    merge_tensor_stats(moved, other, [1, 0, 1, -1], gone=True)
    merge_tensor_stats(moved, other, [-1, -1, -1, 1])
    assert_rows(moved, reference.tensor_stats(whole), whole)
    assert [bool(table[:3].any()) for table in other] == [False, False]
    assert other[1][3].sum() == 300


def test_the_empty_row_is_the_identity_of_merging():
    row = functional.tensor_stats([values((100,), torch.float32)])[0]
    empty = torch.zeros(1, 9, dtype=torch.float64)
    assert same_bits(merged_rows(row, empty), row)
    assert same_bits(merged_rows(empty, row), row)
    assert same_bits(merged_rows(empty, empty), empty)
    again = functional.tensor_stats([torch.zeros(0)], into=(row.clone(), torch.zeros(1, 2048, dtype=torch.int64)))
    assert same_bits(again[0], row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_operations_of_torch(dtype):
    """For devices without a kernel."""
    tensors = [values(s, DTYPES[dtype]) for s in ((0,), (1,), (17,), (3, 5, 7), (5000,))]
    tensors[3][0, 0, :3] = torch.tensor([math.nan, math.inf, 0.0])
    tensors.append(torch.full((5,), math.inf, dtype=DTYPES[dtype]))
    rows, bins = empty_tensor_stats(len(tensors), torch.device("cpu"))
    add_on_device(tensors, range(len(tensors)), rows, bins)
    assert_rows((rows, bins), reference.tensor_stats(tensors), tensors)


# ---- what is refused


def table(n=2, columns=9):
    return torch.zeros(n, columns, dtype=torch.float64), torch.zeros(n, 2048, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"places": [0]}, "places: they are rows of into="),
        ({"into": table(1), "places": [0, 1, 2]}, "places: expected 2 places, one per tensor, got 3"),
        ({"into": table(1)}, r"places\[1\]: expected a row of rows, 0 to 0, got 1"),
        ({"into": table(), "places": [-1, 1]}, r"places\[0\]: expected a row of rows, 0 to 1, got -1"),
        ({"into": table(), "places": [1, 1]}, r"places\[1\]: 1 comes twice"),
        ({"into": table(), "places": [1, 0.5]}, "places: expected integers"),
        ({"into": table(2, 8)}, "rows: expected a contiguous float64 tensor of shape"),
        ({"into": (table()[0], table(3)[1])}, "bins: expected as many rows as rows has, 2"),
        ({"into": (table()[0], table()[1].double())}, "bins: expected an int64 tensor"),
        ({"into": (table()[0].float(), table()[1])}, "rows: expected a contiguous float64 tensor"),
        ({"into": table()[0]}, "into: expected a tuple of rows and bins, got Tensor"),
        ({"tensors": torch.zeros(3)}, "tensors: expected a list or tuple of tensors, got Tensor"),
        ({"tensors": [torch.zeros(3), torch.zeros(3, dtype=torch.int64)]}, r"tensors\[1\]: "),
    ],
)
def test_what_is_refused(arguments, words):
    arguments = {"tensors": [torch.ones(3), torch.ones(2)]} | arguments
    tensors = arguments.pop("tensors")
    with pytest.raises((TypeError, ValueError), match=words):
        functional.tensor_stats(tensors, **arguments)
    assert not any(t.any() for t in arguments.get("into", ()) if isinstance(t, torch.Tensor))


def test_memory_that_is_written_to_is_no_input():
    into = table(3)
    for tensors in ([into[0][0]], [into[0]]):
        with pytest.raises(ValueError, match=r"tensors\[0\]: shares memory with rows or bins"):
            functional.tensor_stats(tensors, into=into)


def test_more_dimensions_than_the_core_walks_through():
    check([torch.randn([2] * 12).permute(*reversed(range(12)))[..., ::2]])


# ---- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda(dtype):
    """Sizes, alignments, several chunks, strided tensors, what is not finite."""
    sizes = [0, 17, 16385] if EMULATED and dtype != "f32" else [*ODD_SIZES, 16384, 2 * 16384 + 17]
    tensors = [values((n,), DTYPES[dtype]) for n in sizes]
    tensors += [in_layout(values((17, 65), DTYPES[dtype]), layout) for layout in ("offset", "sliced", "transposed")]
    bad = values((20_000,), DTYPES[dtype])
    bad[:7], bad[-3:], bad[100] = math.nan, -math.inf, math.inf
    tensors += [bad, torch.full((40,), 0.1, dtype=bad.dtype), torch.full((3,), math.nan, dtype=bad.dtype)]
    there = [tensor.cuda() for tensor in tensors]
    got = functional.tensor_stats(there)
    assert_rows(got, reference.tensor_stats(tensors), tensors)
    if dtype == "bf16":
        again = functional.tensor_stats(there)
        assert all(same_bits(a, b) for a, b in zip(got, again, strict=True))
        functional.tensor_stats(there, into=got, places=range(len(there)))
        twice = [torch.cat([tensor.flatten(), tensor.flatten()]) for tensor in tensors]
        assert_rows(got, reference.tensor_stats(twice), twice)


@pytest.mark.gpu
def test_many_tensors_on_cuda():
    """More than one kernel's parameters can hold, empty ones among them, to places in another order."""
    count = sized(300, 110)
    tensors = [values((i % 3,), torch.float32, i) for i in range(count)]
    into = tuple(table.cuda() for table in empty_tensor_stats(count, torch.device("cpu")))
    functional.tensor_stats([t.cuda() for t in tensors], into=into, places=list(range(count))[::-1])
    truth = reference.tensor_stats(tensors)
    assert_rows([table.cpu().flip(0) for table in into], truth, tensors)
