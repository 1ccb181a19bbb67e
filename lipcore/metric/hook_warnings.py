"""Warnings from inside the user's forward pass, backward pass or step."""

from __future__ import annotations

import warnings


def warn_in_hook(message: str, category: type[Warning], stacklevel: int = 1) -> Warning | None:
    """Warn as warnings.warn() does, but raise nothing: a warning that the user's filters make an error of (``-W
    error``) is returned, to be kept and raised by the user's next call."""
    try:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
    except Warning as error:
        return error
    return None
