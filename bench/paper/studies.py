"""The paper's open questions, on Task 1's data: batch size, optimizer, LayerNorm; and a plain test of its claim.

    python bench/paper/studies.py

1. At the same weights: normalised gradient norm r_i and displacement form ||db|| / (lr eps), for batches of 1 to 64.
2. Over all runs: Spearman's rank correlation of the final test loss with the cumulative length, and with predictors
   that cost nothing (training loss, mean gradient norm, weight norm, distance of the first bias), with intervals by
   bootstrap.

One run per file in the state folder, named by its setting: after an interruption, or a run that failed, a call goes on
with the runs that are missing. Task 2's runs are taken from its results file in the folder that is written to:
bench/paper/results for the full size, a folder in build/paper for a smaller one, or --out.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from options import at_least, folder_of, parser_of
from store import read_json, write_json
from task1_training import SIZES, TRAIN, build

from lipcore import Lipschitz, Monitor, Trajectory

FREQUENCIES = [0.25, 0.5, 0.75, 1.0]
PREDICTORS = ("cumulative_length", "train_loss", "mean_grad_norm", "weight_norm", "distance")
Job = tuple[str, float, int]  # setting, frequency, seed
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
#: name: batch size, optimizer, LayerNorm behind the first layer's activation. Rates grow with the batch, up to 0.1.
SETTINGS: dict[str, tuple[int, Make, bool]] = {
    "SGD, batch 1": (1, lambda p: torch.optim.SGD(p, lr=5e-3), False),
    "SGD, batch 4": (4, lambda p: torch.optim.SGD(p, lr=2e-2), False),
    "SGD, batch 16": (16, lambda p: torch.optim.SGD(p, lr=8e-2), False),
    "SGD, batch 64": (64, lambda p: torch.optim.SGD(p, lr=1e-1), False),
    "momentum 0.9, batch 4": (4, lambda p: torch.optim.SGD(p, lr=2e-3, momentum=0.9), False),
    "Adam, batch 4": (4, lambda p: torch.optim.Adam(p, lr=1e-3), False),
    "Adam, batch 4, LayerNorm": (4, lambda p: torch.optim.Adam(p, lr=1e-3), True),
}


def network(seed: int, normalised: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(len(SIZES) - 1):
        layers += [nn.Linear(SIZES[i], SIZES[i + 1]), nn.ReLU()]
        if normalised and i == 1:
            layers.append(nn.LayerNorm(SIZES[2]))
    nn.init.eye_(layers[0].weight).requires_grad_(False)
    return nn.Sequential(*layers[:-1])


def half_square(output: Tensor, y: Tensor) -> Tensor:
    return (output[:, 0] - y).square().mean() / 2


def run(setting: str, frequency: float, seed: int, epochs: int) -> dict[str, float]:
    """The final test loss and the predictors of one run."""
    torch.set_num_threads(1)
    size, make, normalised = SETTINGS[setting]
    problem = build([frequency], [seed])
    x, y, x_test, y_test = (part[0] for part in (problem.x, problem.y, problem.x_test, problem.y_test))
    model = network(seed, normalised)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    length = loss_sum = grads = steps = 0.0
    with Monitor(model, optimizer, [Trajectory(), Lipschitz()], window_steps=None) as monitor:
        for epoch in range(epochs):
            loss_sum = 0.0
            for batch in torch.from_numpy(problem.randoms[0].permutation(TRAIN)).split(size):
                optimizer.zero_grad()
                loss = half_square(model(x[batch]), y[batch])
                loss.backward()
                if epoch >= epochs - 10:
                    grads += math.sqrt(
                        sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
                    )
                    steps += 1
                optimizer.step()
                loss_sum += loss.item() * len(batch) / TRAIN
            window = monitor.close_window()
            length += window["lipschitz"].normalized_gradient_norm["model:Linear"].sum.value / TRAIN
    trajectory = window["trajectory"]
    with torch.no_grad():
        test = float(half_square(model(x_test), y_test))
    return {
        "test_loss": test,
        "cumulative_length": length,
        "train_loss": loss_sum,
        "mean_grad_norm": grads / steps,  # over the last ten epochs
        "weight_norm": trajectory.weight_norm["total"].last.value,
        "distance": trajectory.distance["0.bias"].last.value,
    }


def invariance(seed: int = 0, frequency: float = 0.5) -> dict[str, dict[str, float]]:
    """At the same (initial) weights, per batch size: mean r_i, and what the displacement of a step would give."""
    problem = build([frequency], [seed])
    x, y = problem.x[0], problem.y[0]
    model = network(seed, False)
    found = {}
    for size in (1, 4, 16, 64):
        lipschitz = Lipschitz(model, batch_of_one="exact")
        shifts = []
        for batch in torch.arange(64).split(size):
            model.zero_grad()
            output = model(x[batch])
            half_square(output, y[batch]).backward()
            lipschitz.update()
            bias = model[0].bias
            assert bias.grad is not None
            eps = float((output[:, 0] - y[batch]).detach().abs().mean())
            shifts.append(float(bias.grad.norm()) / eps)  # ||lr grad|| / (lr eps)
        r = lipschitz.compute().normalized_gradient_norm["model:Linear"].mean.value
        lipschitz.close()
        found[str(size)] = {"mean_r": r, "mean_displacement": float(np.mean(shifts))}
    return found


def correlations(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Spearman's rho of each predictor with the final test loss, 95 % percentile bootstrap over runs, n."""
    from scipy.stats import bootstrap, spearmanr

    test = np.array([row["test_loss"] for row in runs])
    found = {}
    for name in PREDICTORS:
        values = np.array([row[name] for row in runs])

        def rho(a: np.ndarray, b: np.ndarray) -> float:
            return float(spearmanr(a, b).statistic)

        spread = bootstrap(
            (values, test), rho, paired=True, vectorized=False, method="percentile", n_resamples=999, random_state=0
        ).confidence_interval
        found[name] = {"rho": rho(values, test), "low": spread.low, "high": spread.high, "n": len(runs)}
    return found


def task2_runs(folder: Path) -> list[dict[str, float]]:
    file = folder / "task2-digits.json"
    if not file.exists():
        return []
    return [
        {
            "test_loss": r["test"][-1],
            "cumulative_length": sum(r["length"]),
            "train_loss": r["train"][-1],
            "mean_grad_norm": float(np.mean(r["grad_norm"][-10:])),
            "weight_norm": r["weight_norm"][-1],
            "distance": r["distance"][-1],
        }
        for r in read_json(file, ("runs",))["runs"]
    ]


def draw(groups: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(groups), 2.9), layout="constrained")
    for axis, (name, found) in zip(
        figure.subplots(1, len(groups), squeeze=False, sharey=True)[0], groups.items(), strict=True
    ):
        for i, predictor in enumerate(PREDICTORS):
            row = found[predictor]
            axis.plot([row["low"], row["high"]], [-i, -i], color="#31688e", linewidth=2)
            axis.plot(row["rho"], -i, "o", color="#440154")
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.set_yticks([-i for i in range(len(PREDICTORS))], [p.replace("_", " ") for p in PREDICTORS])
        axis.set(
            title=f"{name} (n = {found[PREDICTORS[0]]['n']})", xlabel="rank correlation with test loss", xlim=(-1, 1)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def slug(setting: str) -> str:
    """A setting's name as part of a file's: its position in SETTINGS would make another setting's file of it when a row
    is added or moved.

    >>> slug("Adam, batch 4, LayerNorm")
    'adam-batch-4-layernorm'
    """
    return re.sub(r"[^a-z0-9.]+", "-", setting.lower()).strip("-")


def make(jobs: list[tuple[Job, Path]], options: argparse.Namespace) -> None:
    """Run the jobs, each into its file as soon as it is done; the first error is raised when all others are there."""
    errors = []
    with ProcessPoolExecutor(options.workers) as pool:
        files = {pool.submit(run, *job, options.epochs): file for job, file in jobs}
        for future in as_completed(files):
            error = future.exception()
            if error is None:
                write_json(files[future], future.result())
            else:
                errors.append(error)
    if errors:
        raise errors[0]


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=at_least(1), default=300)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--workers", type=at_least(1), default=2)
    options = parser.parse_args(arguments)
    out = folder_of(parser, options, "epochs", "seeds")
    jobs = [(s, f, seed) for s in SETTINGS for f in FREQUENCIES for seed in range(options.seeds)]
    files = [options.state / f"study-{slug(s)}-{f}-{seed}-{options.epochs}.json" for s, f, seed in jobs]
    make([(job, file) for job, file in zip(jobs, files, strict=True) if not file.exists()], options)
    runs: list[dict[str, Any]] = [
        {"setting": s, "frequency": f, "seed": seed} | read_json(file, ("test_loss", *PREDICTORS))
        for (s, f, seed), file in zip(jobs, files, strict=True)
    ]
    diverged = [row for row in runs if any(row[name] is None for name in ("test_loss", *PREDICTORS))]
    usable = [row for row in runs if row not in diverged]
    groups = {"Task 1 studies": correlations(usable)}
    others = task2_runs(out)
    if others:
        groups["Task 2, digits"] = correlations(others)
    per_setting = {}
    for setting in SETTINGS:
        rows = [row for row in usable if row["setting"] == setting]
        means = {
            f: float(np.mean([r["cumulative_length"] for r in rows if r["frequency"] == f] or [math.nan]))
            for f in FREQUENCIES
        }
        per_setting[setting] = {"runs": len(rows), "mean_cumulative_length": means}
        if len(rows) > 4:
            per_setting[setting]["rank_correlation"] = correlations(rows)["cumulative_length"]
    draw(groups, out / "studies.png")
    write_json(
        out / "studies.json",
        {
            "what": (__doc__ or "").splitlines()[0],
            "epochs": options.epochs,
            "same_weights_per_batch_size": invariance(),
            "rank_correlation_with_test_loss": groups,
            "settings": per_setting,
            "diverged": len(diverged),
            "torch": str(torch.__version__),
            "runs": runs,
        },
    )
    for name, found in groups.items():
        for predictor, row in found.items():
            print(f"{name}, {predictor}: rho {row['rho']:.2f} [{row['low']:.2f}, {row['high']:.2f}], n {row['n']}")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
