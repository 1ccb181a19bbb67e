"""When a step's gradient is not the mean of its samples' gradients: it has no noise scale, and that is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import few
from models import Graph
from per_sample_models import made, mlp, sum_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import Monitor, PerSampleGradNorms
from lipcore.capture.layers.layer_pass import LayerRecord
from lipcore.metric.results import MetricResult
from lipcore.per_sample.layer_index import LayerIndex
from lipcore.per_sample.loss_factor import LossFactor
from lipcore.per_sample.loss_reduction import Reduction
from lipcore.per_sample.noise import noise_sums as steps
from lipcore.per_sample.noise.noise_scale import NoiseScale
from lipcore.per_sample.open_step import _MOST
from lipcore.per_sample.pass_norms import PassNorms
from lipcore.per_sample.results import add_noise

Loop = Callable[[nn.Module, PerSampleGradNorms], None]


def after(loop: Loop, **options: Any) -> MetricResult:
    """One step, in which the loop has its backward passes."""
    model = made(mlp)
    metric = PerSampleGradNorms(**{"loss_reduction": "mean", **options})
    with Monitor(model, torch.optim.SGD(model.parameters(), 1e-3), metrics=[metric]) as monitor:
        loop(model, metric)
        monitor.step()
        return monitor.compute()["per_sample_grad_norm"]


def mean_loss(model: nn.Module, size: int) -> Tensor:
    return sum_loss(model(torch.randn(size, 5))) / size


def kept_graph(model: nn.Module, _: PerSampleGradNorms) -> None:
    loss = mean_loss(model, 6)
    loss.backward(retain_graph=True)
    loss.backward()


def hooked(model: nn.Module, _: PerSampleGradNorms) -> None:
    model[0].weight.register_hook(lambda grad: 0.5 * grad)
    mean_loss(model, 6).backward()


def hooked_afterwards(model: nn.Module, _: PerSampleGradNorms) -> None:
    def clip(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)

    model[0].weight.register_post_accumulate_grad_hook(clip)
    mean_loss(model, 6).backward()


def penalty(model: nn.Module, _: PerSampleGradNorms) -> None:
    (mean_loss(model, 6) + 1e3 * model[0].weight.square().sum()).backward()


def of_sizes(model: nn.Module, _: PerSampleGradNorms) -> None:
    for size in (2, 14):
        mean_loss(model, size).backward()


def zeroed_in_place(model: nn.Module, _: PerSampleGradNorms) -> None:
    for _ in range(2):  # SAM, the closure of LBFGS
        model.zero_grad(set_to_none=False)
        mean_loss(model, 6).backward()


def clipped_in_mid_step(model: nn.Module, _: PerSampleGradNorms) -> None:
    for _ in range(2):
        (mean_loss(model, 6) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def scaled_anew_in_mid_step(model: nn.Module, _: PerSampleGradNorms) -> None:
    for _ in range(2):
        (mean_loss(model, 6) / 2).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = 0.5 * parameter.grad


def forgotten_in_part(model: nn.Module, _: PerSampleGradNorms) -> None:
    for _ in range(2):
        model[0].zero_grad(set_to_none=True)
        (mean_loss(model, 6) / 2).backward()


def zeroed_before_a_penalty(model: nn.Module, _: PerSampleGradNorms) -> None:
    mean_loss(model, 6).backward()
    model.zero_grad(set_to_none=False)
    sum(p.square().sum() for p in model.parameters()).backward()


def replaced(model: nn.Module, _: PerSampleGradNorms) -> None:
    for module in model:
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    mean_loss(model, 6).backward()


def taken_away(model: nn.Module, _: PerSampleGradNorms) -> None:
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    mean_loss(model, 6).backward()


WRONG: list[tuple[Loop, str, bool]] = [
    (kept_graph, "two backward passes came from one forward pass", True),
    (hooked, "parameters have hooks", True),
    (hooked_afterwards, "parameters have hooks", True),
    (penalty, "parts that are no sample's", False),
    (of_sizes, "another number from micro-batch to micro-batch", True),
    (zeroed_in_place, "gradients were changed between two", True),
    (clipped_in_mid_step, "gradients were changed between two", True),
    (scaled_anew_in_mid_step, "gradients were changed between two", True),
    (forgotten_in_part, "gradients were changed between two", True),
    (zeroed_before_a_penalty, "gradients were changed between two", True),
    (replaced, "its gradients were not found", True),
    (taken_away, "its gradients were not found", True),
]


@pytest.mark.parametrize(("loop", "reason", "everywhere"), WRONG, ids=[loop.__name__ for loop, *_ in WRONG])
def test_a_gradient_that_is_not_the_mean_of_the_samples_gradients(loop: Loop, reason: str, everywhere: bool) -> None:
    result = after(loop)
    ((found, count),) = result.details["noise_scale_skipped"].items()
    assert reason in found
    assert count == 1
    for place in ("0", "total"):
        assert result.skipped_steps[place]["sum"].value == 1
        assert math.isnan(result.gradient_sq[place].mean.value)
    # A penalty on one layer leaves the others' numbers as they are.
    assert result.skipped_steps["3"]["sum"].value == everywhere
    assert result.norm["total"].mean.count >= 6  # the norms are there all the same


def terms_loop(make: Callable[[int], Any]) -> tuple[Loop, list[Any]]:
    terms: list[Any] = [None]

    def loop(model: nn.Module, _: PerSampleGradNorms) -> None:
        for count in (4, 16):
            terms[0] = make(count)
            (sum_loss(model(torch.randn(3, 5))) / count).backward()

    return loop, terms


@pytest.mark.parametrize("make", [int, torch.tensor], ids=["number", "tensor"])
def test_terms_that_differ_between_the_micro_batches_of_a_step(make: Callable[[int], Any]) -> None:
    loop, terms = terms_loop(make)
    result = after(loop, loss_terms=lambda: terms[0])
    assert result.details["noise_scale_skipped"] == {steps.UNEQUAL: 1}
    assert result.skipped_steps["total"]["sum"].value == 1


@pytest.mark.parametrize("sizes", [(2, 14), (8, 8)], ids=str)
def test_sizes_are_compared_beside_a_scale_that_is_a_tensor(sizes: tuple[int, int]) -> None:
    model = made(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu")
    metric = PerSampleGradNorms(loss_reduction="mean", scale=0.5)
    with Monitor(model, optimizer, metrics=[metric], scaler=scaler) as monitor:
        for size in sizes:
            scaler.scale(mean_loss(model, size) / 2).backward()
        scaler.step(optimizer)
        scaler.update()
        result = monitor.compute()["per_sample_grad_norm"]
    unequal = sizes[0] != sizes[1]
    assert result.details["noise_scale_skipped"] == ({steps.UNEQUAL: 1} if unequal else {})
    assert math.isnan(result.gradient_noise["total"].mean.value) == unequal


def of_device(number: float, tensor: float | None, task: int) -> PassNorms:
    """A micro-batch of two samples, whose factor is in part known to the device only."""
    part = None if tensor is None else torch.tensor(tensor, dtype=torch.float64)
    rows = {"0.weight": torch.tensor([1.0, 3.0], dtype=torch.float64)}
    return PassNorms(LayerRecord(2, rows, task=task), LossFactor(number, part), LayerIndex({"0.weight": "0"}))


@pytest.mark.parametrize(
    ("factors", "equal"),
    [
        ([(2.0, 0.5), (2.0, 0.5), (2.0, 0.5)], True),
        ([(2.0, 0.5), (2.0, 0.25), (2.0, 0.5)], False),
        ([(2.0, 0.5), (4.0, 0.5)], False),
        ([(1.0, None), (1.0, 1.0)], False),
    ],
    ids=["equal", "tensors differ", "numbers differ", "one is known"],
)
def test_factors_that_only_the_device_knows(factors: list[tuple[float, float | None]], equal: bool) -> None:
    layer = nn.Linear(1, 1, bias=False)
    sums = steps.NoiseSums(LayerIndex({"0.weight": "0"}), lambda: {"0.weight": layer.weight})
    layer.weight.grad = torch.ones(1, 1)
    found: list[Tensor] = []
    for task, factor in enumerate(factors):
        sums.add(of_device(*factor, task))
    sums.read_gradients()
    sums.finish(lambda mean, batch, samples: found.append(batch), 1)
    assert bool(found[0].isfinite().all()) == equal
    assert sums.skipped() == ({} if equal else {steps.UNEQUAL: 1})
    sums.reset()
    assert sums.skipped() == {}


@pytest.mark.parametrize("reducer", ["mean", "lower", "upper", "ema"])
def test_a_rank_that_has_no_noise_scale_says_why_and_has_no_average_of_before(reducer: str) -> None:
    noise = NoiseScale(2)
    noise.observe(torch.tensor([5.0, 5.0]), torch.tensor([2.0, 2.0]), samples=4)
    noise.reset()
    sums = steps.NoiseSums(LayerIndex({"0.weight": "0"}), dict)
    sums.off = steps.SHARDED
    add_noise(result := MetricResult("norms"), ["0"], "total", noise, sums)
    for quantity in (result.noise_scale, result.gradient_sq, result.gradient_noise):
        value = getattr(quantity["total"], reducer)
        assert math.isnan(value.value)
        assert (value.valid, value.note) == (False, steps.SHARDED)


def test_samples_that_are_all_alike_are_as_long_as_their_mean() -> None:
    def loop(model: nn.Module, _: PerSampleGradNorms) -> None:
        (sum_loss(model(torch.ones(6, 5))) / 6).backward()

    result = after(loop)
    assert result.details["noise_scale_skipped"] == {}
    assert result.gradient_noise["total"].mean.value == pytest.approx(0, abs=1e-3)


def ordinary(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def zeroed(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def views_of_one_buffer(model: nn.Module) -> None:
    """Whose changes are counted together."""
    sizes = [p.numel() for p in model.parameters()]
    for p, part in zip(model.parameters(), torch.zeros(sum(sizes)).split(sizes), strict=True):
        p.grad = part.view_as(p)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["no checkpoint", "checkpoint", "reentrant"])
@pytest.mark.parametrize("prepare", few([ordinary, zeroed, views_of_one_buffer], 1))
def test_gradients_that_only_backward_passes_add_to(prepare: Callable[[Any], None], reentrant: bool | None) -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        for _ in range(2):
            h = m.inner(h) if reentrant is None else checkpoint(m.inner, h, use_reentrant=reentrant)
        return m.last(h)

    model = made(lambda: Graph(rule, first=nn.Linear(5, 4), inner=nn.Linear(4, 4), last=nn.Linear(4, 2)))
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, metrics=[metric]) as monitor:
        for _ in range(3):
            prepare(model)
            for _ in range(3):
                sum_loss(model(torch.randn(4, 5))).backward()
            monitor.step()
        assert monitor.compute()["per_sample_grad_norm"].details["noise_scale_skipped"] == {}


def test_gradients_of_parameters_that_were_frozen_since() -> None:
    model = made(mlp)
    xs, results = torch.randn(2, 6, 5), []
    for forgotten in (False, True):
        model.requires_grad_(True)
        model.zero_grad()
        metric = PerSampleGradNorms(loss_reduction="sum")
        with Monitor(model, metrics=[metric], window_steps=1) as monitor:
            for k, x in enumerate(xs):
                if k:
                    for layer in model if forgotten else model[2:]:
                        layer.zero_grad()
                    model[0].requires_grad_(False)
                sum_loss(model(x)).backward()
                monitor.step()
        results.append(monitor.history[-1]["per_sample_grad_norm"])
    for result in results:
        assert result.details["noise_scale_skipped"] == {}
    kept, cleared = (result.gradient_sq["total"].mean.value for result in results)
    assert kept == cleared


def test_a_hook_that_was_removed_is_none() -> None:
    def loop(model: nn.Module, _: PerSampleGradNorms) -> None:
        model[0].weight.register_hook(lambda grad: 0.5 * grad).remove()
        mean_loss(model, 6).backward()

    assert after(loop).details["noise_scale_skipped"] == {}


# ---- steps of many micro-batches


@pytest.mark.parametrize("size", few([2, 1], 1))
def test_a_step_of_many_micro_batches_is_as_one_of_a_few(size: int) -> None:
    model, xs = made(mlp), torch.randn(_MOST + 5, size, 5)
    results = []
    for parts in (xs.unbind(), [xs.flatten(0, 1)]):
        metric = PerSampleGradNorms(loss_reduction="sum")
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        with Monitor(model, optimizer, metrics=[metric]) as monitor:
            for x in parts:
                metric.set_ids(torch.arange(len(x)))
                sum_loss(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
            results.append((monitor.compute()["per_sample_grad_norm"], metric.scores))
    (many, scores), (one, _) = results
    for quantity in ("gradient_sq", "gradient_noise"):
        found, expected = (getattr(r, quantity)["total"].mean.value for r in (many, one))
        assert found == pytest.approx(expected, rel=1e-4)
    assert many.norm["total"].mean.count == one.norm["total"].mean.count == size * (_MOST + 5)
    assert many.norm["0"].p99.value == one.norm["0"].p99.value
    assert scores.lookup([0]).count.tolist() == [_MOST + 5]


@pytest.mark.ci
def test_nothing_grows_without_steps_and_a_skipped_step_counts_what_it_drops() -> None:
    model = made(mlp)
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, metrics=[metric]) as monitor:
        for _ in range(2 * _MOST + 3):
            sum_loss(model(torch.randn(2, 5))).backward()
            assert len(metric._window.open_step._waiting) < _MOST
        metric.observe_skipped_step()
        assert monitor.compute() is None
        result = metric.compute()
    assert result.details["dropped_samples"] == 2 * (2 * _MOST + 3)
    assert result.norm["total"].mean.count == 0


def test_nothing_waits_for_a_device() -> None:
    """Tensors on the meta device have no values: reading one raises. (Distributions have kernels, and the emulator
    tells whether anything waits for them.)"""
    meta = torch.device("meta")
    places = LayerIndex({"0.weight": "0", "1.weight": "1"})
    layers = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    sums = steps.NoiseSums(places, lambda: {f"{i}.weight": layer.weight for i, layer in enumerate(layers)})
    reduction = Reduction("mean", lambda: torch.tensor(4, device=meta), 0.5)
    for task in range(2):
        rows = {"0.weight": torch.ones(2, dtype=torch.float64, device=meta)}
        sums.add(PassNorms(LayerRecord(2, rows, task=task), reduction.factor(2, None), places))
    sums._gradient_sq = torch.ones(3, dtype=torch.float64, device=meta)
    noise = NoiseScale(3)
    sums.finish(noise.observe, 1)
    assert noise.steps == 1
    with pytest.raises(RuntimeError, match="meta"):
        sums.skipped()  # which is asked for results, and may wait


def test_a_backward_pass_through_a_layer_called_alone_is_in_the_gradient() -> None:
    def loop(model: nn.Module, metric: PerSampleGradNorms) -> None:
        mean_loss(model, 6).backward()
        first = next(module for module in model.modules() if isinstance(module, nn.Linear))
        (0.05 * first(torch.randn(6, first.in_features)).square().mean()).backward()

    result = after(loop)
    assert math.isnan(result.gradient_sq["total"].mean.value)
    assert any("called outside the model's forward pass" in reason for reason in result.details["noise_scale_skipped"])


def not_zeroed(gradient: Tensor) -> Tensor:
    return gradient


def halved(gradient: Tensor) -> Tensor:
    return gradient.mul_(0.5)


def zeroed(gradient: Tensor) -> Tensor:
    return gradient.zero_()


@pytest.mark.parametrize(("between", "left_out"), [(not_zeroed, 3), (halved, 3), (zeroed, 0), (None, 0)])
def test_gradients_of_the_step_before(between: Callable[[Tensor], Tensor] | None, left_out: int) -> None:
    model = made(mlp)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    metric = PerSampleGradNorms(loss_reduction="mean")
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for _ in range(4):
            for _ in range(2):
                (mean_loss(model, 6) / 2).backward()
            optimizer.step()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad = None if between is None else between(parameter.grad)
        result = monitor.compute()["per_sample_grad_norm"]
    assert result.skipped_steps["total"]["sum"].value == left_out
    assert result.details["noise_scale_skipped"] == ({steps.NOT_EMPTY: left_out} if left_out else {})
