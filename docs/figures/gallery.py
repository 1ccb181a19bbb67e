"""Draws the pictures of docs/gallery.md, each of a small run with a fixed seed.

    .venv/bin/python docs/figures/gallery.py            # all of them, some minutes
    .venv/bin/python docs/figures/gallery.py spike      # one of them

Those named "spike", "report" and "demo-report" are what a browser shows, and need chromium.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from torch import nn

import lipcore
from lipcore import demo
from lipcore.cli import main as command_line
from lipcore.regions import Coverage, Plane, slice_map

mpl.use("Agg")
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests" / "helpers")]
from browser import browser  # noqa: E402
from transformer import train  # noqa: E402

BATCH = 256
BLUE, ORANGE, GREY = "#0072b2", "#c75a00", "#595959"  # told apart by colour-blind people too
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11}


def spike(target: Path, folder: Path) -> None:
    """Draw the post-mortem of a step in which one sample's input was 100 times too large."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.ReLU()) for _ in range(4)))
    model = nn.Sequential(OrderedDict(input=nn.Linear(6, 24), layers=layers, head=nn.Linear(24, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    metrics = [lipcore.Trajectory(), lipcore.PerSampleGradNorms(loss_reduction="mean")]
    with lipcore.watch(model, optimizer, run=folder / "spike", metrics=metrics, alarms="default") as monitor:
        for step in range(1, 261):
            ids = torch.arange(32 * step, 32 * step + 32)
            x = torch.randn(32, 6)
            y = x[:, 0].sin() + 0.5 * torch.randn(32)
            if step == 200:
                x[7] *= 100
            losses = (model(x)[:, 0] - y).square()
            monitor.log(loss=losses.mean())
            monitor.log_batch(ids, losses=losses)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    command_line(["postmortem", str(folder / "spike"), "-o", str(folder / "spike.html")])
    with browser() as page:
        page.open(folder / "spike.html", width=1000, height=815)
        page.picture(target)


def head_of_report(target: Path, folder: Path) -> None:
    """Draw the head of the report of a transformer, of which one layer had too large a learning rate in one step."""
    run_of_transformer(folder)
    _picture_of_report(folder / "transformer", target)


def demo_report(target: Path, folder: Path) -> None:
    """Draw the head of the report of one of the demo's runs: the hardest sinusoid."""
    demo.run(folder / "demo", seeds=1)
    _picture_of_report(folder / "demo" / "runs" / "sinusoid-1", target, height=640)


def _picture_of_report(record: Path, target: Path, height: int = 860) -> None:
    with lipcore.open_run(record) as run, browser() as page:
        path = run.report().save(target.with_suffix(".html"))
        try:
            page.open(path, width=1100, height=height)
            page.picture(target)
        finally:
            path.unlink()


def update_ratios(target: Path, folder: Path) -> None:
    """Draw the largest update over weight norm of each layer in every window of the same run."""
    run_of_transformer(folder)
    with lipcore.open_run(folder / "transformer") as run, mpl.rc_context(STYLE):
        run.heatmap("update_ratio.max").savefig(target, dpi=90)


def run_of_transformer(folder: Path) -> None:
    if not (folder / "transformer").exists():
        train(folder / "transformer")


def noise_scale(target: Path, folder: Path) -> None:
    """Draw the noise scale of a network that learns digits, and the batch size in use."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    metrics = [lipcore.PerSampleGradNorms(loss_reduction="mean")]
    with lipcore.watch(model, optimizer, run=folder / "digits", metrics=metrics, window_steps=50):
        for _ in range(1500):
            ids = torch.randint(len(x), (BATCH,))
            nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
    with lipcore.open_run(folder / "digits") as run:
        lower, middle, upper = (run.series(f"noise_scale.{end}") for end in ("lower", "mean", "upper"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axis = figure.subplots()
        top = np.where(np.isfinite(upper["total"]), upper["total"], 1e9)  # an interval may be open
        axis.fill_between(lower.steps, lower["total"], top, color=BLUE, alpha=0.2, linewidth=0, label="95 % interval")
        axis.plot(middle.steps, middle["total"], color=BLUE, linewidth=2, label="noise scale")
        axis.axhline(BATCH, color=ORANGE, linestyle="--", label=f"batch in use: {BATCH}")
        axis.set(yscale="log", xlabel="optimizer step", ylabel="samples", xlim=(0, 1500), ylim=(10, 1e4))
        axis.set_title("Below the dashed line a smaller batch would do, above it a larger one would help", fontsize=11)
        axis.legend(loc="lower right", frameon=False)
        axis.grid(alpha=0.25)
        figure.savefig(target, dpi=90)


def hard_samples(target: Path, _: Path) -> None:
    """Draw the digits whose gradients are largest, where 5 % of the labels are wrong."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    torch.manual_seed(0)
    x, true = torch.tensor(digits.images / 16, dtype=torch.float32).flatten(1), torch.tensor(digits.target)
    wrong = torch.rand(len(x)) < 0.05
    given = torch.where(wrong, (true + torch.randint(1, 10, true.shape)) % 10, true)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with lipcore.PerSampleGradNorms(model, loss_reduction="mean") as norms:
        for _epoch in range(12):
            for ids in torch.randperm(len(x)).split(64):
                norms.set_ids(ids)
                nn.functional.cross_entropy(model(x[ids]), given[ids]).backward()
                optimizer.step()
                optimizer.zero_grad()
        mean = norms.scores.lookup(torch.arange(len(x))).mean
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.8))
        top = mean.argsort(descending=True)[:10].tolist()
        upper.suptitle(
            "The ten digits that pull hardest, each below the label that it was given (orange: a wrong one)",
            fontsize=11,
        )
        for axis, i in zip(upper.subplots(1, 10), top, strict=True):
            axis.imshow(digits.images[i], cmap="gray_r")
            axis.set_axis_off()
            axis.set_title(f"{int(given[i])}", color=ORANGE if wrong[i] else GREY)
        axis = lower.subplots()
        edges = np.linspace(0, float(mean.max()), 60)
        axis.hist(mean[~wrong], edges, color=GREY, alpha=0.55, label=f"right label ({int((~wrong).sum()):,})")
        axis.hist(mean[wrong], edges, color=ORANGE, alpha=0.85, label=f"wrong label ({int(wrong.sum())})")
        axis.set(yscale="log", xlabel="a sample's gradient norm, mean over 12 epochs", ylabel="samples")
        axis.legend(frameon=False)
        figure.savefig(target, dpi=90)


def regions(target: Path, _: Path) -> None:
    """Draw what a small network does on a plane: its regions, its slope, and where training says something."""
    torch.manual_seed(1)
    angle, side = 3.14 * torch.rand(160), torch.arange(160) % 2
    x = torch.stack([angle.cos() + side - 0.5, (1 - 2 * side) * angle.sin() + 0.5 * side - 0.25], 1)
    x += 0.08 * torch.randn(160, 2)
    y = 2.0 * side - 1
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _step in range(600):
        (model(x)[:, 0] - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.double()
    x = x.double()
    plane = Plane(torch.zeros(2).double(), torch.tensor([2.2, 0.0]).double(), torch.tensor([0.0, 2.2]).double())
    found = slice_map(model, plane, resolution=120, coverage=Coverage(model, x), x=x)
    assert found.coverage is not None
    names = {"train": "of a training point", "combination": "a combination of such", "uncovered": "uncovered"}
    colors = {"train": "#04395e", "combination": "#4fb0e5", "uncovered": "#f3e6c8"}
    status = found.coverage.status.reshape(found.local_lipschitz.shape)
    number = np.random.default_rng(0).permutation(int(found.regions.max()) + 1)  # neighbours of unlike colours
    with mpl.rc_context(STYLE | {"axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(11, 3.7), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        at = {"origin": "lower", "extent": (-1, 1, -1, 1), "interpolation": "nearest"}
        panels[0].imshow(number[found.regions], cmap="cividis", **at)
        panels[0].set(title=f"{len(number)} linear regions")
        slope = panels[1].imshow(found.local_lipschitz, cmap="viridis", **at)
        figure.colorbar(slope, ax=panels[1], label="slope", shrink=0.9)
        panels[1].set(title="Local Lipschitz constant, exact")
        panels[2].imshow(np.array([[to_rgb(colors[one]) for one in row] for row in status]), **at)
        panels[2].set(title="Does training say something there?")
        boxes = [Patch(color=colors[one], label=f"{names[one]} ({(status == one).mean():.0%})") for one in names]
        panels[2].legend(handles=boxes, loc="upper center", fontsize=9, title="the region is", framealpha=0.95)
        for panel in panels:
            panel.scatter(*found.points.T, s=9, c="white", edgecolors="black", linewidths=0.6)
            panel.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        figure.savefig(target, dpi=90)


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "report": head_of_report,
    "demo-report": demo_report,
    "spike": spike,
    "update-ratios": update_ratios,
    "noise-scale": noise_scale,
    "hard-samples": hard_samples,
    "regions": regions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that they are written to; default: this one")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PICTURES)}; default: all")
    options = parser.parse_args()
    names = options.names or list(PICTURES)
    if unknown := set(names) - set(PICTURES):
        parser.error(f"there is no picture {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            target = options.out / f"{name}.png"
            PICTURES[name](target, Path(folder))
            print(f"{target}: {target.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
