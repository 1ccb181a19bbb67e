"""The CUDA twins of sample_norms and trajectory_step: against float64, against the CPU, in streams and in graphs."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devices import set_capability, sized, slow_in_float64
from oracle import assert_close, same_bits
from torch import Tensor, nn

import lipcore
from lipcore import _core, functional
from lipcore.functional import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LENGTHS = [0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 2047, 2048, 2049]
CHUNK = 16384  # kCudaChunk: a block's share
SUM_ERROR = 1e-6  # differences are taken in float32, as on the CPU
NORM_ERROR = 1e-13
GROUPED_ERROR = 1e-7  # of 16-bit rows on devices that are slow in float64


@pytest.fixture
def cuda() -> torch.device:
    torch.manual_seed(0)
    return torch.device("cuda", torch.cuda.current_device())


def assert_relative(got: Tensor, truth: Tensor, error: float) -> None:
    assert_close(got, truth, eps=error, k=1)


def test_without_a_driver_the_module_says_that_there_is_no_device() -> None:
    code = "from lipcore import _core; print(_core.cuda_device_count())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0"


def test_only_operators_and_plans_ask_whether_there_is_cuda() -> None:
    """Else an object of a core without CUDA would not fit into the one of tests/cuda_on_cpu."""
    csrc = Path(__file__).parents[2] / "csrc"
    files = [file for file in csrc.rglob("*") if file.is_file()]
    asking = [file for file in files if "defined(LIPCORE_WITH_CUDA)" in file.read_text()]
    assert asking
    assert all(file.parent.name in ("ops", "trajectory") and file.suffix == ".cpp" for file in asking), asking


@pytest.mark.gpu
def test_the_core_sees_the_devices_torch_sees(cuda: torch.device) -> None:
    assert _core.cuda_device_count() == torch.cuda.device_count()


# ---- sample_norms

LAYOUTS = {
    "contiguous": lambda rows, length: torch.randn(rows, length),
    "unaligned": lambda rows, length: torch.randn(rows * length + 3)[3:].view(rows, length),
    "columns of a larger one": lambda rows, length: torch.randn(rows, length + 5)[:, 2 : length + 2],
    "transposed": lambda rows, length: torch.randn(length, rows).t(),
    "every other element": lambda rows, length: torch.randn(rows, 2 * length)[:, ::2],
    "expanded": lambda rows, length: torch.randn(rows, 1, length).expand(rows, 3, length),
    "permuted": lambda rows, length: torch.randn(rows, 3, length, 2).permute(0, 2, 3, 1)[:, :, 1:],
}


def whole_storage(x: Tensor) -> Tensor:
    return x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)


def on(device: torch.device, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x on the device in this dtype, with the strides and the offset it has."""
    return whole_storage(x).to(device, dtype, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def norm_error(dtype: torch.dtype) -> float:
    return GROUPED_ERROR if dtype.itemsize == 2 and slow_in_float64() else NORM_ERROR


def norms_in_float64(x: Tensor) -> Tensor:
    return x.cpu().double().reshape(x.shape[0], -1).pow(2).sum(1).sqrt() if x.shape[0] else torch.zeros(0)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_norms_of_every_length(cuda: torch.device, dtype: torch.dtype, layout: str) -> None:
    for rows in sized((0, 1, 3, 65), (0, 33)):
        for length in LENGTHS:
            x = on(cuda, LAYOUTS[layout](rows, length), dtype)
            assert_relative(functional.sample_norms(x), norms_in_float64(x), norm_error(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sample_norms_of_16_bit_numbers_in_groups(cuda: torch.device, dtype: torch.dtype) -> None:
    """On a device that is slow in float64 eight squares are added in float32, where they fit."""
    set_capability(89)
    assert slow_in_float64()
    for length in (7, 8, 33, 77, 2050, CHUNK + 9):
        x = torch.randn(5, length)
        x[3] = 0
        x[4, ::3] *= -0.0
        for scale in (1e-30, 1e-12, 1.0, 1e30) if dtype == torch.bfloat16 else (1e-7, 1.0, 1e4):
            scaled = (x * scale).to(dtype)
            expected = norms_in_float64(scaled)
            got = functional.sample_norms(scaled.to(cuda))
            assert_relative(got, expected, GROUPED_ERROR)
            moved = torch.zeros(5 * (length + 1) + 1, dtype=dtype)[1:].view(5, -1)[:, :length].copy_(scaled)
            assert same_bits(functional.sample_norms(on(cuda, moved, dtype)), got)
            scaled[2, length - 1] = math.inf
            scaled[1, 0] = math.nan
            got = functional.sample_norms(scaled.to(cuda))
            assert_relative(got, norms_in_float64(scaled), GROUPED_ERROR)
    x = torch.randn(3, 80).to(dtype)
    assert not same_bits(functional.sample_norms(x.to(cuda)), functional.sample_norms(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_norms_of_short_rows_change_no_bit_where_they_lie_apart(cuda: torch.device, dtype: torch.dtype) -> None:
    """Those that lie behind each other are read some at a time."""
    for rows, length in ((1, 1), (257, 10), (64, 32), (65, 31), (600, 3)):
        x = torch.randn(rows, length, dtype=torch.float64).to(dtype)
        apart = torch.zeros(rows, length + 3, dtype=dtype)[:, :length].copy_(x)
        got = functional.sample_norms(x.to(cuda))
        assert_relative(got, norms_in_float64(x), norm_error(dtype))
        assert same_bits(got, functional.sample_norms(on(cuda, apart, dtype)))
        offset = torch.zeros(rows * length + 1, dtype=dtype)[1:].view(rows, length).copy_(x)
        assert same_bits(got, functional.sample_norms(on(cuda, offset, dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "length"),
    [
        *[(2, CHUNK), (2, CHUNK + 1), (3, 3 * CHUNK + 77)],
        *sized([(1, 2**20 + 3), (2, 5 * 2**20), (300_001, 3)], [(1, 2**17 + 3), (30_001, 3)]),
    ],
)
def test_sample_norms_of_long_rows_and_many_rows(
    cuda: torch.device, dtype: torch.dtype, rows: int, length: int
) -> None:
    x = torch.randn(rows, length, device=cuda).to(dtype)
    assert_relative(functional.sample_norms(x), norms_in_float64(x), norm_error(dtype))
    y = torch.randn(2 * length, rows, device=cuda).to(dtype).t()[:, ::2]
    assert_relative(functional.sample_norms(y), norms_in_float64(y), norm_error(dtype))


@pytest.mark.gpu
def test_sample_norms_of_sliced_rows_of_every_size(cuda: torch.device) -> None:
    """Places come from products with a reciprocal; some, as that of 49, are too small: 49 * (1 / 49) < 1."""
    for size in range(1, 200):
        x = torch.randn(2, 3, size + 1, device=cuda)[..., :size]
        assert_relative(functional.sample_norms(x), norms_in_float64(x), NORM_ERROR)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_norms_do_not_depend_on_alignment_or_run(cuda: torch.device, dtype: torch.dtype) -> None:
    for length in (7, 129, 5001, 3 * CHUNK + 77):
        x = torch.randn(4, length, device=cuda).to(dtype)
        expected = functional.sample_norms(x)
        assert same_bits(functional.sample_norms(x), expected)
        for offset in (1, 2, 3):
            moved = torch.empty(x.numel() + offset, dtype=dtype, device=cuda)[offset:].view_as(x).copy_(x)
            assert same_bits(functional.sample_norms(moved), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [3, 100, 3000, 40000])
@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1.0, 1e200, 5e307], ids=str)
def test_sample_norms_keep_the_whole_range(cuda: torch.device, length: int, scale: float) -> None:
    x = torch.rand(3, length, dtype=torch.float64) * scale
    largest = x.amax(1, keepdim=True)
    error = 1e-12 if scale > 1e-300 else 1e-9
    assert_relative(functional.sample_norms(x.to(cuda)), (x / largest).norm(dim=1) * largest[:, 0], error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [5, 500, 5000, 50000])
def test_sample_norms_of_special_values(cuda: torch.device, dtype: torch.dtype, length: int) -> None:
    x = torch.ones(4, length)
    x[0, 0] = math.inf
    x[1, length - 1] = math.nan
    x[2] = 0
    expected = torch.tensor([math.inf, math.nan, 0, length**0.5], dtype=torch.float64)
    assert_relative(functional.sample_norms(x.to(cuda, dtype)), expected, norm_error(dtype))


@pytest.mark.gpu
def test_sample_norms_keep_a_vanishing_gradient(cuda: torch.device) -> None:
    x = torch.full((2, 3), 1e-24, device=cuda)
    assert_relative(functional.sample_norms(x), norms_in_float64(x), 1e-15)


@pytest.mark.gpu
def test_normalized_norms_stay_on_the_device(cuda: torch.device) -> None:
    delta, output_grad = torch.randn(65, 33), torch.randn(65)
    output_grad[3], output_grad[7] = 0, math.inf
    r, skipped = functional.normalized_norms(delta.to(cuda), output_grad.to(cuda))
    expected, expected_skipped = functional.normalized_norms(delta, output_grad)
    assert r.device == cuda
    assert int(skipped) == int(expected_skipped) == 2
    assert_relative(r, expected, 1e-13)


# ---- trajectory_step

STEP_SIZES = [
    0,
    1,
    2,
    3,
    7,
    15,
    16,
    17,
    63,
    64,
    65,
    129,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
    3 * CHUNK + 5,
    sized(2**20 + 3, 2**16 + 3),
]


def make_step(dtypes: list[torch.dtype], sizes: list[int], offset: int = 0) -> list[list[Tensor]]:
    """params, prev, deviation on the CPU: every size in every dtype, at an offset into a larger tensor."""
    lists: list[list[Tensor]] = [[], [], []]
    for size in sizes:
        for dtype in dtypes:
            prev = torch.randn(size).to(dtype)
            param = (prev + 0.01 * torch.randn(size)).to(dtype)
            deviation = (0.01 * torch.randn(size)).to(torch.float64 if dtype == torch.float64 else torch.float32)
            for tensors, values in zip(lists, (param, prev, deviation), strict=True):
                tensors.append(torch.zeros(size + offset + 4, dtype=values.dtype)[offset : offset + size].copy_(values))
    return lists


def to_device(device: torch.device, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[on(device, tensor, tensor.dtype) for tensor in tensors] for tensors in lists]


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1])
def test_trajectory_step_against_the_specification(cuda: torch.device, offset: int) -> None:
    lists = make_step(DTYPES, STEP_SIZES, offset)
    params, prev, deviation = lists
    bad = [i for i in range(len(params)) if params[i].numel() and i % 7 == 3]
    for k, i in enumerate(bad):
        params[i][31 * i % params[i].numel()] = (math.nan, math.inf, -math.inf)[k % 3]
    rows, new_prev, new_deviation = reference.trajectory_step(params, prev, deviation, 5)
    on_device = to_device(cuda, lists)
    got = functional.trajectory_step(*on_device, 5)
    on_cpu = functional.trajectory_step(*lists, 5)  # changes prev and deviation
    for i in range(len(params)):
        where = (i, params[i].numel(), params[i].dtype)
        assert_relative(got[i], rows[i], SUM_ERROR)
        assert_relative(got[i], on_cpu[i], 1e-12)
        assert same_bits(got[i, [2, 4]], on_cpu[i, [2, 4]]), where
        assert same_bits(on_device[1][i], new_prev[i].to(params[i].dtype)), where
        assert same_bits(on_device[1][i], prev[i]), where
        assert same_bits(on_device[2][i], deviation[i]), where
        if i not in bad and params[i].numel():
            assert (on_device[2][i].cpu().double() - new_deviation[i].double()).abs().max() < 1e-7, where
        for tensors in on_device:  # nothing was written beside a tensor
            storage = whole_storage(tensors[i])
            assert not storage[:offset].any(), where
            assert not storage[offset + params[i].numel() :].any(), where


@pytest.mark.gpu
def test_trajectory_step_of_large_tensors(cuda: torch.device) -> None:
    sizes = sized([3_000_000, 5, 20_000_000, 70_000, 8_000_000], [75_000, 5, 500_001, 70_000])
    lists = make_step([torch.float32], sizes)
    lists[0][2][-1] = math.nan
    lists[0][3][0] = math.inf
    on_device = to_device(cuda, lists)
    got = functional.trajectory_step(*on_device, 2)
    assert_relative(got, functional.trajectory_step(*lists, 2), 1e-11)
    for i in range(len(sizes)):
        assert same_bits(on_device[1][i], lists[1][i])
        assert same_bits(on_device[2][i], lists[2][i])


@pytest.mark.gpu
def test_trajectory_step_does_not_depend_on_alignment(cuda: torch.device) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    lists = make_step(dtypes, [100_003])
    aligned = to_device(cuda, lists)
    shifted = [[torch.zeros(t.numel() + 1, dtype=t.dtype, device=cuda)[1:].copy_(t) for t in ts] for ts in lists]
    assert same_bits(functional.trajectory_step(*aligned, 3), functional.trajectory_step(*shifted, 3))
    for a, b in zip(aligned[2], shifted[2], strict=True):
        assert same_bits(a, b)


@pytest.mark.gpu
def test_a_past_that_is_not_finite_is_seen_in_every_sum(cuda: torch.device) -> None:
    """Comparisons drop NaN, so the largest movement has to be told."""
    lists = make_step([torch.float32], [5, 3 * CHUNK])
    for prev in lists[1]:
        prev[3] = math.nan
    on_device = to_device(cuda, lists)
    got, on_cpu = functional.trajectory_step(*on_device, 2), functional.trajectory_step(*lists, 2)
    assert on_cpu[:, 2].isnan().all()
    assert_relative(got, on_cpu, 1e-12)


@pytest.mark.gpu
def test_trajectory_step_refuses_mixed_devices(cuda: torch.device) -> None:
    params, prev, deviation = make_step([torch.float32], [5, 6])
    with pytest.raises(ValueError, match=r"params\[1\]"):
        functional.trajectory_step(
            [params[0].to(cuda), params[1]], *([t.to(cuda) for t in ts] for ts in (prev, deviation)), 1
        )


# ---- the stateful form


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(301, 200)
        self.narrow = nn.Linear(200, 7)
        self.exact = nn.Linear(16, 3).double()
        self.half = nn.Linear(700, 90).bfloat16()
        self.short = nn.Linear(5, 5).half()


@pytest.fixture
def models(cuda: torch.device) -> tuple[nn.Module, nn.Module]:
    """The same model on the CPU and on the device."""
    model = Toy()
    return model, copy.deepcopy(model).to(cuda)


def move(models: tuple[nn.Module, ...], seed: int) -> None:
    """The same step for all of them, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            step = 0.01 * torch.randn(parameters[0].shape, generator=generator)
            target = (parameters[0].cpu() + step).to(parameters[0].dtype)
            for parameter in parameters:
                parameter.copy_(target)


def assert_same_trajectory(a: lipcore.Trajectory, b: lipcore.Trajectory, error: float = 1e-12) -> None:
    left, right = (t.state_dict()["trackers"]["exact"] for t in (a, b))
    assert_relative(left["rows"], right["rows"], error)
    for name, kinds in left["tensors"].items():
        for kind, tensor in kinds.items():
            assert same_bits(tensor, right["tensors"][name][kind]), f"{name}.{kind}"


@pytest.mark.gpu
def test_trajectory_agrees_with_the_cpu(models: tuple[nn.Module, nn.Module]) -> None:
    trajectories = [lipcore.Trajectory(model) for model in models]
    for step in range(8):
        move(models, step)
        with torch.no_grad():
            for model in models:
                if step == 2:
                    model.wide.weight[3, 3] = math.nan
                if step == 3:
                    model.wide.weight[3, 3] = 0.5
                if step == 4:  # another object at another address
                    model.narrow.weight = nn.Parameter(model.narrow.weight.detach().clone())
        for trajectory in trajectories:
            if step == 6:
                trajectory.reset()
            trajectory.update()
        assert_same_trajectory(*trajectories)


@pytest.mark.gpu
def test_variances_of_elements_agree_with_the_cpu(models: tuple[nn.Module, nn.Module]) -> None:
    trajectories = [lipcore.Trajectory(model, stats=["variance", "element_variance"]) for model in models]
    for step in range(6):
        move(models, step)
        for trajectory in trajectories:
            if step == 3:
                trajectory.reset()
            trajectory.update()
        here, there = (trajectory.element_variance() for trajectory in trajectories)
        for name, variance in here.items():  # torch divides by a reciprocal on a device
            assert_relative(there[name], variance, 2 * torch.finfo(variance.dtype).eps)


@pytest.mark.gpu
def test_update_neither_waits_nor_allocates(models: tuple[nn.Module, nn.Module]) -> None:
    model = models[1]
    trajectory = lipcore.Trajectory(model)
    trajectory.update()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # a second or so of work in front
        for _ in range(10):
            trajectory.update()
        waited = torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited, "update() waited for the device"
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_everything_runs_on_the_current_stream(models: tuple[nn.Module, nn.Module], cuda: torch.device) -> None:
    trajectories = [lipcore.Trajectory(model) for model in models]
    x = torch.zeros(3, 3 * CHUNK, device=cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    move(models[:1], 1)
    targets = [parameter.to(cuda) for parameter in models[0].parameters()]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(200_000_000)  # on any other stream what follows would see the old values
        for parameter, target in zip(models[1].parameters(), targets, strict=True):
            parameter.copy_(target)
        x.fill_(2)
        trajectories[1].update()
        norms = functional.sample_norms(x)
    stream.synchronize()
    trajectories[0].update()
    assert_same_trajectory(*trajectories)
    assert_relative(norms, torch.full((3,), 2 * (3 * CHUNK) ** 0.5, dtype=torch.float64), 1e-13)


@pytest.mark.gpu
def test_steps_can_be_captured_in_a_graph(models: tuple[nn.Module, nn.Module]) -> None:
    """Replayed steps, plain steps and steps of replaced parameters in turn are the same trajectory as on the CPU."""
    cpu, gpu = models
    trajectories = [lipcore.Trajectory(model) for model in models]
    deltas = [torch.zeros_like(parameter) for parameter in gpu.parameters()]
    captured = list(gpu.parameters())

    def step() -> None:
        with torch.no_grad():
            for parameter, delta in zip(captured, deltas, strict=True):
                parameter.add_(delta)
        trajectories[1].update()

    def step_both(seed: int, run: object) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for mine, theirs, delta in zip(cpu.parameters(), gpu.parameters(), deltas, strict=True):
                delta.copy_((0.01 * torch.randn(mine.shape, generator=generator)).to(mine.dtype))
                mine.copy_((theirs + delta).cpu())
        trajectories[0].update()
        run()  # type: ignore[operator]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step_both(0, step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()  # records, does not run
    for seed in range(1, 5):
        step_both(seed, graph.replay)
        assert_same_trajectory(*trajectories)
    step_both(5, step)
    trajectories[0].reset()
    trajectories[1].reset()
    step_both(6, graph.replay)  # the first step of a window, known to the device alone
    assert_same_trajectory(*trajectories)

    original = gpu.narrow.weight
    gpu.narrow.weight = nn.Parameter(original.detach().clone())
    with torch.no_grad():
        gpu.narrow.weight.add_(0.5)
        cpu.narrow.weight.copy_(gpu.narrow.weight.cpu())
    for trajectory in trajectories:
        trajectory.update()
    assert_same_trajectory(*trajectories)
    gpu.narrow.weight = original
    with torch.no_grad():
        original.copy_(cpu.narrow.weight)
    step_both(7, graph.replay)  # brings its own pointers
    assert_same_trajectory(*trajectories)


@pytest.mark.gpu
def test_stateless_ops_can_be_captured_in_a_graph(cuda: torch.device) -> None:
    lists = to_device(cuda, make_step([torch.float32, torch.bfloat16], [65, 3 * CHUNK + 5]))
    x = torch.randn(3, 3 * CHUNK, device=cuda)
    functional.trajectory_step(*lists, 2)
    functional.sample_norms(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, norms = functional.trajectory_step(*lists, 2), functional.sample_norms(x)
    x.copy_(torch.randn_like(x))
    for param in lists[0]:
        param.add_(0.01)
    expected = functional.trajectory_step([t.cpu() for t in lists[0]], *([t.cpu() for t in ts] for ts in lists[1:]), 2)
    graph.replay()
    assert_relative(rows, expected, 1e-11)
    assert_relative(norms, norms_in_float64(x), NORM_ERROR)


@pytest.mark.gpu
def test_a_model_that_was_moved_is_refused_by_name(models: tuple[nn.Module, nn.Module]) -> None:
    model = models[1]
    trajectory = lipcore.Trajectory(model)
    model.narrow.cpu()
    before = trajectory.state_dict()["trackers"]["exact"]["rows"]
    with pytest.raises(ValueError, match=r"narrow\.weight.*device"):
        trajectory.update()
    assert torch.equal(trajectory.state_dict()["trackers"]["exact"]["rows"], before)


@pytest.mark.gpu
def test_every_device_gets_its_own_work(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    x = torch.randn(3, 3 * CHUNK)
    model = Toy()
    moved = copy.deepcopy(model).to("cuda:1")
    trajectories = [lipcore.Trajectory(model), lipcore.Trajectory(moved)]
    move((model, moved), 1)
    for trajectory in trajectories:
        trajectory.update()
    assert_same_trajectory(*trajectories)
    assert_relative(functional.sample_norms(x.to("cuda:1")), norms_in_float64(x), NORM_ERROR)
    assert torch.cuda.current_device() == cuda.index
