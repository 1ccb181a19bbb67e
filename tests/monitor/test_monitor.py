"""The Monitor: its clock, its windows, what it returns and keeps, and what it says when something is wrong."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import math
import resource
from collections.abc import Callable
from html import escape
from typing import Any

import pytest
import torch
from few import few
from models import Graph, batches, cnn, mlp, mse, seeded, train
from oracle import assert_same_state
from states import opened, sealed
from torch import Tensor, nn

from lipcore import Lipschitz, Metric, Monitor, PerSampleGradNorms, Trajectory
from lipcore.distributed.rank_axis import packed
from lipcore.metric.protocol import PlanLine
from lipcore.metric.results import MetricResult, Window


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)


def watched(build: Callable[[], nn.Module] = lambda: mlp(5, 7, 1), **settings: Any) -> tuple[Any, Any, Monitor]:
    model = seeded(build)
    optimizer = sgd(model)
    return model, optimizer, Monitor(model, optimizer, **settings)


class Steps(Metric):
    """Counts what it is told."""

    name = "steps"

    def __init__(self) -> None:
        self.count = 0

    def bind(self, model: nn.Module) -> None:
        pass

    def plan(self) -> list[PlanLine]:
        return [PlanLine("steps", "counted", 8)]

    def observe_step(self) -> None:
        self.count += 1

    def finalize(self) -> MetricResult:
        return MetricResult(self.name, count=self.count)

    def reset(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


# ---- windows


def test_windows_close_by_themselves() -> None:
    model, optimizer, monitor = watched(window_steps=3)
    train(model, batches(8, 2), optimizer)
    assert [(w.index, w.first_step, w.last_step, w.steps, w.closed) for w in monitor.history] == [
        (0, 1, 3, 3, True),
        (1, 4, 6, 3, True),
    ]
    open_window = monitor.compute()
    assert (open_window.index, open_window.first_step, open_window.last_step, open_window.closed) == (2, 7, 8, False)
    assert [w["lipschitz"].skipped["model:Linear"].sum.count for w in [*monitor.history, open_window]] == [6, 6, 4]
    lengths = [w["trajectory"].path_length["total"] for w in [*monitor.history, open_window]]
    assert lengths[-1].cumulative.value == pytest.approx(sum(length.sum.value for length in lengths), rel=1e-12)


def test_compute_changes_nothing() -> None:
    model, optimizer, monitor = watched()
    train(model, batches(3, 2), optimizer)
    first = monitor.compute().to_dict()
    assert monitor.compute().to_dict() == first
    assert not monitor.history
    train(model, batches(2, 2), optimizer)
    assert monitor.compute().last_step == 5
    _, _, undisturbed = run_of_five = watched()
    train(run_of_five[0], batches(3, 2), run_of_five[1])
    train(run_of_five[0], batches(2, 2), run_of_five[1])
    assert monitor.compute().to_dict() == undisturbed.compute().to_dict()


def test_close_window_returns_what_it_closes() -> None:
    model, optimizer, monitor = watched()
    windows = []
    for steps in (2, 3, 1):
        train(model, batches(steps, 2), optimizer)
        before = monitor.compute()
        windows.append(monitor.close_window())
        assert before.to_dict() == windows[-1].to_dict() | {"closed": False}
    assert [w.steps for w in windows] == [2, 3, 1]
    assert list(monitor.history) == windows
    assert monitor.pop_window() is None  # it was returned already


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("before", [0, 2, 4])
def test_an_empty_window_is_none_and_not_closed(before: int, blocks: int) -> None:
    """With windows of four steps: before the first step, with steps in the window, and right after one has closed."""
    model, optimizer, monitor = watched(window_steps=4, window_blocks=blocks)
    train(model, batches(before, 2), optimizer)
    if before % (4 // blocks):
        assert monitor.close_window().steps == before
    closed, state = list(monitor.history), resume(monitor.state_dict())
    assert monitor.close_window() is monitor.close_window() is None
    assert list(monitor.history) == closed
    assert_same_state(monitor.state_dict(), state)
    slides = blocks > 1 and before  # then the window has the steps of the blocks before
    assert (monitor.compute() is None) is not bool(slides)
    train(model, batches(1, 2), optimizer)
    assert monitor.compute().last_step == before + 1
    assert monitor.close_window().index == len(closed)
    with monitor:
        pass
    assert (monitor.compute() is None) is (blocks == 1)
    assert monitor.close_window() is None


def test_passes_without_a_step_belong_to_the_window_of_the_next_step() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    metrics = [Lipschitz(), PerSampleGradNorms(loss_reduction="sum")]
    with Monitor(model, metrics=metrics) as monitor:
        model(torch.randn(3, 5)).sum().backward()
        assert monitor.compute() is monitor.close_window() is None
        monitor.step()
        window = monitor.close_window()
        assert window["lipschitz"].normalized_gradient_norm["model:Linear"].mean.count == 3
        assert window["per_sample_grad_norm"].norm["total"].mean.count == 3
        assert monitor.close_window() is None
    assert len(monitor.history) == 1


def test_a_copy_of_an_empty_window_is_empty() -> None:
    _, _, monitor = watched()
    assert copy.deepcopy(monitor).compute() is None


def test_pop_window_brings_each_window_once_in_order() -> None:
    model, optimizer, monitor = watched(window_steps=2)
    assert monitor.pop_window() is None
    train(model, batches(5, 2), optimizer)
    first = monitor.pop_window()
    assert first is not None
    assert first.index == 0
    monitor.close_window()  # the third, of one step
    train(model, batches(2, 2), optimizer)
    assert [monitor.pop_window().index for _ in range(2)] == [1, 3]
    assert monitor.pop_window() is None
    assert [(w.index, w.steps) for w in monitor.history] == [(0, 2), (1, 2), (2, 1), (3, 2)]


def test_closing_by_hand_restarts_the_count_of_steps() -> None:
    model, optimizer, monitor = watched(window_steps=3)
    train(model, batches(2, 2), optimizer)
    monitor.close_window()
    train(model, batches(3, 2), optimizer)
    assert [(w.first_step, w.last_step) for w in monitor.history] == [(1, 2), (3, 5)]


def test_history_is_bounded() -> None:
    model, optimizer, monitor = watched(window_steps=1, history_limit=3)
    train(model, batches(10, 2), optimizer)
    assert [w.index for w in monitor.history] == [7, 8, 9]
    assert [monitor.pop_window().index for _ in range(3)] == [7, 8, 9]


def test_results_are_json() -> None:
    model, optimizer, monitor = watched(lambda: nn.Sequential(*mlp(5, 7, 1), nn.Sigmoid()), window_steps=2)
    train(model, batches(5, 3), optimizer)
    with torch.no_grad():
        model[0].weight.fill_(torch.inf)
    train(model, batches(2, 3), optimizer)
    for thing in (monitor.history.to_dict(), monitor.compute().to_dict(), monitor.compute()["lipschitz"].to_dict()):
        text = json.dumps(thing, allow_nan=False)
        assert json.loads(text) == thing
    first = monitor.history.to_dict()["windows"][0]
    assert set(first) == {"index", "first_step", "last_step", "closed", "scope", "metrics"}
    mean = first["metrics"]["lipschitz"]["quantities"]["local_lipschitz"]["model:Sigmoid"]["mean"]
    assert set(mean) >= {"value", "count", "label", "valid"}


def test_flat_keys_are_metric_quantity_reducer_place() -> None:
    model, optimizer, monitor = watched(cnn)
    train(model, images(2), optimizer)
    window = monitor.compute()
    flat = window.flat()
    for key, value in flat.items():
        metric, middle, place = key.split("/")
        quantity, reducer = middle.split(".")
        assert isinstance(value, float)
        assert window[metric][quantity][place][reducer].value == value or math.isnan(value)
    assert "lipschitz/local_lipschitz.p99/model:Linear" in flat
    assert "trajectory/update_norm.max/total" in flat
    assert "trajectory/path_length.sum/3" in flat  # a group
    assert "trajectory/path_length.sum/3.weight" not in flat
    assert "trajectory/path_length.sum/3.weight" in window.flat("tensor")
    with pytest.raises(ValueError, match=r"level: expected 'tensor', 'group' or 'total', got 'all'"):
        window.flat("all")


def images(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, 1, 8, 8), torch.randn(3, 1)) for _ in range(count)]


def test_results_say_what_they_have() -> None:
    model, optimizer, monitor = watched()
    train(model, batches(2, 2), optimizer)
    window = monitor.compute()
    with pytest.raises(KeyError, match=r"no metric 'loss' in this window; it has trajectory, lipschitz"):
        window["loss"]
    with pytest.raises(AttributeError, match=r"lipschitz has no quantity 'ratio'; it has normalized_gradient_norm, "):
        _ = window["lipschitz"].ratio
    with pytest.raises(KeyError, match=r"update_norm has no place '9'; it has '0.weight', "):
        window["trajectory"].update_norm["9"]
    with pytest.raises(AttributeError, match=r"no reducer 'median'; this quantity has last, mean, max"):
        _ = window["trajectory"].update_norm["total"].median
    assert (
        float(window["trajectory"].update_norm["total"].max)
        == window["trajectory"]["update_norm"]["total"]["max"].value
    )
    series = monitor.history.series("lipschitz", "local_lipschitz", "model:Linear", "mean")
    assert series == []


def test_the_window_is_not_local_in_a_single_process() -> None:
    _, _, monitor = watched()
    monitor.step()
    window = monitor.compute()
    assert window.scope == "global"
    assert window.local is False


# ---- the clock


def test_the_first_of_several_optimizers_is_the_clock() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[2].parameters(), lr=0.1)
    with Monitor(model, [first, second], metrics=[Trajectory()]) as monitor:
        for x, y in batches(4, 2):
            model.zero_grad()
            mse(model(x), y).backward()
            second.step()
            first.step()
        window = monitor.compute()
    assert window.steps == 4
    assert window["trajectory"].update_norm["0.weight"].mean.count == 4
    assert window["trajectory"].update_norm["2.weight"].max.value > 0
    assert "SGD.step" in str(monitor.plan())


def test_steps_can_be_ticked_by_hand() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with Monitor(model, window_steps=2) as monitor:
        for x, y in batches(4, 2):
            model.zero_grad()
            mse(model(x), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            monitor.step()
    assert [w.steps for w in monitor.history] == [2, 2]
    twin = seeded(lambda: mlp(5, 7, 1))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    with Monitor(twin, optimizer, window_steps=2) as expected:
        train(twin, batches(4, 2), optimizer)
    for mine, theirs in zip(monitor.history, expected.history, strict=True):
        assert mine.flat() == pytest.approx(theirs.flat(), rel=1e-6, nan_ok=True)
    assert "monitor.step()" in str(monitor.plan())


def test_accumulated_gradients_make_one_step() -> None:
    model, optimizer, monitor = watched()
    for _ in range(3):
        for x, y in batches(4, 2):
            (mse(model(x), y) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    window = monitor.compute()
    assert window.steps == 3
    assert window["trajectory"].update_norm["total"].mean.count == 3
    assert window["lipschitz"].normalized_gradient_norm["model:Linear"].mean.count == 24


def test_a_skipped_optimizer_step_is_no_step() -> None:
    model, optimizer, monitor = watched(metrics=[Trajectory(), Lipschitz()])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, (x, y) in enumerate(batches(4, 2)):
        optimizer.zero_grad()
        loss = mse(model(x), y) * (torch.inf if i == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    window = monitor.compute()
    assert window.steps == 3
    assert window["lipschitz"].skipped["model:Linear"].sum.value == 2
    assert window["lipschitz"].normalized_gradient_norm["model:Linear"].mean.count == 6
    assert window["trajectory"].nonfinite_steps["total"].sum.value == 0


def test_custom_metrics_are_told_about_steps_and_windows() -> None:
    metric = Steps()
    model, optimizer, monitor = watched(metrics=[metric], window_steps=3)
    train(model, batches(7, 2), optimizer)
    assert [w["steps"].details["count"] for w in [*monitor.history, monitor.compute()]] == [3, 3, 1]
    assert monitor.plan().bytes == 8


def test_a_metric_that_fails_does_not_stop_the_training() -> None:
    class Failing(Steps):
        def observe_step(self) -> None:
            raise ArithmeticError("as expected")

    model, optimizer, monitor = watched(metrics=[Failing()])
    with pytest.warns(RuntimeWarning, match="lipcore stopped recording: as expected"):
        train(model, batches(3, 2), optimizer)
    with pytest.raises(ArithmeticError, match="as expected"):
        monitor.close_window()
    monitor.close()


def test_no_metrics_is_a_clock_alone() -> None:
    model, optimizer, monitor = watched(metrics=[], window_steps=2)
    train(model, batches(5, 2), optimizer)
    assert [dict(w) for w in monitor.history] == [{}, {}]
    assert monitor.compute().flat() == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- the plan


def test_the_plan_is_there_before_the_first_step() -> None:
    model, _, monitor = watched(window_steps=10)
    plan = monitor.plan()
    parameters = sum(p.numel() for p in model.parameters())
    text = str(plan)
    assert plan.bytes >= 3 * 4 * parameters
    for words in (
        "lipcore plan",
        "window closed every 10 steps",
        "SGD.step",
        "trajectory",
        "lipschitz",
        "'0' (Linear)",
        "KiB",
    ):
        assert words in text
    assert "one value per sample" in text


def test_a_metric_s_plan_prints_as_the_monitor_s_does() -> None:
    _, _, monitor = watched(window_steps=10)
    whole = monitor.plan()
    assert str(whole) == repr(whole)
    for metric in monitor.metrics.values():
        lines = metric.plan()
        assert all(f"    {row}" in str(whole) for row in str(lines).splitlines())
        assert "PlanLine(" not in str(lines)
        html = lines._repr_html_()  # type: ignore[attr-defined]
        for line in lines:
            assert all(f"<td>{escape(cell)}</td>" in html for cell in (line.what, line.rule))
            assert f"<td>{escape(line.rule)}</td>" in whole._repr_html_()
    assert "<td>history</td>" in whole._repr_html_()


def test_the_plan_before_and_after_the_first_layer_is_found() -> None:
    build = lambda: Graph(lambda m, x: m.b(m.a(x).relu()), b=nn.Linear(7, 1), a=nn.Linear(5, 7))  # noqa: E731
    model, optimizer, monitor = watched(build)
    assert "found at the first step" in str(monitor.plan())
    train(model, batches(1, 2), optimizer)
    assert "'a' (Linear)" in str(monitor.plan())


def test_by_default_lipschitz_turns_itself_off_where_it_does_not_apply() -> None:
    model, optimizer, monitor = watched(lambda: Graph(lambda m, x: {"out": m.a(x)}, a=nn.Linear(5, 1)), window_steps=2)
    with pytest.warns(RuntimeWarning, match="lipcore turned lipschitz off: output: model returns a dict") as caught:
        for x, _ in batches(4, 2):
            optimizer.zero_grad()
            model(x)["out"].square().sum().backward()
            optimizer.step()
    assert len(caught) == 1
    assert "off" in str(monitor.plan())
    assert "key or attribute (of 'out')" in str(monitor.plan())
    assert "returns a dict" in repr(monitor.history[1])
    assert [list(w) for w in monitor.history] == [["trajectory"], ["trajectory"]]
    assert monitor.history[1]["trajectory"].path_length["total"].sum.value > 0
    monitor.close()


def test_by_default_lipschitz_raises_nothing_where_it_cannot_begin() -> None:
    """A language model whose block is compiled: no layer can be found by watching it, and its input holds integers."""
    parts = {"a": nn.Embedding(9, 5), "b": nn.Linear(5, 5), "c": nn.Linear(5, 9)}
    model = Graph(lambda m, x: m.c(m.b(m.a(x))), **parts)
    model.b.compile(backend="eager")
    with pytest.warns(UserWarning, match="normalized_gradient_norm off"):
        monitor = Monitor(model, optimizer := sgd(model), window_steps=2)
    with pytest.warns(RuntimeWarning, match="lipcore turned lipschitz off: the first layer of a compiled model"):
        for _ in range(3):
            loss = model(torch.arange(6).reshape(3, 2)).logsumexp(-1).mean()
            monitor.log(loss=loss)  # where what was kept is raised
            loss.backward()
            optimizer.step()
    assert {"trajectory", "logged"} <= set(monitor.history[0])
    assert "cannot be found by watching it run" in monitor.history[0].off["lipschitz"]
    monitor.close()


def test_by_default_a_classifier_has_bounds_of_its_jacobians() -> None:
    model, optimizer, monitor = watched(lambda: mlp(5, 7, 3), window_steps=2)
    for x, _ in batches(4, 6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        optimizer.step()
    assert "one-sided bound" in str(monitor.plan())
    for window in monitor.history:
        for quantity in ("local_lipschitz", "normalized_gradient_norm", "steadiness"):
            assert {value.label for value in window["lipschitz"][quantity]["model:Linear"].values()} == {"one-sided"}
        assert window["lipschitz"].local_lipschitz["model:Linear"].mean.value > 0
        assert window["lipschitz"].details["quantity"] == "residual"


def test_by_default_a_model_without_a_first_layer_has_lambda_alone() -> None:
    with pytest.warns(UserWarning, match="normalized_gradient_norm off: the model has no Linear"):
        model, optimizer, monitor = watched(lambda: Graph(lambda m, x: m.a(x, x), a=nn.Bilinear(5, 5, 1)))
    for x, _ in batches(4, 6):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    result = monitor.compute()["lipschitz"]
    assert result.local_lipschitz["model"].mean.value > 0
    assert "no Linear, Conv1d, Conv2d, Conv3d or Embedding" in repr(result)
    assert "no Linear, Conv1d, Conv2d, Conv3d or Embedding" in str(monitor.plan())
    monitor.close()


def test_a_default_monitor_that_hears_nothing_says_so() -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    never_called = nn.Sequential(*model)
    optimizer = sgd(model)
    with Monitor(never_called, optimizer) as monitor:
        with pytest.warns(RuntimeWarning, match="turned lipschitz off: model: two optimizer steps were made"):
            train(model, batches(3, 2), optimizer)
        assert monitor.compute()["trajectory"].path_length["total"].sum.value > 0
        assert "two optimizer steps were made" in str(monitor.plan())


# ---- wrong arguments


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"optimizer": "sgd"}, TypeError, "optimizer: expected a torch.optim.Optimizer"),
        ({"optimizer": [3]}, TypeError, "optimizer: expected .* got int"),
        ({"metrics": [Trajectory]}, TypeError, "metrics: expected lipcore metrics, got "),
        ({"metrics": ["lipschitz"]}, TypeError, "metrics: expected lipcore metrics, got str"),
        ({"metrics": Trajectory}, TypeError, "metrics: "),
        ({"metrics": [Lipschitz(), Lipschitz()]}, ValueError, "metrics: two of them are called 'lipschitz'"),
        ({"window_steps": 0}, ValueError, "window_steps: expected an integer >= 1, got 0"),
        ({"window_steps": 2.0}, ValueError, "window_steps: expected an integer >= 1, got 2.0"),
        ({"window_steps": True}, ValueError, "window_steps: expected an integer >= 1, got True"),
        ({"history_limit": -1}, ValueError, "history_limit: expected an integer >= 1, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with pytest.raises(error, match=message):
        Monitor(model, **settings)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("model", [None, "model", nn.Linear, lambda x: x], ids=["none", "text", "class", "function"])
def test_the_model_must_be_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got "):
        Monitor(model)


def test_a_metric_belongs_to_one_monitor() -> None:
    metric = Trajectory()
    _, _, _ = watched(metrics=[metric])
    with pytest.raises(RuntimeError, match="bound to a model already"):
        watched(metrics=[metric])


def test_a_frozen_model_has_no_trajectory() -> None:
    model = seeded(lambda: mlp(5, 7, 1)).requires_grad_(False)
    with pytest.raises(ValueError, match="model: has no trainable parameter"):
        Monitor(model)


# ---- state


def resume(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("before", [2, 3, 5])
def test_a_resumed_run_continues_as_if_it_had_not_been_interrupted(before: int, size: int) -> None:
    data = batches(10, size)

    def uninterrupted() -> Monitor:
        model, optimizer, monitor = watched(window_steps=3)
        train(model, data, optimizer)
        return monitor

    model, optimizer, monitor = watched(window_steps=3)
    train(model, data[:before], optimizer)
    saved = resume({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "monitor": monitor.state_dict()})
    closed = list(monitor.history)
    model, optimizer = mlp(5, 7, 1), None
    model.load_state_dict(saved["model"])
    optimizer = sgd(model)
    optimizer.load_state_dict(saved["optimizer"])
    resumed = Monitor(model, optimizer, window_steps=3)
    resumed.load_state_dict(saved["monitor"])
    train(model, data[before:], optimizer)
    expected = uninterrupted()
    windows = [*closed, *resumed.history, resumed.compute()]
    assert [w.to_dict() for w in windows] == [w.to_dict() for w in [*expected.history, expected.compute()]]


def test_labels_survive_a_resumption() -> None:
    model, optimizer, monitor = watched(metrics=[Lipschitz()])
    train(model, batches(3, 2), optimizer)
    state = resume(monitor.state_dict())
    twin = copy.deepcopy(model)
    resumed = Monitor(twin, metrics=[Lipschitz()])
    resumed.load_state_dict(state)
    label = resumed.compute()["lipschitz"].normalized_gradient_norm["model:Linear"].mean.count
    assert label == 6
    twin(torch.randn(2, 5)).sum().backward()
    resumed.step()
    sandwich = resumed.close_window()["lipschitz"].sandwich["model:Linear"]
    assert sandwich.lower.label == "heuristic"  # W_1 moved in the part before
    twin.zero_grad()
    twin(torch.randn(2, 5)).sum().backward()
    resumed.step()
    assert resumed.close_window()["lipschitz"].sandwich["model:Linear"].lower.label == "exact"


def test_a_state_that_does_not_fit_is_refused() -> None:
    model, optimizer, monitor = watched()
    train(model, batches(3, 2), optimizer)
    good = monitor.state_dict()
    before = monitor.compute().to_dict()
    _, _, other = watched(metrics=[Lipschitz()])
    with pytest.raises(ValueError, match=r"metrics: the state has \['lipschitz', 'trajectory'\], this monitor has"):
        other.load_state_dict(good)
    for key, value in (("version", 99), ("quantity", "residual")):
        bad = opened(good)
        bad["metrics"]["lipschitz"][key] = value
        with pytest.raises(ValueError, match=f"{key}: the state has"):
            monitor.load_state_dict(sealed(bad))
        assert monitor.compute().to_dict() == before


def test_windows_of_a_run_that_is_given_up_go_when_its_monitor_loads_a_state() -> None:
    model, optimizer, monitor = watched(window_steps=2)
    inputs = batches(9, 2)
    train(model, inputs[:5], optimizer)
    saved = monitor.state_dict(), copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert monitor.pop_window().last_step == 2
    kept = list(monitor.history)
    train(model, inputs[5:], optimizer)
    lengths = monitor.history.series("trajectory", "path_length", "total", "sum")
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    monitor.load_state_dict(saved[0])
    assert list(monitor.history) == kept
    assert monitor.global_window() is None  # the newest was one of those
    train(model, inputs[5:], optimizer)
    assert [(window.index, window.first_step) for window in monitor.history] == [(0, 1), (1, 3), (2, 5), (3, 7)]
    assert monitor.history.series("trajectory", "path_length", "total", "sum") == lengths
    assert [monitor.pop_window().last_step for _ in range(3)] == [4, 6, 8]
    assert monitor.pop_window() is None


MONITOR_STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{f"without_{key}": ((lambda s, key=key: s.pop(key)), f"{key}: missing from the monitor's state")
       for key in ("version", "step", "windows", "starts")},
    "version": (lambda s: s.update(version=1),
                "version: the state has 1, this monitor has 3; an older lipcore has saved it"),
    "newer_with_other_keys": (lambda s: (s.update(version=4), s.pop("step")),
                              "version: the state has 4, this monitor has 3; a newer lipcore has saved it"),
    "a_metric_of_another_version": (lambda s: s["metrics"]["trajectory"].update(version=1),
                                    r"trajectory: version: the state has 1, this metric has \d; an older lipcore"),
    "step_text": (lambda s: s.update(step="3"), "step: expected a count >= 0, got '3'"),
    "step_negative": (lambda s: s.update(step=-1), "step: expected a count >= 0, got -1"),
    "windows": (lambda s: s.update(windows=None), "windows: expected a count >= 0, got None"),
    "metrics_list": (lambda s: s.update(metrics=[]), "alike: expected the number of ranks and the metrics, got "),
    "metrics_more": (lambda s: s["metrics"].update(other={}), r"metrics: the state has \['lipschitz', 'other', "),
    "starts_empty": (lambda s: s.update(starts=[]), "starts: expected .* 1 to 2 blocks"),
    "starts_many": (lambda s: s.update(starts=[[0, 0]] * 3), "starts: expected .* 1 to 2 blocks"),
    "starts_flat": (lambda s: s.update(starts=[0]), "starts: expected"),
    "starts_text": (lambda s: s.update(starts=[["0", 0]]), "starts: expected"),
    "starts_later": (lambda s: s.update(starts=[[9, 0]]), r"starts: blocks begin after steps \[9\], but .* step 3"),
    "a_metric": (lambda s: s["metrics"]["lipschitz"].update(version=99),
                 "lipschitz: version: the state has 99, this metric has 1; a newer lipcore has saved it"),
    **{f"lipschitz_without_{key}": ((lambda s, key=key: s["metrics"]["lipschitz"].pop(key)), f"{key}: expected .*None")
       for key in ("mixed", "weight_moved", "closed")},
    "lipschitz_without_distributions": (lambda s: s["metrics"]["lipschitz"].pop("distributions"),
                                        "distributions: expected a list of 3, got NoneType"),
    "lipschitz_none": (lambda s: s["metrics"].update(lipschitz=None),
                       "ranks.0.metrics.lipschitz: expected a dict, got NoneType"),
    "lipschitz_closed_many": (lambda s: s["metrics"]["lipschitz"].update(closed=[[]] * 2),
                              "closed: expected a list of at most 1 blocks, got 2 of them"),
    "lipschitz_closed_bad": (lambda s: s["metrics"]["lipschitz"].update(closed=[[{}] * 3]),
                             r"closed\[0\]\[0\]: version"),
    "lipschitz_steps_text": (lambda s: s["metrics"]["lipschitz"].update(bias_steps=[["a", "b", "c"]]),
                             "bias_steps: expected .*'a'"),
    "lipschitz_steps_short": (lambda s: s["metrics"]["lipschitz"].update(bias_steps=[[1, 2]]), "bias_steps: expected"),
    "another_metric": (lambda s: s["metrics"]["trajectory"]["trackers"].clear(), "trackers: 'exact' is missing"),
}  # fmt: skip


#: Of what ranks do not have alike, and of what they have.
RANKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{f"without_{key}": ((lambda s, key=key: s.pop(key)), f"{key}: missing from the monitor's state")
       for key in ("alike", "copies", "ranks")},
    "alike_text": (lambda s: s["alike"].update(all="x"), "alike: expected bytes, got str"),
    "alike_bytes": (lambda s: s["alike"].update(all=b"x"), "alike: cannot be read"),
    "alike_list": (lambda s: s["alike"].update(all=packed([1])), "alike: expected the number of ranks and the metrics"),
    "alike_ranks": (lambda s: s["alike"].update(all=packed({"ranks": 0, "metrics": {}})), "alike: expected the number"),
    "ranks_list": (lambda s: s.update(ranks=[]), "ranks: expected entries by rank, got list"),
    "ranks_names": (lambda s: s["ranks"].update(a=b"-"), "ranks: expected entries by rank, got keys"),
    "ranks_text": (lambda s: s["ranks"].update({"0": "x"}), "ranks.0: expected bytes, got str"),
    "ranks_bytes": (lambda s: s["ranks"].update({"0": b"x"}), "ranks.0: cannot be read"),
    "ranks_empty": (lambda s: s["ranks"].update({"0": packed({})}), "ranks.0: expected the metrics of a rank of 1"),
    "ranks_more": (lambda s: s["ranks"].update({"7": packed({"metrics": {}})}), "ranks.7: expected the metrics of a"),
    "copies_list": (lambda s: s.update(copies={"all": []}), "copies: expected tensors by metric, got list"),
    "copies_of_another": (lambda s: s["copies"]["all"]["trajectory"]["0.weight"]["prev"].add_(1),
                          "copies.0.weight.prev: parameter '0.weight' has other values in the checkpoint than"),
    "copies_without_one": (lambda s: s["copies"]["all"]["trajectory"]["0.weight"].pop("ref"), "copies: .*'0.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", few(RANKS, 6))
def test_what_ranks_have_alike_and_not_is_checked(case: str) -> None:
    corrupt, words = RANKS[case]
    _, optimizer, source = watched()
    train(source.model, batches(3, 2), optimizer)
    bad = source.state_dict()
    corrupt(bad)
    before = copy.deepcopy(source.state_dict())
    with pytest.raises(ValueError, match=words):
        source.load_state_dict(bad)
    assert_same_state(source.state_dict(), before)


@pytest.mark.parametrize("case", few(MONITOR_STATES, 8))
def test_a_bad_key_is_named_and_nothing_changes(case: str) -> None:
    corrupt, words = MONITOR_STATES[case]
    _, optimizer, source = watched(window_steps=4, window_blocks=2)
    train(source.model, batches(3, 2), optimizer)
    model, optimizer, monitor = watched(window_steps=4, window_blocks=2)
    train(model, batches(5, 2), optimizer)
    before, numbers = copy.deepcopy(monitor.state_dict()), monitor.compute().to_dict()
    bad = opened(source.state_dict())
    corrupt(bad)
    with pytest.raises(ValueError, match=words):
        monitor.load_state_dict(sealed(bad))
    assert_same_state(monitor.state_dict(), before)
    assert monitor.compute().to_dict() == numbers
    monitor.load_state_dict(source.state_dict())
    assert_same_state(monitor.state_dict(), source.state_dict())


@pytest.mark.parametrize("bad", [None, [], "state"])
def test_a_state_must_be_a_dict(bad: Any) -> None:
    _, _, monitor = watched()
    with pytest.raises(ValueError, match="state: expected a dict, got "):
        monitor.load_state_dict(bad)


def test_a_state_that_does_not_fit_changes_no_metric_at_all() -> None:
    model, optimizer, monitor = watched()
    train(model, batches(3, 2), optimizer)
    bad = opened(monitor.state_dict())
    train(model, batches(2, 2), optimizer)
    before = monitor.compute().to_dict()
    bad["metrics"]["lipschitz"]["version"] = 99  # the trajectory's part is fine
    with pytest.raises(ValueError, match="version"):
        monitor.load_state_dict(sealed(bad))
    assert monitor.compute().to_dict() == before


def test_a_resumed_monitor_that_hears_nothing_says_so_too() -> None:
    model, optimizer, monitor = watched(metrics=[Lipschitz()])
    train(model, batches(5, 2), optimizer)
    state = monitor.state_dict()
    monitor.close()
    resumed = Monitor(nn.Sequential(*model), optimizer, metrics=[Lipschitz()])
    resumed.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match="two optimizer steps were made"):
        train(model, batches(3, 2), optimizer)


# ---- the end


def test_results_stay_readable_after_close() -> None:
    model, optimizer, monitor = watched(window_steps=2)
    with monitor:
        train(model, batches(3, 2), optimizer)
        expected = monitor.compute().to_dict()
    train(model, batches(3, 2), optimizer)
    assert monitor.compute().to_dict() == expected
    assert len(monitor.history) == 1
    assert monitor.pop_window().index == 0
    closed = monitor.close_window()
    assert closed.to_dict() == expected | {"closed": True}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backward_pass_right_before_the_end_is_counted(frozen: bool) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    model[0].requires_grad_(not frozen)
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        monitor.step()
        model(torch.randn(3, 5)).sum().backward()
    assert monitor.compute()["lipschitz"].normalized_gradient_norm["model:Linear"].mean.count == 3


def test_an_exception_in_the_with_block_comes_through() -> None:
    model, optimizer, monitor = watched()
    with pytest.raises(KeyboardInterrupt), monitor:
        train(model, batches(2, 2), optimizer)
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert monitor.compute().steps == 2


@pytest.mark.parametrize(
    ("build", "size"),
    [
        pytest.param(lambda: mlp(5, 7, 1), 1, id="mlp-1", marks=pytest.mark.ci),  # by the shortcut
        pytest.param(lambda: mlp(5, 7, 1), 4, id="mlp-4", marks=pytest.mark.ci),
        pytest.param(lambda: frozen_mlp(), 1, id="frozen-1", marks=pytest.mark.slow),
        pytest.param(lambda: frozen_mlp(), 4, id="frozen-4", marks=pytest.mark.slow),
        pytest.param(lambda: found_mlp(), 1, id="found-1", marks=pytest.mark.slow),
        pytest.param(lambda: found_mlp(), 4, id="found-4", marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow(build: Callable[[], nn.Module], size: int) -> None:
    model, optimizer, monitor = watched(build, window_steps=50, history_limit=3)
    data = batches(20, size)

    def run(steps: int) -> tuple[int, int]:
        for _ in range(steps // 20):
            train(model, data, optimizer)
            model(data[0][0])  # abandoned
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(gc.get_objects())

    rounds = [run(steps) for steps in (1200, 800, 800, 800)]  # past the first 512 steps and once round the ring
    kib, objects = zip(*rounds, strict=True)
    # A leak grows in every round. Torch and the allocator take what they keep in some of them, megabytes at a time, and
    # other threads (pytest-xdist's) make objects of their own.
    assert min(after - before for before, after in itertools.pairwise(objects)) <= 10
    assert min(after - before for before, after in itertools.pairwise(kib)) <= 256
    assert isinstance(monitor.history[-1], Window)
    monitor.close()


def frozen_mlp() -> nn.Module:
    model = mlp(5, 7, 1)
    model[0].requires_grad_(False)
    return model


def found_mlp() -> nn.Module:
    return Graph(lambda m, x: m.b(m.a(x).relu()), b=nn.Linear(7, 1), a=nn.Linear(5, 7))


def test_the_first_batch_after_a_rebind_keeps_all_its_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = [Lipschitz(lambda_every=1), PerSampleGradNorms(loss_reduction="mean")]
    with Monitor(model, optimizer, metrics, window_steps=None) as monitor:
        for _ in range(2):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            window = monitor.compute()
            assert window["lipschitz"].local_lipschitz["model:Linear"].mean.count == 8
            assert window["per_sample_grad_norm"].norm["total"].mean.count == 8
            monitor.rebind()


@pytest.mark.parametrize("kind", [nn.ModuleDict, nn.ModuleList])
def test_default_metrics_of_modules_that_nobody_calls_together(kind: type[nn.Module]) -> None:
    layer = nn.Linear(3, 1)
    model = kind({"a": layer} if kind is nn.ModuleDict else [layer])  # type: ignore[call-arg]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer) as monitor:
        layer(torch.randn(4, 3)).mean().backward()
        optimizer.step()
        assert list(monitor.metrics) == ["trajectory"]
        assert monitor.compute()["trajectory"].path_length["total"].sum.value > 0
