"""PerSampleGradNorms in a Monitor: windows, steps, sample ids, noise scale, state, copies, several at once."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from per_sample_models import assert_equal, made, mlp, sum_loss, train, weights
from per_sample_oracle import assert_norms, norms_sq, samples_of
from states import opened, sealed
from torch import Tensor, nn

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory
from lipcore.metric.results import Window

NAME = "per_sample_grad_norm"


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def oracle(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Norms per layer and in total."""
    squares = norms_sq(model, samples_of((x,), len(x)), sum_loss)
    layers: dict[str, Tensor] = {}
    for name, row in squares.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + row
    layers["total"] = torch.stack(list(squares.values())).sum(0)
    return {name: row.sqrt() for name, row in layers.items()}


def assert_window(window: Window, expected: list[dict[str, Tensor]]) -> None:
    found = window[NAME].norm
    assert set(found) == {"0", "2", "3", "total"}
    for place in found:
        values = torch.cat([e[place] for e in expected])
        assert found[place].mean.count == len(values)
        assert found[place].mean.value == pytest.approx(float(values.mean()), rel=1e-5)
        assert found[place].min.value == pytest.approx(float(values.min()), rel=1e-5, abs=1e-5)
        assert found[place].max.value == pytest.approx(float(values.max()), rel=1e-5)
        assert found[place].missing.value == 0


# ---- windows and steps


def test_windows() -> None:
    model = made(mlp)
    optimizer = sgd(model)
    every = []
    with Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean")], window_steps=2) as monitor:
        for size in (3, 4, 1, 2, 1):
            x = torch.randn(size, 5)
            every.append(oracle(model, x))
            train(model, optimizer, [x])
        assert [w.steps for w in monitor.history] == [2, 2]
        assert_window(monitor.history[0], every[:2])
        assert_window(monitor.history[1], every[2:4])
        assert_window(monitor.compute(), every[4:])
        assert_window(monitor.close_window(), every[4:])


def test_sliding_windows() -> None:
    model = made(mlp)
    optimizer = sgd(model)
    every = []
    metric = PerSampleGradNorms(loss_reduction="mean", noise_scale=False)
    with Monitor(model, optimizer, metrics=[metric], window_steps=4, window_blocks=2) as monitor:
        for size in (3, 4, 1, 2, 1, 5):
            x = torch.randn(size, 5)
            every.append(oracle(model, x))
            train(model, optimizer, [x])
        assert len(monitor.history) == 3
        assert_window(monitor.history[0], every[:2])
        assert_window(monitor.history[1], every[:4])
        assert_window(monitor.history[2], every[2:6])


@pytest.mark.parametrize("size", [1, 3])
def test_every_so_many_steps(size: int) -> None:
    model = made(mlp)
    optimizer = sgd(model)
    metric = PerSampleGradNorms(loss_reduction="mean", every_steps=3)
    every = []
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for _ in range(7):
            x = torch.randn(size, 5)
            every.append(oracle(model, x))
            train(model, optimizer, [x])
        assert_window(monitor.compute(), every[::3])


def test_what_has_not_been_followed_by_a_step_is_in_no_window() -> None:
    model = made(mlp)
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, metrics=[metric]) as monitor:
        sum_loss(model(torch.randn(3, 5))).backward()
        assert metric.per_sample.shape == (3,)
        assert metric.compute().norm["total"].mean.count == 0
        assert monitor.compute() is monitor.close_window() is None
        monitor.step()
        assert monitor.compute()[NAME].norm["total"].mean.count == 3


def test_the_default_clock_of_several_optimizers() -> None:
    model = made(mlp)
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=1e-3) for i in (0, 3)]
    every = []
    with Monitor(model, optimizers, metrics=[PerSampleGradNorms(loss_reduction="sum")]) as monitor:
        for size in (3, 1, 2):
            x = torch.randn(size, 5)
            every.append(oracle(model, x))
            model.zero_grad()
            sum_loss(model(x)).backward()
            for optimizer in optimizers:
                optimizer.step()
        assert_window(monitor.compute(), every)


@pytest.mark.parametrize(("together", "steps", "samples"), [(True, 2, 8), (False, 4, 4)])
def test_optimizers_that_take_turns(together: bool, steps: int, samples: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    turns = [sgd(model[0]), sgd(model[2])]
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, turns if together else None, metrics=[metric], window_steps=1) as monitor:
        for _ in range(2):
            for optimizer in turns:
                sum_loss(model(torch.randn(4, 3))).backward()
                optimizer.step()
                if not together:
                    monitor.step()
                model.zero_grad()
    counts = [window[NAME].norm["total"].mean.count for window in monitor.history]
    assert counts == [samples] * steps


def test_together_with_the_other_metrics() -> None:
    model = made(lambda: nn.Sequential(*mlp(), nn.Linear(4, 1)))
    optimizer = sgd(model)
    metrics = [Trajectory(), Lipschitz(), PerSampleGradNorms(loss_reduction="mean", normalized=True)]
    with Monitor(model, optimizer, metrics=metrics) as monitor:
        for size in (3, 1, 1, 4):
            x = torch.randn(size, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            train(model, optimizer, [x])
            assert_norms(metrics[2], expected)
        window = monitor.compute()
    assert set(window.results) == {"trajectory", "lipschitz", NAME}
    assert window["lipschitz"].normalized_gradient_norm["model:Linear"].mean.count == 9
    assert window[NAME].norm["total"].mean.count == 9


def test_the_plan() -> None:
    metric = PerSampleGradNorms(loss_reduction="mean", scale=0.25, every_steps=4, methods={"0": "direct"})
    with Monitor(made(mlp), metrics=[metric]) as monitor:
        text = str(monitor.plan())
    for words in ("loss reduction 'mean', scale 0.25 in every 4th step", "Linear: weight, bias, method 'direct'"):
        assert words in text


def test_the_plan_names_the_way_that_was_chosen() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.Linear(64, 64), nn.Flatten(), nn.Linear(64 * 9, 2))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        before = [line.rule for line in metric.plan()][1:]
        model(torch.randn(3, 9, 5)).sum().backward()
        text = [line.rule for line in metric.plan()][1:]
    lengths = ["Gram up to 4 positions, else direct", "Gram up to 28 positions, else direct"]
    assert [rule.partition("bias, ")[2] for rule in before[:2]] == lengths
    assert [rule.partition("bias, ")[2] for rule in text] == [
        f"by direct (9 positions, weight 64 x 5; {lengths[0]})",
        f"by gram (9 positions, weight 64 x 64; {lengths[1]})",
        "by product of norms",
    ]


@pytest.mark.ci
def test_the_plan_of_a_compiled_model_does_not_promise_the_way() -> None:
    model = torch.compile(nn.Sequential(nn.Conv1d(9, 4, 3), nn.Flatten(), nn.Linear(8, 1)), backend="eager")
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        model(torch.randn(3, 9, 4)).sum().backward()
        rules = [line.rule for line in metric.plan()]
    assert "Conv1d: weight, bias, Gram or direct, by the sizes" in rules


def test_the_plan_names_the_way_of_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(64, 1))
    with PerSampleGradNorms(model, loss_reduction="sum", methods={"0": "direct"}) as metric:
        before = [line.rule for line in metric.plan()][1:3]
        model(torch.randn(3, 1, 3, 3)).sum().backward()
        text = [line.rule for line in metric.plan()][1:3]
    assert before == [
        "Conv2d: weight, bias, method 'direct'",
        "Conv2d: weight, bias, Gram or direct, by the sizes",
    ]
    assert text == [
        "Conv2d: weight, bias, by direct (1 position, weight 64 x 1 x 3 x 3)",
        "Conv2d: weight, bias, by gram (1 position, weight 64 x 64 x 3 x 3)",
    ]


def test_the_plan_names_what_needs_no_choice() -> None:
    with PerSampleGradNorms(nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)), loss_reduction="sum") as metric:
        rules = [line.rule for line in metric.plan()]
    assert rules[1:] == [
        "Embedding: weight, by sums over equal indices",
        "LayerNorm: weight, bias, by sums over positions",
    ]


# ---- copies


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_copy_has_the_numbers_and_no_model(again: Callable[[Any], Any], alone: bool) -> None:
    model = made(mlp)
    optimizer = sgd(model)
    metric = PerSampleGradNorms(model if alone else None, loss_reduction="mean", cu_seqlens=None)
    with metric._engine if alone else Monitor(model, optimizer, metrics=[metric]):
        metric.set_ids([0, 1, 2])
        train(model, optimizer, [torch.randn(3, 5)])
        copied = again(metric)
        assert torch.equal(copied.per_sample, metric.per_sample)
        train(model, optimizer, [torch.randn(2, 5)])
    assert copied.finalize().norm["total"].mean.count == 3 == len(copied.scores)
    with pytest.raises(RuntimeError, match="watches no model yet"):
        copied.coverage()
    with Monitor(model, sgd(model), metrics=[copied]) as monitor:  # it can be given another one
        train(model, monitor._optimizers[0], [torch.randn(4, 5)])
    assert copied.finalize().norm["total"].mean.count == 7
    assert metric.finalize().norm["total"].mean.count == 5


# ---- sample ids


@pytest.mark.parametrize("size", [1, 4])
def test_scores_by_sample_id_over_epochs(size: int) -> None:
    torch.manual_seed(1)
    model, data = made(mlp), torch.randn(8, 5)
    optimizer = sgd(model)
    metric = PerSampleGradNorms(loss_reduction="mean")
    expected: dict[int, list[float]] = {i: [] for i in range(8)}
    with Monitor(model, optimizer, metrics=[metric]):
        for epoch in range(3):
            order = torch.randperm(8, generator=torch.Generator().manual_seed(epoch))
            for ids in order.split(size):
                for i, norm in zip(ids.tolist(), oracle(model, data[ids])["total"].tolist(), strict=True):
                    expected[i].append(norm)
                metric.set_ids(ids + 100)
                train(model, optimizer, [data[ids]])
        found = metric.scores.lookup(torch.arange(100, 108))
    assert found.count.tolist() == [3] * 8
    values = torch.tensor([expected[i] for i in range(8)], dtype=torch.float64)
    assert torch.allclose(found.mean, values.mean(1), rtol=1e-5)
    assert torch.allclose(found.max, values.max(1).values, rtol=1e-5)
    assert torch.allclose(found.variance, values.var(1, correction=0), rtol=1e-3, atol=1e-6)


def test_ids_under_accumulation_and_ids_that_are_given_once() -> None:
    model = made(mlp)
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, metrics=[metric]) as monitor:
        for ids in ([1, 2], [3]):
            metric.set_ids(ids)
            sum_loss(model(torch.randn(len(ids), 5))).backward()
        sum_loss(model(torch.randn(2, 5))).backward()  # without ids
        monitor.step()
    assert metric.scores.lookup([1, 2, 3, 4]).count.tolist() == [1, 1, 1, 0]


def test_the_ids_of_a_step_that_is_skipped_do_not_count() -> None:
    model = made(mlp)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    metric = PerSampleGradNorms(loss_reduction="mean")
    with Monitor(model, optimizer, metrics=[metric], scaler=scaler) as monitor:
        for step in range(4):
            metric.set_ids([step, 10])
            optimizer.zero_grad()
            overflow = float("inf") if step == 1 else 1.0
            scaler.scale(overflow * sum_loss(model(torch.randn(2, 5)))).backward()
            scaler.step(optimizer)
            scaler.update()
        monitor.flush()
    assert metric.scores.lookup([0, 1, 2, 3, 10]).count.tolist() == [1, 0, 1, 1, 3]


def test_ids_of_samples_whose_norm_is_not_known() -> None:
    model = made(mlp)
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, metrics=[metric]) as monitor:
        metric.set_ids([1, 2])
        (sum_loss(model(torch.randn(2, 5))) + model[0](torch.randn(2, 5)).sum()).backward()
        monitor.step()
        result = monitor.compute()[NAME]
    assert metric.scores.missing == 2
    assert result.norm["total"].missing.value == 2


# ---- gradient noise scale


def noise(norms: list[Tensor], gradient: Tensor, samples: int) -> tuple[float, float]:
    """McCandlish et al. (2018), appendix A, with B_small = 1: estimators of |G|^2 and tr Sigma."""
    small, big = float(torch.cat(norms).square().mean()), float(gradient.square().sum())
    return (samples * big - small) / (samples - 1), (small - big) / (1 - 1 / samples)


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (2, 2, 2), (1,) * 6], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_noise_scale_takes_in_all_micro_batches_of_a_step(reduction: str, sizes: tuple[int, ...]) -> None:
    model = made(mlp)
    optimizer = sgd(model)
    metric = PerSampleGradNorms(loss_reduction=reduction, scale=1 / len(sizes))
    estimates = []
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            norms = []
            for size in sizes:
                x = torch.randn(size, 5)
                norms.append(oracle(model, x)["total"])
                loss = sum_loss(model(x)) / len(sizes)
                (loss / size if reduction == "mean" else loss).backward()
            factor = 1.0 if reduction == "mean" else len(sizes) / sum(sizes)
            gradient = factor * torch.cat([p.grad.flatten() for p in model.parameters()]).double()
            estimates.append(noise(norms, gradient, sum(sizes)))
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # comes later
            optimizer.step()
        result = monitor.compute()[NAME]
    signal, trace = (sum(e[i] for e in estimates) / 3 for i in (0, 1))
    assert result.gradient_sq["total"].mean.value == pytest.approx(signal, rel=1e-4)
    assert result.gradient_noise["total"].mean.value == pytest.approx(trace, rel=1e-4)
    assert result.details["noise_scale_skipped"] == {}


def test_micro_batches_of_different_sizes_have_no_noise_scale_under_a_mean() -> None:
    model = made(mlp)
    optimizer = sgd(model)
    with Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean", scale=0.5)]) as monitor:
        for size in (2, 3):
            (sum_loss(model(torch.randn(size, 5))) / size / 2).backward()
        optimizer.step()
        result = monitor.compute()[NAME]
    assert list(result.details["noise_scale_skipped"].values()) == [1]
    assert result.skipped_steps["total"]["sum"].value == 1
    assert result.norm["total"].mean.count == 5


@pytest.mark.parametrize("size", [2, 5])
def test_gradients_that_are_zeroed_in_mid_step_are_no_part_of_its_noise_scale(size: int) -> None:
    """Two backward passes a step, of which the second counts (SAM), or a closure that is called often."""
    model = made(mlp)
    optimizer = sgd(model)
    with Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean")]) as monitor:
        for _ in range(2):
            x = torch.randn(size, 5)
            optimizer.zero_grad()
            (sum_loss(model(x)) / size).backward()
        expected = oracle(model, x)["total"]
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        signal, trace = noise([expected], gradient, size)
        optimizer.step()
        result = monitor.compute()[NAME]
    assert result.gradient_sq["total"].mean.value == pytest.approx(signal, rel=1e-4)
    assert result.gradient_noise["total"].mean.value == pytest.approx(trace, rel=1e-4)
    assert result.norm["total"].mean.count == 2 * size


def test_no_noise_scale() -> None:
    model = made(mlp)
    metric = PerSampleGradNorms(loss_reduction="sum", noise_scale=False)
    with Monitor(model, metrics=[metric]) as monitor:
        sum_loss(model(torch.randn(2, 5))).backward()
        monitor.step()
        assert not any(key.startswith(f"{NAME}/noise_scale") for key in monitor.compute().to_dict())


# ---- state


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("options", [{}, {"every_steps": 2}, {"noise_scale": False}], ids=str)
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_restart_in_the_middle_of_a_window_is_bitwise_the_same(options: dict[str, Any], blocks: int) -> None:
    torch.manual_seed(4)
    data = [torch.randn(size, 5) for size in (3, 1, 4, 2, 1, 3, 3, 2)]
    settings = {"window_steps": 4, "window_blocks": blocks}

    def start(state: Any = None) -> tuple[nn.Module, Any, PerSampleGradNorms, Monitor]:
        model = made(mlp)
        optimizer = sgd(model)
        metric = PerSampleGradNorms(loss_reduction="mean", **options)
        monitor = Monitor(model, optimizer, metrics=[metric], **settings)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            monitor.load_state_dict(state[2])
        return model, optimizer, metric, monitor

    def run(model: nn.Module, optimizer: Any, metric: PerSampleGradNorms, xs: list[Tensor]) -> None:
        for i, x in enumerate(xs):
            metric.set_ids(torch.arange(len(x)) + i % 2)
            train(model, optimizer, [x])

    whole = start()
    run(*whole[:3], data)
    first = start()
    run(*first[:3], data[:4])
    first_half = [w.to_dict() for w in first[3].history]
    run(*first[:3], data[4:5])
    state = through_a_file([first[0].state_dict(), first[1].state_dict(), first[3].state_dict()])
    first[3].close()
    second = start(state)
    assert second[3].compute().to_dict() == first[3].compute().to_dict()
    for i, x in enumerate(data[5:], 5):
        second[2].set_ids(torch.arange(len(x)) + i % 2 * 0 + (i - 0) % 2)
        train(second[0], second[1], [x])
    assert_equal(weights(second[0]), weights(whole[0]))
    histories = first_half + [w.to_dict() for w in second[3].history]
    for mine, theirs in zip(histories, [w.to_dict() for w in whole[3].history], strict=True):
        assert str(mine) == str(theirs)
    for monitor in (whole[3], second[3]):
        monitor.close()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    def monitored(build: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, Monitor]:
        model = made(build)
        return model, Monitor(model, metrics=[PerSampleGradNorms(loss_reduction="sum", **options)])

    model, monitor = monitored(mlp)
    sum_loss(model(torch.randn(3, 5))).backward()
    monitor.step()
    before = str(monitor.compute().to_dict())
    _, other = monitored(lambda: nn.Sequential(nn.Linear(5, 4)))
    with pytest.raises(ValueError, match="layers: the state has"):
        monitor.load_state_dict(other.state_dict())
    _, silent = monitored(mlp, noise_scale=False)
    with pytest.raises(ValueError, match="noise: the state has none, since it was made with noise_scale=False"):
        monitor.load_state_dict(silent.state_dict())
    for key, value in (("version", 99), ("scores", {}), ("open", []), ("noise", {"x": 1})):
        state = opened(monitor.state_dict())
        state["metrics"][NAME][key] = value
        with pytest.raises((ValueError, KeyError)):
            monitor.load_state_dict(sealed(state))
        assert str(monitor.compute().to_dict()) == before
    for one in (monitor, other, silent):
        one.close()


def test_nothing_is_left_on_the_model() -> None:
    model = made(mlp)
    keys = list(model.state_dict())
    before = {id(thing): set(thing.__dict__) for thing in [*model.modules(), *model.parameters()]}
    optimizer = sgd(model)
    with Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean")]) as monitor:
        train(model, optimizer, [torch.randn(size, 5) for size in (3, 1, 1, 3)])
        assert list(model.state_dict()) == keys
        for thing in [*model.modules(), *model.parameters()]:
            assert set(thing.__dict__) == before[id(thing)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    after = str(monitor.compute().to_dict())
    train(model, optimizer, [torch.randn(3, 5)])
    assert str(monitor.compute().to_dict()) == after


def by_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin: nn.Module = torch.load(buffer, weights_only=False)
    return twin


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_save], ids="dps")
@pytest.mark.parametrize("size", [1, 3])
def test_a_copy_is_not_watched(clone: Callable[[nn.Module], nn.Module], size: int) -> None:
    model = made(mlp)
    optimizer = sgd(model)
    metric = PerSampleGradNorms(loss_reduction="mean")
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        train(model, optimizer, [torch.randn(size, 5)] * 2)
        twin = clone(model)
        before = str(monitor.compute().to_dict())
        train(twin, sgd(twin), [torch.randn(size, 5)] * 2)
        assert str(monitor.compute().to_dict()) == before
        with PerSampleGradNorms(twin, loss_reduction="sum") as other:
            x = torch.randn(size, 5)
            twin.zero_grad()
            sum_loss(twin(x)).backward()
            assert_norms(other, norms_sq(twin, samples_of((x,), size), sum_loss))
        assert str(monitor.compute().to_dict()) == before
        train(model, optimizer, [torch.randn(size, 5)])
        assert monitor.compute()[NAME].norm["total"].mean.count == 3 * size


def test_a_model_that_nobody_has_any_more_is_freed() -> None:
    model = made(mlp)
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean")])
    train(model, optimizer, [torch.randn(size, 5) for size in (3, 1, 1)])
    alive = weakref.ref(model)
    del model, optimizer, monitor
    gc.collect()
    assert alive() is None


# ---- several


@pytest.mark.parametrize("size", [1, 3])
def test_two_models_in_one_loop(size: int) -> None:
    models = [made(mlp, seed) for seed in (0, 1)]
    metrics = [PerSampleGradNorms(loss_reduction="sum") for _ in models]
    monitors = [Monitor(m, metrics=[metric]) for m, metric in zip(models, metrics, strict=True)]
    for _ in range(3):
        x = torch.randn(size, 5)
        expected = [norms_sq(model, samples_of((x,), size), sum_loss) for model in models]
        for model in models:
            model.zero_grad()
        sum(sum_loss(model(x)) for model in models).backward()
        for metric, wanted, monitor in zip(metrics, expected, monitors, strict=True):
            assert_norms(metric, wanted)
            monitor.step()
    for monitor in monitors:
        monitor.close()


@pytest.mark.parametrize("size", [1, 3])
def test_two_metrics_on_one_model(size: int) -> None:
    model = made(mlp)
    with (
        PerSampleGradNorms(model, loss_reduction="sum") as first,
        PerSampleGradNorms(model, loss_reduction="mean") as second,
    ):
        for _ in range(3):
            x = torch.randn(size, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(first, expected)
            assert_norms(second, {name: row * size**2 for name, row in expected.items()})


def test_a_model_and_a_part_of_it() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(5, 5), mlp()))
    with (
        PerSampleGradNorms(model, loss_reduction="sum") as whole,
        PerSampleGradNorms(model[1], loss_reduction="sum") as part,
    ):
        for size in (3, 1, 1):
            x = torch.randn(size, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(whole, expected)
            assert_norms(part, {n.removeprefix("1."): row for n, row in expected.items() if n.startswith("1.")})


def test_two_metrics_in_one_monitor_need_names_of_their_own() -> None:
    metrics = [PerSampleGradNorms(loss_reduction="sum") for _ in range(2)]
    model = made(mlp)
    with pytest.raises(ValueError, match=f"two of them are called '{NAME}'"):
        Monitor(model, metrics=metrics)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("alone", [True, False])
def test_one_metric_watches_once_at_a_time(alone: bool) -> None:
    model, scaler = made(mlp), torch.amp.GradScaler("cpu", init_scale=4.0)
    metric = PerSampleGradNorms(model if alone else None, loss_reduction="sum", scaler=scaler if alone else None)
    first = metric._engine if alone else Monitor(model, metrics=[metric], scaler=scaler)
    other = PerSampleGradNorms(loss_reduction="sum")
    other.name = "other"
    x = torch.randn(3, 5)
    with pytest.raises(ValueError, match="metrics: this PerSampleGradNorms watches a model already"):
        Monitor(model, metrics=[other, metric])
    scaler.scale(sum_loss(model(x))).backward()
    assert torch.allclose(metric.per_sample, oracle(model, x)["total"], rtol=1e-5)  # it has kept its scaler
    with pytest.raises(RuntimeError, match="watches no model yet"):
        _ = other.per_sample
    first.close()
    for _ in range(2):
        with Monitor(model, metrics=[metric]) as monitor:
            sum_loss(model(x)).backward()
            monitor.step()
            monitor.close_window()
        assert len(monitor.history) == 1
    assert monitor.history[0][NAME].norm["total"].mean.count == 3


def test_a_metric_that_was_refused_can_be_used_again() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LSTM(4, 4))
    metric = PerSampleGradNorms(loss_reduction="sum", max_replay_bytes=0)
    with pytest.raises(ValueError, match="cannot be measured per sample"):
        Monitor(model, metrics=[metric])
    model[1].requires_grad_(False)
    Monitor(model, metrics=[metric]).close()


# ---- errors


def test_a_model_that_will_not_do_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LSTM(4, 3))
    optimizer, norms = sgd(model), PerSampleGradNorms(loss_reduction="sum", max_replay_bytes=0)
    with pytest.raises(ValueError, match="no rule for LSTM"):
        Monitor(model, optimizer, metrics=[Lipschitz(optional=True), norms])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not optimizer._optimizer_step_post_hooks


def test_a_metric_is_free_when_another_one_of_its_monitor_was_refused() -> None:
    model, metric = made(mlp), PerSampleGradNorms(loss_reduction="sum")
    other = PerSampleGradNorms(loss_reduction="sum", broadcast=["ghost"])
    other.name = "other"
    with pytest.raises(ValueError, match="the model has no tapped layer 'ghost'"):
        Monitor(model, metrics=[metric, other])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    Monitor(model, metrics=[metric]).close()


def test_a_dictionary_of_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="watches the forward pass of one module"):
        Monitor({"a": made(mlp)}, metrics=[PerSampleGradNorms(loss_reduction="sum")])


def test_the_wrong_object_is_called() -> None:
    inner = made(mlp)
    outer = nn.Sequential(inner)
    optimizer = sgd(inner)
    monitor = Monitor(outer, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean")])
    with pytest.warns(RuntimeWarning, match="two optimizer steps were made, but no backward pass came through"):
        train(inner, optimizer, [torch.randn(3, 5)] * 3)
    with pytest.raises(ValueError, match="Call the very object that was passed as model"):
        monitor.compute()
    monitor.close()


def test_nothing_was_recorded_yet() -> None:
    with PerSampleGradNorms(made(mlp), loss_reduction="sum") as metric:
        with pytest.raises(RuntimeError, match="no backward pass was recorded yet; call the very object"):
            _ = metric.per_sample


def test_a_metric_of_a_monitor_is_closed_by_it() -> None:
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(made(mlp), metrics=[metric]):
        with pytest.raises(RuntimeError, match="belongs to a Monitor"):
            metric.close()
        with pytest.raises(RuntimeError, match="to use it alone call PerSampleGradNorms"), metric:
            pass


@pytest.mark.parametrize("size", [1, 3])
def test_an_error_is_raised_once_and_training_goes_on(size: int) -> None:
    def run(watched: bool) -> list[Tensor]:
        model = made(mlp)
        optimizer = sgd(model)
        metric = PerSampleGradNorms(loss_reduction="mean")
        monitor = Monitor(model, optimizer, metrics=[metric]) if watched else None
        torch.manual_seed(5)
        for step in range(4):
            if monitor is not None and step == 1:
                metric.set_ids(torch.arange(17))
                with pytest.warns(RuntimeWarning, match="stopped recording: ids: 17 ids"):
                    train(model, optimizer, [torch.randn(size, 5)])
            else:
                train(model, optimizer, [torch.randn(size, 5)])
        if monitor is not None:
            with pytest.raises(ValueError, match="17 ids"):
                monitor.compute()
            monitor.close()
        return weights(model)

    assert_equal(run(True), run(False))
