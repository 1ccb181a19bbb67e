"""The examples run as their first lines say, on two ranks and more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lipcore

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run(name: str, *arguments: str, ranks: int = 2) -> str:
    """Return what an example prints."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*TORCHRUN, str(ranks), f"examples/{name}.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_each_has_a_test() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {"ddp", "pretraining", "resume", *OF_TWO_WINDOWS}


OF_TWO_WINDOWS = {
    "fsdp2": "update norms: {'0': ",
    "tensor_parallel": "path length: ",
    "pipeline": "path lengths: ",
}


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "arguments"), [("fsdp2", []), ("fsdp2", ["--compile"]), ("tensor_parallel", []), ("pipeline", [])]
)
def test_windows_of_both_ranks(name: str, arguments: list[str]) -> None:
    lines = [line for line in run(name, *arguments).splitlines() if line.startswith("global ")]
    assert len(lines) == 2
    assert all(line.startswith(f"global {OF_TWO_WINDOWS[name]}") for line in lines)


@pytest.mark.ci
def test_samples_of_ranks_that_hold_parts() -> None:
    lines = [line for line in run("tensor_parallel").splitlines() if line.startswith("  ")]
    assert len([line for line in lines if "norm of a sample's gradient: " in line]) == 2
    noise = [float(line.rpartition(" ")[2]) for line in lines if "gradient noise scale: " in line]
    assert len(noise) == 2
    assert all(value > 0 for value in noise)


@pytest.mark.ci
def test_ddp_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("ddp", str(folder))
    # What a run writes after its last checkpoint is made again by the next.
    half = run("ddp", str(folder))
    assert "scope of the last window: global" in half
    with lipcore.open_run(folder) as record:
        assert record.series("path_length.sum", "total").steps.tolist() == list(range(20, 121, 20))
        assert record.series("loss").steps.tolist() == list(range(1, 121))
        assert [start.kind for start in record.starts] == ["start", "resume"]


@pytest.mark.ci
def test_a_training_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    run("resume", str(tmp_path / "whole"), "60")
    run("resume", str(tmp_path / "parts"), "30")  # the last checkpoint is of step 25
    run("resume", str(tmp_path / "parts"), "60", ranks=3)
    found = []
    for name in ("whole", "parts"):
        with lipcore.open_run(tmp_path / name) as record:
            found.append(record.series("path_length.sum", "total"))
            assert record.series("loss").steps.tolist() == list(range(1, 61))
            assert record.windows[-1].scope == "global"
    one, other = found
    assert one.steps.tolist() == other.steps.tolist() == [20, 40, 60]
    assert other.values[:, 0].tolist() == pytest.approx(one.values[:, 0].tolist(), rel=1e-5)


@pytest.mark.ci
def test_pretraining_goes_on_with_other_ranks_and_compiled(tmp_path: Path) -> None:
    run("pretraining", str(tmp_path), "--steps", "30")  # the last checkpoint is of step 20
    said = run("pretraining", str(tmp_path), "--steps", "60", "--compile", ranks=3)
    assert "alarms: 0" in said
    with lipcore.open_run(tmp_path) as record:
        losses = record.series("loss")
        assert losses.steps.tolist() == list(range(1, 61))
        assert losses.values[-1, 0] < 0.2 * losses.values[0, 0]
        assert record.series("tokens").values[-1, 0] == 60 * 2 * 24 * 16
        assert [(start.kind, start.step) for start in record.starts] == [("start", 0), ("rewind", 20)]
        assert record.windows[-1].scope == "global"
