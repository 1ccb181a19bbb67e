"""Results as columns: the numbers of one Value at a time, in less memory; equality, pickling, History.from_dict."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory
from lipcore.metric.distribution import Distribution, described
from lipcore.metric.results import History, MetricResult, Value, Window
from lipcore.trajectory.describe import GRADIENTS, MOVES, OFFSETS


def trained(steps: int = 20, spoil: bool = False, **settings: object) -> Monitor:
    """A Monitor with windows of 10 steps that has seen a run of all default metrics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = [
        Trajectory(stats=[*MOVES, *OFFSETS, *GRADIENTS]),
        Lipschitz(),
        PerSampleGradNorms(loss_reduction="mean"),
    ]
    monitor = Monitor(model, optimizer, metrics, window_steps=10, **settings)  # type: ignore[arg-type]
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(6, 3)).square().mean().backward()
        if spoil and step in (3, 14):
            for parameter in (model[2].weight, model[4].weight):
                assert parameter.grad is not None
                parameter.grad.zero_()
                with torch.no_grad():
                    parameter.zero_() if parameter is model[4].weight else parameter.fill_(math.nan)
        optimizer.step()
        if spoil:
            with torch.no_grad():
                model[2].weight.nan_to_num_(0.1)
    return monitor


def one_by_one(result: MetricResult) -> MetricResult:
    """The same values, added one place at a time."""
    other = MetricResult(result.metric, **dict(result.details))
    for name, quantity in result.items():
        for place in quantity:
            other.add(name, place, quantity.level(place), **quantity[place])
    return other


@pytest.mark.parametrize("spoil", [False, True])
def test_columns_say_what_single_values_say(spoil: bool) -> None:
    for window in trained(spoil=spoil).history:
        for result in window.values():
            other = one_by_one(result)
            assert result == other
            assert result.to_dict() == other.to_dict()
            for level in ("tensor", "group", "total"):
                np.testing.assert_equal(result.flat(level), other.flat(level))  # type: ignore[arg-type]
            for name, quantity in result.items():
                assert list(quantity) == list(other[name])
                for reducer in quantity[next(iter(quantity))]:
                    expected = [row[reducer].value if reducer in row else math.nan for row in quantity.values()]
                    np.testing.assert_array_equal(quantity.array(reducer), expected)


def test_rows_of_the_ledger_as_they_stand_there() -> None:
    monitor = trained(15)
    tracker = monitor.metrics["trajectory"]._tracker  # type: ignore[attr-defined]
    result = monitor.compute()["trajectory"]
    for (place, level), row in tracker.named_rows().items():
        steps, path, last = row[0].item(), row[1].item(), row[5].item()
        found = result.update_norm[place]
        assert (found.last.value, found.mean.value, found.mean.count) == (last, path * (1 / steps), 5)
        assert result.update_norm.level(place) == level
    assert type(found.last.value) is float
    assert type(found.last.count) is int


@pytest.mark.parametrize("steps", [1, 2, 9, 40])
def test_quantiles_from_the_ring_are_those_of_the_distributions(steps: int) -> None:
    weight = nn.Parameter(torch.ones(4))
    trajectory = Trajectory([("w", weight)])
    generator = torch.Generator().manual_seed(steps)
    for step in range(steps):
        with torch.no_grad():
            weight.add_(torch.randn(4, generator=generator))
            if step % 7 == 3:
                weight.zero_()  # an infinite ratio
        trajectory.update()
    direct = trajectory.compute().to_dict()
    _ = trajectory.state_dict()  # fills the distributions
    assert trajectory.compute().to_dict() == direct


def test_many_distributions_at_once() -> None:
    distributions = [Distribution() for _ in range(4)]
    for i, d in enumerate(distributions[1:]):
        d.observe(torch.rand(50 * (i + 1)))
    distributions[2].observe(torch.tensor([math.nan, math.inf, -1.0]))
    count, mean, low, high, missing, invalid, median, top = described(distributions, (0.5, 1.0))
    for i, d in enumerate(distributions):
        assert (count[i], missing[i], invalid[i]) == (d.count, d.missing, d.invalid)
        np.testing.assert_equal(
            [mean[i], low[i], high[i], median[i], top[i]], [d.mean, d.min, d.max, d.quantile(0.5), d.quantile(1.0)]
        )


def test_windows_are_equal_copied_and_pickled() -> None:
    for window in trained(spoil=True).history:
        for other in (pickle.loads(pickle.dumps(window)), copy.deepcopy(window)):
            assert other == window
            assert other.to_dict() == window.to_dict()
        place = window["trajectory"].update_norm["0.weight"]
        assert pickle.loads(pickle.dumps(place)) == place
        assert len(pickle.dumps(place)) < 2000


def test_history_comes_back_from_json() -> None:
    history = trained(spoil=True).history
    state = json.loads(json.dumps(history.to_dict()))
    restored = History.from_dict(state)
    assert restored.to_dict() == history.to_dict()
    for one, other in zip(restored, history, strict=True):
        assert (one.index, one.steps, one.closed) == (other.index, other.steps, other.closed)
        for level in ("tensor", "group"):
            flat, expected = one.flat(level), other.flat(level)  # type: ignore[arg-type]
            assert flat.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_equal(flat[key], value if math.isfinite(value) else math.nan)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"window": []}, "d: expected the dict that History.to_dict.*keys"),
        ([], "got list"),
        ({"windows": [{"index": 0}]}, r"d: windows\[0\] is not one"),
    ],
)
def test_what_is_no_history_is_refused(state: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        History.from_dict(state)  # type: ignore[arg-type]


def test_singular_values_are_taken_when_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from lipcore.lipschitz import first_weight

    calls = []
    taken = first_weight.singular_values
    monkeypatch.setattr(first_weight, "singular_values", lambda *a: calls.append(1) or taken(*a))
    monitor = trained(10)
    window = monitor.history[0]
    result = window["lipschitz"]
    assert "sandwich" in result
    assert "singular_values" in result.details
    assert result.details["first_weight_moved"] is True
    assert result.pending_bytes == 3 * 5 * 4
    repr(window)
    assert not calls
    with torch.no_grad():
        monitor.model[0].weight.fill_(7.0)  # type: ignore[index, union-attr, operator]
    sides = result.sandwich["model:Linear"]
    assert len(calls) == 1
    assert result.pending_bytes == 0
    assert sides.middle.value == result.normalized_gradient_norm["model:Linear"].mean.value
    assert result.details["singular_values"]["largest"] < 7
    window.flat()
    pickle.dumps(window)
    assert len(calls) == 1


def test_the_history_is_bounded_in_bytes() -> None:
    size = trained(10).history[0].nbytes
    monitor = trained(100, history_bytes=int(3.5 * size))
    assert 2 <= len(monitor.history) <= 4
    assert monitor.history.nbytes <= int(3.5 * size)
    assert monitor.history[-1].index == 9
    assert "at most 1000 windows" in str(monitor.plan())
    assert monitor.plan().history_bytes == int(3.5 * size)
    assert len(trained(20, history_bytes=1).history) == 1  # the last one stays
    assert "64.0 MiB" in str(trained(0).plan())


def test_copies_of_w_1_go_before_windows_do() -> None:
    monitor = trained(30)
    size = monitor.history.nbytes
    pending = monitor.history[0]["lipschitz"].pending_bytes
    history = History(bytes_limit=size - pending)
    for window in monitor.history:
        history.append(window)
    assert len(history) == 3
    lower = history[0]["lipschitz"].sandwich["model:Linear"].lower
    assert math.isnan(lower.value)
    assert not lower.valid
    assert "history_bytes" in lower.note
    assert history[2]["lipschitz"].sandwich["model:Linear"].lower.valid


def test_what_is_printed_fits_a_screen_and_names_what_is_off() -> None:
    monitor = trained()
    for thing in (
        monitor,
        monitor.history[0],
        monitor.history[0]["trajectory"],
        monitor.metrics["per_sample_grad_norm"],
    ):
        text, html = repr(thing), thing._repr_html_()  # type: ignore[attr-defined]
        assert 2 <= len(text.splitlines()) <= 25
        assert html.startswith("<table>")
        assert "<td>" in html
    assert "steps 1 to 10" in repr(monitor.history[0])
    assert "update_norm" in repr(monitor.history[0]["trajectory"])
    model = nn.LSTM(2, 3)  # returns a tuple: no Lipschitz by default
    watching = Monitor(model)
    with pytest.warns(RuntimeWarning, match="lipcore turned lipschitz off: output: model:LSTM returns a tuple"):
        model(torch.ones(4, 2))[0].sum().backward()
    watching.step()
    window = watching.close_window()
    assert window.off
    assert "lipschitz" in repr(window)
    assert window.off["lipschitz"][:20] in repr(watching)


def test_places_named_twice_are_the_later_one() -> None:
    result = MetricResult("own")
    result.add("q", "a", "tensor", x=Value(1.0, 1))
    result.add("q", "a", "group", x=Value(2.0, 1))
    assert result.q["a"].x.value == 2
    assert result.q.level("a") == "group"
    assert len(result.q) == 1
    window = Window(0, 1, 1, True, "global", {"own": result})
    assert Window.from_dict(window.to_dict()).flat("group") == {"own/q.x/a": 2.0}
