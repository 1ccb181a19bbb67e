"""Task 1 of Loukas, Poiitis and Jegelka (NeurIPS 2021): Figures 1a-c and 2a-b, with bands over seeds.

    python bench/paper/task1.py             # 10 seeds x 4 frequencies x 3000 epochs, a few minutes on 2 cores
    python bench/paper/task1.py --epochs 20 --seeds 2

The full size writes to bench/paper/results, a smaller one to a folder in build/paper (and says so), unless --out is
given. Goes on where it was when it is interrupted. Ends with exit status 1 when the curves are not those of the golden
file.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[2] / "tests" / "helpers"))  # the golden file and its bands

import golden
import task1_figures
from options import at_least, folder_of, parser_of
from store import BadState, load_arrays, save_arrays, write_json
from task1_training import CURVES, LEARNING_RATE, TRAIN, Training, build

FREQUENCIES = [0.25, 0.5, 0.75, 1.0]
_KEEP_EVERY = 250


def train(seeds: list[int], epochs: int, state: Path) -> dict[str, np.ndarray]:
    """Curves [frequencies, seeds, epochs]."""
    from rich.progress import Progress

    torch.set_num_threads(1)  # the matrices are too small to be worth a second one
    training = Training(build(FREQUENCIES, seeds))
    curves = {name: np.full((len(FREQUENCIES), len(seeds), epochs), np.nan) for name in CURVES}
    arrays = training.arrays()
    shapes: dict[str, tuple[int | None, ...]] = {name: array.shape for name, array in arrays.items()}
    kept = load_arrays(state, shapes | dict.fromkeys(CURVES, (len(FREQUENCIES), len(seeds), None)))
    if kept is not None:
        made = int(kept["epochs"])
        if not 0 < made <= epochs or any(kept[name].shape[2] != made for name in CURVES):
            raise BadState(state, f"{made} epochs, but curves of others")
        training.restore(kept)
        for name in CURVES:
            curves[name][:, :, : training.epochs] = kept[name]
    with Progress() as progress:
        bar = progress.add_task("epochs of all runs", total=epochs, completed=training.epochs)
        while training.epochs < epochs:
            found = training.epoch()
            for name in CURVES:
                curves[name][:, :, training.epochs - 1] = found[name].reshape(len(FREQUENCIES), len(seeds))
            progress.advance(bar)
            if training.epochs % _KEEP_EVERY == 0 or training.epochs == epochs:
                made = {name: curve[:, :, : training.epochs] for name, curve in curves.items()}
                save_arrays(state, training.arrays() | made)
    return curves


#: What the paper's Figures 1 and 2 show for this task.
PUBLISHED = "the order of the frequencies, .25 < .5 < .75 < 1, in length, variance and test loss at the end"


def table(curves: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row per frequency, at the last epoch."""
    length = curves["traj_grad"].sum(axis=2) / TRAIN
    last = slice(-10, None)
    rows = []
    for i, frequency in enumerate(FREQUENCIES):
        rows.append(
            {
                "frequency": frequency,
                "cumulative_length_mean": length[i].mean(),
                "cumulative_length_std": length[i].std(ddof=1) if length.shape[1] > 1 else 0.0,
                "per_epoch_length": curves["traj_grad"][i, :, -1].mean() / TRAIN,
                "lipschitz_mean": curves["lam_avg_end"][i, :, -1].mean(),
                "variance_over_lr_sq_median": float(np.median(curves["var"][i, :, last]) / LEARNING_RATE**2),
                "distance": curves["dist"][i, :, -1].mean(),
                "train_loss": curves["train"][i, :, -1].mean(),
                "test_loss": curves["test"][i, :, -1].mean(),
            }
        )
    return rows


def order(curves: dict[str, np.ndarray]) -> dict[str, Any]:
    """In how many seeds the cumulative lengths are ordered as the frequencies."""
    length = curves["traj_grad"].sum(axis=2)
    ends = length[0] < length[-1]
    everywhere = (np.diff(length, axis=0) > 0).all(axis=0)
    return {"seeds": length.shape[1], "first_below_last": int(ends.sum()), "all_in_order": int(everywhere.sum())}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=at_least(1), default=3000)
    parser.add_argument("--seeds", type=at_least(1), default=10)
    options = parser.parse_args(arguments)
    out = folder_of(parser, options, "epochs", "seeds")
    seeds = list(range(options.seeds))
    began = time.perf_counter()
    curves = train(seeds, options.epochs, options.state / f"task1-{options.epochs}-epochs-{options.seeds}-seeds.npz")
    seconds = time.perf_counter() - began
    check = golden.compare(curves, FREQUENCIES, seeds)
    rows, found = table(curves), order(curves)
    task1_figures.figure1(curves, FREQUENCIES, out / "task1-figure1.png")
    task1_figures.figure2(curves, FREQUENCIES, LEARNING_RATE, out / "task1-figure2.png")
    every = np.unique(np.geomspace(1, options.epochs, 60).round().astype(int)) - 1
    document = {
        "what": "Task 1: 10-10-32-32-32-1 ReLU, W_1 = I frozen, SGD lr 1e-3, batch 1, squared error / 2",
        "frequencies": FREQUENCIES,
        "seeds": seeds,
        "epochs": options.epochs,
        "seconds_of_this_call": seconds,
        "torch": str(torch.__version__),
        "golden": check,
        "published_trend": PUBLISHED,
        "table": rows,
        "order": found,
        "curve_epochs": every + 1,
        "curves": {name: curves[name][:, :, every] for name in ("traj_grad", "train", "test", "var", "dist")},
    }
    write_json(out / "task1.json", document)
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()))
    print(f"order {found}; golden: {check['checked']} values checked, {len(check['wrong'])} wrong; {seconds:.0f} s")
    print(f"written to {out}")
    for line in check["wrong"][:20]:
        print("  " + line)
    return 1 if check["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
