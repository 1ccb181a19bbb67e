"""fully_shard (FSDP2) with activation checkpointing; with --compile, the blocks are compiled too.

torchrun --nproc-per-node 2 examples/fsdp2.py [--compile]
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import lipcore

STEPS, WINDOW, WIDTH = 40, 20, 32


class Block(nn.Module):
    """Residual block whose activations are made again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def inside(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.inside, x, use_reentrant=False)


on_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpu else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, WIDTH), Block(), Block(), nn.Linear(WIDTH, 1)).to(device)
for part in model:
    if "--compile" in sys.argv and isinstance(part, Block):
        part.compile()
    fully_shard(part)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

# The first layer's weight is in parts, of which no rank can make local Lipschitz constants: the Trajectory alone.
monitor = lipcore.Monitor(model, optimizer, [lipcore.Trajectory()], window_steps=WINDOW)
data = torch.Generator().manual_seed(rank)
with monitor:
    for step in range(1, STEPS + 1):
        x = torch.randn(8, 16, generator=data).to(device)
        (model(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % WINDOW == 0:  # on every rank, at the same step
            window = monitor.global_window()
            assert window is not None
            if rank == 0:
                norms = window["trajectory"].update_norm
                print(window.scope, "update norms:", {name: norms[name].mean.value for name in ("0", "1", "2", "3")})
dist.destroy_process_group()
