"""The examples run as their first lines say, on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lipcore

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(name: str, *arguments: str) -> str:
    """Return what an example prints, of two ranks."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*TORCHRUN, f"examples/{name}.py", *arguments],
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
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {"ddp", *OF_TWO_WINDOWS}


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
