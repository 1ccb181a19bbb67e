"""The output that proofs begin at: what the model returns, a part of it, or what a module inside returns."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from lipcore.capture.training_pass import in_backward
from lipcore.models.named_output import OutputChoice, find_output
from lipcore.models.names import find_module
from lipcore.models.outputs import picked_output


class _Heard(threading.local):
    """The output that the module has returned last in this thread, while somebody listens."""

    listening = False
    last: Any = None


class ProofOutput:
    """The output of a model, by its choice; a hook on the module that is named brings it.

    Raises:
        ValueError: a plain chain has no module of this name.
    """

    def __init__(self, model: nn.Module, choice: OutputChoice | None) -> None:
        self._name, self._part = find_output(model, choice)
        self._module = find_module(model, self._name, "output")[1] if self._name else None
        self._heard = _Heard()
        self._handle: Any = None

    @property
    def is_named(self) -> bool:
        """True where it is not all that the model returns."""
        return self._module is not None or self._part is not None

    def attach(self) -> None:
        """Put the hook on the module, if one was named."""
        if self._module is not None and self._handle is None:
            self._handle = self._module.register_forward_hook(self)

    def detach(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._heard.last = None

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._heard.listening or in_backward() != -1:
            return
        self._heard.last = output

    def listen(self) -> None:
        """Keep what the module returns from here on, until the output is asked for."""
        self._heard.listening, self._heard.last = self._module is not None, None

    def of(self, returned: Any) -> Any:
        """Return the output that is meant, of a pass in which the model has returned this; None where the named module
        did not run, or is inside a compiled region. Raise ValueError where there is no such part."""
        if self._module is not None:
            found, self._heard.last, self._heard.listening = self._heard.last, None, False
            return found
        return returned if self._part is None else picked_output(returned, self._part)

    def __reduce__(self) -> tuple[type[_Nothing], tuple[()]]:
        return _Nothing, ()


class _Nothing:
    """The stand-in for the hook in a copied model."""

    def __call__(self, *_: Any) -> None:
        return None
