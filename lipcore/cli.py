"""The command line: ``lipcore demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lipcore import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    from lipcore import demo

    try:
        demo.run(options.out, seeds=options.seeds, quick=options.quick, force=options.force)
    except demo.DemoError as error:
        print(f"lipcore demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lipcore demo: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lipcore", description="Measure what a neural network is learning while it trains."
    )
    parser.add_argument("--version", action="version", version=f"lipcore {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    about = "Train small networks on harder and harder tasks, measured by lipcore; draw a figure and print a table."
    demo = commands.add_parser("demo", help=about, description=about)
    demo.add_argument(
        *("--seeds",),
        type=_count,
        metavar="N",
        help="runs per task and difficulty (default: 5 sinusoids, 3 digits; --quick: 2)",
    )
    demo.add_argument(
        *("--out",),
        type=Path,
        default=Path("lipcore-demo"),
        metavar="DIR",
        help="folder for figure.png and metrics.json (default: %(default)s)",
    )
    demo.add_argument("--quick", action="store_true", help="a few epochs, to see that it works; too few for the result")
    demo.add_argument(
        "--force", action="store_true", help="replace figure.png and metrics.json in a folder that exists"
    )
    return parser


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return number
