"""One fresh process of bench_overhead: step time of a loop with a Monitor over that of the same loop without."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from small_transformer import SmallTransformer
from torch import nn

import lipcore


def paper_mlp() -> tuple[nn.Module, torch.Tensor]:
    sizes = (10, 10, 32, 32, 32)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 1)), torch.randn(1, 10)


def small_cnn() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 64, 1),
    )  # fmt: skip
    return model, torch.randn(64, 3, 32, 32)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    return SmallTransformer(), torch.randint(32, (16, 32))


MODELS = {"mlp": paper_mlp, "cnn": small_cnn, "transformer": transformer}
METRICS: dict[str, Callable[[], list[lipcore.Metric]]] = {
    "default": lambda: [lipcore.Trajectory(), lipcore.Lipschitz()],
    "fast": lambda: [lipcore.Trajectory(), lipcore.Lipschitz(batch_of_one="fast")],
}


def squares(y: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda out: ((out - y) ** 2 / 2).mean()


def cross_entropy(tokens: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda out: nn.functional.cross_entropy(out.flatten(0, 1), tokens.flatten())


def loop(model_name: str, metrics: str | None) -> Callable[[int], float]:
    torch.manual_seed(0)
    model, x = MODELS[model_name]()
    loss_of = squares(torch.randn(len(x), 1))
    if model_name == "transformer":
        loss_of = cross_entropy(torch.randint(32, x.shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = lipcore.Monitor(model, optimizer, metrics=METRICS[metrics]()) if metrics else None

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            loss_of(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - start) / steps

    run.monitor = monitor  # type: ignore[attr-defined]
    return run


def main() -> None:
    model, metrics = sys.argv[1:3]
    torch.set_num_threads(1)
    runs = {"plain": loop(model, None), "control": loop(model, None), "monitored": loop(model, metrics)}
    # As many steps in a turn as lambda's period, so that every turn carries its share of it.
    steps, rounds = (100, 100) if model == "mlp" else (32, 12)
    for run in runs.values():
        run(steps)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run(steps))
    result = {
        name: statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        for name in ("control", "monitored")
    }
    print(json.dumps(result | {"step_us": statistics.median(times["plain"]) * 1e6}))


if __name__ == "__main__":
    main()
