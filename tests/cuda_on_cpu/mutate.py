"""Plants the faults of tests/mutants/kernel_faults.py in a copy of csrc, one by one: the GPU tests must see each.

An equivalent one must survive: where it does not, its reason is wrong. Exit status 1 when a verdict is not the expected
one, 2 when there is none: the tests fail without any fault, or a fault does not build.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked

from build import ROOT, build, ordinary_build

sys.path.insert(0, str(ROOT / "tests" / "mutants"))
from kernel_faults import KERNEL_MUTANTS, KernelMutant

_LONGEST = 300  # seconds of a fault's tests: one that hangs is seen


class Unjudged(Exception):
    """Why it is not known whether the tests see a fault."""


class Copy:
    """A copy of csrc with a build of its own."""

    def __init__(self, folder: Path, objects: Path) -> None:
        self._tree, self._build, self._objects = folder / "tree", folder / "build", objects
        wanted = {self._tree / file.relative_to(ROOT): file for file in (ROOT / "csrc").rglob("*") if file.is_file()}
        for old in self._tree.rglob("*"):
            if old.is_file() and old not in wanted:
                old.unlink()
        for new, file in wanted.items():  # what is the same keeps its time, and so its object
            if not new.exists() or new.read_bytes() != file.read_bytes():
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, new)

    def fails(self, mode: str, tests: tuple[str, ...]) -> bool:
        """Return whether one of these tests fails on what lies there now, or hangs."""
        try:
            module = build(mode, self._tree, self._objects, self._build)
        except RuntimeError as error:
            raise Unjudged(str(error)) from None
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "-m", "gpu", *(f"tests/{test}" for test in tests)]
        variables = {"LIPCORE_CUDA_ON_CPU": str(module)}
        output = self._build / "pytest.txt"
        if mode == "plain":
            status = forked.run(arguments, ROOT, variables, output, _LONGEST)
        else:
            status = _with_sanitizer(mode, arguments, variables, output)
        # A signal: the fault has ended the process.
        if status is not None and status >= 0 and status not in (0, 1, 66):  # 66: a sanitizer's
            raise Unjudged(f"pytest ended with {status}:\n{output.read_text()[-4000:]}")
        return status != 0

    def sees(self, mutant: KernelMutant) -> bool:
        """Return whether its tests fail with the fault in place."""
        file = self._tree / mutant.file
        good = file.read_text()
        file.write_text(mutant.applied(good))
        try:
            return self.fails(mutant.mode, mutant.tests)
        finally:
            file.write_text(good)


def _with_sanitizer(mode: str, arguments: list[str], variables: dict[str, str], output: Path) -> int | None:
    """Run pytest beside a sanitizer's library. Python is not instrumented, so that has to be loaded before: no fork."""
    names = [f"lib{mode}.so", "libstdc++.so"]
    compiler = os.environ.get("CXX", "c++")
    paths = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": f"suppressions={ROOT / 'tests' / 'tsan.supp'}"}
    environment = os.environ | variables | {"LD_PRELOAD": " ".join(paths)} | options
    command = [sys.executable, "-m", "pytest", *arguments]
    with output.open("w") as file:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=_LONGEST, check=False
            )
        except subprocess.TimeoutExpired:
            return None
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant small faults in the CUDA kernels; the tests must see each.")
    parser.add_argument("words", nargs="*", help="only faults with one of these in their name, file or mode")
    parser.add_argument("--objects", type=Path, help="a build tree of the core; by default the installed one's")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cuda_mutants", help="where the copy is kept")
    options = parser.parse_args()
    chosen = [
        mutant
        for mutant in KERNEL_MUTANTS
        if not options.words or any(word in f"{mutant.name} {mutant.file} {mutant.mode}" for word in options.words)
    ]
    copy = Copy(options.folder.resolve(), (options.objects or ordinary_build(ROOT)).resolve())
    worst = 0
    try:
        for mode in dict.fromkeys(mutant.mode for mutant in chosen):
            tests = dict.fromkeys(test for mutant in chosen if mutant.mode == mode for test in mutant.tests)
            if copy.fails(mode, tuple(tests)):
                raise Unjudged(f"the tests fail without any fault ({mode}): run `make test-cuda-on-cpu` first")
    except Unjudged as error:
        print(error, file=sys.stderr)
        return 2
    for mutant in chosen:
        begin = time.monotonic()
        try:
            seen = copy.sees(mutant)
            verdict = "caught" if seen else "equivalent" if mutant.equivalent else "SURVIVED"
            if seen and mutant.equivalent:
                verdict = "CAUGHT, not equivalent"
            worst = max(worst, int(verdict.isupper() or verdict.startswith("CAUGHT")))
        except Unjudged as error:
            verdict, worst = f"NOT JUDGED: {error}", 2
        print(f"{verdict:10} {time.monotonic() - begin:6.1f} s  {mutant.file}: {mutant.name}", flush=True)
    print(f"{len(chosen)} faults")
    return worst


if __name__ == "__main__":
    sys.exit(main())
