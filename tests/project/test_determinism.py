"""Bitwise the same numbers for any number of threads and any instruction set; the choice of one; fork."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import CHUNK, values
from few import few
from oracle import DTYPES, same_bits
from torch import nn
from ways import ISAS, assert_same_in_all_ways

from lipcore import Trajectory, _core, functional
from lipcore.functional.update_rules import UpdateRule

# Each takes a second and more: all instruction sets, with one thread and two.
MOST_DTYPES_LATER = [name if name == "f32" else pytest.param(name, marks=pytest.mark.ci) for name in DTYPES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_sample_norms(layout, dtype):
    shapes = [(5, 17), (1000, 129), (3, CHUNK + 1), (1, 7 * CHUNK + 5), (CHUNK + 3, 2)]
    tensors = [values(s, DTYPES[dtype]) for s in shapes]
    if layout == "strided":
        tensors = [t[:, ::2] for t in tensors]
    tensors[2][1, 3] = torch.nan
    assert_same_in_all_ways(lambda: [functional.sample_norms(t) for t in tensors])


@pytest.mark.parametrize("dtype", MOST_DTYPES_LATER)
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_per_sample_norms_without_matrices(layout, dtype):
    shapes = [(3, 5, 17), (1, 3 * CHUNK // 64 + 1, 64), (2, 700, 1030), (300, 9, 33), (1, 9, CHUNK + 1)]
    pairs = [tuple(values(s, DTYPES[dtype], seed) for seed in (0, 1)) for s in shapes]
    if layout == "strided":
        pairs = [(g[:, :, ::2], x[:, :, ::2]) for g, x in pairs]
    ids = [torch.arange(g.shape[0] * g.shape[1]).reshape(g.shape[:2]) ** 2 % 37 for g, _ in pairs]

    def compute():
        found = []
        for (g, x), tokens in zip(pairs, ids, strict=True):
            offsets = torch.tensor([0, 1, 1, g.shape[1]])
            found += [functional.affine_norms_sq(g, x), functional.channel_affine_norms_sq(g, x)]
            found += [functional.affine_norms_sq(g[0], x[0], offsets=offsets)]
            found += [functional.embedding_norms_sq(tokens, g), functional.outer_norms_sq([x, g], [g, g])]
            found += [functional.embedding_norms_sq(tokens, g, weights=x[..., 0], padding_idx=1)]
        g, x = (t[..., :40] for t in pairs[2])
        return [*found, functional.tied_cross(ids[2], g, x, g)]

    assert_same_in_all_ways(compute)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalized_norms(dtype):
    delta, output_grad = values((700, 301), DTYPES[dtype]), values((700,), DTYPES[dtype], 1)
    assert_same_in_all_ways(lambda: list(functional.normalized_norms(delta, output_grad)))


# Tensors of one task, of several chunks of one task, of several tasks, and groups of those; one with a NaN.
SIZES = (1, 17, CHUNK, CHUNK + 1, 4 * CHUNK, 4 * CHUNK + 1, 9 * CHUNK + 7, 300_003, 5, 40 * CHUNK)


@pytest.mark.parametrize("dtype", MOST_DTYPES_LATER)
def test_trajectory_step(dtype):
    sizes = SIZES if dtype == "f32" else SIZES[:-1]
    start = [values((n,), DTYPES[dtype], 1) for n in sizes]
    params = [(z + 0.1 * values((n,), DTYPES[dtype], 2)).to(DTYPES[dtype]) for z, n in zip(start, sizes, strict=True)]
    params[6][5] = torch.nan
    wide = torch.float64 if dtype == "f64" else torch.float32

    def compute():
        prev, deviation = [z.clone() for z in start], [torch.zeros(n, dtype=wide) for n in sizes]
        first = functional.trajectory_step(params, prev, deviation, 2)
        moved = [w * 0.875 for w in params]
        return [first, functional.trajectory_step(moved, prev, deviation, 3), *prev, *deviation]

    assert_same_in_all_ways(compute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [UpdateRule.of_step(0.1, 0.09, 1e-3), UpdateRule(0.1, eps=1e-8, adaptive=True)])
def test_update_sums(rule, dtype):
    sizes = SIZES if dtype == "f32" else SIZES[:-1]
    params, first, second = ([values((n,), DTYPES[dtype], i).abs() for n in sizes] for i in (1, 2, 3))
    first[6][5] = torch.nan
    second[7] = second[7].float()
    assert_same_in_all_ways(lambda: list(functional.update_sums(params, first, second, [rule] * len(sizes))))


@pytest.mark.parametrize("dtype", MOST_DTYPES_LATER)
def test_trajectory_metric(dtype):
    sizes = SIZES[:-1]

    def compute():
        generator = torch.Generator().manual_seed(0)
        model = nn.ParameterList(torch.randn(n, generator=generator).to(DTYPES[dtype]) for n in sizes)
        trajectory = Trajectory(model)
        for step in range(4):
            with torch.no_grad():
                for parameter in model:
                    parameter.mul_(0.875).add_(0.01)
                if step == 2:
                    model[5][3] = torch.inf
            trajectory.update()
            if step == 1:
                trajectory.reset()
        state = trajectory.state_dict()
        tracker = state["trackers"]["exact"]
        return [tracker["rows"], *(t for kinds in tracker["tensors"].values() for t in kinds.values())]

    assert_same_in_all_ways(compute)


# ---- float16, which the base instruction set converts by integer arithmetic

ALL_HALVES = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)


def test_float16_conversion():
    """All 65536 values as torch converts them; of a NaN only that it is one."""
    ours = torch.tensor([_core.float16_to_float(b) for b in range(65536)], dtype=torch.float64)
    theirs = ALL_HALVES.double()
    assert same_bits(ours, theirs)
    assert torch.equal(torch.signbit(ours), torch.signbit(theirs))


def test_float16_in_the_kernels(isa):
    """A single value's norm is its magnitude, exactly; and as a parameter, its step from 0."""
    truth = ALL_HALVES.double().abs()
    assert same_bits(functional.sample_norms(ALL_HALVES.reshape(-1, 1)), truth)
    finite = ALL_HALVES[ALL_HALVES.isfinite()]
    rows = finite.reshape(-1, 16).unbind()
    state = [[torch.zeros(16, dtype=d) for _ in rows] for d in (torch.float16, torch.float32)]
    got = functional.trajectory_step(rows, *state, 2)
    assert torch.equal(got[:, 2], finite.reshape(-1, 16).double().abs().amax(dim=1))
    assert torch.equal(torch.stack(state[1]), finite.reshape(-1, 16).float() / 2), "half of the first step is deviation"


def test_bfloat16_in_the_kernels(isa):
    every = ALL_HALVES.view(torch.bfloat16)
    assert same_bits(functional.sample_norms(every.reshape(-1, 1)), every.double().abs())


# ---- processes


def python(code, **environment):
    """Runs code in a fresh interpreter that finds lipcore as this one does."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


FORK = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
from lipcore import _core, functional
torch.set_num_threads(2)
x = torch.randn(8, 300_000)
lists = [[torch.zeros(300_000)] for _ in range(2)]  # made here: in the child torch itself would wait for its threads
here = functional.sample_norms(x).tolist()
row = functional.trajectory_step([x[0]], *[[t[0].clone()] for t in lists], 1).tolist()
assert _core.pool_size() == 2
child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that hangs dies, and the test fails
    fine = _core.pool_size() == 1 and functional.sample_norms(x).tolist() == here
    fine = fine and functional.trajectory_step([x[0]], *lists, 1).tolist() == row
    os._exit(0 if fine else 3)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert _core.pool_size() == 2 and functional.sample_norms(x).tolist() == here
sys.exit(code)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.ci
def test_a_forked_child_is_serial_and_right():
    """The pool's threads do not survive a fork; waiting for them would hang."""
    done = python(FORK)
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_an_import_error():
    done = python("import lipcore", LIPCORE_ISA="sse9")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ImportError" in last
    assert "LIPCORE_ISA" in last
    assert "'sse9'" in last
    assert all(name in last for name in ISAS), last


@pytest.mark.parametrize("choice", few(["base", "", *ISAS[1:]], 1))
def test_the_environment_chooses_the_instruction_set(choice):
    done = python("from lipcore import _core; print(_core.isa())", LIPCORE_ISA=choice)
    assert done.stdout.strip() == (choice or ISAS[-1]), done.stderr


@pytest.mark.parametrize("name", ["", "AVX2", "sse9", "base ", "x" * 300])
def test_use_isa_refuses_what_is_not_one(name):
    before = _core.isa()
    with pytest.raises(ValueError, match="choose one of base"):
        _core.use_isa(name)
    assert _core.isa() == before
