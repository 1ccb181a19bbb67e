"""Messages and their ways out: how each message is provoked, and what is done then as it says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import pytest


class Remedy(NamedTuple):
    """One message.

    Attributes:
        provoke: does what lipcore objects to.
        message: a regular expression that the message matches, with the words of the way out.
        apply: takes that way, and asserts that the number is there and right.
    """

    provoke: Callable[[], object]
    message: str
    apply: Callable[[], object]


def try_it(remedy: Remedy, *, warned: bool = False) -> None:
    """See the message, as an error or as a warning (beside a number that may be another one), then that its way out
    works without another one."""
    if warned:
        with pytest.warns(Warning, match=remedy.message), suppress(AssertionError):
            remedy.provoke()
    else:
        with warnings.catch_warnings(), pytest.raises(Exception, match=remedy.message):
            warnings.simplefilter("ignore")
            remedy.provoke()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        remedy.apply()
