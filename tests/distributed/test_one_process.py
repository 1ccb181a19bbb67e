"""group=, timeout=, prefix= and global_window() in one process, where everything is there already."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from one_rank import one_rank
from torch import nn

from lipcore import Monitor, PerSampleGradNorms, Trajectory
from lipcore.distributed.ownership import Ownership, describe
from lipcore.metric import Metric, global_windows


def monitored(**settings: Any) -> tuple[nn.Module, Any, Monitor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, Monitor(model, optimizer, **{"window_steps": 2} | settings)


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()


def test_the_newest_closed_window_comes_once() -> None:
    model, optimizer, monitor = monitored()
    assert monitor.global_window() is None
    train(model, optimizer, 5)
    window = monitor.global_window()
    assert window is monitor.history[-1]
    assert window.scope == "global"
    assert monitor.global_window() is None
    assert list(monitor.global_history) == list(monitor.history)
    assert monitor.pop_window() is monitor.history[0]  # which is another matter


@pytest.mark.parametrize("group", ["auto", None])
def test_one_process_has_everything(group: Any) -> None:
    model, optimizer, monitor = monitored(group=group)
    train(model, optimizer, 2)
    assert monitor.global_window().scope == "global"


def test_a_process_group_of_one_rank() -> None:
    with one_rank():
        model, optimizer, monitor = monitored(group=dist.group.WORLD)
        train(model, optimizer, 3)
        assert monitor.global_window().scope == "global"
        trajectory = monitor.metrics["trajectory"]
        assert trajectory.sync().flat() == trajectory.compute().flat()
        assert len(copy.deepcopy(monitor).global_history) == 1
        assert pickle.loads(pickle.dumps(monitor)).history[0].scope == "global"


def test_one_rank_with_a_rule_of_its_own_by_which_gradients_are_reduced() -> None:
    def doubled(_: Any, bucket: Any) -> Any:
        done: Any = torch.futures.Future()
        done.set_result(2 * bucket.buffer())
        return done

    doubled.__annotations__.clear()  # torch knows no names of types
    with one_rank():
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        monitor = Monitor(model, optimizer, [PerSampleGradNorms(loss_reduction="mean")], window_steps=2)
        for step in range(4):
            if step == 3:
                model.register_comm_hook(None, doubled)
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum(1).mean().backward()
            optimizer.step()
        first, second = (window["per_sample_grad_norm"] for window in monitor.history)
        monitor.close()
    assert (first.noise_scale["total"].mean.count, second.noise_scale["total"].mean.count) == (2, 1)
    assert not first.details["noise_scale_skipped"]
    ((why, steps),) = second.details["noise_scale_skipped"].items()
    assert "a rule of its own by which gradients are reduced" in why
    assert steps == 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"group": "gloo"},
            TypeError,
            "group: expected 'auto', None, a .*ProcessGroup or a DeviceMesh, got .gloo.",
        ),
        ({"group": 3}, TypeError, "group: expected 'auto', None, .*, got 3"),
        ({"timeout": "60"}, TypeError, "timeout: expected seconds, got str"),
        ({"timeout": True}, TypeError, "timeout: expected seconds, got bool"),
        ({"timeout": 0}, ValueError, "timeout: expected seconds > 0, got 0"),
        ({"timeout": float("inf")}, ValueError, "timeout: expected seconds > 0, got inf"),
        ({"prefix": 1}, TypeError, "prefix: expected a str, got int"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        monitored(**settings)


def test_names_have_the_prefix() -> None:
    model, optimizer, monitor = monitored(prefix="stages.1", metrics=[Trajectory()])
    trajectory = monitor.metrics["trajectory"]
    trajectory.set_reference(copy.deepcopy(model))
    trajectory.set_reference(copy.deepcopy(model).state_dict())
    train(model, optimizer, 2)
    flat = monitor.history[0].flat("tensor") | monitor.history[0].flat()
    assert "trajectory/update_norm.last/stages.1.0.weight" in flat
    assert {place for place in monitor.history[0]["trajectory"].update_norm if "stages.1" not in place} == {"total"}
    model[2].add_module("more", nn.Linear(1, 1))
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match=r"parameter '2.more.weight' is trainable but was not"):
        monitor.compute()


def test_masters_and_groups_with_a_prefix() -> None:
    model = nn.Linear(3, 1).bfloat16()
    masters = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    trajectory = Trajectory(groups=lambda name: name[:3], masters=masters)
    trajectory.prefix = "a.b"
    trajectory.bind(model)
    trajectory.update()
    assert list(trajectory.compute().weight_norm) == ["a.b.weight", "a.b.bias", "a.b", "total"]


class OfOnesOwn(Trajectory):
    """Has no part in the windows of all ranks."""

    name = "own"
    rank_part = Metric.rank_part


class Group:
    """Stands for a process group of two ranks."""

    handle, ranks, place, size, name = None, (0, 1), 0, 2, "two"


def test_nobody_calls(monkeypatch: Any) -> None:
    """Windows wait, not for ever; the warning comes once. Metrics that are not merged say so."""
    monkeypatch.setattr(global_windows, "_MOST", 3)
    model, optimizer, monitor = monitored(window_steps=1, metrics=[Trajectory(), OfOnesOwn()])
    monkeypatch.setattr(monitor._global.partners, "find", Group)
    with pytest.warns(RuntimeWarning, match=r"nobody has called monitor.global_window\(\) for so long") as caught:
        train(model, optimizer, 6)
    assert len(caught) == 1
    waiting = monitor._global._waiting
    assert [window.index for window, _ in waiting] == [3, 4, 5]
    assert "not merged over ranks" in waiting[0][1].left_out["own"]
    assert {window.scope for window in monitor.history} == {"rank"}
    assert not monitor.global_history


# ---- who owns what


def pieces(*ranks: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    return [describe((name, "group", tensor) for name, tensor in rank.items()) for rank in ranks]


def test_replicas_count_once_and_stages_all() -> None:
    w, b, other = torch.randn(2, 3), torch.zeros(()), torch.randn(4).bfloat16()
    found = pieces({"w": w, "b": b}, {"w": w.clone(), "b": b, "other": other})
    owners = [Ownership.of(found, (4, 7), here) for here in range(2)]
    assert [sorted(each.mine) for each in owners] == [["b", "w"], ["other"]]
    assert owners[0].names == owners[1].names == ["w", "b", "other"]
    assert owners[0].alone(["w", "b"])
    assert not owners[0].alone(["w", "other"])


def test_what_does_not_fit_together_is_named() -> None:
    w = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"'w' has other values on rank 7 than on rank 4"):
        Ownership.of(pieces({"w": w}, {"w": w + 1}), (4, 7), 0)
    with pytest.raises(ValueError, match=r"'w' has shape \[2, 3\] on rank 4 and \[3, 2\] on rank 7.*prefix="):
        Ownership.of(pieces({"w": w}, {"w": w.T}), (4, 7), 0)
    found = pieces({"w": w}, {"w": w})
    found[1]["groups"] = ["another"]
    with pytest.raises(ValueError, match=r"'w' is in group 'group' on rank 4 and in 'another' on rank 7"):
        Ownership.of(found, (4, 7), 0)
    found = pieces({"w": w})
    found[0]["shape"] = [[1, 3]]
    with pytest.raises(ValueError, match=r"'w': the ranks hold 3 of its 6 elements between them"):
        Ownership.of(found, (4,), 0)
    with pytest.raises(ValueError, match=r"rank 4: not today"):
        Ownership.of([{"refused": "not today"}], (4,), 0)


def test_descriptions_are_as_long_at_other_values() -> None:
    lengths = {len(str(pieces({"w": torch.full((5,), value)}))) for value in (0.0, -1.0, 1e30)}
    assert len(lengths) == 1
