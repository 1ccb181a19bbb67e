"""Stages that torch's schedules run, against one process in float64; and what is put on the stages for that."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import pytest
import torch
from one_rank import one_rank
from rank_runs import Found, assert_right, run_situations
from schedule_situations import MICRO_BATCHES, NAMES, SCHEDULES, WINDOW
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules, stage

from lipcore import Monitor, PerSampleGradNorms, Trajectory
from lipcore.capture import pipeline_stages
from lipcore.models.torch_internals import STAGE_LEARNS_SHAPES, STAGE_REDUCES

ONE_EACH = [name for name in NAMES if SCHEDULES[name.partition(",")[0]] == 1]


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    return run_situations(tmp_path_factory.mktemp("schedules"), "schedule_situations", 2)


@pytest.mark.ci
@pytest.mark.parametrize("name", NAMES)
def test_gradients_as_the_schedule_leaves_them(found: Found, name: str) -> None:
    """A schedule divides them behind the last backward pass, and user code clips them behind that."""
    for numbers in found[name]:
        assert_right(numbers)
        assert not numbers["other_methods"]


@pytest.mark.ci
@pytest.mark.parametrize("name", ONE_EACH)
def test_passes_that_stages_make_to_learn_shapes_do_not_count(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert numbers["passes"] == [MICRO_BATCHES * WINDOW] * 2
        assert not numbers["outputs"]["absent"]
        assert numbers["outputs"]["error"] <= 1e-7


# ---- stages of this process


def schedule_of(stages: nn.ModuleList) -> Any:
    made = [pipelining.PipelineStage(stage, i, len(stages), torch.device("cpu")) for i, stage in enumerate(stages)]
    return pipelining.ScheduleInterleaved1F1B(made, MICRO_BATCHES, loss_fn=nn.functional.mse_loss)


def in_two() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double() for _ in range(2)])


def test_another_models_schedule_leaves_what_was_read() -> None:
    """Its gradients are divided between the clipping of this one's and the optimizer's step."""
    torch.manual_seed(1)
    with one_rank():
        ours, theirs, x = in_two(), in_two(), torch.randn(8, 6).double()
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
        first, second = schedule_of(ours), schedule_of(theirs)
        with Monitor(ours, optimizer, [Trajectory(stats=("grad_norm",))], window_steps=1) as monitor:
            first.step(x, target=x, losses=[])
            norm = nn.utils.clip_grad_norm_(ours.parameters(), 1e-3)
            second.step(x, target=x, losses=[])
            optimizer.step()
            read = monitor.pop_window()["trajectory"].grad_norm["total"].mean.value
    assert read == pytest.approx(float(norm), rel=1e-12)


def test_sums_over_samples_are_of_gradients_that_nobody_has_divided() -> None:
    """The noise of the first stage, by definition: its samples' gradients are as the backward passes add them up."""
    torch.manual_seed(1)
    with one_rank():
        stages, x = in_two(), torch.randn(8, 6).double()
        first = list(stages[0].parameters())
        rows = []
        for i in range(8):
            loss = nn.functional.mse_loss(stages[1](stages[0](x[i : i + 1])), x[i : i + 1])
            rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, first)]))
        norms = PerSampleGradNorms(loss_reduction="mean")
        optimizer = torch.optim.SGD(first, lr=0.1)
        schedule = schedule_of(stages)
        with Monitor(stages[0], optimizer, [norms], window_steps=1) as monitor:
            schedule.step(x, target=x, losses=[])
            optimizer.step()
            noise = monitor.pop_window()["per_sample_grad_norm"].gradient_noise["total"].mean.value
    assert noise == pytest.approx(float(torch.stack(rows).var(0).sum()), rel=1e-9)


def test_stages_have_their_own_methods_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_stages, "_watches", weakref.WeakSet())  # other tests may leave Monitors open
    pipeline_stages._unwrap()
    kind = pipelining.PipelineStage

    def methods() -> list[Any]:
        return [getattr(kind, name) for name in (*STAGE_REDUCES, *STAGE_LEARNS_SHAPES)]

    before, model = methods(), nn.Linear(2, 2)
    first, second = (Monitor(model, torch.optim.SGD(model.parameters()), [Trajectory()]) for _ in range(2))
    assert all(now is not then for now, then in zip(methods(), before, strict=True))
    first.close()
    assert methods() != before
    second.close()
    assert methods() == before


def test_torch_calls_these_methods() -> None:
    """A torch that divides gradients, or learns shapes, elsewhere is to be noticed here."""
    code = inspect.getsource(schedules)
    assert code.count(".scale_grads(") == 2
    assert code.count(".perform_reduce_grad(") == 3
    assert inspect.getsource(stage).count("module=self.submod") == 1
