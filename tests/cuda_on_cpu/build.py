"""Builds the core over the emulator in one mode and prints the module's path: build.py plain, asan or tsan."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODES = ("plain", "asan", "tsan")


def ordinary_build(root: Path) -> Path:
    """Return the build tree of the installed core, which an editable install leaves below build/."""
    for cache in sorted((root / "build").glob("*/CMakeCache.txt")):
        text = cache.read_text()
        python = re.search(r"^(?:_?Python_EXECUTABLE)(?::\w+)?=(.+)$", text, re.MULTILINE)
        sanitized = re.search(r"^LIPCORE_SANITIZE:\w+=\w", text, re.MULTILINE)
        if python and not sanitized and Path(python[1]).absolute() == Path(sys.executable).absolute():
            return cache.parent
    raise SystemExit(f"no build of the core for {sys.executable} below {root / 'build'}; run `make test`")


def build(mode: str, source: Path, objects: Path, folder: Path) -> Path:
    """Build the core of ``source`` in this mode; the rest comes from the build tree ``objects``. Return the module."""
    settings = {
        "LIPCORE_SOURCE": source,
        "LIPCORE_OBJECTS": objects,
        "PYTHON_INCLUDE": sysconfig.get_path("include"),
    }
    configure = ["cmake", "-S", HERE, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())]
    for command in (configure, ["cmake", "--build", folder, "--target", f"core_{mode}"]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
    return folder / mode / "core.so"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build lipcore's core over the CUDA emulator.")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--source", type=Path, default=ROOT, help="the tree whose csrc is built")
    parser.add_argument(
        "--objects", type=Path, help="a build tree of the ordinary core; by default the installed one's"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cuda_on_cpu", help="where it is built")
    options = parser.parse_args()
    objects = options.objects or ordinary_build(ROOT)
    try:
        print(build(options.mode, options.source.resolve(), objects.resolve(), options.folder.resolve()))
    except RuntimeError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
