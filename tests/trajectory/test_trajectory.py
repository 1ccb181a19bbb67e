"""The Trajectory metric against a float64 loop over real training, and what it does when the model changes under it."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import DTYPES, assert_same_state, same_bits
from paths import OPTIMIZERS, Path, check, cnn, mlp, observe, train
from torch import nn

import lipcore
from lipcore import Trajectory
from lipcore.trajectory.building import ALL
from lipcore.trajectory.describe import GRADIENTS, MOVES, OFFSETS
from lipcore.trajectory.groups import by_block
from lipcore.trajectory.sketch_tracker import ANGLES
from lipcore.trajectory.update_tracker import ROOTS

# ---- numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training(optimizer, dtype):
    model = mlp(DTYPES[dtype])
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    train(model, 40, observe(trajectory, path), optimizer)
    check(trajectory.compute(), path, tolerance=1e-12 if dtype == "f64" else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_convolutions(dtype):
    model = cnn(DTYPES[dtype])
    assert not model[0].weight.is_contiguous()
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    train(model, 10, observe(trajectory, path), shape=(3, 6, 6))
    check(trajectory.compute(), path)


def test_transposed_parameters():
    model = nn.Linear(6, 1)
    model.weight = nn.Parameter(torch.randn(6, 1).t())
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    train(model, 10, observe(trajectory, path))
    check(trajectory.compute(), path)


def test_parameters_of_several_dtypes():
    model = nn.Sequential(nn.Linear(6, 8).double(), nn.Linear(6, 8), nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3).half())
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
        observe(trajectory, path)()
    check(trajectory.compute(), path)


def test_large_parameters(two_threads):
    """Several chunks and several tasks a tensor."""
    tensors = {"a": torch.randn(3, 100_001), "b": torch.randn(70_000), "c": torch.randn(5)}
    trajectory, path = Trajectory(tensors.items()), Path(tensors)
    for _ in range(3):
        for tensor in tensors.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
        observe(trajectory, path)()
    check(trajectory.compute(), path)


@pytest.mark.parametrize("groups", [lambda name: "all", lambda name: name.rsplit(".")[-1], by_block])
def test_groups(groups):
    model = mlp()
    trajectory, path = Trajectory(model, groups=groups), Path(model.named_parameters())
    train(model, 5, observe(trajectory, path))
    check(trajectory.compute(), path, groups=groups)


def test_windows():
    """reset() begins a window at the last observed point; what is cumulative goes on."""
    model = mlp()
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    for window in range(4):
        start = len(path.points) - 1
        train(model, 7, observe(trajectory, path), seed=window)
        check(trajectory.compute(), path, start=start)
        check(trajectory.compute(), path, start=start)  # compute() changes nothing
        trajectory.reset()


def test_an_empty_window():
    """No step since the reset: no number, and it says so; what is cumulative stays."""
    model = mlp()
    trajectory = Trajectory(model)
    for moved in (False, True):
        result = trajectory.compute()
        for quantity in ("update_norm", "update_ratio", "max_abs_update", "variance"):
            for value in result[quantity]["total"].values():
                assert math.isnan(value.value)
                assert not value.valid
                assert value.count == 0
        assert result.path_length["total"].cumulative.valid == moved
        assert result.distance["total"].last.valid == moved
        train(model, 3, trajectory.update)
        trajectory.reset()


def test_a_model_that_does_not_move():
    trajectory = Trajectory(mlp())
    trajectory.update()
    result = trajectory.compute()
    assert result.path_length["total"].sum.value == 0
    assert result.variance["total"].last.value == 0
    assert result.update_ratio["total"].last.value == 0
    assert not result.directness["total"].last.valid


@pytest.mark.parametrize("every", [2, 5])
def test_every_steps(every):
    """Only every k-th point is seen, and the length is called what it then is: a chord length."""
    model = mlp()
    trajectory, path = Trajectory(model, every_steps=every), Path(model.named_parameters())
    train(model, 4 * every, observe(trajectory, path))
    check(trajectory.compute(), path, every=every)
    trajectory.reset()
    train(model, 3 * every, observe(trajectory, path), seed=5)
    check(trajectory.compute(), path, start=4 * every, every=every)


# ---- non-finite parameters


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_parameters(value):
    """Flagged, counted and left out of that step; every other tensor as if nothing had happened."""
    model, twin = mlp(), mlp()
    trajectory, unharmed = Trajectory(model), Trajectory(twin)
    train(model, 3, trajectory.update)
    train(twin, 3, unharmed.update)
    kept = model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight[1, :3] = value
    for _ in range(2):
        trajectory.update()
        unharmed.update()
    with torch.no_grad():
        model[2].weight.copy_(kept + 1)
        twin[2].weight.copy_(kept + 1)
    trajectory.update()
    unharmed.update()
    ours, theirs = trajectory.compute(), unharmed.compute()
    assert ours.nonfinite_steps["2.weight"].sum.value == 2
    assert ours.nonfinite_elements["2.weight"].sum.value == 6
    assert "non-finite" in ours.update_norm["2.weight"].last.note
    assert ours.update_norm["2.weight"].last.count == 4
    for quantity in ("path_length", "update_norm", "distance", "weight_norm"):
        for place in ("0.weight", "2.bias", "4.weight", "2.weight"):
            if quantity == "update_norm" and place == "2.weight":
                continue  # its mean is over the steps that were observed
            for reducer in ours[quantity][place]:
                assert ours[quantity][place][reducer].value == theirs[quantity][place][reducer].value
    for quantity in ours:
        for place in ours[quantity]:
            for reducer, number in ours[quantity][place].items():
                assert math.isfinite(number.value), f"{quantity}.{reducer} of {place}"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bound_to_non_finite_parameters(value):
    """Refused by name, or flagged; in no case do other tensors, groups or the total become NaN."""
    model = mlp()
    with torch.no_grad():
        model[0].bias[0] = value
    try:
        trajectory = Trajectory(model)
    except ValueError as error:
        assert "0.bias" in str(error)  # noqa: PT017
        return
    trajectory.update()
    with torch.no_grad():
        model[0].bias[0] = 0
        model[2].bias.add_(1)
    trajectory.update()
    trajectory.update()
    result = trajectory.compute()
    for quantity in result:
        for place in ("2.weight", "2.bias", "2", "total"):
            for reducer, number in result[quantity][place].items():
                assert math.isfinite(number.value) or not number.valid, f"{quantity}.{reducer} of {place}"


# ---- which parameters


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.again = self.a

    model = Tied()
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    assert trajectory.state_dict()["names"] == ["a.weight", "a.bias", "b.bias"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    observe(trajectory, path)()
    check(trajectory.compute(), path)
    assert trajectory.compute().path_length["total"].sum.value == pytest.approx(math.sqrt(36 + 6 + 6))


def test_frozen_parameters_are_skipped():
    model = mlp()
    model[0].weight.requires_grad_(False)
    trajectory = Trajectory(model)
    path = Path((n, p) for n, p in model.named_parameters() if p.requires_grad)
    assert "0.weight" not in trajectory.state_dict()["names"]
    train(model, 5, observe(trajectory, path))
    check(trajectory.compute(), path)


def test_pairs():
    tensors = {"w": torch.zeros(3), "layer.0.v": torch.zeros(2, 2, requires_grad=True)}
    trajectory, path = Trajectory(iter(tensors.items())), Path(tensors)
    with torch.no_grad():
        for _ in range(3):
            tensors["w"].add_(torch.tensor([1.0, 0.0, 2.0]))
            tensors["layer.0.v"].sub_(0.5)
            observe(trajectory, path)()
    check(trajectory.compute(), path)
    tensors["w"].data = torch.zeros(3)
    observe(trajectory, path)()
    check(trajectory.compute(), path)


def test_scalar_and_empty_parameters():
    tensors = {"scale": torch.tensor(2.0), "nothing": torch.zeros(0, 3)}
    trajectory = Trajectory(tensors.items())
    tensors["scale"].add_(3.0)
    trajectory.update()
    result = trajectory.compute()
    assert result.path_length["total"].sum.value == 3
    assert result.path_length["nothing"].sum.value == 0


def wrapped(model, how):
    class Wrapper(nn.Module):  # as DistributedDataParallel, without a process group
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, x):
            return self.module(x)

    if how == "ddp":
        return Wrapper()
    if how == "data_parallel":
        return nn.DataParallel(model)
    if how == "compile":
        return torch.compile(model, backend="eager")
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    if how == "checkpoint":
        return checkpoint_wrapper(model)
    for name in ("0", "2"):
        model._modules[name] = checkpoint_wrapper(model._modules[name])
    model._modules["4"] = torch.compile(model._modules["4"], backend="eager")
    if how == "inside":
        return model
    return torch.compile(wrapped(model, "ddp"), backend="eager")


@pytest.mark.parametrize("how", ["ddp", "data_parallel", "compile", "checkpoint", "inside", "all"])
def test_names_do_not_depend_on_wrappers(how):
    plain, inner = mlp(), mlp()
    model = wrapped(inner, how)
    expected, trajectory = Trajectory(plain), Trajectory(model)
    assert (
        trajectory.state_dict()["names"] == expected.state_dict()["names"] == [n for n, _ in plain.named_parameters()]
    )
    with torch.no_grad():
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            a.add_(0.5)
            b.add_(0.5)
    expected.update()
    trajectory.update()
    assert trajectory.compute().flat("tensor") == expected.compute().flat("tensor")


def test_no_trace_is_left_in_the_model():
    model = mlp()
    keys, attributes = list(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    Trajectory(model).update()
    assert list(model.state_dict()) == keys
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


# ---- a model that changes


def replace_object(model):
    model[0]._parameters["weight"] = nn.Parameter(model[0].weight.detach() + 1)


def replace_by_attribute(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1)


def load_assign(model):
    state = {k: v + 1 if k == "0.weight" else v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def assign_data(model):
    model[0].weight.data = model[0].weight.detach() + 1


def write_data(model):
    model[0].weight.data += 1


def swap(model):
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(model[0].weight.detach() + 1))


def through_a_view(model):
    with torch.no_grad():
        model[0].weight.view(-1).add_(1)


@pytest.mark.parametrize(
    "change", [replace_object, replace_by_attribute, load_assign, assign_data, write_data, swap, through_a_view]
)
def test_changes_are_seen(change):
    model = mlp()
    trajectory = Trajectory(model)
    trajectory.update()
    change(model)
    trajectory.update()
    result = trajectory.compute()
    assert result.update_norm["0.weight"].last.value == pytest.approx(math.sqrt(48), rel=1e-6)
    assert result.update_norm["total"].last.value == pytest.approx(math.sqrt(48), rel=1e-6)
    with torch.no_grad():
        model[0].weight.add_(1)
    trajectory.update()
    assert trajectory.compute().distance["0.weight"].last.value == pytest.approx(2 * math.sqrt(48), rel=1e-6)


REFUSED = {
    "deleted": lambda model: delattr(model[0], "weight"),
    "set_to_none": lambda model: model[0]._parameters.__setitem__("weight", None),
    "parametrized": lambda model: nn.utils.parametrizations.weight_norm(model[0]),
    "larger": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(9, 6))),
    "smaller": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(7, 6))),
    "reshaped": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(6, 8))),
    "resized_data": lambda model: setattr(model[0].weight, "data", torch.zeros(3)),
    "flattened_in_place": lambda model: setattr(model[0].weight, "data", model[0].weight.data.view(-1)),
    "transposed": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(6, 8).t())),
    "strided": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(8, 12)[:, ::2])),
    "to_double": lambda model: model.double(),
    "to_half": lambda model: model[0].bfloat16(),
    "to_meta": lambda model: model[0].to("meta"),
    "freed": lambda model: model[0].weight.untyped_storage().resize_(0),
    "shrunk": lambda model: model[0].weight.untyped_storage().resize_(8),
    "emptied": lambda model: setattr(model[0].weight, "data", torch.empty(0)),
}


@pytest.mark.parametrize("change", REFUSED)
def test_changes_that_do_not_fit_are_refused(change):
    """By name, with nothing updated, and the old parameter is welcome again."""
    model = mlp()
    trajectory, path = Trajectory(model), Path(model.named_parameters())
    train(model, 3, observe(trajectory, path))
    parameter, values = model[0].weight, model[0].weight.detach().clone()
    before = trajectory.state_dict()
    with torch.no_grad():
        model[4].bias.add_(1)  # a later parameter has moved: it must not be counted either
    REFUSED[change](model)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=r"0\.weight"):
            trajectory.update()
        after = trajectory.state_dict()
        assert_same_state(after["trackers"], before["trackers"])
    if change in ("deleted", "set_to_none", "larger", "smaller", "reshaped", "transposed", "strided"):
        model[0]._parameters["weight"] = parameter
        assert torch.equal(parameter, values)
        observe(trajectory, path)()
        check(trajectory.compute(), path)


def test_a_refused_step_is_not_counted_as_seen():
    """every_steps counts optimizer steps; a refusal in between must not shift it."""
    model = mlp()
    trajectory = Trajectory(model, every_steps=2)
    trajectory.update()
    parameter = model[0]._parameters["weight"]
    model[0]._parameters["weight"] = None
    with pytest.raises((ValueError, TypeError), match=r"0\.weight"):
        trajectory.update()
    model[0]._parameters["weight"] = parameter
    with torch.no_grad():
        parameter.add_(1)
    trajectory.update()
    assert trajectory.compute().update_norm["total"].last.count == 1


# ---- binding


def lazy(model):
    model.add_module("5", nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lazy, r"5\.weight.*uninitialised"),
        (lambda m: m[0].to("meta"), r"0\.weight.*meta"),
        (lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(8, 12)[:, ::2])), r"0\.weight.*strided"),
        (lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(1, 6).expand(8, 6))), r"0\.weight.*strided"),
        (lambda m: m.requires_grad_(False), "no trainable parameter"),
    ],
    ids=["lazy", "meta", "strided", "expanded", "frozen"],
)
def test_models_that_are_refused(change, words):
    model = mlp()
    change(model)
    trajectory = Trajectory()
    with pytest.raises((TypeError, ValueError), match=words):
        trajectory.bind(model)
    with pytest.raises(RuntimeError, match="no model"):
        trajectory.update()
    trajectory.bind(mlp())  # a failed bind leaves it free
    trajectory.update()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Trajectory(3), TypeError, "model: .*int"),
        (lambda: Trajectory([torch.zeros(3)]), (TypeError, ValueError), "model: "),
        (lambda: Trajectory([("w", None)]), TypeError, "w: .*None"),
        (lambda: Trajectory([("w", torch.zeros(2)), ("w", torch.zeros(2))]), ValueError, "'w'"),
        (lambda: Trajectory([("w", torch.zeros(2, dtype=torch.int64))]), TypeError, "w: .*int64"),
        (lambda: Trajectory([("w", torch.zeros(2)), ("v", torch.zeros(2, device="meta"))]), ValueError, "v: .*meta"),
        (lambda: Trajectory([]), ValueError, "model: "),
        (lambda: Trajectory(mlp(), every_steps=0), ValueError, "every_steps: .*0"),
        (lambda: Trajectory(mlp(), every_steps=1.5), ValueError, "every_steps: .*1.5"),
        (lambda: Trajectory(mlp(), groups="block"), TypeError, "groups: .*str"),
        (lambda: Trajectory(mlp(), groups=lambda name: None), ValueError, "groups: .*None"),
        (lambda: Trajectory().update(), RuntimeError, "no model"),
        (lambda: Trajectory().compute(), RuntimeError, "no model"),
        (lambda: Trajectory().reset(), RuntimeError, "no model"),
        (lambda: Trajectory().state_dict(), RuntimeError, "no model"),
        (lambda: Trajectory(mlp()).bind(mlp()), RuntimeError, "bound"),
        (lambda: Trajectory(mlp()).compute().no_such_quantity, AttributeError, "path_length"),
    ],
)
def test_wrong_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_plan_names_every_group_and_its_bytes():
    lines = {line.what: line for line in Trajectory(mlp()).plan()}
    assert {"0", "2", "4"} < set(lines)
    assert "exact copies" in lines["mode"].rule
    assert [lines[kind].bytes for kind in ("previous values", "reference", "mean")] == [4 * (56 + 72 + 9)] * 3
    half = {line.what: line.bytes for line in Trajectory(mlp(torch.bfloat16)).plan()}
    assert [half[kind] for kind in ("previous values", "reference", "mean")] == [2 * 137, 2 * 137, 4 * 137]


# ---- what it leaves alone


def test_training_is_bitwise_the_same_with_and_without():
    plain, observed = mlp(), mlp()
    trajectory = Trajectory(observed)
    train(plain, 10, lambda: None, "adam")
    train(observed, 10, trajectory.update, "adam")
    assert all(same_bits(a, b) for a, b in zip(plain.parameters(), observed.parameters(), strict=True))


def test_public_names():
    assert lipcore.Trajectory is Trajectory
    assert isinstance(Trajectory(), lipcore.Metric)


def test_every_quantity_that_can_be_asked_for_is_made_by_a_tracker() -> None:
    made = {*MOVES, *OFFSETS, *GRADIENTS, *ANGLES, *ROOTS, "element_variance"}
    assert set(ALL) == made
