"""Figure 6 of Loukas, Poiitis and Jegelka (NeurIPS 2021): a slice through the inputs, near the training points and far.

    python bench/paper/figure6.py
    python bench/paper/figure6.py --resolution 40       # smaller: writes to a folder in build/paper, unless --out says

A 10-10-32-1 ReLU network (W_1 = I, frozen) is trained on Task 1's data; the slice is the plane the data lie on.
The bounds are those of Theorem 2, checked against the exact constant at every point of the grid. The trained network
is kept in the state folder: an interrupted call goes on with the grid.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from options import at_least, finite, folder_of, parser_of
from store import load_arrays, save_arrays, write_json
from task1_training import build

from lipcore.regions import Coverage, Plane, slice_map


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    nn.init.eye_(model[0].weight).requires_grad_(False)
    return model


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> float:
    """Training loss at the end; Adam, so that a minute is enough."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(10):
            optimizer.zero_grad()
            ((model(x[batch])[:, 0] - y[batch]).square().mean() / 2).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model(x)[:, 0] - y).square().mean() / 2)


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int, state: Path) -> float:
    """As train(), or from the file in which that was kept."""
    parameters = dict(model.named_parameters())
    shapes: dict[str, tuple[int | None, ...]] = {name: tuple(p.shape) for name, p in parameters.items()}
    kept = load_arrays(state, shapes | {"loss": ()})
    if kept is None:
        loss = train(model, x, y, epochs, seed)
        save_arrays(state, {name: p.detach().numpy() for name, p in parameters.items()} | {"loss": np.array(loss)})
        return loss
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(kept[name]))
    return float(kept["loss"])


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=at_least(1), default=1000)
    parser.add_argument("--resolution", type=at_least(2), default=150)
    parser.add_argument("--frequency", type=finite, default=0.5)
    parser.add_argument("--seed", type=at_least(0), default=0)
    options = parser.parse_args(arguments)
    out = folder_of(parser, options, "epochs", "resolution", "frequency", "seed")
    torch.set_num_threads(1)
    problem = build([options.frequency], [options.seed])
    x, y, basis = problem.x[0], problem.y[0], problem.basis[0]
    model = network(options.seed)
    state = options.state / f"figure6-{options.epochs}-epochs-{options.frequency:g}-{options.seed}.npz"
    loss = trained(model, x, y, options.epochs, options.seed, state)
    model.double()
    x = x.double()
    coverage = Coverage(model, x)
    plane = Plane(torch.zeros(10).double(), basis[:, 0].double(), basis[:, 1].double())

    def target(points: Tensor) -> Tensor:
        s = points @ basis.double() / 100  # the basis' columns have length 10
        return torch.cos(2 * torch.pi * options.frequency * s).prod(dim=1)

    began = time.perf_counter()
    found = slice_map(
        model, plane, resolution=options.resolution, target=target, coverage=coverage, x=x, progress=sys.stdout.isatty()
    )
    seconds = time.perf_counter() - began
    assert found.coverage is not None
    truth = found.local_lipschitz.ravel()
    combined = found.coverage.status == "combination"
    ratio = found.coverage.bound[combined] / np.maximum(truth[combined], 1e-300)
    quantiles = {q: float(np.quantile(ratio, float(q))) if len(ratio) else None for q in ("0", "0.5", "0.9")}
    below = int((found.coverage.bound < truth * (1 - 1e-6) - 1e-12).sum())
    below += int((found.coverage.relaxed < truth * (1 - 1e-6) - 1e-12).sum())
    out.mkdir(parents=True, exist_ok=True)
    found.draw(out / "figure6.png")
    write_json(
        out / "figure6.json",
        {
            "what": "10-10-32-1 ReLU on Task 1's data; Theorem 2 on the plane of the data",
            "settings": {name: getattr(options, name) for name in ("epochs", "resolution", "frequency", "seed")},
            "train_loss": loss,
            "training_regions": coverage.regions,
            "rank": coverage.rank,
            "regions_on_the_slice": int(found.regions.max()) + 1 if found.regions is not None else None,
            "share": {s: float((found.coverage.status == s).mean()) for s in ("train", "combination", "uncovered")},
            "bound_over_truth": quantiles,
            "relaxed_over_truth_median": float(np.median(found.coverage.relaxed / np.maximum(truth, 1e-12))),
            "largest_k": int(found.coverage.k.max()),
            "bounds_below_truth": below,
            "seconds": seconds,
            "torch": str(torch.__version__),
        },
    )
    print(f"{coverage}; {found.coverage}; bounds below the truth: {below}; {seconds:.0f} s")
    print(f"written to {out}")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
