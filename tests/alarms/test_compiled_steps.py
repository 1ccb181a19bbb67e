"""An optimizer's step that is compiled: nothing of lipcore is traced with it, and its numbers are those of any step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lipcore
from lipcore.alarms import Alarms


def trained(*, compiled: bool) -> tuple[list[tuple[int, str, float]], float, list[str]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3))
    traces: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        traces.extend(node.stack_trace or "" for node in graph.graph.nodes)
        return graph.forward

    step = torch.compile(lambda: optimizer.step(), backend=backend) if compiled else optimizer.step
    alarms = Alarms(signals=["unexplained_movement"])
    with lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], alarms=alarms) as monitor:
        for number in range(1, 8):
            model(torch.randn(4, 6)).square().mean().backward()
            if number == 5:
                model[2].weight.data.mul_(1.01)
            step()
            optimizer.zero_grad()
        path = monitor.compute()["trajectory"].path_length["total"].sum.value
    return [(event.step, event.place, event.score) for event in alarms.events], path, traces


@pytest.mark.ci
def test_it_is_measured_and_not_traced() -> None:
    torch._dynamo.reset()
    events, path, traces = trained(compiled=True)
    expected, expected_path, _ = trained(compiled=False)
    assert [found[:2] for found in events] == [found[:2] for found in expected] == [(5, "2.weight")]
    assert path == pytest.approx(expected_path, rel=1e-5)
    assert traces
    assert not [trace for trace in traces if "lipcore/" in trace and "test_compiled_steps.py" not in trace]
