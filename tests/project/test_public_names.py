"""The names that a user of lipcore sees."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import lipcore


def test_only_public_names_are_listed() -> None:
    packages = {"alarms", "metric", "regions", "theory"}
    assert set(dir(lipcore)) == {*lipcore.__all__, *packages, "__version__"}
    assert all(isinstance(import_module(f"lipcore.{name}"), ModuleType) for name in packages)
    for name in lipcore.__all__:
        assert getattr(lipcore, name) is not None


def test_no_module_from_elsewhere_is_a_name_of_lipcore() -> None:
    modules = {name: value for name, value in vars(lipcore).items() if isinstance(value, ModuleType)}
    assert not {name for name, value in modules.items() if not value.__name__.startswith("lipcore")}
