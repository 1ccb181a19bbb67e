"""Tensor parallelism within pairs of ranks, FSDP2 over the pairs.

torchrun --nproc-per-node 4 examples/tensor_parallel.py     two pairs; with 2 processes, one
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lipcore

STEPS, WINDOW = 40, 20

on_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpu else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
mesh = init_device_mesh(device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
fully_shard(model, mesh=mesh["data"])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

metrics = [lipcore.Trajectory(), lipcore.PerSampleGradNorms(loss_reduction="mean")]
monitor = lipcore.Monitor(model, optimizer, metrics, window_steps=WINDOW)
data = torch.Generator().manual_seed(mesh["data"].get_local_rank())  # the ranks of a pair have the same samples
with monitor:
    for step in range(1, STEPS + 1):
        x = torch.randn(8, 16, generator=data).to(device)
        (model(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % WINDOW == 0:  # on every rank, at the same step
            window = monitor.global_window()
            assert window is not None
            if rank == 0:
                moved, norms = window["trajectory"], window["per_sample_grad_norm"]
                print(window.scope, "path length:", moved.path_length["total"].sum.value)
                print("  norm of a sample's gradient:", norms.norm["total"].mean.value)
                print("  gradient noise scale:", norms.noise_scale["total"].ema.value)
dist.destroy_process_group()
