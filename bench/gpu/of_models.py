"""What a training of GPT-2's size costs with lipcore beside it: whole steps in turns, with a control."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timing import assert_close, copy_limit, measure
from torch import Tensor, nn
from torch.nn import functional as F

import lipcore
from lipcore import functional
from lipcore.trajectory.sources import OptimizerSource

WIDTH, LAYERS, HEADS, LENGTH, VOCABULARY = 768, 12, 12, 1024, 50257
STEPS, ROUNDS = 10, 7  # of one turn, and turns
SEED = 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return y


class Gpt2(nn.Module):
    """GPT-2 small: 124 million parameters, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Training:
    """Steps of a model in bfloat16 autocast with the fused AdamW."""

    def __init__(self, samples: int, compiled: bool = False) -> None:
        torch.manual_seed(SEED)
        self.model = Gpt2().cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
        self.tokens = torch.randint(VOCABULARY, (samples, LENGTH + 1), device="cuda")
        self.call = torch.compile(self.model) if compiled else self.model

    def step(self) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = self.call(self.tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def monitor(training: Training, *metrics: Any) -> Any:
    return lipcore.Monitor(training.model, training.optimizer, list(metrics) or None, window_steps=100)


WAYS: dict[str, Callable[[Training], AbstractContextManager[Any]]] = {
    "plain": lambda _: nullcontext(),
    "control": lambda _: nullcontext(),
    "default Monitor": monitor,
    "trajectory": lambda t: monitor(t, lipcore.Trajectory(mode="exact")),
    "updates": lambda t: monitor(t, lipcore.Trajectory(mode="updates")),
    "sketch": lambda t: monitor(t, lipcore.Trajectory(mode="sketch")),
    "TensorStats every 10": lambda t: monitor(t, lipcore.TensorStats(every_steps=10)),
    "per sample every 10": lambda t: monitor(t, lipcore.PerSampleGradNorms(loss_reduction="mean", every_steps=10)),
    "per sample every 1": lambda t: monitor(t, lipcore.PerSampleGradNorms(loss_reduction="mean")),
}


def gpt2(samples: int, compiled: bool = False) -> dict[str, Any]:
    """Seconds of ten steps of each way in turns; `ratio` is the median of those to the plain ones of the same round."""
    times: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    turns: dict[str, Iterator[float]] = {}
    for name, watch in WAYS.items():
        turn = _turns(Training(samples, compiled), watch)
        try:
            next(turn)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:2000]
            continue
        turns[name], times[name] = turn, []
    for _ in range(ROUNDS):
        for name, turn in turns.items():
            times[name].append(next(turn))
    plain = times["plain"]
    ratios = {
        name: round(statistics.median(t / p for t, p in zip(some, plain, strict=True)), 4)
        for name, some in times.items()
    }
    steps_ms = {name: round(statistics.median(some) / STEPS * 1e3, 3) for name, some in times.items()}
    sizes = {"samples": samples, "tokens": LENGTH, "compiled": compiled}
    for name, ratio in ratios.items():
        print(f"    {name}: {ratio}", flush=True)
    for name, error in errors.items():
        print(f"    {name}: {error}", flush=True)
    return {"op": "gpt2-124M step", **sizes, "ms": steps_ms, "ratio": ratios, "errors": errors}


def _turns(training: Training, watch: Callable[[Training], AbstractContextManager[Any]]) -> Iterator[float]:
    with watch(training):
        for _ in range(STEPS):  # warm
            training.step()
        while True:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(STEPS):
                training.step()
            torch.cuda.synchronize()
            yield time.perf_counter() - start


def sums() -> dict[str, Any]:
    """Sums over all gradients, over all updates, statistics of all tensors: of GPT-2's 148 tensors."""
    training = Training(1)
    training.step()
    params = list(training.model.parameters())
    grads = [torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    training.optimizer.step()
    elements = sum(p.numel() for p in params)
    owner: dict[str, Any] = {str(i): p for i, p in enumerate(params)}
    source = OptimizerSource([training.optimizer], [(name, owner, name) for name in owner])
    found, _ = functional.tensor_stats(grads)
    assert_close(found[:, 1], torch.stack([g.double().mean() for g in grads]), 1e-6)
    square = {
        "lipcore": lambda: lipcore.functional.sample_norms(grads[0].flatten()[None]),
        "vector_norm": lambda: torch.linalg.vector_norm(grads[0]),
    }
    stats = {
        "lipcore": lambda: functional.tensor_stats(grads),
        "torch": lambda: [_naive(g) for g in grads],
        "copy_limit": copy_limit(4 * elements),
    }
    updates = {
        "lipcore": source.sums,
        "foreach_norm_of_gradients": lambda: torch._foreach_norm(grads),
        "copy_limit": copy_limit(12 * elements),
    }
    sketched = {
        "lipcore": lambda: functional.sketch(params, _starts(params), buckets=4096, seed=0),
        "copy_limit": copy_limit(4 * elements),
    }
    return {
        "op": "sums of 124M in 148 tensors",
        "norm": measure(square, 4 * grads[0].numel()),
        "tensor_stats": measure(stats, 4 * elements),
        "sketch": measure(sketched, 4 * elements),
        **measure(updates, 12 * elements),
    }


def _starts(params: list[nn.Parameter]) -> list[int]:
    return list(itertools.accumulate((p.numel() for p in params[:-1]), initial=0))


def _naive(x: Tensor) -> list[Tensor]:
    mean, sd = x.mean(), x.std(correction=0)
    kurtosis = ((x - mean) / sd).pow(4).mean()
    magnitudes = torch.histc(x.abs().clamp(min=1e-30).log2(), 64, -32, 32)
    return [mean, sd, x.min(), x.max(), kurtosis, (x == 0).float().mean(), (~x.isfinite()).sum(), magnitudes]


CASES: list[tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = [(sums, ()), (gpt2, (32,)), (gpt2, (8,))]
