"""``lipcore demo``: one --quick run end to end, and everything it refuses before it trains."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lipcore import cli, demo
from lipcore.demo import output

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

CURVES = ("train_loss", "test_loss", "normalized_length", "grad_norm", "lipschitz_mean", "lipschitz_p99", "skipped")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder and the process of a --quick run with the default folder name."""
    place = tmp_path_factory.mktemp("demo")
    root = Path(cli.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-m", "lipcore", "demo", "--quick"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    return place / "lipcore-demo", run


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training at all is a failure."""
    from lipcore.demo import train

    monkeypatch.setattr(train, "train_all", lambda *_: pytest.fail("it began to train"))


@pytest.mark.ci
def test_quick_run_writes_its_files_and_prints_the_table(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, run = finished
    assert run.returncode == 0, run.stderr
    assert sorted(file.name for file in folder.iterdir()) == ["figure.png", "metrics.json", "runs"]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    for words in (
        "Sinusoid regression",
        "Handwritten digits",
        "cumulative",
        "p99",
        "seeds",
        "Seeds in order: 0.25 < 1 in",
        "epochs to",
        "Rank correlation with the test loss over the 8 runs: cumulative length ",
    ):
        assert words in run.stdout
    assert "What to see: " in run.stdout
    assert "How the setting was chosen: " in run.stdout


@pytest.mark.ci
def test_metrics_hold_every_epoch_of_every_run(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    document = json.loads((finished[0] / "metrics.json").read_text(encoding="utf-8"))
    assert document["schema"] == 1
    assert document["quick"] is True
    assert set(document["versions"]) == {"lipcore", "python", "torch", "numpy", "scikit-learn"}
    assert document["machine"]["cores"] >= 1
    assert set(document["values_per_epoch"]) == set(CURVES)
    assert [task["settings"]["name"] for task in document["tasks"]] == ["sinusoid", "digits"]
    for task, place in zip(document["tasks"], ("model:Linear", "model:Sigmoid"), strict=True):
        settings = task["settings"]
        cells = [(run["level"], run["seed"]) for run in task["runs"]]
        assert cells == [(level, seed) for level in settings["levels"] for seed in settings["seeds"]]
        assert len(settings["seeds"]) == task["in_order"]["seeds"] == 2
        assert [row["level"] for row in task["summary"]] == settings["levels"]
        assert all(min(run["train_loss"]) <= task["equal_loss"] for run in task["runs"])
        assert all(1 <= row["epochs_to_equal_loss"] <= settings["epochs"] for row in task["summary"])
        assert len(task["rank_correlations_with_test_loss"]) == 4
        for run in task["runs"]:
            assert run["place"] == place
            for curve in CURVES:
                assert len(run[curve]) == settings["epochs"]
                assert all(math.isfinite(value) and value >= 0 for value in run[curve])
            assert run["cumulative_length"] == pytest.approx(sum(run["normalized_length"]), rel=1e-5)


@pytest.mark.ci
def test_with_a_frozen_identity_length_and_lipschitz_constant_coincide(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    document = json.loads((finished[0] / "metrics.json").read_text(encoding="utf-8"))
    for run in document["tasks"][0]["runs"]:
        assert run["normalized_length"] == pytest.approx(run["lipschitz_mean"], rel=1e-5)


@pytest.mark.ci
def test_the_same_levels_and_seeds_give_the_same_numbers(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """A run alone in this process, whatever its number of threads, against the one from the demo's workers."""
    from lipcore.demo.runs import train
    from lipcore.demo.tasks import TASKS

    expected = json.loads((finished[0] / "metrics.json").read_text(encoding="utf-8"))["tasks"][0]["runs"][0]
    again = train(TASKS[0].quick(), expected["level"], expected["seed"], lambda: None)
    assert again.normalized_length == pytest.approx(expected["normalized_length"], rel=1e-4)


@pytest.mark.usefixtures("untrained")
def test_existing_results_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "figure.png").write_text("mine")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "figure.png").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("below", ["", "deeper/still"], ids=["the file itself", "below it"])
def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / below
    assert cli.main(["demo", "--quick", "--out", str(out)]) == 2
    assert f"cannot write to '{out}'" in capsys.readouterr().err


@pytest.mark.usefixtures("untrained")
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system in which nobody can make folders")
def test_an_unwritable_place_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--quick", "--out", "/proc/lipcore-demo"]) == 2
    assert "cannot write to '/proc/lipcore-demo'" in capsys.readouterr().err


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("package", ["matplotlib", "sklearn", "rich"])
def test_a_missing_package_is_named_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find_spec = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == package else find_spec(name))
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'lipcore[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    "arguments",
    [
        *(["demo", "--seeds", value] for value in ("0", "-1", "abc", "1.5", "")),
        *(["demo", "--quickly"], ["demo", "extra"], ["train"]),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_errors(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "error: " in message
    if "--seeds" in arguments:
        assert f"expected an integer >= 1, got {arguments[-1]!r}" in message


def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lipcore.demo import train

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_all", interrupted)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "new" / "out")]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.ci
def test_what_it_says_to_do_next_works(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, run = finished
    assert len(list((folder / "runs").iterdir())) == 8  # the first seed of each level of two tasks
    lines = run.stdout.partition("What to do next:")[2].splitlines()
    said = [re.split(r"\s{2,}", line.strip())[1:2] for line in lines]  # what for, and the command
    commands = [
        command for each in said for command in each if command.startswith(("lipcore report", "lipcore export"))
    ]
    assert len(commands) == 2
    root, scripts = Path(cli.__file__).parents[1], str(Path(sys.executable).parent)
    env = os.environ | {"PYTHONPATH": str(root), "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}
    for command in commands:
        words = shlex.split(command)
        words[:1] = [sys.executable, "-m", "lipcore"]
        subprocess.run(words, cwd=folder.parent, env=env, check=True, timeout=120)
    assert (folder.parent / "run.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "update_norm" in (folder.parent / "numbers.csv").read_text(encoding="utf-8")


def test_force_replaces_only_its_own_files(tmp_path: Path) -> None:
    for name in ("metrics.json", "notes.txt", "runs/a/mine", "runs/a/rank0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    with output.staging(tmp_path, force=True) as folder:
        (folder / "runs" / "a").mkdir(parents=True)
        for name in ("metrics.json", "runs/a/rank0"):
            (folder / name).write_text("new")
            assert (tmp_path / name).read_text() == "old"
    left = {file.relative_to(tmp_path).as_posix(): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {"metrics.json": "new", "notes.txt": "old", "runs/a/mine": "old", "runs/a/rank0": "new"}


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    with output.staging(tmp_path, force=False) as folder:
        (folder / "figure.png").touch()
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]
