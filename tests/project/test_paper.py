"""bench/paper: the vectorised Task 1, step by step against a Monitor, and the script in a reduced size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lipcore import Lipschitz, Monitor, local_lipschitz

PAPER = Path(__file__).parents[2] / "bench" / "paper"
if not PAPER.exists():
    pytest.skip("bench/paper is not part of this installation", allow_module_level=True)
sys.path.insert(0, str(PAPER))

import golden  # noqa: E402
from task1_training import CURVES, TRAIN, Training, build  # noqa: E402


def test_every_step_has_the_monitors_numbers() -> None:
    """Of the third of the stacked networks: r at each of 200 steps, and the constants at the end."""
    training = Training(build([0.25, 1.0], [3, 4]))
    p, which = build([0.25, 1.0], [3, 4]), 2
    layers: list[nn.Module] = [nn.Linear(10, 10)]
    nn.init.eye_(layers[0].weight)
    layers[0].bias.data.copy_(p.biases[0][which])
    for weight, bias in zip(p.weights, p.biases[1:], strict=True):
        layers += [nn.ReLU(), nn.Linear(weight.shape[2], weight.shape[1])]
        layers[-1].weight.data.copy_(weight[which])
        layers[-1].bias.data.copy_(bias[which])
    model = nn.Sequential(*layers)
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([q for q in model.parameters() if q.requires_grad], lr=1e-3)
    random = np.random.default_rng(3)
    random.uniform(-1, 1, (100, 2)), random.uniform(-1, 1, (30, 2)), random.standard_normal((10, 10))
    with Monitor(model, optimizer, [Lipschitz()], window_steps=1) as monitor:
        for _ in range(2):
            training.epoch()
            truth = []
            for i in random.permutation(TRAIN).tolist():
                optimizer.zero_grad()
                ((model(p.x[which, i : i + 1]) - p.y[which, i]).square().sum() / 2).backward()
                optimizer.step()
                window = monitor.pop_window()
                assert window is not None
                truth.append(window["lipschitz"].normalized_gradient_norm["model:Linear"].mean.value)
            assert np.allclose(training.ratios()[:, which], truth, rtol=1e-5)
    ends = training.constants(p.x)[which]
    assert np.allclose(ends, local_lipschitz(model, p.x[which]), rtol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    import task1

    folder = tmp_path_factory.mktemp("paper")

    class Interrupted(Exception):
        pass

    class Stopping(Training):
        def epoch(self) -> dict[str, np.ndarray]:
            if self.epochs == 7:
                raise Interrupted
            return super().epoch()

    where = ["--out", str(folder / "out"), "--state", str(folder / "state"), "--seeds", "2", "--epochs", "10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task1, "_KEEP_EVERY", 3)
        patch.setattr(task1, "Training", Stopping)
        with pytest.raises(Interrupted):
            task1.main(where)
    assert task1.main(where) == 0  # goes on
    return folder


def test_the_script_in_a_reduced_size_is_the_golden_file(finished: Path) -> None:
    document = json.loads((finished / "out" / "task1.json").read_text())
    assert document["golden"]["wrong"] == []
    assert document["golden"]["checked"] > 200
    for name in ("task1-figure1.png", "task1-figure2.png"):
        assert (finished / "out" / name).stat().st_size > 10_000


def test_an_interrupted_run_goes_on_bit_for_bit(finished: Path) -> None:
    training = Training(build([0.25, 0.5, 0.75, 1.0], [0, 1]))
    curves = [training.epoch() for _ in range(10)]
    with np.load(finished / "state" / "task1-10-epochs-2-seeds.npz") as kept:
        for name in CURVES:
            assert np.array_equal(kept[name].reshape(8, 10), np.stack([c[name] for c in curves], axis=1)), name


def test_a_wrong_curve_is_noticed() -> None:
    curves = {name: np.ones((1, 1, 10)) for name in ("train", "traj_grad")}
    assert golden.compare(curves, [0.25], [0])["wrong"]


def test_committed_results_are_those_of_a_full_run() -> None:
    document = json.loads((PAPER / "results" / "task1.json").read_text())
    assert (document["epochs"], len(document["seeds"])) == (3000, 10)
    assert document["golden"]["wrong"] == []
    assert document["golden"]["checked"] > 1000


@pytest.mark.ci
def test_figure_6_in_a_reduced_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    import figure6

    where = ["--out", str(tmp_path / "out"), "--state", str(tmp_path / "state"), "--epochs", "5", "--resolution", "12"]
    assert figure6.main(where) == 0
    document = json.loads((tmp_path / "out" / "figure6.json").read_text())
    assert document["bounds_below_truth"] == 0
    assert sum(document["share"].values()) == pytest.approx(1)
    assert (tmp_path / "out" / "figure6.png").stat().st_size > 10_000
    monkeypatch.setattr(figure6, "train", lambda *_: pytest.fail("a trained network was trained again"))
    assert figure6.main(where) == 0
    again = json.loads((tmp_path / "out" / "figure6.json").read_text())
    assert again | {"seconds": 0} == document | {"seconds": 0}


@pytest.mark.ci
def test_task_2_in_a_reduced_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    import task2

    where = ["--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]
    assert task2.main(["--epochs", "1", "--seeds", "1", *where]) == 0
    document = json.loads((tmp_path / "out" / "task2-digits.json").read_text())
    assert [row["corrupted"] for row in document["table"]] == [0.0, 0.2, 0.4, 0.6]
    assert all(row["cumulative_length"] > 0 for row in document["table"])
    monkeypatch.setattr(task2, "run", lambda *_: pytest.fail("a finished run was made again"))
    assert task2.main(["--epochs", "1", "--seeds", "1", *where]) == 0
    with pytest.raises(SystemExit, match="needs --folder"):
        task2.main(["--data", "cifar", *where])


@pytest.mark.ci
def test_studies_in_a_reduced_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    import studies

    where = ["--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]
    assert studies.main(["--epochs", "1", "--seeds", "1", "--workers", "1", *where]) == 0
    document = json.loads((tmp_path / "out" / "studies.json").read_text())
    assert len(document["runs"]) == 4 * len(studies.SETTINGS)
    same = document["same_weights_per_batch_size"]
    r = [row["mean_r"] for row in same.values()]
    assert r == pytest.approx([r[0]] * 4, rel=1e-5)  # r_i does not know the batch it was taken in
    assert same["1"]["mean_displacement"] == pytest.approx(r[0], rel=1e-5)
    assert same["64"]["mean_displacement"] < 0.9 * r[0]  # single samples pull in different directions
