"""Per-sample gradient norms of whole models in eager mode, against one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graph
from per_sample_models import MODELS, assert_equal, made, sum_loss, train
from per_sample_oracle import assert_norms, check, norms_sq, samples_of, seeded
from torch import Tensor, nn

from lipcore import Monitor, PerSampleGradNorms

each_model = pytest.mark.parametrize(("build", "inputs"), list(MODELS.values()), ids=list(MODELS))


def norms_of(model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor] = sum_loss, **options: Any) -> Tensor:
    model.zero_grad()
    with PerSampleGradNorms(model, loss_reduction="sum", **options) as metric:
        loss(model(x)).backward()
        return metric.per_sample


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("size", [1, 4])
@each_model
def test_against_one_sample_at_a_time(build: Any, inputs: Any, size: int, reduction: str) -> None:
    model = made(build)
    check(model, (inputs(size),), loss=sum_loss, reduction=reduction)


@each_model
def test_double_precision(build: Any, inputs: Any) -> None:
    model, x = made(build).double(), inputs(3)
    check(model, (x.double() if x.is_floating_point() else x,), loss=sum_loss, tolerance=1e-12)


@each_model
def test_permuting_samples_permutes_splitting_splits_and_scaling_scales(build: Any, inputs: Any) -> None:
    model, x = made(build), inputs(6)
    whole = norms_of(model, x)
    order = torch.randperm(6)
    assert torch.allclose(norms_of(model, x[order]), whole[order], rtol=1e-6)
    parts = torch.cat([norms_of(model, part) for part in x.tensor_split([1, 3])])
    assert torch.allclose(parts, whole, rtol=1e-5)
    assert torch.allclose(norms_of(model, x, lambda y: -4 * sum_loss(y)), 4 * whole, rtol=1e-6)


@each_model
def test_run_to_run_and_any_number_of_threads_are_bitwise_the_same(build: Any, inputs: Any) -> None:
    model, x = made(build), inputs(7)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(norms_of(model, x))
    finally:
        torch.set_num_threads(before)
    assert_equal(found[1:], found[:1] * 2)


@pytest.mark.parametrize("size", [1, 4])
@each_model
def test_five_steps_in_a_monitor(build: Any, inputs: Any, size: int) -> None:
    """At every step, also where batches of one are served from the gradients."""
    model = made(build)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    metric = PerSampleGradNorms(loss_reduction="mean")
    total = 0.0
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for _ in range(5):
            x = inputs(size)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            train(model, optimizer, [x])
            assert_norms(metric, expected)
            total += float(torch.stack(list(expected.values())).sum(0).sqrt().sum())
        result = monitor.compute()["per_sample_grad_norm"].norm["total"]
        assert result.mean.count == 5 * size
        assert result.mean.value == pytest.approx(total / (5 * size), rel=1e-5)


def test_sizes_in_turn() -> None:
    model = made(MODELS["mlp"][0])
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for size in (3, 1, 1, 2, 7, 1):
            x = torch.randn(size, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(metric, expected)


def sequences() -> nn.Module:
    return Graph(
        lambda m, x: m.head(m.norm(m.attention(x, x, x)[0])),
        attention=nn.MultiheadAttention(6, 2, batch_first=True),
        norm=nn.LayerNorm(6),
        head=nn.Linear(6, 4),
    )


@pytest.mark.parametrize(("build", "shape"), [(MODELS["mlp"][0], (5,)), (sequences, (7, 6))], ids=["mlp", "sequences"])
def test_an_empty_batch(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Also with the strides of the gradient that sum() sends back."""
    model = made(build)
    with PerSampleGradNorms(model, loss_reduction="mean") as metric:
        for size in (2, 0, 0, 3):
            model.zero_grad()
            model(torch.randn(size, *shape)).sum().backward()
            assert metric.per_sample.shape == (size,)


def test_gradients_that_were_there_before_a_batch_of_one() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(1, 5)
    expected = norms_sq(model, [(x,)], sum_loss)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(4):  # accumulates
            sum_loss(model(x)).backward()
            assert_norms(metric, expected)


# ---- ways to call a model and a layer


class Fancy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, batch: dict[str, Tensor], *, flip: bool = False) -> dict[str, Any]:
        h = self.a(input=batch["x"]).relu_()
        y = self.b(input=h)
        return {"logits": -y if flip else y, "hidden": (h, {"again": h})}


@pytest.mark.parametrize("size", [1, 3])
def test_dictionaries_and_keywords(size: int) -> None:
    model = made(Fancy)

    def loss(output: Any) -> Tensor:
        return sum_loss(output["logits"]) + sum_loss(output["hidden"][1]["again"])

    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(4):
            x = torch.randn(size, 5)
            expected = norms_sq(model, [({"x": row.double()},) for row in x.split(1)], loss)
            model.zero_grad()
            loss(model(batch={"x": x}, flip=False)).backward()
            assert metric.per_sample.allclose(torch.stack(list(expected.values())).sum(0).sqrt(), rtol=1e-5)
            assert not [name for name in metric.per_parameter if name.startswith("unused") and name not in expected]


def test_a_layer_that_was_not_called_and_one_that_no_gradient_reached() -> None:
    model = made(Fancy)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model({"x": torch.randn(3, 5)})["hidden"][0]).backward()
        assert set(metric.per_parameter) == {name for name, _ in model.named_parameters()}
        assert metric.per_parameter["b.weight"].isnan().all()
        assert metric.per_layer["b"].isnan().all()
        assert "no gradient reached it" in metric.per_parameter.reasons["b.weight"]
        assert metric.per_sample.isfinite().all()  # a gradient that is none counts as 0
        assert metric.per_layer["unused"].isnan().all()
        assert "no gradient reached it" in metric.per_layer.reasons["unused"]
        with pytest.raises(KeyError, match="no parameter 'ghost' was measured"):
            metric.per_parameter["ghost"]


def test_layers_in_turn_from_pass_to_pass() -> None:
    """Another expert for every batch, also at batch one."""
    model = made(lambda: Graph(lambda m, x, which: (m.a if which else m.b)(m.stem(x)), **experts()))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for size in (3, 1):
            for which in (0, 1, 1, 0):
                x = torch.randn(size, 5)
                expected = norms_sq(model, [(row, which) for row in x.split(1)], sum_loss)
                model.zero_grad()
                sum_loss(model(x, which)).backward()
                total = torch.stack(list(expected.values())).sum(0).sqrt()
                assert torch.allclose(metric.per_sample, total, rtol=1e-5)


def experts() -> dict[str, nn.Module]:
    return {"stem": nn.Linear(5, 4), "a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}


def test_one_module_under_two_names_and_called_twice() -> None:
    def build() -> nn.Module:
        twice = nn.Linear(5, 5)
        return Graph(lambda m, x: m.b(m.a(x).tanh()) + m.a(x), a=twice, b=twice)

    for size in (1, 3):
        check(made(build), (torch.randn(size, 5),), loss=sum_loss)


def test_a_shared_weight_with_its_own_biases() -> None:
    def build() -> nn.Module:
        model = Graph(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(5, 5), b=nn.Linear(5, 5))
        model.b.weight = model.a.weight
        return model

    with seeded(1):
        check(made(build), (torch.randn(3, 4, 5),), loss=sum_loss)


def test_a_call_under_no_grad_inside_the_forward_pass_is_no_use_of_the_weight() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = m.a(x)
        return m.b(m.a(x).tanh()) + target

    for size in (1, 3):
        check(made(lambda: Graph(rule, a=nn.Linear(5, 5), b=nn.Linear(5, 5))), (torch.randn(size, 5),), loss=sum_loss)


def test_frozen_first_layers_and_frozen_last_layers() -> None:
    for frozen in (0, 3):
        for size in (1, 4):
            model = made(MODELS["mlp"][0])
            model[frozen].requires_grad_(False)
            metric = check(model, (torch.randn(size, 5),), loss=sum_loss)
            assert metric.coverage().frozen == [f"{frozen}.weight", f"{frozen}.bias"]


# ---- single samples


def test_a_sample_without_loss_terms_has_norm_zero() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    mask = torch.tensor([1.0, 0, 1, 0]).unsqueeze(1)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        (model(x) * mask).sum().backward()
        assert metric.per_sample[[1, 3]].tolist() == [0, 0]
        assert (metric.per_sample[[0, 2]] > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each_model
def test_a_sample_that_is_not_finite_leaves_the_others_alone(build: Any, inputs: Any, value: float) -> None:
    model, x = made(build), inputs(4)
    factor = torch.tensor([1, 1, value, 1])

    def loss(output: Tensor) -> Tensor:
        return sum_loss(output * factor.reshape(-1, *[1] * (output.dim() - 1)))

    expected = norms_of(model, x)
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, metrics=[metric]) as monitor:
        loss(model(x)).backward()
        found = metric.per_sample
        monitor.step()
        result = monitor.compute()["per_sample_grad_norm"].norm["total"]
    assert not found[2].isfinite()
    assert torch.allclose(found[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-5)
    assert (result.mean.count, result.missing.value) == (3, 1)
    assert result.mean.value == pytest.approx(float(expected[[0, 1, 3]].mean()), rel=1e-5)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_gradients_whose_squares_leave_float32(factor: float) -> None:
    for name in ("mlp", "cnn"):
        build, inputs = MODELS[name]
        model, x = made(build), inputs(3)
        expected = norms_of(model, x) * factor
        assert torch.allclose(norms_of(model, x, lambda y: sum_loss(y.double()) * factor), expected, rtol=1e-5)
