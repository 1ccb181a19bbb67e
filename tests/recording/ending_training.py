"""A process that trains with a record until it is ended, in the way that it is told; the tests end it.

`python ending_training.py RUN WAY`: WAY is "plain", "chained" (a handler of the loop's own, which lets it go on to the
end of a step), "ignored", "raise" or "raise outside a with block".
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import torch
from torch import nn

import lipcore

run, way = sys.argv[1:]
told = []
if way == "chained":
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
if way == "ignored":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def train(monitor: Any) -> None:
    step = 0
    while not told:
        step += 1
        x = torch.randn(8, 6)
        ids = torch.arange(8 * step, 8 * step + 8)
        each = (model(x)[:, 0] - x[:, 0]).square()
        monitor.log(loss=each.mean())
        monitor.log_batch(ids, losses=each)
        each.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(step, flush=True)
        if way.startswith("raise") and step == 77:
            raise ValueError("this is the end\nof it")
    print("went on", flush=True)


if way == "raise outside a with block":
    train(lipcore.watch(model, optimizer, run=run, alarms="default"))
else:
    with lipcore.watch(model, optimizer, run=run, alarms="default") as monitor:
        train(monitor)
