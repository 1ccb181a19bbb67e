"""Measures what docs/evidence.md says besides alarms: python bench/evidence.py writes bench/results/evidence.json

Which score finds wrong labels, whether local Lipschitz constants tell inputs of another kind, whether the
gradient noise scale is the batch size beyond which more samples do not help, what Dropout does to phi and the factors
of Theorem 3 at equal training loss, and what goes with the test loss there (from the committed runs of bench/paper).
A few minutes of one core; python bench/evidence.py dropout measures that part alone.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import machine
from scipy.stats import rankdata, spearmanr
from sklearn.datasets import load_digits, make_classification
from torch import Tensor, nn
from torch.nn import functional as F

import lipcore
from lipcore import theory
from lipcore.metric.results import json_ready
from lipcore.theory.falling import first_at

BENCH = Path(__file__).parent
RESULTS = BENCH / "results" / "evidence.json"
TASK2 = BENCH / "paper" / "results" / "task2-digits.json"
SEEDS = 5

Row = dict[str, Any]


def auc(other: Sequence[float], own: Sequence[float]) -> float:
    """Return the chance that a score of the first kind is above one of the second, ties counted half."""
    ranks = rankdata(np.concatenate([other, own]))
    n, m = len(other), len(own)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def over_seeds(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of every number."""
    return {
        name: {
            "mean": float(np.mean([row[name] for row in rows])),
            "sd": float(np.std([row[name] for row in rows], ddof=1)),
        }
        for name in rows[0]
    }


def _digits(seed: int) -> tuple[Tensor, np.ndarray[Any, Any], np.random.Generator]:
    digits, random = load_digits(), np.random.default_rng(seed)
    order = random.permutation(len(digits.target))
    return torch.tensor(digits.data[order] / 16, dtype=torch.float32), digits.target[order], random


# ---- wrong labels


def _digits_with_wrong_labels(seed: int) -> tuple[Tensor, Tensor, np.ndarray[Any, Any], int]:
    x, y, random = _digits(seed)
    return (*_spoiled(x[:1400], y[:1400], random, 10), 10)


def _hard_task_with_wrong_labels(seed: int) -> tuple[Tensor, Tensor, np.ndarray[Any, Any], int]:
    x, y = make_classification(
        1400, 20, n_informative=10, n_redundant=2, n_classes=5, flip_y=0, class_sep=1.0, random_state=seed
    )
    return (*_spoiled(torch.tensor(x, dtype=torch.float32), y, np.random.default_rng(seed), 5), 5)


def _spoiled(
    x: Tensor, y: np.ndarray[Any, Any], random: np.random.Generator, classes: int
) -> tuple[Tensor, Tensor, np.ndarray[Any, Any]]:
    """Return a tenth of the labels wrong, and which."""
    bad = random.permutation(len(y))[: len(y) // 10]
    y = y.copy()
    y[bad] = (y[bad] + random.integers(1, classes, len(bad))) % classes
    wrong = np.zeros(len(y), bool)
    wrong[bad] = True
    return x, torch.tensor(y), wrong


def labels(make: Callable[[int], Any], seed: int, epochs: int = 5) -> dict[str, float]:
    """Return how well each sample's mean loss and mean gradient norm over some epochs tell wrong labels."""
    x, y, wrong, classes = make(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, classes))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean")
    with lipcore.Monitor(model, optimizer, [norms], window_steps=None) as monitor:
        for _ in range(epochs):
            for ids in torch.randperm(len(x)).split(32):
                losses = F.cross_entropy(model(x[ids]), y[ids], reduction="none")
                monitor.log_batch(ids, losses=losses.detach())
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
        every = torch.arange(len(x))
        scores = {"gradient norm": norms.scores, "loss": norms.loss_scores}
        means = {name: each.lookup(every).mean.numpy() for name, each in scores.items()}
    return {name: auc(mean[wrong], mean[~wrong]) for name, mean in means.items()}


# ---- inputs of another kind


def other_inputs(seed: int) -> dict[str, float]:
    """Return how well the local Lipschitz constant, the distance to the nearest training point and the model's
    confidence tell inputs of another kind from test inputs; "kind: score"."""
    x, y, random = _digits(seed)
    known = np.flatnonzero(y < 5)
    train, test = known[:600], known[600:800]
    targets = torch.tensor(y[train] % 2, dtype=torch.float32)[:, None]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(30):
        for ids in torch.randperm(600).split(20):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x[train][ids]), targets[ids]).backward()
            optimizer.step()
    kinds = {
        "other digits": x[random.permutation(np.flatnonzero(y >= 5))[:200]],
        "noise": torch.rand(200, 64),
        "permuted pixels": x[test][:, torch.randperm(64)],
    }

    def scores(points: Tensor) -> dict[str, np.ndarray[Any, Any]]:
        with torch.no_grad():
            logit = model(points)[:, 0].abs().numpy()
        return {
            "lambda": lipcore.local_lipschitz(model, points).detach().numpy(),
            "nearest neighbour": torch.cdist(points, x[train]).min(1).values.numpy(),
            "low confidence": -logit,
        }

    own = scores(x[test])
    return {
        f"{kind}: {name}": auc(score, own[name])
        for kind, points in kinds.items()
        for name, score in scores(points).items()
    }


# ---- batch sizes


def steps_to(loss: float, batch: int, rate: float, seed: int, most: int) -> tuple[float, list[float]]:
    """Return how many steps of SGD it takes to bring the loss of all digits down to a level, infinite where it takes
    more than `most`, and the noise scale of every 20 steps."""
    x, y, random = _digits(0)
    wrong = random.permutation(len(y))[: int(0.3 * len(y))]
    y = y.copy()
    y[wrong] = random.integers(0, 10, len(wrong))
    targets = torch.tensor(y)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    norms = lipcore.PerSampleGradNorms(loss_reduction="mean", prove=False)
    scales: list[float] = []
    with lipcore.Monitor(model, optimizer, [norms], window_steps=20) as monitor:
        for step in range(1, most + 1):
            ids = torch.randint(len(x), (batch,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[ids]), targets[ids]).backward()
            optimizer.step()
            if (window := monitor.pop_window()) is not None:
                scales.append(window["per_sample_grad_norm"].noise_scale["total"].mean.value)
            if step % 5 == 0:
                with torch.no_grad():
                    if float(F.cross_entropy(model(x), targets)) <= loss:
                        return step, scales
    return np.inf, scales


def critical_batch(loss: float = 1.6, seeds: int = 2) -> Row:
    """Fit steps = least (1 + critical / batch) to the steps at the best rate, and compare with the noise scale."""
    steps, scales = {}, []
    for batch, most in ((4, 1200), (16, 600), (64, 300), (256, 200)):
        means = []
        for rate in (0.1, 0.3, 1.0):
            runs = [steps_to(loss, batch, rate, seed, most) for seed in range(seeds)]
            means.append((float(np.mean([run[0] for run in runs])), rate, runs))
        best = min(means, key=lambda each: each[0])
        steps[batch] = {"steps": best[0], "rate": best[1]}
        if batch == 16:
            scales = [scale for run in best[2] for scale in run[1] if np.isfinite(scale) and scale > 0]
    found = [(batch, row["steps"]) for batch, row in steps.items() if np.isfinite(row["steps"])]
    weights = np.array([1 / count for _, count in found])
    design = np.array([[1.0, 1 / batch] for batch, _ in found]) * weights[:, None]
    (least, slope), *_ = np.linalg.lstsq(design, np.ones(len(found)), rcond=None)
    return {
        "steps_by_batch": steps,
        "fitted_critical_batch": float(slope / least),
        "noise_scale_median": float(np.median(scales)),
        "noise_scale_last": scales[-1],
    }


# ---- Dropout

_SHARES = (0.0, 0.2, 0.5)
_WINDOW = 10  # steps


def dropout(share: float, seed: int, begin: float = 0.2, end: float = 0.1) -> dict[str, float]:
    """Return phi, every factor of Theorem 3 and what they make together, of a training with Dropout from where the loss
    of its training set, in eval mode, first came down to a level on until it came to another; what it is like there."""
    inputs, labels, random = _digits(seed)
    targets = torch.tensor(labels % 2, dtype=torch.float32)[:, None]
    x, y, x_test, y_test = inputs[:1000], targets[:1000], inputs[1000:], targets[1000:]
    torch.manual_seed(seed)
    parts = [nn.Linear(64, 64), nn.ReLU(), nn.Dropout(share), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(share)]
    model = nn.Sequential(*parts, nn.Linear(64, 1), nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    order: list[int] = []
    slopes: list[Tensor] = []

    def loss_of(x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return float(F.binary_cross_entropy(model(x), y))

    with lipcore.Monitor(model, optimizer, [lipcore.Lipschitz()], window_steps=None) as monitor:
        loss = np.inf
        while loss > end:
            model.train()
            for _ in range(_WINDOW):
                order = order or random.permutation(len(x)).tolist()
                ids, order = order[:20], order[20:]
                optimizer.zero_grad()
                F.binary_cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
            model.eval()
            loss = loss_of(x, y)
            monitor.log(loss=loss)
            monitor.close_window()
            slopes.append(lipcore.local_lipschitz(model, x).detach())
    first, last = (theory.at_loss(monitor.history, level) for level in (begin, end))
    assert first.window is not None
    gamma = theory.slack(slopes[first.window.index :]).gamma.value
    found = theory.generalization(monitor.history, model, x, gamma=gamma, first_step=first.window.first_step)
    return {
        "steps": last.step.value,
        "test loss": loss_of(x_test, y_test),
        "mean lambda": float(slopes[-1].mean()),
        **found.factors,
        "1 / radius": 1 / found.radius.value,
        "lambda_steady": found.lambda_steady.value,
        "log10 of the covering number": found.log10_covering_number.value,
    }


def dropout_study(seeds: int = 2 * SEEDS) -> Row:
    """Return each number by the share of units that Dropout leaves out: geometric mean, least and greatest of the
    seeds, and in how many of them it is below that without Dropout."""
    runs = {share: [dropout(share, seed) for seed in range(seeds)] for share in _SHARES}
    found: Row = {"seeds": seeds, "numbers": {}}
    for name in runs[0.0][0]:
        plain = np.array([run[name] for run in runs[0.0]])
        row = found["numbers"][name] = {}
        for share, each in runs.items():
            values = np.array([run[name] for run in each])
            row[f"{share:g}"] = {
                "mean": float(np.exp(np.log(values).mean())),
                "low": float(values.min()),
                "high": float(values.max()),
                "below": int((values < plain).sum()),
            }
    return found


# ---- at equal training loss


def at_equal_loss(levels: Iterable[float] = (0.4, 0.3, 0.2, 0.1)) -> Row:
    """Return how each quantity goes with the test loss, and with the label corruption itself, where the committed runs
    of Task 2 have the same training loss: the mean rank correlation over levels and groups, of all corruptions of a
    seed and of all seeds of a corruption."""
    runs = json.loads(TASK2.read_text(encoding="utf-8"))["runs"]
    names = (
        "epochs",
        "length so far",
        "length of the epoch",
        "distance",
        "gradient norm",
        "weight norm",
        "mean lambda",
    )
    found: Row = {"runs": len(runs), "levels": list(levels)}
    for words, key, against in (
        ("test loss, across label corruption, same seed", "seed", "test"),
        ("label corruption, same seed", "seed", "corrupted"),
        ("test loss, same corruption, across seeds", "corrupted", "test"),
    ):
        sums: dict[str, list[float]] = {name: [] for name in names}
        for level, group in itertools.product(found["levels"], sorted({run[key] for run in runs})):
            points = [point for run in runs if run[key] == group and (point := _point(run, level)) is not None]
            if len(points) < 3:
                continue
            for name in names:
                rho = spearmanr([each[name] for each in points], [each[against] for each in points])[0]
                sums[name] += [float(rho)] if np.isfinite(rho) else []
        found[words] = {
            name: {"rho": float(np.mean(each)), "se": float(np.std(each) / len(each) ** 0.5), "groups": len(each)}
            for name, each in sums.items()
        }
    return found


def _point(run: Row, level: float) -> dict[str, float] | None:
    """Return a run's numbers where its training loss first came down to a level, between two epochs."""
    losses = np.array(run["train"])
    at = first_at(losses, level)
    if at is None or at == 0:
        return None
    share = (losses[at - 1] - level) / (losses[at - 1] - losses[at])
    series = {
        "epochs": np.arange(1.0, len(losses) + 1),
        "length so far": np.cumsum(run["length"]),
        "length of the epoch": run["length"],
        "distance": run["distance"],
        "gradient norm": run["grad_norm"],
        "weight norm": run["weight_norm"],
        "mean lambda": run["lipschitz_mean"],
        "test": run["test"],
    }
    found = {name: float(each[at - 1] + share * (each[at] - each[at - 1])) for name, each in series.items()}
    return found | {"corrupted": float(run["corrupted"])}


def measure() -> Row:
    """Return all results."""
    makes = {"digits": _digits_with_wrong_labels, "five classes that overlap": _hard_task_with_wrong_labels}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "machine": machine(),
            "seeds": SEEDS,
            "wrong_labels": {
                name: over_seeds([labels(make, seed) for seed in range(SEEDS)]) for name, make in makes.items()
            },
            "other_inputs": over_seeds([other_inputs(seed) for seed in range(SEEDS)]),
            "critical_batch": critical_batch(),
            "dropout": dropout_study(),
            "at_equal_loss": at_equal_loss(),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["dropout"]:
        found = json.loads(RESULTS.read_text(encoding="utf-8")) | {"dropout": dropout_study()}
    else:
        found = measure()
    text = json.dumps(json_ready(found, digits=4), indent=1, allow_nan=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(RESULTS)
