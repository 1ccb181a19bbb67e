"""Guard against values that depend on x and leave torch: no recorded operation takes them to numpy, and nobody sees
what they decide."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from lipcore.regions.recorder import Recorder

_WAYS = frozenset({"numpy", "tolist", "__array__", "__dlpack__"})


class OutsideTorch(TorchFunctionMode):
    """Context in which values that depend on x may not leave torch; ValueError where one does."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        way = getattr(func, "__name__", "")
        if way in _WAYS and self._recorder.followed.among(args):
            raise ValueError(self._recorder.refused_reading(f"{way}()"))
        return func(*args, **(kwargs or {}))
