"""Weighted sums of single samples' gradients, from the factors of one backward pass, against float64 gradients of one
sample at a time."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import few
from layer_cases import CASES, Case
from models_without_rules import WITHOUT_RULES, C, T
from per_sample_models import MODELS, Transformer, assert_equal, made, sum_loss, train, weights
from per_sample_oracle import gradients, samples_of, seeded, weighted_sum
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lipcore
from lipcore import Monitor

PerSampleGradNorms = functools.partial(lipcore.PerSampleGradNorms, keep_factors=True)


def assert_sums(found: dict[str, Tensor], rows: dict[str, Tensor], c: Tensor, tolerance: float = 1e-5) -> None:
    assert set(found) == set(rows)
    largest = max(float(c.abs().double() @ each.reshape(len(each), -1).norm(dim=1)) for each in rows.values())
    for name, each in rows.items():
        assert found[name].shape == each.shape[1:]
        error = float((found[name].double() - torch.tensordot(c.double(), each, 1)).norm())
        assert error <= tolerance * (
            float(c.abs().double() @ each.reshape(len(each), -1).norm(dim=1)) + 1e-3 * largest
        ), name


def check(
    model: nn.Module,
    arguments: tuple[Any, ...],
    reduction: str = "sum",
    tolerance: float = 1e-5,
    dim: int = 0,
    **options: Any,
) -> None:
    size = next(a.shape[dim] for a in arguments if isinstance(a, Tensor))
    rows = gradients(model, samples_of(arguments, size, dim), weighted_sum)
    c = torch.linspace(-1, 2, size)
    with PerSampleGradNorms(model, loss_reduction=reduction, batch_dim=dim, **options) as norms:
        total = weighted_sum(model(*arguments))
        (total / size if reduction == "mean" else total).backward()
        assert_sums(norms.weighted_sum(c), rows, c, tolerance)
        lengths = torch.stack([each.reshape(len(each), -1).norm(dim=1) for each in rows.values()]).norm(dim=0)
        clipped = norms.weighted_sum(lambda n: lipcore.clip_factors(n, float(lengths.median())))
        assert_sums(clipped, rows, lipcore.clip_factors(lengths, float(lengths.median())), tolerance)


@pytest.mark.parametrize("reduction", few(["mean", "sum"], 1))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_rule(case: Case, reduction: str) -> None:
    with seeded(1):
        check(case.make(), case.arguments(5), reduction)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, size: int) -> None:
    build, inputs = MODELS[name]
    check(made(build), (inputs(size),), "mean")


@pytest.mark.parametrize("name", WITHOUT_RULES)
def test_parameters_without_a_rule(name: str) -> None:
    check(made(WITHOUT_RULES[name]), (torch.randn(4, T, C),), max_replay_bytes=1 << 30)


def test_inside_the_weight_gradient() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    check(model, (torch.randn(4, 64, 5),), fused=True)


def test_batch_second_and_estimates() -> None:
    check(made(lambda: nn.Linear(5, 3)), (torch.randn(6, 4, 5),), dim=1)
    model, x = made(lambda: nn.Sequential(nn.Linear(5, 3))), torch.randn(4, 9, 5)
    rows, c = gradients(model, samples_of((x,), 4), weighted_sum), torch.randn(4)
    with PerSampleGradNorms(model, loss_reduction="sum", methods={"0": "estimate"}) as norms:
        weighted_sum(model(x)).backward()
        assert_sums(norms.weighted_sum(c), rows, c)


class Twice(nn.Module):
    """A layer that is called twice, on sequences of two lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(torch.tanh(self.a(x))[:, :3]))
        return y


def test_several_calls_of_a_layer() -> None:
    check(made(Twice), (torch.randn(4, 5, 6),), "mean")


class Checkpointed(Twice):
    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        if self.reentrant is None:
            return self.b(y)
        z: Tensor = checkpoint(self.b, y, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return z


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    model, x, c = made(Checkpointed), torch.randn(4, 5, 6), torch.randn(4)
    rows = gradients(model, samples_of((x,), 4), weighted_sum)
    model.reentrant = reentrant
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        weighted_sum(model(x)).backward()
        assert_sums(norms.weighted_sum(c), rows, c)


def test_autocast() -> None:
    model, x, c = made(MODELS["cnn"][0]), torch.randn(5, 1, 6, 6), torch.rand(5)
    rows = gradients(model, samples_of((x,), 5), sum_loss)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms, torch.autocast("cpu", torch.bfloat16):
        sum_loss(model(x).float()).backward()
        found = norms.weighted_sum(c)  # in float32 in the midst of autocast too
        norms.weighted_sum(torch.ones(5))
    assert {total.dtype for total in found.values()} == {torch.float32}
    for name, each in rows.items():
        error = (found[name] - torch.tensordot(c.double(), each, 1)).norm()
        assert error <= 0.1 * (c.double() @ each.reshape(len(each), -1).norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_type_of_the_sums(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        model(torch.randn(4, 3, dtype=dtype)).sum().backward()
        sums = norms.weighted_sum(torch.ones(4), set_grad=True)
    wide = torch.promote_types(dtype, torch.float32)
    assert {total.dtype for total in sums.values()} == {wide}
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == dtype


def test_all_ones_are_the_gradient() -> None:
    model, x = made(MODELS["tied transformer"][0]), torch.randint(11, (4, 5))
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        (sum_loss(model(x)) / 4).backward()
        for name, total in norms.weighted_sum(torch.full((4,), 0.25)).items():
            torch.testing.assert_close(total, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_a_mask_is_ones_and_zeros() -> None:
    model = made(MODELS["mlp"][0])
    with PerSampleGradNorms(model, loss_reduction="sum", keep_factors=True) as norms:
        sum_loss(model(torch.randn(4, 5))).backward()
        chosen = torch.tensor([True, False, True, True])
        found, expected = norms.weighted_sum(chosen), norms.weighted_sum(chosen.double())
        of_function = norms.weighted_sum(lambda n: n >= n.median())
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert set(of_function) == set(found)


def test_micro_batches_and_the_gradient() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(6, 5)
    rows = gradients(model, samples_of((x,), 6), sum_loss)
    lengths = torch.stack([each.reshape(len(each), -1).norm(dim=1) for each in rows.values()]).norm(dim=0)
    sums: dict[str, Tensor] = {}
    with PerSampleGradNorms(model, loss_reduction="mean", scale=1 / 3) as norms:
        for part in x.split(2):
            (sum_loss(model(part)) / 2 / 3).backward()
            found = norms.weighted_sum(lambda n: lipcore.clip_factors(n, 2.0), into=sums, set_grad=True)
            assert found is sums
    assert_sums(sums, rows, lipcore.clip_factors(lengths, 2.0))
    for name, total in sums.items():
        grad = model.get_parameter(name).grad
        assert torch.equal(grad, total)
        assert grad is not total  # the next pass adds to the gradient


def test_frozen_parameters() -> None:
    model, x, c = made(MODELS["mlp"][0]), torch.randn(4, 5), torch.rand(4)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        model[0].weight.requires_grad_(False)
        rows = gradients(model, samples_of((x,), 4), sum_loss)
        sum_loss(model(x)).backward()
        assert_sums(norms.weighted_sum(c), rows, c)


class OneOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y


def test_parameters_that_no_gradient_came_to() -> None:
    model = OneOfTwo()
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        model.b.weight.grad = torch.ones(3, 5)  # of another loss, which is in no sum
        sum_loss(model(torch.randn(4, 5))).backward()
        assert set(norms.weighted_sum(torch.rand(4), set_grad=True)) == {"a.weight", "a.bias"}
        assert model.b.weight.grad is None


def test_a_scaled_loss() -> None:
    model, x, c = made(MODELS["mlp"][0]), torch.randn(4, 5), torch.rand(4)
    rows = gradients(model, samples_of((x,), 4), sum_loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with PerSampleGradNorms(model, loss_reduction="mean", scaler=scaler) as norms:
        scaler.scale(sum_loss(model(x)) / 4).backward()
        assert_sums(norms.weighted_sum(c), rows, c)
        with pytest.raises(RuntimeError, match=r"set_grad: .*scaler.get_scale\(\)"):
            norms.weighted_sum(c, set_grad=True)
    # The remedy: what the scaler's step() makes of it is a step by the sums.
    optimizer, before = torch.optim.SGD(model.parameters(), 1.0), weights(model)
    with PerSampleGradNorms(model, loss_reduction="mean", scaler=scaler) as norms:
        scaler.scale(sum_loss(model(x)) / 4).backward()
        sums = norms.weighted_sum(c)
        for name, parameter in model.named_parameters():
            parameter.grad = sums[name] * scaler.get_scale()
        scaler.step(optimizer)
    moved = {name: old - new for (name, new), old in zip(model.named_parameters(), before, strict=True)}
    for name, difference in moved.items():
        torch.testing.assert_close(difference, sums[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_training_stays_the_same_bits(name: str) -> None:
    build, draw = MODELS[name]
    mine, inputs = made(build), [draw(size) for size in (4, 4, 3, 1)]
    theirs = copy.deepcopy(mine)
    train(theirs, torch.optim.SGD(theirs.parameters(), 0.01), inputs)
    optimizer = torch.optim.SGD(mine.parameters(), 0.01)
    metric = PerSampleGradNorms(loss_reduction="mean")
    with Monitor(mine, optimizer, metrics=[metric]):
        train(mine, optimizer, inputs)
    assert_equal(weights(mine), weights(theirs))


def test_the_norms_stay_the_same_bits() -> None:
    model, x = made(Transformer), torch.randint(11, (4, 5))
    found = []
    for keep in (False, True):
        with lipcore.PerSampleGradNorms(model, loss_reduction="sum", keep_factors=keep) as norms:
            sum_loss(model(x)).backward()
            found.append(norms.per_sample)
    assert torch.equal(*found)


# ---- what has no number


def test_passes_without_a_record_have_no_sums() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(x)).backward()
        before = model[0].weight.grad.clone()
        torch.autograd.grad(sum_loss(model(x)), list(model.parameters()))
        assert norms.broken
        assert all(total.isnan().all() for total in norms.weighted_sum(torch.ones(4)).values())
        with pytest.raises(RuntimeError, match=r"set_grad: .*every \.grad stays"):
            norms.weighted_sum(torch.ones(4), set_grad=True)
        assert torch.equal(model[0].weight.grad, before)


def test_a_sample_without_a_number_is_nan_unless_it_is_left_out() -> None:
    model = made(MODELS["mlp"][0])
    with PerSampleGradNorms(model, loss_reduction="sum", prove=False) as norms:
        sum_loss(model(torch.randn(4, 5))).backward()
        record = norms._last_norms().record
        record.norms_sq = {name: row.clone() for name, row in record.norms_sq.items()}
        record.norms_sq["0.weight"][1] = torch.nan
        sums = norms.weighted_sum(torch.ones(4))
        assert sums["0.weight"].isnan().all()
        assert sums["0.bias"].isfinite().all()
        assert norms.weighted_sum(torch.tensor([1.0, 0, 1, 1]))["0.weight"].isfinite().all()


def test_no_sample() -> None:
    model = made(MODELS["mlp"][0])
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(torch.randn(0, 5))).backward()
        assert all(not total.any() for total in norms.weighted_sum(torch.ones(0).double()).values())


def test_samples_in_unproved_passes_say_so() -> None:
    model = made(MODELS["mlp"][0])
    with PerSampleGradNorms(model, loss_reduction="sum", prove=False) as norms:
        sum_loss(model(torch.randn(4, 5))).backward()
        norms.weighted_sum(torch.ones(4))
        assert norms.unproved


def test_steps_between_those_that_are_recorded() -> None:
    model = made(MODELS["mlp"][0])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    norms = PerSampleGradNorms(loss_reduction="sum", every_steps=2)
    with Monitor(model, optimizer, metrics=[norms]):
        for step in range(4):
            optimizer.zero_grad()
            sum_loss(model(torch.randn(4, 5))).backward()
            recorded = step % 2 == 0
            sums = norms.weighted_sum(torch.ones(4))
            assert all(total.isfinite().all() == recorded for total in sums.values())
            if not recorded:
                with pytest.raises(RuntimeError, match=r"set_grad: .*every_steps=2"):
                    norms.weighted_sum(torch.ones(4), set_grad=True)
            optimizer.step()


def test_batches_of_one_are_not_read_from_the_gradients() -> None:
    model = made(MODELS["mlp"][0])
    with PerSampleGradNorms(model, loss_reduction="sum", batch_of_one="fast") as norms:
        for _ in range(6):
            model.zero_grad()
            x = torch.randn(1, 5)
            sum_loss(model(x)).backward()
            rows = gradients(model, samples_of((x,), 1), sum_loss)
            assert_sums(norms.weighted_sum(torch.ones(1)), rows, torch.ones(1))


def test_sums_that_are_made_in_inference_mode_can_be_written_to() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    sums: dict[str, Tensor] = {}
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        for _ in range(2):
            sum_loss(model(x)).backward()
            with torch.inference_mode():
                norms.weighted_sum(torch.ones(4), into=sums, set_grad=True)
                assert not norms.gram()["total"].is_inference()
        sums["0.bias"].add_(1)
        assert model[0].bias.grad is not None
        model[0].bias.grad.add_(1)


# ---- the life of factors


def test_released_when_the_next_forward_pass_begins() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(x)).backward()
        first = norms._last_norms().record.factors
        assert first
        with torch.no_grad():
            model(x)
        assert norms.weighted_sum(torch.ones(4))
        y = model(x)
        assert first.released
        assert not first
        with pytest.raises(RuntimeError, match=r"weighted_sum: .*released.*next forward pass"):
            norms.weighted_sum(torch.ones(4))
        sum_loss(y).backward()
        assert norms.weighted_sum(torch.ones(4))
    assert norms.weighted_sum(torch.ones(4))  # of a closed metric too


def test_what_was_written_into_is_refused() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(x)).backward()
        x.zero_()
        with pytest.raises(RuntimeError, match=r"weighted_sum: .*'0\.weight' .*changed in place"):
            norms.weighted_sum(torch.ones(4))


def test_plan_names_the_memory() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        (line,) = [line for line in norms.plan() if line.what == "kept factors"]
        assert line.bytes == 0
        sum_loss(model(x)).backward()
        # Per sample: the Linears' inputs and output gradients, and the LayerNorm's normalised input and gradient.
        (line,) = [line for line in norms.plan() if line.what == "kept factors"]
        assert line.bytes == 4 * 4 * (5 + 7 + 7 + 7 + 7 + 4)
        model(x)
        assert [line.bytes for line in norms.plan() if line.what == "kept factors"] == [4 * 4 * 37]
    assert not any(line.what == "kept factors" for line in lipcore.PerSampleGradNorms(loss_reduction="sum").plan())


def test_copies_have_no_factors() -> None:
    model = made(MODELS["mlp"][0])
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(torch.randn(4, 5))).backward()
        for other in (pickle.loads(pickle.dumps(norms)), copy.deepcopy(norms)):
            assert torch.equal(other.per_sample, norms.per_sample)
            with pytest.raises(RuntimeError, match=r"watches no model|released"):
                other.weighted_sum(torch.ones(4))


# ---- bad input


def test_several_forward_passes_of_one_backward_pass_are_refused() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        (sum_loss(model(x)) + sum_loss(model(2 * x))).backward()
        with pytest.raises(RuntimeError, match=r"weighted_sum: .*several forward passes.*backward\(\) for each"):
            norms.weighted_sum(torch.ones(4))
        sum_loss(model(x)).backward()
        assert norms.weighted_sum(torch.ones(4))


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a list": (lambda: [1.0] * 4, TypeError, r"coefficients: expected a floating-point tensor of shape \[4\].*list"),
    "a number of others": (lambda: torch.ones(3), ValueError, r"coefficients: .*\[4\].*got torch.float32 \[3\]"),
    "a column": (lambda: torch.ones(4, 1), ValueError, r"coefficients: .*got torch.float32 \[4, 1\]; give one"),
    "integers": (lambda: torch.ones(4).long(), ValueError, r"coefficients: .*got torch.int64 \[4\]"),
    "a device": (lambda: torch.ones(4, device="meta"), ValueError, r"coefficients: .*got one on meta; move it with"),
    "a function": (lambda: lambda n: n[:2], ValueError, r"coefficients: the function's result: .*\[4\].*\[2\]"),
    "a function of nothing": (lambda: lambda n: None, TypeError, r"coefficients: the function's result.*NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_coefficients(name: str) -> None:
    given, kind, words = BAD[name]
    model = made(MODELS["mlp"][0])
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(torch.randn(4, 5))).backward()
        with pytest.raises(kind, match=words):
            norms.weighted_sum(given())


def test_other_bad_arguments() -> None:
    model = made(MODELS["mlp"][0])
    with pytest.raises(TypeError, match="keep_factors"):
        PerSampleGradNorms(model, loss_reduction="sum", keep_factors="yes")
    with lipcore.PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(torch.randn(4, 5))).backward()
        with pytest.raises(RuntimeError, match=r"weighted_sum: .*keeps no factors.*keep_factors=True"):
            norms.weighted_sum(torch.ones(4))
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        with pytest.raises(RuntimeError, match="no backward pass"):
            norms.weighted_sum(torch.ones(4))
        sum_loss(model(torch.randn(4, 5))).backward()
        with pytest.raises(TypeError, match=r"into: expected .*empty dict, got list"):
            norms.weighted_sum(torch.ones(4), into=[])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"into\['0.weight'\]: expected .*\[7, 5\] on cpu, got \[2\] on cpu"):
            norms.weighted_sum(torch.ones(4), into={"0.weight": torch.ones(2)})
        with pytest.raises(ValueError, match=r"into\['0.bias'\]: expected .*got int"):
            norms.weighted_sum(torch.ones(4), into={"0.bias": 3})  # type: ignore[dict-item]


def test_gradients_that_would_stay_plain_are_refused() -> None:
    model = nn.Sequential(nn.Linear(C, C), made(WITHOUT_RULES["layer scale"]))
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip", max_replay_bytes=0) as norms:
        sum_loss(model(torch.randn(4, T, C))).backward()
        assert norms.weighted_sum(torch.ones(4))
        with pytest.raises(ValueError, match=r"set_grad: .* not measured and would keep the plain gradient"):
            norms.weighted_sum(torch.ones(4), set_grad=True)


def test_compiled_models_are_refused() -> None:
    model = torch.compile(nn.Linear(3, 2), backend="aot_eager")
    with pytest.raises(ValueError, match=r"compiled.*eager.*keep_factors="):
        PerSampleGradNorms(model, loss_reduction="sum")
