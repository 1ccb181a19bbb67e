"""Callbacks by which trainers of other libraries record a run; each needs its library, and is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lipcore.integrations.lightning import LightningCallback
    from lipcore.integrations.transformers import HFCallback

__all__ = ["HFCallback", "LightningCallback"]


def __getattr__(name: str) -> Any:
    if name == "HFCallback":
        from lipcore.integrations.transformers import HFCallback

        return HFCallback
    if name == "LightningCallback":
        from lipcore.integrations.lightning import LightningCallback

        return LightningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
