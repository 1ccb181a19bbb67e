"""A pipeline with one stage on each rank.

torchrun --nproc-per-node 2 examples/pipeline.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import lipcore

STEPS, WINDOW, MICRO_BATCHES, BATCH = 40, 20, 4, 16

on_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
first, last = rank == 0, rank == world - 1

torch.manual_seed(rank)
layers = [nn.Linear(16 if first else 32, 32), nn.Tanh(), *([nn.Linear(32, 1)] if last else [])]
module = nn.Sequential(*layers).to(device)
stage = PipelineStage(module, rank, world, device)


def loss_of(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of a micro-batch."""
    return (predicted - target).square().mean()


schedule = ScheduleGPipe(stage, MICRO_BATCHES, loss_fn=loss_of)
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

# Stages hold parameters of the same names: the prefix tells them apart.
monitor = lipcore.Monitor(module, optimizer, [lipcore.Trajectory()], window_steps=WINDOW, prefix=f"stages.{rank}")
data = torch.Generator().manual_seed(0)
with monitor:
    for step in range(1, STEPS + 1):
        x = torch.randn(BATCH, 16, generator=data).to(device)
        inputs = (x,) if first else ()
        schedule.step(*inputs, **({"target": x.sin().sum(1, keepdim=True)} if last else {}))
        optimizer.step()
        optimizer.zero_grad()
        if step % WINDOW == 0:  # on every rank, at the same step
            window = monitor.global_window()
            assert window is not None
            if rank == 0:
                lengths = window["trajectory"].path_length
                print(window.scope, "path lengths:", lengths["stages.0.0.weight"].sum.value, lengths["total"].sum.value)
dist.destroy_process_group()
