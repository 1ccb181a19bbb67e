"""What package indexes show of the project agrees with what lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lipcore

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def file() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def project(file: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = file["project"]
    return found


def test_the_files_it_names_are_there(project: dict[str, Any]) -> None:
    assert (ROOT / project["readme"]).read_text(encoding="utf-8").startswith("# lipcore")
    for name in project["license-files"]:
        assert "Apache License" in (ROOT / name).read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert project["version"] == lipcore.__version__


def test_classifiers_agree_with_the_project(project: dict[str, Any]) -> None:
    classifiers = project["classifiers"]
    # Build tools refuse a licence named twice: by an expression and by a classifier.
    assert not any(classifier.startswith("License ::") for classifier in classifiers)
    versions = [c.rsplit(" ", 1)[1] for c in classifiers if c.startswith("Programming Language :: Python :: 3.")]
    assert versions == sorted(versions, key=lambda version: int(version.split(".")[1]))
    assert project["requires-python"] == f">={versions[0]}"
    assert ("Typing :: Typed" in classifiers) == Path(lipcore.__file__).with_name("py.typed").exists()
    assert ("Environment :: GPU :: NVIDIA CUDA" in classifiers) == any((ROOT / "csrc").rglob("*.cu"))


def test_the_description_is_a_line(project: dict[str, Any]) -> None:
    assert len(project["description"]) <= 120
    assert len(set(project["keywords"])) == len(project["keywords"])


def test_wheels_are_built_for_every_python_that_is_named(file: dict[str, Any]) -> None:
    settings = file["tool"]["cibuildwheel"]
    named = [c.rsplit(" ", 1)[1] for c in file["project"]["classifiers"] if ":: Python :: 3." in c]
    assert settings["build"].split() == [f"cp{version.replace('.', '')}-*" for version in named]
    assert settings["archs"] == ["x86_64", "aarch64"]
    assert {settings[f"manylinux-{arch}-image"] for arch in settings["archs"]} == {"manylinux_2_28"}
    (torch,) = (each for each in file["project"]["dependencies"] if each.startswith("torch"))
    assert torch in settings["test-requires"]  # a bare user's
    assert settings["environment"] == {"LIPCORE_CUDA": "OFF"}
