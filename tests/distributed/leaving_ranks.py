"""A training of two ranks, one of which leaves it in the middle: FOLDER, KIND and RANK are the arguments."""

from __future__ import annotations

import datetime
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lipcore

FOLDER, KIND, RANK = sys.argv[1], sys.argv[2], int(sys.argv[3])
STEPS, WINDOW, AT = 40, 5, 13
LEAVER = 0 if KIND == "killed" else 1
PATIENCE = datetime.timedelta(seconds=120)


class Net(nn.Module):
    """It does what `KIND` says in its forward pass number AT on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(6, 8), nn.Linear(8, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == AT and RANK == LEAVER:
            if KIND == "killed":
                os._exit(3)
            raise ValueError("a batch that cannot be read")
        self.calls += 1
        found: Tensor = self.b(torch.tanh(self.a(x)))
        return found


def train() -> list[str]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with lipcore.watch(model, optimizer, run=f"{FOLDER}/run", window_steps=WINDOW, timeout=2) as monitor:
                for step in range(STEPS):  # the same data on both, so that no rank waits for the other but in log()
                    loss = model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().mean()
                    monitor.log(loss=loss)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        except ValueError as error:
            if KIND != "caught":
                raise
            return [f"caught {error}"]
    return [str(one.message) for one in told]


def main() -> None:
    torch.set_num_threads(1)
    port = Path(FOLDER, "port")
    if KIND != "killed":
        store = dist.FileStore(f"{FOLDER}/store", 2)
    elif RANK == 0:  # it keeps the store, which goes with it
        store = dist.TCPStore("127.0.0.1", 0, 2, True, PATIENCE, wait_for_workers=False)
        Path(FOLDER, "number").write_text(str(store.port))
        Path(FOLDER, "number").rename(port)
    else:
        while not port.exists():
            pass
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), 2, False, PATIENCE)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=2, timeout=PATIENCE)
    Path(FOLDER, f"{RANK}.json").write_text(json.dumps(train()))


main()
