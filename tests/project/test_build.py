"""The compiled module as it was built: symbols, libraries, loading without torch, stubs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lipcore import _core

ROOT = Path(__file__).parents[2]
MODULE = Path(_core.__file__)
STUBS = ROOT / "lipcore" / "_core.pyi"


def output_of(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def isa_objects():
    """Objects of the per-ISA libraries in every build tree but a sanitizer's, which adds symbols of its own."""
    objects = []
    for tree in sorted((ROOT / "build").glob("*/CMakeCache.txt")):
        if not re.search(r"^LIPCORE_SANITIZE:\w+=\w", tree.read_text(), re.MULTILINE):
            objects += sorted(tree.parent.glob("CMakeFiles/lipcore_cpu_*.dir/**/*.o"))
    return objects


def test_isa_objects_export_one_symbol_each():
    """Any other one, an inline function say, could be linked to code of another instruction set and end in SIGILL."""
    objects = isa_objects()
    if not objects:
        pytest.skip("no build tree beside these tests (not an editable install?)")
    seen = set()
    for path in objects:
        isa = path.relative_to(ROOT / "build").parts[2].removeprefix("lipcore_cpu_").removesuffix(".dir")
        kernel = path.name.removesuffix(".cpp.o")
        symbols = [
            line.split() for line in output_of("nm", "-C", "-g", "--defined-only", str(path)).splitlines() if line
        ]
        assert [s[-1] for s in symbols] == [f"lipcore::{isa}::{kernel}"], f"{path}: {symbols}"
        seen.add((isa, kernel))
    kernels = {k for _, k in seen}
    assert {"sample_norms", "trajectory_step"} <= kernels
    assert seen == {(isa, k) for isa, _ in seen for k in kernels}


def test_the_module_exports_only_its_init_function():
    exported = [line.split()[-1] for line in output_of("nm", "-D", "-g", "--defined-only", str(MODULE)).splitlines()]
    ours = [name for name in exported if "lipcore" in name]
    assert "PyInit__core" in exported
    assert not ours, ours


def test_the_module_needs_no_torch_library():
    needed = re.findall(r"NEEDED.*\[(.+)\]", output_of("readelf", "-d", str(MODULE)))
    assert needed
    assert not [n for n in needed if re.search(r"torch|c10|gomp|iomp|cuda", n)], needed
    undefined = output_of("nm", "-D", "-C", "-u", str(MODULE))
    assert not re.search(r"\b(at|c10|torch)::", undefined)


ALONE = """
import importlib.util, sys, time
start = time.perf_counter()
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
milliseconds = 1e3 * (time.perf_counter() - start)
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "numpy", "lipcore")]
assert core.pool_size() == 1
d = core.Distribution()
d.observe(2.0)
assert d.quantile(0.5) == 2.0
for call in (lambda: core.sample_norms(object(), object()), lambda: core.check_storage(None, "x")):
    try:
        call()
    except TypeError as error:
        assert str(error) == "x: lipcore._core used without torch; import lipcore first", error
    else:
        raise AssertionError("accepted")
print(milliseconds)
"""


def test_the_module_loads_alone_and_fast():
    """Without torch, in a few milliseconds (50 here, for a busy machine); tensors are then refused in words."""
    command = [sys.executable, "-c", ALONE, str(MODULE)]
    times = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)]
    assert min(times) <= 50


# ---- stubs


def declarations(source):
    """name -> (kind, arguments, annotations) of everything a caller sees; formatting and order do not matter."""
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[f"{prefix}{node.name}"] = "class", "", ""
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                kind = ",".join(ast.unparse(d).rsplit(".")[-1] for d in node.decorator_list)
                arguments = [a for a in ast.walk(node.args) if isinstance(a, ast.arg)]
                annotations = [n and ast.unparse(n) for n in (*(a.annotation for a in arguments), node.returns)]
                for argument in arguments:
                    argument.annotation = None
                name = f"{prefix}{node.name}" + (".setter" if kind == "setter" else "")
                found[name] = kind, ast.unparse(node.args), annotations
            elif isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("__"):
                found[f"{prefix}{ast.unparse(node.target)}"] = "value", "", [ast.unparse(node.annotation)]

    visit(ast.parse(source).body, "")
    return found


def test_stubs_match_the_module(tmp_path):
    pytest.importorskip("pybind11_stubgen")
    command = [sys.executable, "-m", "pybind11_stubgen", "lipcore._core", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    generated = declarations((tmp_path / "lipcore" / "_core.pyi").read_text())
    committed = declarations(STUBS.read_text())
    how = "write them anew with `python -m pybind11_stubgen lipcore._core -o .` and keep the hot functions' annotations"
    assert not set(generated) ^ set(committed), how
    for name, (kind, arguments, types) in generated.items():
        assert committed[name][:2] == (kind, arguments), f"{name}: {how}"
        if any(types):  # plain C functions, the hot ones, carry none
            assert committed[name][2] == types, f"{name}: {how}"


def test_the_package_is_typed():
    assert (ROOT / "lipcore" / "py.typed").exists()
