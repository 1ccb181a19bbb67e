"""DistributedDataParallel with gradient accumulation, bfloat16, clipping, and a checkpoint that training goes on from.

torchrun --nproc-per-node 2 examples/ddp.py runs/ddp
Started again with the same folder, it goes on behind its last checkpoint, and so does the record.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lipcore

STEPS, WINDOW, MICRO_BATCHES = 60, 20, 2

folder = Path(sys.argv[1])
on_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpu else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")

torch.manual_seed(0)  # all ranks begin with the same model
net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
monitor = lipcore.watch(model, optimizer, run=folder, window_steps=WINDOW)

begin, checkpoint = 0, folder / f"checkpoint-rank{rank}.pt"  # lipcore's state is each rank's own
if checkpoint.exists():
    state = torch.load(checkpoint, weights_only=True)
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    monitor.load_state_dict(state["lipcore"])
    begin = state["step"]

data = torch.Generator().manual_seed(1000 * begin + rank)
with monitor:
    for step in range(begin + 1, begin + STEPS + 1):
        for micro_batch in range(MICRO_BATCHES):
            last = micro_batch == MICRO_BATCHES - 1
            x = torch.randn(8, 16, generator=data).to(device)
            with contextlib.nullcontext() if last else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16):
                    predicted = model(x)
                loss = (predicted.float() - x.sin().sum(1, keepdim=True)).square().mean() / MICRO_BATCHES
                loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        monitor.log(loss=loss.detach() * MICRO_BATCHES)  # every rank calls it: this is where windows are merged
        if step % WINDOW == 0:
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            half = checkpoint.with_suffix(".half")
            torch.save(state | {"lipcore": monitor.state_dict()}, half)
            half.replace(checkpoint)

if rank == 0:
    run = lipcore.open_run(folder)
    length = run.series("path_length.sum", "total")
    print("path length of each window:", length.values[:, 0].tolist(), "up to steps", length.steps.tolist())
    print("scope of the last window:", run.windows[-1].scope)
dist.destroy_process_group()
