"""``make mutants``: plants the faults of faults.py and alarm_faults.py in a copy of the tree, one by one, and runs the
tests that must see.

The copy and a build of the core of its own are kept under build/mutants, so that a second run builds what a fault
touches and nothing else. Exit status 1 when a fault survives, 2 when one cannot be judged: its text is not there once,
the tests that are to see it fail without it, or what it makes does not build.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

from alarm_faults import ALARM_MUTANTS
from faults import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("lipcore", "csrc", "tests", "docs", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")
MODULE = "_core" + sysconfig.get_config_var("EXT_SUFFIX")
_LONGEST = 600  # seconds of a fault's tests: one that hangs is seen

# An editable install puts a finder before all paths, which would import the package from the working tree.
PYTEST = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
sys.path.insert(0, sys.argv[1])
import lipcore, pytest
if not all(module.__file__.startswith(sys.argv[1]) for module in (lipcore, lipcore._core)):
    print(lipcore.__file__, "is not in the copy")
    sys.exit(3)
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


class Unjudged(Exception):
    """Why it is not known whether the tests see a fault."""


class Copy:
    """A copy of the tree with a core of its own."""

    def __init__(self, folder: Path) -> None:
        self.tree, self._build = folder / "tree", folder / "core"
        self._synchronise()
        self._plain: bytes | None = None

    def _synchronise(self) -> None:
        """Every file as it is in the working tree; one that is the same already keeps its time, and so its objects."""
        wanted = {}
        for part in PARTS:
            whole = ROOT / part
            for file in [whole] if whole.is_file() else whole.rglob("*"):
                if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so":
                    wanted[self.tree / file.relative_to(ROOT)] = file
        for old in self.tree.rglob("*"):
            if old.is_file() and old not in wanted and old.suffix != ".so":
                old.unlink()
        for new, file in wanted.items():
            content = file.read_bytes()
            if not new.exists() or new.read_bytes() != content:
                new.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes(content)

    def build(self) -> None:
        """Build the core and put it into the copy."""
        settings = ["-DCMAKE_BUILD_TYPE=Release", "-DLIPCORE_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
        pybind11 = _run([sys.executable, "-m", "pybind11", "--cmakedir"], self.tree).strip()
        _run(["cmake", "-S", ".", "-B", self._build, "-G", "Ninja", *settings, f"-Dpybind11_DIR={pybind11}"], self.tree)
        _run(["cmake", "--build", self._build], self.tree)
        built = next(self._build.rglob(MODULE)).read_bytes()
        self._plain = self._plain or built
        self._install(built)

    def take_core(self) -> None:
        """Use the working tree's core, which has no fault."""
        import lipcore._core

        self._plain = Path(lipcore._core.__file__).read_bytes()
        self._install(self._plain)

    def _install(self, core: bytes) -> None:
        target = self.tree / "lipcore" / MODULE
        target.unlink(missing_ok=True)  # a file that is mapped must not be written to
        target.write_bytes(core)

    def test(self, tests: Iterable[str]) -> int:
        """pytest's exit status; 1 for tests that hang."""
        arguments = [sys.executable, "-c", PYTEST, self.tree, *(f"tests/{test}" for test in tests)]
        environment = os.environ | {"PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                arguments, cwd=self.tree, env=environment, capture_output=True, text=True, timeout=_LONGEST, check=False
            )
        except subprocess.TimeoutExpired:
            return 1
        if done.returncode not in (0, 1):
            raise Unjudged(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode

    def survives(self, mutant: Mutant) -> bool:
        """Whether its tests pass with the fault in place."""
        file = self.tree / mutant.file
        good = file.read_text()
        file.write_text(mutant.applied(good))
        try:
            if mutant.compiled:
                self.build()
            return self.test(mutant.tests) == 0
        finally:
            file.write_text(good)
            if mutant.compiled and self._plain is not None:
                self._install(self._plain)


def _run(command: list[object], folder: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unjudged(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant small faults one by one; the tests must see each.")
    parser.add_argument("words", nargs="*", help="only faults with one of these in their name or file")
    parser.add_argument("--python", action="store_true", help="only those that need no build")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants", help="where the copy is kept")
    options = parser.parse_args()
    chosen = [
        mutant
        for mutant in (*MUTANTS, *ALARM_MUTANTS)
        if (not options.words or any(word in f"{mutant.name} {mutant.file}" for word in options.words))
        and not (options.python and mutant.compiled)
    ]
    try:
        for mutant in chosen:
            mutant.applied((ROOT / mutant.file).read_text())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    copy = Copy(options.folder.resolve())
    worst = 0
    try:
        copy.build() if any(mutant.compiled for mutant in chosen) else copy.take_core()
        if copy.test(dict.fromkeys(test for mutant in chosen for test in mutant.tests)):
            raise Unjudged("the tests fail without any fault: run them first")
    except Unjudged as error:
        print(error, file=sys.stderr)
        return 2
    for mutant in chosen:
        begin = time.monotonic()
        try:
            survives = copy.survives(mutant)
            verdict, worst = ("SURVIVED", max(worst, 1)) if survives else ("caught", worst)
        except Unjudged as error:
            verdict, worst = f"NOT JUDGED: {error}", 2
        print(f"{verdict:9} {time.monotonic() - begin:6.1f} s  {mutant.file}: {mutant.name}", flush=True)
    print(f"{len(chosen)} faults")
    return worst


if __name__ == "__main__":
    sys.exit(main())
