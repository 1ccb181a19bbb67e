"""sketch against the float64 specification, the sums it keeps to, the error it promises, and its stateful form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CHUNK, ODD_SIZES, values
from devices import EMULATED, sized
from oracle import DTYPES, in_layout, same_bits
from torch import nn
from ways import assert_same_in_all_ways

from lipcore import _core, functional
from lipcore.functional import reference

BUCKETS = [256, 4096, 65536]
TASK = 16 * CHUNK  # elements of one unit of work up to 16384 buckets


def assert_sketch(got, truth, scale, error=1e-12):
    """Buckets within error times the norm of what was sketched; NaN where the truth has NaN."""
    assert got.dtype == torch.float64
    assert torch.equal(got.isnan(), truth.isnan())
    assert float((got - truth).nan_to_num(0).abs().max()) <= error * float(scale)


def norm_of(tensors):
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def check(tensors, first_index, buckets=4096, seed=1):
    got = functional.sketch(tensors, first_index, buckets=buckets, seed=seed)
    truth = reference.sketch(tensors, first_index, buckets=buckets, seed=seed)
    assert_sketch(got.cpu(), truth, norm_of(tensors))
    return got


# ---- the specification


@pytest.mark.parametrize(
    ("buckets", "dtype"),
    [(2**n, dtype) for n in range(8, 17) for dtype in DTYPES if dtype == "f32" or 2**n in BUCKETS],
)
def test_sizes_and_offsets(dtype, buckets, isa):
    """Every size at every place of its first element among the 32 that share a hash."""
    for offset in (0, 1, 7, 15, 16, 17, 31):
        tensors = [values((n,), DTYPES[dtype], n) for n in ODD_SIZES]
        check(tensors, [1000 * n + offset for n in ODD_SIZES], buckets, seed=offset)


@pytest.mark.parametrize("sizes", [[], [TASK - 1], [TASK + 1], [3 * TASK + 17], [5, TASK, 3, TASK, 7], [17] * 300])
def test_tasks(sizes):
    """One task, several of one tensor, several tensors in one task."""
    first_index = [sum(sizes[:i]) + 3 for i in range(len(sizes))]
    check([values((n,), torch.float32, i) for i, n in enumerate(sizes)], first_index)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_seeds(seed):
    w = values((1000,), torch.float32)
    check([w], [0], 256, seed)
    assert not torch.equal(check([w], [0], 256, seed), check([w], [0], 256, (seed + 1) % 2**64))


def test_large_indices(isa):
    """Beyond 32 bits, and up to the last index there is."""
    for first in (2**31 - 5, 2**32 - 5, 2**40 + 3, 2**63 - 101):
        check([values((100,), torch.float32)], [first], 256)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "offset", "requires_grad"])
def test_dense_layouts(layout, isa):
    """Elements count in the order in which they lie in memory."""
    w = in_layout(values((2, 3, 5, 7), torch.float32), layout)
    check([w], [5])


def test_an_element_has_one_bucket_and_one_sign():
    one = torch.zeros(64)
    hits = set()
    for i in range(64):
        one.zero_()[i] = 2.0
        y = functional.sketch([one], [0], buckets=256, seed=3)
        assert y.count_nonzero() == 1
        assert y.abs().max() == 2
        hits.add(int(y.abs().argmax()) if i < 16 else None)
    assert len(hits) == 17, "elements of one group never share a bucket"


# ---- sums


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_parts_add_up_to_the_whole(dtype):
    """Cut anywhere: a parameter whose shards lie elsewhere after a restart keeps its sketch."""
    w = values((TASK + 4321,), DTYPES[dtype])
    whole = functional.sketch([w], [77], buckets=4096, seed=1)
    generator = torch.Generator().manual_seed(0)
    for cuts in ([1], [16], [31, 32, 33], [TASK], torch.randint(w.numel(), (7,), generator=generator).tolist()):
        edges = [0, *sorted(cuts), w.numel()]
        parts = [functional.sketch([w[a:b]], [77 + a], buckets=4096, seed=1) for a, b in itertools.pairwise(edges)]
        assert_sketch(sum(parts), whole, w.double().norm())
        pieces = [w[a:b] for a, b in itertools.pairwise(edges)]
        first_index = [77 + a for a in edges[:-1]]
        assert_sketch(functional.sketch(pieces, first_index, buckets=4096, seed=1), whole, w.double().norm())


def test_linear():
    a, b = values((10_000,), torch.float64, 1), values((10_000,), torch.float64, 2)

    def sketch(w):
        return functional.sketch([w], [0], buckets=1024, seed=5)

    assert_sketch(sketch(2.5 * a - b), 2.5 * sketch(a) - sketch(b), norm_of([2.5 * a, b]))


@pytest.mark.parametrize(
    ("buckets", "dtype"),
    [(buckets, dtype) for buckets in BUCKETS for dtype in DTYPES if dtype == "f32" or buckets == 4096],
)
def test_the_same_bits_in_all_ways(buckets, dtype):
    sizes = (1, 17, CHUNK + 1, 3 * TASK + 5) if dtype == "f32" else (1, 17, CHUNK + 1)
    tensors = [values((n,), DTYPES[dtype], n) for n in sizes]
    first_index = [3, 100, 200, 10_000_001]
    rows = [("w", 0), ("x", 2), ("y", 2), ("z", 2)]

    def compute():
        owner = {key: t for (key, _), t in zip(rows, tensors, strict=False)}
        sketches, weights = torch.empty(4, buckets).double(), torch.empty(len(tensors), 2).double()
        entries = [(owner, key, key, first_index[i], row) for i, (key, row) in enumerate(rows[: len(tensors)])]
        _core.SketchPlan(entries, sketches, weights, 9).step()
        return [functional.sketch(tensors, first_index[: len(tensors)], buckets=buckets, seed=9), sketches, weights]

    assert_same_in_all_ways(compute)


# ---- non-finite elements


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite(dtype, bad, isa):
    for size, at in ((1, 0), (33, 32), (CHUNK + 100, CHUNK + 50)):
        w = values((size,), DTYPES[dtype])
        w[at] = bad
        got = functional.sketch([w, w[:0]], [3, 0], buckets=256, seed=1)
        assert got.isnan().all()
        assert reference.sketch([w], [3], buckets=256, seed=1).isnan().all()


def test_a_float64_square_that_overflows_is_finite():
    w = torch.tensor([1e200, -3.0], dtype=torch.float64)
    check([w], [0], 256)


# ---- error


def scaled_matrix():
    rows, columns = 10 ** torch.linspace(-2, 2, 256), 10 ** torch.linspace(-1, 1, 128)
    return torch.randn(256, 128, generator=torch.Generator().manual_seed(1)) * rows[:, None] * columns


def hot_column():
    w = 1e-3 * torch.randn(512, 64, generator=torch.Generator().manual_seed(2))
    w[:, 5] = 1.0
    return w


def heavy_tail():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(30_000, generator=generator) / torch.rand(30_000, generator=generator).clamp(1e-3) ** 0.4


def sparse():
    w = torch.zeros(100_000)
    generator = torch.Generator().manual_seed(4)
    w[torch.randperm(100_000, generator=generator)[:3000]] = torch.randn(3000, generator=generator)
    return w


FAMILIES = {
    "gaussian": lambda: torch.randn(30_000, generator=torch.Generator().manual_seed(0)),
    "heavy_tail": heavy_tail,
    "row_column_scaled": scaled_matrix,
    "hot_column": hot_column,
    "sparse": sparse,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_error_of_the_squared_norm(family):
    """sd of ||y||^2 / ||w||^2 over seeds, times sqrt(k / 2). Never far above 1; below it where two elements that share
    a group, and so never meet, hold much of the norm."""
    w, buckets, seeds = FAMILIES[family](), 256, 1500
    truth = float(w.double().square().sum())
    ratios = torch.tensor(
        [float(functional.sketch([w], [0], buckets=buckets, seed=s).square().sum()) / truth for s in range(seeds)]
    )
    scaled = float(ratios.std()) * math.sqrt(buckets / 2)
    participation = float(w.double().pow(4).sum()) / truth**2  # elements do not collide with themselves
    assert 0.85 <= scaled / math.sqrt(1 - participation) <= 1.15, scaled
    assert 0.8 <= scaled <= 1.15, scaled
    assert abs(float(ratios.mean()) - 1) <= 4 * math.sqrt(2 / buckets / seeds), "biased"


def test_inner_products_and_distances():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50_000, generator=generator)
    b = a + 0.3 * torch.randn(50_000, generator=generator)
    y, z = (functional.sketch([w], [0], buckets=65536, seed=1) for w in (a, b))
    assert float((y - z).norm() / (a - b).double().norm()) == pytest.approx(1, abs=0.02)
    assert float(y @ z / (a.double() @ b.double())) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("offset", [0, 5])
def test_a_small_movement_survives_the_difference(offset):
    """||dw|| = 1e-6 ||w||: the difference of two sketches is the sketch of the difference."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(TASK + 7, generator=generator)
    dw = 1e-6 * torch.randn(w.shape, generator=generator)
    after = w + dw
    moved = after.double() - w.double()  # exactly what the parameter did
    y, z = (functional.sketch([t], [offset], buckets=4096, seed=1) for t in (w, after))
    truth = reference.sketch([moved], [offset], buckets=4096, seed=1)
    assert float((z - y - truth).norm() / truth.norm()) <= 1e-7


# ---- refusals


GOOD = torch.zeros(4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buckets": 1000}, "^buckets: .*power of two.*1000"),
        ({"buckets": 128}, "^buckets: .*256 to 65536.*128"),
        ({"buckets": 131072}, "^buckets: .*131072"),
        ({"buckets": -1}, "^buckets: .*-1"),
        ({"buckets": "many"}, "^buckets: .*'many'"),
        ({"seed": -1}, "^seed: .*-1"),
        ({"seed": 2**64}, "^seed: .*2\\*\\*64"),
        ({"seed": 1.5}, "^seed: .*1.5"),
        ({"first_index": [0]}, "^first_index: expected 2 .*got 1"),
        ({"first_index": [0, -1]}, r"^first_index\[1\]: .*-1"),
        ({"first_index": [0, 2**63 - 3]}, r"^first_index\[1\]: .*2\^63"),
        ({"first_index": [0, 2**70]}, r"^first_index\[1\]: .*2\*\*63"),
        ({"first_index": [0, 1.5]}, r"^first_index\[1\]: .*1.5"),
        ({"first_index": 0}, "^first_index: .*int"),
        ({"tensors": [GOOD, torch.zeros(4, 6)[:, ::2]]}, r"^tensors\[1\]: .*strided.*contiguous"),
        ({"tensors": [torch.zeros(1).expand(5), GOOD]}, r"^tensors\[0\]: .*strided"),
    ],
)
def test_refusals(change, words):
    arguments = {"tensors": [GOOD, GOOD], "first_index": [0, 4], "buckets": 256, "seed": 1} | change
    tensors, first_index = arguments.pop("tensors"), arguments.pop("first_index")
    with pytest.raises((TypeError, ValueError), match=words):
        functional.sketch(tensors, first_index, **arguments)


def test_refusals_of_the_core():
    memory = torch.zeros(512, dtype=torch.float64)
    for out, words in [
        (torch.zeros(1000, dtype=torch.float64), "^buckets: .*1000"),
        (torch.zeros(256), "^out: .*float64.*float32"),
        (torch.zeros(1, 256, dtype=torch.float64), r"^out: .*\[buckets\].*\[1, 256\]"),
        (memory[100:356], r"^out: .*memory with tensors\[0\]"),
        (memory[::2], "^out: .*dense"),
    ]:
        with pytest.raises(ValueError, match=words):
            _core.sketch([memory[:200]], [0], 1, out)
    with pytest.raises(ValueError, match="^first_index: expected 1 .*got 2"):
        _core.sketch([memory[:200]], [0, 1], 1, torch.zeros(256, dtype=torch.float64))


# ---- inside compiled graphs


@pytest.mark.parametrize("seed", [3, 2**64 - 1])
def test_compiled(seed):
    tensors = [torch.linspace(-1, 1, 100).reshape(4, 25).requires_grad_(), torch.linspace(0, 1, 7)]

    def call(a, b):
        return functional.sketch([a, b], [0, 100], buckets=256, seed=seed)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
    assert_sketch(got, reference.sketch(tensors, [0, 100], buckets=256, seed=seed), 10)
    detached = [t.detach() for t in tensors]
    torch.library.opcheck(torch.ops.lipcore.sketch.default, (detached, [0, 100], 256, 3))


# ---- the stateful form


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(301, 400)
        self.narrow = nn.Linear(70, 9).bfloat16()
        self.exact = nn.Linear(16, 3).double()


def bind(model, buckets=1024, rows=3, seed=11, device="cpu"):
    entries, names, index = [], [], 5
    for i, (name, p) in enumerate(model.named_parameters()):
        module, _, key = name.rpartition(".")
        entries.append((model.get_submodule(module)._parameters, key, name, index, i % 2))
        names.append(name)
        index += p.numel()
    sketches = torch.full((rows, buckets), 7.0, dtype=torch.float64, device=device)
    weights = torch.full((len(entries), 2), 7.0, dtype=torch.float64, device=device)
    return _core.SketchPlan(entries, sketches, weights, seed), entries, sketches, weights


def expected(model, entries, row, buckets=1024, seed=11):
    mine = [e for e in entries if e[4] == row]
    tensors = [e[0][e[1]] for e in mine]
    return reference.sketch(tensors, [e[3] for e in mine], buckets=buckets, seed=seed), norm_of(tensors)


def test_plan():
    """Rows, one of them without a parameter; parameters changed in place and replaced."""
    model = Model()
    plan, entries, sketches, weights = bind(model)
    for step in range(3):
        plan.step()
        for row in (0, 1):
            assert_sketch(sketches[row], *expected(model, entries, row))
        assert same_bits(sketches[2], torch.zeros(1024, dtype=torch.float64))
        for p, (weight_sq, nonfinite) in zip(model.parameters(), weights.tolist(), strict=True):
            assert weight_sq == pytest.approx(float(p.double().square().sum()), rel=1e-13)
            assert nonfinite == 0
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
            if step == 1:
                model.wide.weight = nn.Parameter(model.wide.weight.detach().clone())


def test_plan_with_non_finite_parameters():
    """Their row is NaN for that step, the other rows are not, and nothing of it stays."""
    model = Model()
    plan, entries, sketches, weights = bind(model)
    with torch.no_grad():
        model.wide.bias[3:5] = math.nan
        model.wide.bias[9] = math.inf
    plan.step()
    names = [e[2] for e in entries]
    bad = names.index("wide.bias")
    assert weights[:, 1].tolist() == [3.0 if i == bad else 0.0 for i in range(len(names))]
    assert sketches[bad % 2].isnan().all()
    assert_sketch(sketches[1 - bad % 2], *expected(model, entries, 1 - bad % 2))
    with torch.no_grad():
        model.wide.bias.zero_()
    plan.step()
    for row in (0, 1):
        assert_sketch(sketches[row], *expected(model, entries, row))
    assert not weights[:, 1].any()


def test_plan_refuses_by_name():
    model = Model()
    plan, _, sketches, weights = bind(model)
    plan.step()
    before = sketches.clone(), weights.clone()
    good = model.narrow.weight
    for bad, error in [
        (nn.Parameter(torch.zeros(70, 9).bfloat16()), ValueError),
        (nn.Parameter(torch.zeros(9, 70)), ValueError),
        (nn.Parameter(torch.zeros(9, 140).bfloat16())[:, ::2], ValueError),
        (torch.zeros(9, 70, dtype=torch.int32), TypeError),
    ]:
        model.narrow._parameters["weight"] = bad
        with pytest.raises(error, match=r"narrow\.weight"):
            plan.step()
    del model.narrow._parameters["weight"]
    with pytest.raises(ValueError, match=r"narrow\.weight.*removed"):
        plan.step()
    assert same_bits(sketches, before[0])
    assert same_bits(weights, before[1])
    model.narrow._parameters["weight"] = good
    plan.step()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sketches": torch.zeros(2, 1000).double()}, "^buckets: .*1000"),
        ({"sketches": torch.zeros(2, 256)}, "^sketches: .*float64.*float32"),
        ({"sketches": torch.zeros(256).double()}, r"^sketches: .*\[rows, buckets\].*\[256\]"),
        ({"sketches": torch.zeros(256, 2).double().t()}, "^sketches: .*contiguous"),
        ({"weights": torch.zeros(2, 2).double()}, r"^weights: .*\[1, 2\].*\[2, 2\]"),
        ({"row": 2}, r"^row\[0\]: .*0 to 1, got 2"),
        ({"row": -1}, r"^row\[0\]: "),
        ({"first_index": -1}, r"^first_index\[0\]: "),
        ({"w": torch.zeros(4, 6)[:, ::2]}, "'w' is a strided view"),
    ],
)
def test_plan_refuses_what_does_not_fit(change, words):
    a = {
        "w": torch.zeros(4),
        "first_index": 0,
        "row": 0,
        "sketches": torch.zeros(2, 256).double(),
        "weights": torch.zeros(1, 2).double(),
    } | change
    entries = [({"w": a["w"]}, "w", "w", a["first_index"], a["row"])]
    with pytest.raises(ValueError, match=words):
        _core.SketchPlan(entries, a["sketches"], a["weights"], 1)


def test_plan_wants_entries_of_five():
    with pytest.raises(TypeError, match="entries: "):
        _core.SketchPlan([({}, "w", "w", 0)], torch.zeros(1, 256).double(), torch.zeros(1, 2).double(), 1)


# ---- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "buckets"), [(d, b) for d in DTYPES for b in BUCKETS if not EMULATED or d == "f32" or b == 4096]
)
def test_sizes_on_cuda(dtype, buckets):
    sizes = [*ODD_SIZES, 16384 + 1, CHUNK + 3, 5 * CHUNK + 17]
    tensors = [values((n,), DTYPES[dtype], n).cuda() for n in sizes]
    first_index = [2**33 + 10**6 * i + n for i, n in enumerate(sizes)]
    got = check(tensors, first_index, buckets)
    assert same_bits(got, functional.sketch(tensors, first_index, buckets=buckets, seed=1))
    tensors[-1][7] = math.nan
    assert functional.sketch(tensors, first_index, buckets=buckets, seed=1).isnan().all()


@pytest.mark.gpu
def test_many_tensors_on_cuda():
    """More than one kernel's parameters can hold: the tables travel in several pieces."""
    tensors = [values((3 + i % 5,), torch.float32, i).cuda() for i in range(300)]
    check(tensors, [10 * i for i in range(300)], 256)


@pytest.mark.gpu
@pytest.mark.parametrize("buckets", BUCKETS)
def test_parts_add_up_on_cuda(buckets):
    w = values((sized(3 * TASK, 10 * CHUNK) + 5,), torch.float32).cuda()
    whole = functional.sketch([w], [3], buckets=buckets, seed=1)
    for cut in sized((1, 16, 31, TASK + 7), (31, CHUNK + 7)):
        parts = [functional.sketch([t], [i], buckets=buckets, seed=1) for t, i in ((w[:cut], 3), (w[cut:], 3 + cut))]
        assert_sketch(sum(parts), whole, w.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("buckets", [1024, 8192])  # one slice, and several
def test_plan_on_cuda(buckets):
    """The CPU's sketches, also after a parameter was replaced and after a step that was not finite; captured steps."""
    model, other = Model(), Model().cuda()
    other.load_state_dict(model.state_dict())
    plan, _, sketches, weights = bind(model, buckets)
    cuda_plan, _, *on_device = bind(other, buckets, device="cuda")
    for step in range(4):
        with torch.no_grad():
            for m in (model, other):
                m.wide.bias[3] = math.nan if step == 1 else 0.5
            if step == 2:
                other.wide.weight = nn.Parameter(other.wide.weight.detach().clone())
        plan.step()
        cuda_plan.step()
        torch.testing.assert_close(on_device[0].cpu(), sketches, rtol=0, atol=1e-11, equal_nan=True)
        torch.testing.assert_close(on_device[1].cpu(), weights, rtol=1e-12, atol=0, equal_nan=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda_plan.step()
    with torch.no_grad():
        for m in (model, other):
            m.wide.weight.mul_(0.5)
    graph.replay()
    plan.step()
    torch.testing.assert_close(on_device[0].cpu(), sketches, rtol=0, atol=1e-11)
