"""set_reference(): distance, directness and the cumulative path from another point; nothing else changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import DTYPES, assert_same_state
from paths import Path, check, mlp, observe, tensors_of, train, walk
from torch import Tensor, nn

from lipcore import Trajectory

WINDOW = ("update_norm", "update_ratio", "max_abs_update", "path_length", "variance", "weight_norm")
LONG = 5e-6


def values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("before", "after"), [(0, 3), (5, 4), (511, 2), (512, 3), (5, 520)])
@pytest.mark.parametrize("to", ["now", "earlier"])
def test_from_another_point(to: str, before: int, after: int) -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    earlier = {name: tensor + 0.5 for name, tensor in tensors.items()}
    walk(tensors, before, observe(trajectory, path))
    reference = values(tensors) if to == "now" else earlier
    trajectory.set_reference(None if to == "now" else earlier)
    walk(tensors, after, observe(trajectory, path), seed=2)
    check(trajectory.compute(), path, reference=reference, since=before, tolerance=LONG)
    trajectory.reset()
    walk(tensors, 3, observe(trajectory, path), seed=3)
    check(trajectory.compute(), path, start=before + after, reference=reference, since=before, tolerance=LONG)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_every_dtype(dtype: str) -> None:
    """The reference is kept in the parameter's own dtype: what was given is rounded to it once."""
    tensors = tensors_of(DTYPES[dtype])
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    walk(tensors, 20, observe(trajectory, path))
    reference = tensors_of(torch.float64, seed=5)
    trajectory.set_reference(reference)
    walk(tensors, 20, observe(trajectory, path), seed=2)
    rounded = {name: value.to(DTYPES[dtype]) for name, value in reference.items()}
    check(trajectory.compute(), path, reference=rounded, since=20, tolerance=1e-12 if dtype == "f64" else LONG)


@pytest.mark.parametrize("steps", [3, 600])
def test_what_the_open_window_keeps(steps: int) -> None:
    """Its path, its norms and (to 1e-6) its variance are those without the call, also right after it."""
    tensors = tensors_of()
    trajectory, twin = Trajectory(tensors.items()), Trajectory(tensors.items())

    def step() -> None:
        trajectory.update()
        twin.update()

    walk(tensors, steps, step)
    trajectory.set_reference({name: t + 0.1 * torch.randn(t.shape) for name, t in tensors.items()})
    for more in (0, 1, 5):
        walk(tensors, more, step, seed=2)
        ours, theirs = trajectory.compute(), twin.compute()
        for quantity in WINDOW:
            for place, reducers in theirs[quantity].items():
                for reducer, number in reducers.items():
                    mine = ours[quantity][place][reducer]
                    if reducer != "cumulative":
                        assert mine.value == pytest.approx(number.value, rel=1e-6), (quantity, place, reducer)
                        assert mine.valid


def test_right_after_the_call() -> None:
    """The distance is known at once; the path since then, and directness, begin with the next step."""
    tensors = tensors_of()
    trajectory = Trajectory(tensors.items())
    walk(tensors, 4, trajectory.update)
    reference = tensors_of(seed=9)
    trajectory.set_reference(reference)
    result = trajectory.compute()
    truth = math.sqrt(sum(float((tensors[n].double() - reference[n].double()).square().sum()) for n in tensors))
    assert result.distance["total"].last.value == pytest.approx(truth, rel=1e-6)
    assert result.distance["total"].last.valid
    assert not result.path_length["total"].cumulative.valid
    assert not result.directness["total"].last.valid


@pytest.mark.parametrize("away", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("steps", [200, 1300])
def test_a_far_reference_costs_nothing(steps: int, away: float) -> None:
    """x standard deviations away: variance, update norms and paths are as with a near one."""
    torch.manual_seed(0)
    tensor = torch.zeros(300)
    stats = ["variance", "path_length", "distance", "element_variance"]
    trajectory, path = Trajectory([("w", tensor)], stats=stats), Path({"w": tensor})
    reference = {"w": torch.full((300,), away)}
    trajectory.set_reference(reference)  # the points have standard deviation 1
    for _ in range(steps):
        tensor.normal_()
        trajectory.update()
        path.look()
    result, truth = trajectory.compute(), path.expected(["w"], reference=reference)
    assert result.variance["w"].last.value == pytest.approx(float(truth["variance"]["last"]), rel=1e-6)
    assert result.path_length["w"].sum.value == pytest.approx(float(truth["path_length"]["sum"]), rel=1e-6)
    assert result.distance["w"].last.value == pytest.approx(float(truth["distance"]["last"]), rel=1e-6)
    assert torch.allclose(trajectory.element_variance()["w"].double(), path.element_variance("w"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("away", [1e2, 1e4])
def test_the_documented_loss_of_sliding_windows_with_a_far_reference(away: float) -> None:
    """The means of closed blocks are offsets in float32: 1e-7 x of the variance."""
    torch.manual_seed(0)
    tensor = torch.zeros(300)
    trajectory, path = Trajectory([("w", tensor)], window_blocks=3), Path({"w": tensor})
    trajectory.set_reference({"w": torch.full((300,), away)})
    for step in range(200):
        tensor.normal_()
        trajectory.update()
        path.look()
        if step in (70, 140):
            trajectory.advance()
    result, truth = trajectory.compute(), path.expected(["w"])
    assert result.variance["w"].last.value == pytest.approx(float(truth["variance"]["last"]), rel=1e-7 * away + 1e-6)


@pytest.mark.parametrize("block", [4, 600])
def test_in_sliding_windows(block: int) -> None:
    """Closed blocks follow: the variance over all of them does not change."""
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items(), window_blocks=3), Path(tensors)
    for seed in range(2):
        walk(tensors, block, observe(trajectory, path), seed=seed)
        trajectory.advance()
    walk(tensors, block // 2, observe(trajectory, path), seed=2)
    reference = tensors_of(seed=4)
    trajectory.set_reference(reference)
    since = len(path.points) - 1
    walk(tensors, block - block // 2, observe(trajectory, path), seed=3)
    check(trajectory.compute(), path, reference=reference, since=since, tolerance=LONG)
    trajectory.advance()
    walk(tensors, block, observe(trajectory, path), seed=5)
    settings: dict[str, Any] = {"reference": reference, "since": since, "from_start": False}
    check(trajectory.compute(), path, start=block, tolerance=LONG, **settings)


def test_variance_per_element_stays() -> None:
    tensors = tensors_of()
    trajectory, path = Trajectory(tensors.items(), stats=["element_variance"]), Path(tensors)
    walk(tensors, 700, observe(trajectory, path))
    trajectory.set_reference({name: t + 0.1 for name, t in tensors.items()})
    walk(tensors, 10, observe(trajectory, path), seed=2)
    for name, found in trajectory.element_variance().items():
        assert torch.allclose(found.double(), path.element_variance(name), rtol=1e-4, atol=0)


# ---- where it comes from

NAMES: dict[str, Callable[[str], str]] = {
    "plain": lambda name: name,
    "ddp": lambda name: f"module.{name}",
    "compile": lambda name: f"_orig_mod.{name}",
    "compiled_ddp": lambda name: f"_orig_mod.module.{name}",
    "ddp_of_compiled": lambda name: f"module._orig_mod.{name}",
    "compiled_part": lambda name: name.replace("2.", "2._orig_mod."),
    "checkpoint": lambda name: name.replace("0.", "0._checkpoint_wrapped_module."),
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}",
}


@pytest.mark.parametrize("wrapper", NAMES)
def test_from_a_state_dict_of_a_wrapped_model(wrapper: str) -> None:
    model, other = mlp(), mlp(seed=3)
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    state = {NAMES[wrapper](name): value for name, value in other.state_dict().items()}
    trajectory.set_reference(state | {"running_mean": torch.zeros(3)})
    train(model, 4, observe(trajectory, path))
    check(trajectory.compute(), path, reference=dict(other.named_parameters()))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_from_another_module(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, other = mlp(), mlp(seed=3).double()
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    reference = {name: p.detach().float() for name, p in other.named_parameters()}
    trajectory.set_reference(wrap(other))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(77)  # it was copied
    train(model, 4, observe(trajectory, path))
    check(trajectory.compute(), path, reference=reference)


def test_frozen_parameters_of_another_module_and_transposed_ones() -> None:
    model = nn.Linear(6, 1)
    model.weight = nn.Parameter(torch.randn(6, 1).t())
    other = nn.Linear(6, 1).requires_grad_(False)
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    trajectory.set_reference(other)
    train(model, 4, observe(trajectory, path))
    check(trajectory.compute(), path, reference=dict(other.named_parameters()))


# ---- refusals


def broken(change: Callable[[dict[str, Any]], object], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    state = {name: value.to(dtype) for name, value in mlp(seed=3).state_dict().items()}
    change(state)
    return state


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "missing": (broken(lambda s: s.pop("2.bias")), ValueError, "reference: has no tensor for parameter '2.bias'"),
    "not_a_tensor": (broken(lambda s: s.update({"2.bias": 3.0})), ValueError, r"reference: .*'2\.bias'"),
    "shape": (broken(lambda s: s.update({"2.bias": torch.zeros(9)})), ValueError,
              r"reference: '2\.bias' has shape \[9\], expected \[8\]"),
    "nan": (broken(lambda s: s["2.bias"].fill_(math.nan)), ValueError, r"reference: '2\.bias' .*not finite"),
    "infinite": (broken(lambda s: s["4.weight"].fill_(-math.inf)), ValueError, r"reference: '4\.weight' .*not finite"),
    "too_large": (broken(lambda s: s["4.weight"].fill_(1e39), torch.float64), ValueError,
                  r"'4\.weight' .*not finite in torch\.float32"),
    "another_model": (nn.Linear(3, 3), ValueError, r"reference: has no tensor for parameter '0\.weight'"),
    "text": ("checkpoint.pt", TypeError, "reference: expected a module or a state_dict, got str"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_references_that_are_refused(case: str) -> None:
    """By name, with nothing changed."""
    reference, error, words = REFUSED[case]
    model = mlp()
    trajectory = Trajectory(model)
    train(model, 3, trajectory.update)
    before = copy.deepcopy(trajectory.state_dict())
    with pytest.raises(error, match=words):
        trajectory.set_reference(reference)
    assert_same_state(trajectory.state_dict(), before)


def test_now_is_refused_while_it_is_not_finite() -> None:
    model = mlp()
    trajectory = Trajectory(model)
    train(model, 3, trajectory.update)
    before = trajectory.state_dict()
    with torch.no_grad():
        model[2].bias[1] = math.nan
    with pytest.raises(ValueError, match=r"reference: '2\.bias' .*not finite"):
        trajectory.set_reference()
    assert_same_state(trajectory.state_dict(), before)


def test_without_copies_there_is_no_reference() -> None:
    with pytest.raises(ValueError, match="reference: mode 'updates' keeps no reference point"):
        Trajectory(mlp(), mode="updates", source="snapshot").set_reference()
    with pytest.raises(RuntimeError, match="no model"):
        Trajectory().set_reference()
