"""bench/paper: what its scripts overwrite, what they refuse to go on from, and what they refuse to be given."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pytest

PAPER = Path(__file__).parents[2] / "bench" / "paper"
if not PAPER.exists():
    pytest.skip("bench/paper is not part of this installation", allow_module_level=True)
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
sys.path.insert(0, str(PAPER))

import figure6  # noqa: E402
import options as command_line  # noqa: E402
import studies  # noqa: E402
import task1  # noqa: E402
import task2  # noqa: E402
from store import BadState, load_arrays, read_json  # noqa: E402

SCRIPTS = {"task1": task1, "task2": task2, "studies": studies, "figure6": figure6}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        *(
            (script, ["--epochs", text], "--epochs: expected an integer >= 1")
            for script in SCRIPTS
            for text in ("0", "x")
        ),
        *((script, ["--seeds", "0"], "--seeds: expected an integer >= 1") for script in ("task1", "task2", "studies")),
        ("studies", ["--workers", "-1"], "--workers: expected an integer >= 1, got '-1'"),
        ("figure6", ["--resolution", "1"], "--resolution: expected an integer >= 2, got '1'"),
        ("figure6", ["--frequency", "nan"], "--frequency: expected a finite number, got 'nan'"),
        ("figure6", ["--frequency", "x"], "--frequency: expected a finite number, got 'x'"),
        ("figure6", ["--seed", "-1"], "--seed: expected an integer >= 0, got '-1'"),
    ],
)
def test_arguments_are_checked(
    script: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(arguments)
    assert message in capsys.readouterr().err


def folder(*arguments: str) -> Path:
    parser = command_line.parser_of("A script.")
    parser.add_argument("--epochs", type=command_line.at_least(1), default=30)
    parser.add_argument("--rate", type=command_line.finite, default=0.5)
    options: argparse.Namespace = parser.parse_args(list(arguments))
    return command_line.folder_of(parser, options, "epochs", "rate")


def test_only_the_full_size_writes_to_the_committed_results() -> None:
    assert folder() == PAPER / "results"
    assert folder("--epochs", "30") == PAPER / "results"
    assert folder("--epochs", "3") == command_line.STATE / "reduced-epochs-3-rate-0.5"
    assert folder("--epochs", "3", "--rate", "1") == command_line.STATE / "reduced-epochs-3-rate-1"
    assert folder("--epochs", "3", "--out", "here") == Path("here")


def test_a_small_run_says_where_it_wrote_and_keeps_a_longer_ones_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "STATE", tmp_path / "reduced")
    monkeypatch.setattr(command_line, "RESULTS", tmp_path / "committed")
    state = tmp_path / "state"
    for epochs in ("3", "2"):
        assert task1.main(["--epochs", epochs, "--seeds", "1", "--state", str(state)]) == 0
        out = tmp_path / "reduced" / f"reduced-epochs-{epochs}-seeds-1"
        assert f"written to {out}" in capsys.readouterr().out
        assert (out / "task1.json").exists()
    assert sorted(path.name for path in state.iterdir()) == ["task1-2-epochs-1-seeds.npz", "task1-3-epochs-1-seeds.npz"]
    assert not (tmp_path / "committed").exists()


# ---- files that cannot be gone on from


def truncated(path: Path) -> None:
    np.savez(path, a=np.zeros(1000))
    path.write_bytes(path.read_bytes()[:500])


def other_arrays(path: Path) -> None:
    np.savez(path, other=np.zeros(3))


def other_shape(path: Path) -> None:
    np.savez(path, a=np.zeros((3, 2)), b=np.zeros(2))


BAD_ARRAYS = {
    "empty": (lambda path: path.write_bytes(b""), ""),
    "text": (lambda path: path.write_text("hello"), ""),
    "truncated": (truncated, ""),
    "of another script": (other_arrays, "it lacks a"),
    "of another shape": (other_shape, r"a has shape \[3, 2\], not \[4, None\]"),
    "a single array": (lambda path: np.save(path.open("wb"), np.zeros(3)), ""),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "state.npz"
    assert load_arrays(path, {}) is None
    make, why = BAD_ARRAYS[name]
    make(path)
    with pytest.raises(BadState, match=f"{path}: not a state file of this script .*{why}.*; delete it"):
        load_arrays(path, {"a": (4, None), "b": (2,)})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ('{"a": [1', "delimiter"),
        ("[1]", "it lacks a dictionary"),
        ('{"a": [1, 2]}', "it lacks b"),
        ('{"a": [1, 2], "b": [1]}', "b is not a list of 2"),
        ('{"a": [1, 2], "b": 1}', "b is not a list of 2"),
    ],
)
def test_bad_documents_are_named(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(BadState, match=f"{path}: not a state file of this script .*{why}.*; delete it"):
        read_json(path, ("a", "b"), 2)


FILES = {
    "task1": ("task1-2-epochs-1-seeds.npz", ["--epochs", "2", "--seeds", "1"]),
    "task2": ("task2-digits-2-0.0-0.json", ["--epochs", "2", "--seeds", "1"]),
    "figure6": ("figure6-2-epochs-0.5-0.npz", ["--epochs", "2"]),
}


@pytest.mark.parametrize("script", FILES)
def test_scripts_say_which_file_to_delete(tmp_path: Path, script: str) -> None:
    if script == "task2":
        pytest.importorskip("sklearn")
    name, arguments = FILES[script]
    (tmp_path / name).write_text("{")
    with pytest.raises(BadState, match=f"{tmp_path / name}: .*delete it"):
        SCRIPTS[script].main([*arguments, "--state", str(tmp_path), "--out", str(tmp_path / "out")])


def test_studies_say_which_file_to_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.setattr(studies, "SETTINGS", dict(list(studies.SETTINGS.items())[:1]))
    monkeypatch.setattr(studies, "FREQUENCIES", [0.25])
    (tmp_path / "study-sgd-batch-1-0.25-0-1.json").write_text('{"test_loss": 1.0}')
    with pytest.raises(BadState, match="study-sgd-batch-1-0.25-0-1.json: .*it lacks cumulative_length.*delete it"):
        studies.main(["--epochs", "1", "--seeds", "1", "--state", str(tmp_path), "--out", str(tmp_path / "out")])


def failing_run(setting: str, frequency: float, seed: int, epochs: int) -> dict[str, float]:
    """The first of the runs fails at once, the others last until after that."""
    if frequency == studies.FREQUENCIES[0]:
        raise MemoryError("as expected")
    time.sleep(0.2)
    return dict.fromkeys(("test_loss", *studies.PREDICTORS), frequency)


@pytest.mark.skipif(sys.platform != "linux", reason="the workers must inherit the run that fails")
def test_a_run_that_fails_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "SETTINGS", dict(list(studies.SETTINGS.items())[:1]))
    monkeypatch.setattr(studies, "run", failing_run)
    with pytest.raises(MemoryError, match="as expected"):
        studies.main(["--epochs", "1", "--seeds", "1", "--state", str(tmp_path), "--out", str(tmp_path / "out")])
    left = sorted(path.name for path in tmp_path.glob("study-*.json"))
    assert left == [f"study-sgd-batch-1-{frequency}-0-1.json" for frequency in studies.FREQUENCIES[1:]]


def test_every_setting_has_files_of_its_own() -> None:
    """Whatever its position."""
    names = [studies.slug(setting) for setting in studies.SETTINGS]
    assert len(set(names)) == len(names)
    assert names[0] == "sgd-batch-1"
