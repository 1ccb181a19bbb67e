"""What the scripts of this folder have in common on their command lines."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
STATE = Path(__file__).parents[2] / "build" / "paper"


def at_least(smallest: int) -> Callable[[str], int]:
    """A type for argparse."""

    def integer(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = smallest - 1
        if number < smallest:
            raise argparse.ArgumentTypeError(f"expected an integer >= {smallest}, got {text!r}")
        return number

    return integer


def finite(text: str) -> float:
    """A type for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return number


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """With --out and --state."""
    parser = argparse.ArgumentParser(description=(documentation or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help=f"default {RESULTS} for the full size (all other defaults), else a folder in {STATE}"
    )
    parser.add_argument("--state", type=Path, default=STATE)
    return parser


def full_size(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> bool:
    """Whether these options are the defaults."""
    return all(getattr(options, name) == parser.get_default(name) for name in names)


def folder_of(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> Path:
    """Where results go. Those of the full size are committed, so anything smaller goes elsewhere unless --out says
    so."""
    if options.out is not None:
        return Path(options.out)
    if full_size(parser, options, *names):
        return RESULTS
    return STATE / "-".join(["reduced", *(f"{name}-{getattr(options, name):g}" for name in names)])
