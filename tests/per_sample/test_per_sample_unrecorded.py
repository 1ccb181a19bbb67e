"""What was not recorded, or not reached: NaN with a reason and a count, never the numbers of another pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from per_sample_models import made, mlp, sum_loss
from torch import Tensor, nn

from lipcore import Monitor, PerSampleGradNorms

NAME = "per_sample_grad_norm"


def autograd_grad(model: nn.Module, loss: Tensor) -> None:
    torch.autograd.grad(loss, list(model.parameters()))


def some_inputs(model: nn.Module, loss: Tensor) -> None:
    loss.backward(inputs=[next(model.parameters())])


UNRECORDED = pytest.mark.parametrize("without", [autograd_grad, some_inputs])
SIZES = pytest.mark.parametrize("size", [1, 3])


def passed(model: nn.Module, size: int, loss: Callable[[Tensor], Tensor] = sum_loss) -> None:
    model.zero_grad()
    loss(model(torch.randn(size, 5))).backward()


@SIZES
@UNRECORDED
def test_a_pass_that_is_not_recorded_has_no_numbers(without: Callable[..., None], size: int) -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(6):  # of size 1, from the fourth on served from the gradients
            passed(model, size)
        model.zero_grad()
        without(model, sum_loss(model(torch.randn(size, 5))))
        assert metric.per_sample.isnan().tolist() == [True] * size
        assert "did not accumulate all gradients" in metric.broken
        for found in (metric.per_layer["0"], metric.per_parameter["0.weight"]):
            assert found.isnan().tolist() == [True] * size
        assert metric.per_layer.reasons["0"] == metric.broken
        passed(model, size)
        assert metric.per_sample.isfinite().all()
        assert metric.broken == ""


def test_passes_without_gradients_leave_the_numbers_alone() -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        passed(model, 3)
        norms = metric.per_sample
        with torch.no_grad():
            model(torch.randn(4, 5))
        model.eval()(torch.randn(4, 5))
        assert torch.equal(metric.per_sample, norms)


# ---- ids


@SIZES
def test_ids_of_a_pass_that_is_not_recorded_are_not_those_of_the_next(size: int) -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        metric.set_ids(torch.arange(size))
        autograd_grad(model, sum_loss(model(torch.randn(size, 5))))
        passed(model, size)
        assert len(metric.scores) == 0
        metric.set_ids(torch.arange(size) + 10)
        passed(model, size)
        assert metric.scores.to_numpy()["ids"].tolist() == [10 + i for i in range(size)]


def test_ids_of_a_step_without_records_are_not_those_of_the_next() -> None:
    model = made(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    metric = PerSampleGradNorms(loss_reduction="sum", every_steps=2)
    with Monitor(model, optimizer, metrics=[metric]):
        for step in range(5):
            if step != 2:
                metric.set_ids([step])
            passed(model, 1)
            optimizer.step()
    assert metric.scores.to_numpy()["ids"].tolist() == [0, 4]


# ---- layers that were not reached


class Routed(nn.Module):
    """One of two layers, as a mixture of experts has them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, which: str) -> Tensor:
        routed: Tensor = self.head(getattr(self, which)(x))
        return routed


@SIZES
@pytest.mark.parametrize("alone", [True, False])
def test_a_layer_that_is_reached_in_some_passes_counts_the_others(alone: bool, size: int) -> None:
    model = made(Routed)
    metric = PerSampleGradNorms(model if alone else None, loss_reduction="sum", batch_of_one="fast")
    monitor = metric._engine if alone else Monitor(model, metrics=[metric])
    routes = ["a"] * 9 + ["b"] + ["a"] * 9  # of size 1, most of them are served from the gradients
    for which in routes:
        model.zero_grad()
        sum_loss(model(torch.randn(size, 5), which)).backward()
        other = "b" if which == "a" else "a"
        assert metric.per_layer[other].isnan().all()
        assert metric.per_parameter[f"{other}.weight"].isnan().all()
        # Of size 1, a pass was to be served from other gradients than it then brought.
        assert metric.per_layer[which].isfinite().all() == (not metric.broken)
        why = metric.broken or "no gradient reached it in this backward pass"
        assert metric.per_layer.reasons[other] == why
        if not alone:
            monitor.step()
    found = metric.finalize().norm
    for layer in ("a", "b", "head", "total"):
        assert found[layer].mean.count + found[layer].missing.value == size * len(routes)
    assert found["head"].missing.value == found["total"].missing.value == (size == 1)
    assert found["a"].missing.value == size
    assert found["b"].mean.count == (size if size > 1 else 0)
    monitor.close()


def test_the_layers_of_a_pass_that_is_broken_are_missing() -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        loss = sum_loss(model(torch.randn(3, 5)))
        (loss + model[0](torch.randn(3, 5)).sum()).backward()
        found = metric.finalize().norm
    assert found["total"].missing.value == 3
    assert found["total"].mean.count == 0


# ---- the model itself as a layer


@pytest.mark.parametrize("alone", [True, False])
def test_a_model_that_is_one_layer_is_called_model(alone: bool) -> None:
    model = nn.Linear(5, 2)
    metric = PerSampleGradNorms(model if alone else None, loss_reduction="sum", methods={"model": "gram"})
    with metric._engine if alone else Monitor(model, metrics=[metric]):
        sum_loss(model(torch.randn(3, 4, 5))).backward()
        assert list(metric.per_layer) == ["model"]
        assert list(metric.per_parameter) == ["weight", "bias"]
        assert torch.equal(metric.per_layer["model"], metric.per_sample)
        assert [line.what for line in metric.plan()] == ["all", "model"]
        assert set(metric.finalize().norm) == {"model", "total"}
    with pytest.raises(ValueError, match="'ghost'; it has 'model'"):
        PerSampleGradNorms(nn.Linear(5, 2), loss_reduction="sum", methods={"ghost": "gram"})
    with pytest.raises(ValueError, match="module 'model'"), PerSampleGradNorms(model, loss_reduction="sum"):
        with pytest.warns(RuntimeWarning, match="module 'model'"):
            model(torch.randn(5)).sum().backward()


def stopped_by_another_layer(model: nn.Module, metric: PerSampleGradNorms) -> None:
    model[0] = nn.Linear(5, 7)  # type: ignore[operator]


def stopped_by_ids(model: nn.Module, metric: PerSampleGradNorms) -> None:
    metric.set_ids([1, 2])


@pytest.mark.parametrize("stop", [stopped_by_another_layer, stopped_by_ids])
@pytest.mark.parametrize("first", [True, False])
def test_after_recording_has_stopped_the_numbers_are_nan_in_the_length_of_the_last_pass(
    stop: Callable[[nn.Module, PerSampleGradNorms], None], first: bool
) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    options = {"normalized": True, "methods": {"0": "estimate"}}
    with pytest.warns(RuntimeWarning, match="stopped recording"):
        metric = PerSampleGradNorms(model, loss_reduction="sum", **options)  # type: ignore[arg-type]
        if not first:
            passed(model, 4)
        stop(model, metric)
        passed(model, 5)
    with pytest.raises(ValueError, match=r"was replaced|ids: 2 ids"):
        _ = metric.per_sample
    for size in (5, 3, 1, 6):
        if size != 5:
            passed(model, size)
        tables = [metric.per_layer, metric.per_parameter, metric.normalized, metric.standard_error]
        places = ["0", "0.weight", "0", "total"]
        for found in (metric.per_sample, *[table[place] for table, place in zip(tables, places, strict=True)]):
            assert found.isnan().tolist() == [True] * size
        assert metric.broken.startswith("recording has stopped: ")
        assert {table.reasons[place] for table, place in zip(tables, places, strict=True)} == {metric.broken}
    autograd_grad(model, sum_loss(model(torch.randn(2, 5))))
    assert metric.per_sample.isnan().tolist() == [True] * 2
    metric.close()


def test_a_step_between_those_that_are_recorded_has_nan_in_its_own_length() -> None:
    model = made(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    metric = PerSampleGradNorms(loss_reduction="sum", every_steps=2)
    with Monitor(model, optimizer, metrics=[metric]):
        for step, size in enumerate((4, 5, 2, 7, 3)):
            passed(model, size)
            optimizer.step()
            assert metric.per_sample.isnan().tolist() == [step % 2 == 1] * size


@UNRECORDED
@SIZES
@pytest.mark.filterwarnings("error")
def test_alone_samples_that_came_are_not_called_silence(without: Callable[..., None], size: int) -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for number in range(6):
            if number == 2:  # for a penalty, say
                without(model, sum_loss(model(torch.randn(size, 5))))
            passed(model, size)
            metric.update()


@UNRECORDED
def test_alone_nothing_but_such_passes_is_said_once(without: Callable[..., None]) -> None:
    model = made(mlp)
    warned = pytest.warns(UserWarning, match="no sample for per_sample_grad_norm in 4 steps")
    with PerSampleGradNorms(model, loss_reduction="sum") as metric, warned as caught:
        for _ in range(6):
            without(model, sum_loss(model(torch.randn(3, 5))))
            metric.update()
    (said,) = (str(one.message) for one in caught)
    assert "no sample for per_sample_grad_norm in 4 steps: the backward pass did not accumulate" in said
