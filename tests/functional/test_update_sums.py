"""update_sums against the float64 specification: every rule, dtype, mixture of dtypes, size, layout and non-finite
value; the CUDA kernels against the same."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CHUNK, FEW_STEP_LISTS, STEP_LISTS, thinned, values
from few import spread
from oracle import DTYPES, LAYOUTS, assert_close, eps_of, in_layout, same_bits

from lipcore import _core, functional
from lipcore.functional import reference
from lipcore.functional.update_rules import DIFFERENCE, GIVEN, UpdateRule
from lipcore.functional.update_sums import NORMALIZED, RATIO, UNEXPLAINED

RULES = {
    "held": UpdateRule(),
    "decay_alone": UpdateRule(decay=0.01),
    "sgd": UpdateRule(rate=0.1),
    "sgd_decayed": UpdateRule.of_step(-0.1, shrink=0.001),
    "momentum": UpdateRule(rate=0.1, momentum=True),
    "nesterov": UpdateRule.of_step(0.1, 0.09, 0.001, momentum=True),
    "adam": UpdateRule(1e-3, first_scale=1 / 0.271, second_scale=1 / math.sqrt(0.002997), eps=1e-8, adaptive=True),
    "adamw": UpdateRule.of_step(1e-2, shrink=1e-3, first_scale=10.0, second_scale=31.6, eps=0.0, adaptive=True),
    "given": GIVEN,
    "difference": DIFFERENCE,
}


def needs(rule):
    """Which of first and second the rule reads."""
    return rule.adaptive or rule.rate != 0, rule.adaptive or rule.mix != 0


def lists_of(shapes, rule, dtypes, device="cpu"):
    """params, first, second, rules; second is positive under a root."""
    w_dtype, a_dtype, b_dtype = dtypes
    params = [values(s, w_dtype, 10 + i).to(device) for i, s in enumerate(shapes)]
    first = [values(s, a_dtype, 20 + i).to(device) for i, s in enumerate(shapes)]
    second = [values(s, b_dtype, 30 + i).to(device) for i, s in enumerate(shapes)]
    if rule.adaptive:
        second = [b.abs() + 1e-3 for b in second]
    has_first, has_second = needs(rule)
    return (
        params,
        first if has_first else [None] * len(shapes),
        second if has_second else [None] * len(shapes),
        [rule] * len(shapes),
    )


def asked_for(shapes, dtypes, device="cpu"):
    """What only some ask for: gradients, and the parameters before the step."""
    names = {"gradients": (40, dtypes[0]), "previous": (50, dtypes[1])}
    return {
        name: [values(s, dtype, seed + i).to(device) for i, s in enumerate(shapes)]
        for name, (seed, dtype) in names.items()
    }


def assert_right(got, params, first, second, rules, k=8, **asked):
    """As exact as float32 arithmetic (float64 with a float64 tensor) on terms that may cancel."""
    truth, true_squares = reference.update_sums(params, first, second, rules, **asked)
    rows, squares = got
    assert rows.dtype == squares.dtype == torch.float64
    assert rows.shape == (len(params), _core.STEP_COLUMNS)
    assert squares.shape == (_core.UPDATE_SQUARES, len(params))
    nothing = [None] * len(params)
    others = asked.get("gradients", nothing), asked.get("previous", nothing)
    for i, (w, a, b, rule, g, w_prev) in enumerate(zip(params, first, second, rules, *others, strict=True)):
        dtypes = {t.dtype for t in (w, a, b, g if rule.adaptive else None, w_prev) if t is not None}
        eps = eps_of(torch.float64 if torch.float64 in dtypes else torch.float32)
        sizes = rule._replace(**{name: abs(getattr(rule, name)) for name in rule._fields[:6]})  # without signs
        absolute = [None if t is None else t.detach().abs() for t in (w, a, b)]
        before = None if w_prev is None else [-w_prev.abs()]
        scale, scale_of_squares = reference.update_sums(*([t] for t in absolute), [sizes], previous=before)
        scale = torch.where(truth[i].isfinite(), scale[0], 1.0)
        # Squares of N terms off by eps each: 2 eps, and float64's own sum.
        assert_close(rows[i], truth[i], scale=scale, eps=eps, k=k)
        assert_close(squares[:UNEXPLAINED, i], true_squares[:UNEXPLAINED, i], eps=eps, k=2 * k)
        known = true_squares[UNEXPLAINED, i].isfinite()
        scale = scale_of_squares[UNEXPLAINED] if known else None
        assert_close(squares[UNEXPLAINED:, i], true_squares[UNEXPLAINED:, i], scale=scale, eps=eps, k=k)


# One of each form that an update takes, in the dtypes that do not try all rules.
FORMS = ("decay_alone", "sgd", "nesterov", "adamw")


@pytest.mark.parametrize(
    ("rule", "shapes", "dtype"),
    spread(
        [
            pytest.param(rule, *case.values, id=f"{rule}-{case.id}", marks=case.marks)
            for rule in RULES
            for case in thinned(STEP_LISTS, FEW_STEP_LISTS)
            if rule in FORMS or case.values[1] == "f32"
        ],
        3,
    ),
)
def test_sizes(shapes, rule, dtype, isa):
    lists = lists_of(STEP_LISTS[shapes], RULES[rule], [DTYPES[dtype]] * 3)
    before = [t.clone() for tensors in lists[:3] for t in tensors if t is not None]
    assert_right(functional.update_sums(*lists), *lists)
    after = [t for tensors in lists[:3] for t in tensors if t is not None]
    assert all(same_bits(x, y) for x, y in zip(before, after, strict=True)), "an argument was written to"


@pytest.mark.parametrize(
    ("rule", "dtypes"),
    [
        *((rule, (dtype, dtype, dtype)) for rule in FORMS for dtype in ("f32", "bf16")),
        *(("adamw", (dtype, dtype, dtype)) for dtype in ("f64", "f16")),
        *(("adamw", dtypes) for dtypes in (("bf16", "f32", "bf16"), ("bf16", "bf16", "f32"), ("f32", "f64", "f32"))),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_gradients_and_parameters_before_the_step(rule, dtypes, isa):
    """Both, one of them, and none: what is there already is the same."""
    shapes = [(), (0, 4), (15,), (16,), (35,), (513,), (CHUNK + 17,)]
    own, *others = (DTYPES[d] for d in dtypes)
    lists = lists_of(shapes, RULES[rule], [own] * 3)
    asked = asked_for(shapes, others)
    alone = functional.update_sums(*lists)
    for names in (("gradients", "previous"), ("gradients",), ("previous",)):
        some = {name: asked[name] for name in names}
        rows, squares = functional.update_sums(*lists, **some)
        assert_right((rows, squares), *lists, **some)
        if len({*dtypes}) == 1:
            assert same_bits(rows, alone[0])
            assert same_bits(squares[[0, 2, 3]], alone[1][[0, 2, 3]])
    some = {name: [None if i % 2 else t for i, t in enumerate(tensors)] for name, tensors in asked.items()}
    assert_right(functional.update_sums(*lists, **some), *lists, **some)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_what_is_asked_for(layout):
    shapes = [(3, 5), (17,), (2, 3, 5, 7), (2, 3, 2, 3, 3)]
    lists, asked = lists_of(shapes, RULES["adamw"], [torch.float32] * 3), asked_for(shapes, [torch.float32] * 2)
    for tensors in asked.values():
        tensors[:] = [t if (other := in_layout(t, layout)) is None else other for t in tensors]
    assert_right(functional.update_sums(*lists, **asked), *lists, **asked)


def test_a_gradient_that_is_not_finite_spoils_its_ratio_alone(isa):
    lists, asked = (
        lists_of([(35,)] * 2, RULES["adamw"], [torch.float32] * 3),
        asked_for([(35,)] * 2, [torch.float32] * 2),
    )
    good = functional.update_sums(*lists, **asked)
    asked["gradients"][0][3] = math.nan
    rows, squares = functional.update_sums(*lists, **asked)
    assert squares[RATIO, 0].isnan()
    good[1][RATIO, 0] = math.nan
    assert same_bits(rows, good[0])
    assert same_bits(squares.nan_to_num(-1), good[1].nan_to_num(-1))


def test_the_ratio_of_a_step_by_hand(isa):
    """g / max(sqrt(v), eps): eps where the second moment has seen nothing, and nothing where eps is 0 too."""
    g, b = torch.tensor([6.0, 0.5, 0.0]), torch.tensor([4.0, 0.0, 0.0])
    rule = UpdateRule(0.1, second_scale=1.5, eps=0.25, adaptive=True)
    squares = functional.update_sums([g], [g], [b], [rule], gradients=[g])[1]
    assert float(squares[RATIO]) == ((6 / 3) ** 2 + (0.5 / 0.25) ** 2) / 3
    assert functional.update_sums([g], [g], [b + 1], [GIVEN], gradients=[g])[1].isnan().all()


# What is given as third is not read by a rule with one tensor.
MIXTURES = [
    *(("sgd_decayed", (w, a, a)) for w, a in itertools.permutations(DTYPES, 2)),
    *((rule, d) for d in itertools.product(DTYPES, repeat=3) if len({*d}) > 1 for rule in ("nesterov", "adamw")),
]


def check_mixed(rule, dtypes, shapes):
    lists = lists_of(shapes, RULES[rule], [DTYPES[d] for d in dtypes])
    assert_right(functional.update_sums(*lists), *lists)


@pytest.mark.parametrize(("rule", "dtypes"), MIXTURES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_mixed_dtypes(rule, dtypes):
    check_mixed(rule, dtypes, [(3, 5), (129,), (511,), (513,)])


@pytest.mark.parametrize(
    "dtypes", [("f32", "bf16", "f16"), ("bf16", "f16", "f64"), ("f16", "f64", "f32")], ids="-".join
)
@pytest.mark.parametrize("rule", ["sgd_decayed", "nesterov", "adamw"])
def test_mixed_dtypes_over_a_chunk(rule, dtypes, isa):
    check_mixed(rule, dtypes, [(3, 5), (CHUNK + 17,)])


def test_a_mixture_has_the_bits_of_its_widened_tensors(isa):
    lists = lists_of([(CHUNK + 17,)], RULES["adamw"], [torch.bfloat16, torch.float32, torch.float16])
    wide = [[t.float() for t in tensors] for tensors in lists[:3]]
    for x, y in zip(functional.update_sums(*lists), functional.update_sums(*wide, lists[3]), strict=True):
        assert same_bits(x, y)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, which, isa):
    """Any argument may have any strides."""
    lists = lists_of([(3, 5), (17,), (2, 3, 5, 7), (2, 3, 2, 3, 3)], RULES["nesterov"], [torch.float32] * 3)
    lists[which][:] = [t if (other := in_layout(t, layout)) is None else other for t in lists[which]]
    assert_right(functional.update_sums(*lists), *lists)


@pytest.mark.parametrize("where", ["params", "first", "second"])
@pytest.mark.parametrize(("size", "dtype"), thinned([(1,), (17,), (CHUNK + 1,)], [(17,)]))
def test_non_finite_elements(size, dtype, where, isa):
    """That tensor has a row of NaN with the number of elements it concerns; the others are unaffected."""
    lists = lists_of([(5,), size, (7,)], RULES["adamw"], [DTYPES[dtype]] * 3)
    alone = functional.update_sums(*([t[0], t[2]] for t in lists))
    tensor = lists[("params", "first", "second").index(where)][1]
    tensor[-1] = math.inf if where == "params" else math.nan
    tensor[0] = math.nan
    rows, squares = functional.update_sums(*lists)
    assert rows[1, :4].isnan().all()
    assert rows[1, 4] == min(*size, 2)
    assert squares[:, 1].isnan().all()
    assert same_bits(rows[[0, 2]], alone[0])
    assert same_bits(squares[:, [0, 2]], alone[1])


def test_an_element_is_counted_once_where_both_are_bad(isa):
    w, a = torch.tensor([math.nan, 1.0, 2.0]), torch.tensor([math.nan, math.inf, 0.0])
    rows, _ = functional.update_sums([w], [a], [None], [GIVEN])
    assert rows[0, 4] == 2


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_eps_may_be_zero(rows, isa):
    """The padding of the last lanes divides nothing by nothing."""
    rule = UpdateRule(0.5, adaptive=True)
    a = torch.arange(1.0, rows + 1)
    got, squares = functional.update_sums([torch.zeros(rows)], [a], [a * a], [rule], gradients=[a])
    assert got[0].tolist() == [0.25 * rows, 0, 0.5, 0, 0]
    assert squares[NORMALIZED, 0] == squares[RATIO, 0] == 1


@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_squares_of_float32_neither_vanish_nor_overflow(value, isa):
    rows, _ = functional.update_sums([torch.full((35,), value)], [torch.full((35,), value)], [None], [GIVEN])
    expected = 35 * float(torch.tensor(value)) ** 2
    assert_close(rows[0, [0, 3]], torch.full((2,), expected, dtype=torch.float64), eps=eps_of(torch.float64), k=40)


def test_float64_squares_may_overflow(isa):
    """Every element is finite, so nothing is called non-finite; the sum is infinite."""
    w = torch.full((3,), 1e200, dtype=torch.float64)
    rows, _ = functional.update_sums([w], [w], [None], [GIVEN])
    assert rows[0].tolist() == [math.inf, 0, 1e200, math.inf, 0]


def test_of_step_inverts_the_step():
    w_prev, s = values((100,), torch.float64, 1), values((100,), torch.float64, 2)
    for shrink in (0.0, 1e-6, 0.3, -0.2, 1.5):
        rule = UpdateRule.of_step(0.1, shrink=shrink)
        w = (1 - shrink) * w_prev - 0.1 * s
        rows, _ = reference.update_sums([w], [s], [None], [rule])
        assert_close(rows[0, 0], (w - w_prev).square().sum(), eps=1e-14)
    with pytest.raises(ValueError, match="less than a tenth"):
        UpdateRule.of_step(0.1, shrink=0.95)


# ---- on a device

DEVICE_CHUNK = 16384  # kCudaChunk
DEVICE_SIZES = [(), (0, 4), (1,), (3,), (4,), (5,), (1023,), (1024,), (1028,), (DEVICE_CHUNK - 1,), (DEVICE_CHUNK + 5,)]


def moved(lists, device):
    """Tensors on another device, with their rules."""
    return [[None if t is None else t.to(device) for t in tensors] for tensors in lists[:3]] + [lists[3]]


def assert_as_on_the_cpu(got, lists, error, **asked):
    """Sums as close as their order allows, largest movements and counts the same, bit for bit."""
    (rows, squares), expected = (t.cpu() for t in got), functional.update_sums(*moved(lists, "cpu"), **asked)
    for mine, theirs in ((rows, expected[0]), (squares, expected[1])):
        assert_close(mine, theirs, eps=error, k=1)
    for column in (2, 4):
        assert same_bits(rows[:, column], expected[0][:, column])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rule", "dtype"), [(rule, dtype) for rule in RULES for dtype in DTYPES if rule in FORMS or dtype == "f32"]
)
def test_on_cuda(rule, dtype):
    lists = lists_of(DEVICE_SIZES, RULES[rule], [DTYPES[dtype]] * 3)
    found = functional.update_sums(*moved(lists, "cuda"))
    assert all(tensor.is_cuda for tensor in found)
    assert_right(tuple(tensor.cpu() for tensor in found), *lists)
    assert_as_on_the_cpu(found, lists, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rule", "dtypes"),
    [
        *((rule, ("f32", "f32", "f32")) for rule in FORMS),
        *(("adamw", (dtype, dtype, dtype)) for dtype in ("f64", "bf16", "f16")),
        *(("adamw", dtypes) for dtypes in (("bf16", "f32", "bf16"), ("bf16", "bf16", "f32"), ("f32", "f64", "f32"))),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_gradients_and_parameters_before_the_step_on_cuda(rule, dtypes):
    own, *others = (DTYPES[d] for d in dtypes)
    lists, asked = lists_of(DEVICE_SIZES, RULES[rule], [own] * 3), asked_for(DEVICE_SIZES, others)
    asked["gradients"][3] = asked["previous"][4] = None
    for names in (("gradients", "previous"), ("gradients",), ("previous",)):
        some = {name: asked[name] for name in names}
        there = {name: [None if t is None else t.cuda() for t in tensors] for name, tensors in some.items()}
        found = functional.update_sums(*moved(lists, "cuda"), **there)
        assert_right(tuple(tensor.cpu() for tensor in found), *lists, **some)
        assert_as_on_the_cpu(found, lists, 1e-12, **some)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["gradients", "previous"])
def test_what_is_asked_for_may_lie_anywhere_on_cuda(which):
    shapes = [(1030,)] * 60  # of more tensors than a launch takes
    lists, asked = lists_of(shapes, RULES["adamw"], [torch.float32] * 3), asked_for(shapes, [torch.float32] * 2)
    there = {name: [t.cuda() for t in tensors] for name, tensors in asked.items()}
    expected = functional.update_sums(*moved(lists, "cuda"), **there)
    there[which] = [t.new_empty(t.numel() + 1)[1:].copy_(t) for t in there[which]]
    for x, y in zip(functional.update_sums(*moved(lists, "cuda"), **there), expected, strict=True):
        assert same_bits(x, y)
    assert_as_on_the_cpu(expected, lists, 1e-12, **asked)


@pytest.mark.gpu
def test_mixtures_on_cuda():
    """All dtypes and forms in one call: more tensors, and more rules, than a launch takes."""
    lists = [[], [], [], []]
    for k, (name, dtypes) in enumerate(MIXTURES):
        for mine, more in zip(lists, lists_of([(5 * k % 23,)], RULES[name], [DTYPES[d] for d in dtypes]), strict=True):
            mine += more
    lists[3] = [rule if k % 3 else rule._replace(rate=0.01 * (k + 1)) for k, rule in enumerate(lists[3])]
    found = functional.update_sums(*moved(lists, "cuda"))
    assert_right(tuple(tensor.cpu() for tensor in found), *lists)
    assert_as_on_the_cpu(found, lists, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_on_cuda_do_not_depend_on_alignment_or_dtype(dtype):
    lists = moved(lists_of([(3,), (1030,), (DEVICE_CHUNK + 7,)], RULES["adamw"], [DTYPES[dtype]] * 3), "cuda")
    expected = functional.update_sums(*lists)
    for which in range(3):
        shifted = list(lists)
        shifted[which] = [t.new_empty(t.numel() + 1)[1:].copy_(t) for t in lists[which]]
        for x, y in zip(functional.update_sums(*shifted), expected, strict=True):
            assert same_bits(x, y)
    if dtype in ("bf16", "f16"):
        wide = [[t.float() for t in tensors] for tensors in lists[:3]]
        for x, y in zip(functional.update_sums(*wide, lists[3]), expected, strict=True):
            assert same_bits(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_values_that_are_not_finite_on_cuda(dtype):
    lists = lists_of([(5,), (1030,), (7,), (3 * DEVICE_CHUNK,), (17,)], RULES["adamw"], [DTYPES[dtype]] * 3)
    lists[0][1][-1], lists[1][1][0], lists[2][3][DEVICE_CHUNK] = math.inf, math.nan, math.nan
    lists[0][3][-1] = lists[1][3][-1] = -math.inf
    assert_as_on_the_cpu(functional.update_sums(*moved(lists, "cuda")), lists, 1e-12)


@pytest.mark.gpu
def test_float64_squares_may_overflow_on_cuda():
    w = torch.full((3,), 1e200, dtype=torch.float64)
    lists = [[w], [w], [None], [GIVEN]]
    assert_as_on_the_cpu(functional.update_sums(*moved(lists, "cuda")), lists, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_numbers_of_a_rule_may_lie_on_cuda(rule, dtype):
    """They are read there, and nothing waits for them."""
    lists = moved(lists_of([(17,), (1030,)], RULES[rule], [torch.float32] * 3), "cuda")
    there = [
        UpdateRule(*(torch.tensor(x, dtype=dtype, device="cuda") for x in rule[:6]), *rule[6:]) for rule in lists[3]
    ]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = functional.update_sums(*lists[:3], there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rounded = [UpdateRule(*(float(x) for x in rule[:6]), *rule[6:]) for rule in there]
    for x, y in zip(found, functional.update_sums(*lists[:3], rounded), strict=True):
        assert same_bits(x, y)
    with pytest.raises(ValueError, match=r"^rules\[0\]: has a number on another device than params\[0\]"):
        functional.update_sums(*moved(lists, "cpu")[:3], there)


@pytest.mark.gpu
def test_update_sums_can_be_captured_in_a_graph():
    """A replay reads what lies in the tensors then, and the window's table of a replayed step takes in every one."""
    lists = moved(lists_of([(17,), (DEVICE_CHUNK + 5,)], RULES["adamw"], [torch.float32] * 3), "cuda")
    functional.update_sums(*lists)
    table, expected = torch.zeros(4, 2, dtype=torch.float64, device="cuda"), torch.zeros(4, 2, dtype=torch.float64)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, squares = functional.update_sums(*lists)
        _core.observe_squares(squares[NORMALIZED], table)
    for step in range(3):
        for k, first in enumerate(lists[1]):
            first.copy_(values(first.shape, torch.float32, 100 + 10 * step + k))
        if step == 1:
            lists[1][0][3] = math.nan
        graph.replay()
        assert_as_on_the_cpu((rows, squares), lists, 1e-12)
        _core.observe_squares(squares[NORMALIZED].cpu(), expected)
    assert same_bits(table, expected)
    assert table[3].tolist() == [2, 3]
    roots = squares[NORMALIZED].cpu().sqrt()
    assert same_bits(table[0].cpu(), roots)
    assert bool((table[2].cpu() >= roots).all())


def test_a_table_of_roots():
    table = torch.zeros(4, 3, dtype=torch.float64)
    for squares in ([4.0, 1.0, math.nan], [9.0, math.nan, math.inf], [1.0, 0.0, math.nan]):
        _core.observe_squares(torch.tensor(squares, dtype=torch.float64), table)
    assert table.tolist() == [[1, 0, 0], [6, 1, 0], [3, 1, 0], [3, 2, 0]]
    with pytest.raises(ValueError, match=r"^table: expected .* \[4, 3\] beside squares, got float64 \[3, 4\]"):
        _core.observe_squares(table[0].clone(), table.t().contiguous())
    with pytest.raises(ValueError, match=r"^squares: expected a contiguous float64 tensor .*, got float32"):
        _core.observe_squares(torch.zeros(3), table)


# ---- refusals that the table of operations does not have


def test_rules_are_refused_in_words():
    w = [torch.zeros(3)]
    with pytest.raises(TypeError, match=r"^rules: expected a list or tuple of rules, got dict"):
        functional.update_sums(w, w, w, {0: GIVEN})
    with pytest.raises(TypeError, match=r"^rules\[0\]: expected a lipcore.update_rules.UpdateRule, got dict"):
        functional.update_sums(w, w, w, [{}])
    with pytest.raises(TypeError, match=r"^rules\[0\]: expected a lipcore.update_rules.UpdateRule, got tuple"):
        functional.update_sums(w, w, w, [(1.0,)])
    with pytest.raises(ValueError, match=r"^rules: expected 1 rules, one per parameter, got 2"):
        functional.update_sums(w, w, w, [GIVEN, GIVEN])
