"""A loop for pretraining in the way of torchtitan: a mesh, FSDP2, activation checkpoints, compiled blocks, warm-up,
accumulation, clipping, checkpoints of everything that has a state, and lipcore as one of these things.

torchrun --nproc-per-node 2 examples/pretraining.py runs/pretraining --steps 60 [--compile]
It goes on from the last whole checkpoint in its folder, on any number of ranks.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

import lipcore


@dataclass
class Config:
    folder: Path
    steps: int
    compile: bool
    vocabulary: int = 64
    width: int = 32
    layers: int = 2
    length: int = 16
    batch: int = 24  # sequences per micro-batch, of all ranks together
    accumulate: int = 2
    rate: float = 3e-3
    warm_up: int = 10
    max_norm: float = 1.0
    checkpoint_every: int = 20


class Block(nn.Module):
    """Attention and a gated layer, whose activations are made again in the backward pass."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.gate = nn.Linear(width, 4 * width, bias=False), nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def inside(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(nnf.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nnf.silu(self.gate(h)) * self.up(h))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False)


class Transformer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm, self.head = nn.RMSNorm(config.width), nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Trainer:
    """All that a training is made of; a Stateful of torch.distributed.checkpoint."""

    def __init__(self, config: Config) -> None:
        self.config, self.step, self.tokens = config, 0, 0
        on_gpu = torch.cuda.is_available()
        self.mesh = init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        torch.manual_seed(0)
        self.model = Transformer(config).to(self.device)
        for block in self.model.layers:
            if config.compile:
                block.compile()
            fully_shard(block, mesh=self.mesh)
        fully_shard(self.model, mesh=self.mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.rate, weight_decay=0.1)
        get_state_dict(self.model, self.optimizer)  # torch makes the optimizer's state by a step of its own
        # The two lines of lipcore: this one, and log() below.
        self.monitor = lipcore.watch(self.model, self.optimizer, run=config.folder, window_steps=20, alarms="default")

    def batches(self) -> Any:
        """Return a step's micro-batches: the same sequences on any number of ranks."""
        config, generator = self.config, torch.Generator().manual_seed(self.step)
        for _ in range(config.accumulate):
            start = torch.randint(config.vocabulary, (config.batch, 1), generator=generator)
            text = (start + 7 * torch.arange(config.length + 1)) % config.vocabulary
            yield text.chunk(dist.get_world_size())[dist.get_rank()].to(self.device)

    def train_step(self) -> None:
        config = self.config
        self.step += 1
        rate = config.rate * min(1.0, self.step / config.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mean = torch.zeros((), device=self.device)
        for text in self.batches():
            logits = self.model(text[:, :-1])
            loss = nnf.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / config.accumulate
            loss.backward()
            mean += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += config.accumulate * config.batch * config.length
        self.monitor.log(loss=mean, lr=rate, tokens=self.tokens)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        of_model, of_optimizer = state["model"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
        self.step, self.tokens = state["step"], state["tokens"]

    def train(self) -> None:
        states, folder = {"trainer": self, "lipcore": self.monitor}, self.config.folder / "checkpoints"
        whole = sorted(int(path.parent.name) for path in folder.glob("*/.metadata"))  # which is written last
        if whole:
            dcp.load(states, checkpoint_id=folder / str(whole[-1]))
        with self.monitor:
            while self.step < self.config.steps:
                self.train_step()
                if self.step % self.config.checkpoint_every == 0:
                    dcp.save(states, checkpoint_id=folder / str(self.step))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--compile", action="store_true")
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    trainer = Trainer(Config(**vars(parser.parse_args())))
    trainer.train()
    if dist.get_rank() == 0:
        losses = lipcore.open_run(trainer.config.folder).series("loss").values[:, 0]
        print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}; alarms: {len(trainer.monitor.alarms.events)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
