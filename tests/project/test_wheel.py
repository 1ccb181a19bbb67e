"""The wheel that users install: what is in it, what it needs, and that it works where there is no compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ci


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy without git, and with what stands beside the sources."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("no sources beside these tests")
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    (source / "bench").mkdir(parents=True)
    (source / "bench" / "conftest.py").touch()
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("csrc", "lipcore"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".so"):
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    make = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", make, folder, cwd=source)
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist, built with the tools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"LIPCORE_CUDA": "OFF", "PATH": tools}
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, sdist)
    run(*pip, env=environment)
    (found,) = folder.glob("*.whl")
    return found


def test_an_sdist_has_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "PKG-INFO", "lipcore/py.typed"} <= names
    assert any(name.startswith("csrc/") and name.endswith(".cpp") for name in names)
    assert not [name for name in names if name.startswith("bench") or name.endswith((".so", ".pyc"))]
    assert sdist.stat().st_size < 2_000_000


def test_it_is_small_and_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    modules = [name for name in names if name.endswith(".so")]
    assert len(modules) == 1
    assert {"lipcore/py.typed", "lipcore/_core.pyi", "lipcore/recording/run.py"} <= set(names)
    assert {"lipcore/report/page.css", "lipcore/report/page.js"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "bench", "csrc"))]
    assert wheel.stat().st_size < 2_100_000


def test_it_needs_nothing_that_a_system_may_lack(wheel: Path, tmp_path: Path) -> None:
    """What auditwheel looks at: which libraries, and of which version of the C library."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".so"))
        module = Path(file.extract(name, tmp_path))
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", module))
    allowed = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0", "libdl.so.2"}
    assert set(needed) <= allowed | {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert "RUNPATH" not in run("readelf", "-d", module)


@pytest.fixture(scope="module")
def manylinux(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with the tag that auditwheel gives it."""
    pytest.importorskip("auditwheel", reason="needs the extra `wheel` (make test-ci)")
    folder = tmp_path_factory.mktemp("manylinux")
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    repair = (sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, wheel)
    run(*repair, env=os.environ | {"PATH": tools})
    (found,) = folder.glob("*.whl")
    return found


def test_auditwheel_adds_no_library(wheel: Path, manylinux: Path) -> None:
    assert "manylinux_2_" in manylinux.name
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(manylinux) as after:
        added = set(after.namelist()) - set(before.namelist())
        assert not [name for name in added if not name.endswith("/")]


def test_it_works_without_a_compiler(manylinux: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=True)
    python = bare / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "-q", manylinux)
    # torch and numpy are those of this environment: only lipcore is looked at.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip()
    for library in (torch, numpy):
        where = Path(str(library.__file__)).parents[1]
    assert str(where) == sysconfig.get_path("platlib") or where.is_dir()
    (Path(site) / "others.pth").write_text(f"import sys; sys.path.append({str(where)!r})\n", encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert example is not None
    code = "import lipcore; print(lipcore.__file__)\n" + example.group(1)
    printed = run(python, "-c", code, cwd=tmp_path, env={"PATH": "/nonexistent", "HOME": str(tmp_path)})
    assert printed.startswith(str(site))
    assert "trajectory/update_norm.max/total" in printed
