"""fully_shard (FSDP2) with checkpoints of torch.distributed.checkpoint: a training goes on with any number of ranks.

torchrun --nproc-per-node 2 examples/resume.py runs/resume 50
torchrun --nproc-per-node 3 examples/resume.py runs/resume 100
The second goes on behind the last whole checkpoint of the first, in the middle of a window, and so does the record.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import lipcore

WINDOW, EVERY, BATCH = 20, 25, 48

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
on_gpu = torch.cuda.is_available()
dist.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
for part in model:
    fully_shard(part)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
get_state_dict(model, optimizer)  # torch makes the optimizer's state by a step, which no Monitor should see
monitor = lipcore.watch(model, optimizer, run=folder, window_steps=WINDOW, metrics=[lipcore.Trajectory()])


def checkpoint() -> dict[str, object]:
    """What is saved, and loaded into."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "lipcore": monitor, "step": 0}


saved = sorted(int(path.parent.name) for path in folder.glob("checkpoints/*/.metadata"))  # written last: it is whole
begin = saved[-1] if saved else 0
if saved:
    state = checkpoint()
    dcp.load(state, checkpoint_id=folder / "checkpoints" / str(begin))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

with monitor:
    for step in range(begin + 1, steps + 1):
        batch = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(step))  # the same on any number of ranks
        x = batch.chunk(ranks)[rank].to(device)
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.log(loss=loss.detach())  # every rank calls it: this is where windows are merged
        if step % EVERY == 0:
            dcp.save(checkpoint(), checkpoint_id=folder / "checkpoints" / str(step))

if rank == 0:
    length = lipcore.open_run(folder).series("path_length.sum", "total")
    print("path length of each window:", length.values[:, 0].tolist(), "up to steps", length.steps.tolist())
dist.destroy_process_group()
