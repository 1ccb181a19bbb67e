"""The command line: ``lipcore demo``, ``doctor``, ``export``, ``report``, ``postmortem``, ``compare``, ``top``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lipcore import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    run: dict[str, Callable[[argparse.Namespace], int]] = {
        "demo": _demo,
        "doctor": _doctor,
        "export": _export,
        "report": _report,
        "postmortem": _postmortem,
        "compare": _compare,
        "top": _top,
    }
    try:
        status = run[options.command](options)
        sys.stdout.flush()  # here, not at exit, where nobody can be told
    except BrokenPipeError:  # who reads it has had enough: `lipcore doctor | head`
        # What is still in the buffer would be tried once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _demo(options: argparse.Namespace) -> int:
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


def _doctor(options: argparse.Namespace) -> int:
    from lipcore.cli.doctor import findings

    found = findings()
    width = max(map(len, found))
    for name, text in found.items():
        print(f"{name:<{width}}  {text}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from lipcore.recording import RecordError, open_run
    from lipcore.recording.export import export_csv, export_parquet

    try:
        with open_run(options.run, options.rank) as run:
            if options.csv is not None:
                path, rows = options.csv, export_csv(run, options.csv)
            else:
                path, rows = options.parquet, export_parquet(run, options.parquet)
    except (RecordError, ValueError, ImportError) as error:
        print(f"lipcore export: error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {rows} rows")
    return 0


def _report(options: argparse.Namespace) -> int:
    from lipcore.recording import RecordError, open_run
    from lipcore.report.follow import follow
    from lipcore.report.output import ReportError

    try:
        with open_run(options.run, options.rank) as run:
            own = "report" if run.path.stem == "rank0" else f"report-{run.path.stem}"
            path = options.output or run.path.with_name(f"{own}.html")
            if options.follow is None:
                run.report().save(path)
        if options.follow is not None:
            print(f"{path}: written every {options.follow:g} s while the run goes on; Ctrl-C ends it", flush=True)
            if not follow(lambda: open_run(options.run, options.rank), path, options.follow):
                return 130
    except (RecordError, ReportError, ValueError, ImportError) as error:
        print(f"lipcore report: error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def _postmortem(options: argparse.Namespace) -> int:
    from lipcore.recording import RecordError, open_run
    from lipcore.report.output import ReportError, write_whole

    try:
        follow = options.rank is None and options.run.is_dir()
        with open_run(options.run, options.rank or 0) as run:
            if options.output is None:
                print(run.postmortem(options.step, follow=follow))
            else:
                from lipcore.report.postmortem.page import postmortem_page

                print(write_whole(postmortem_page(run, options.step, follow=follow), options.output))
    except (RecordError, ReportError, ValueError, ImportError) as error:
        print(f"lipcore postmortem: error: {error}", file=sys.stderr)
        return 2
    return 0


def _compare(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from lipcore.recording import RecordError, open_run
    from lipcore.report.compare.page import compare_page
    from lipcore.report.output import ReportError, write_whole

    try:
        with ExitStack() as opened:
            runs = [opened.enter_context(open_run(run, options.rank)) for run in [options.run, *options.others]]
            path = write_whole(compare_page(runs, options.by), options.output)
    except (RecordError, ReportError, ValueError, ImportError) as error:
        print(f"lipcore compare: error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def _top(options: argparse.Namespace) -> int:
    from lipcore.recording import RecordError

    try:
        from lipcore.cli.top.screen import top
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        print('lipcore top: error: it needs rich; run: pip install "lipcore[top]"', file=sys.stderr)
        return 2
    try:
        top(options.run, options.rank, options.every)
    except (RecordError, ValueError) as error:
        print(f"lipcore top: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lipcore", description="Measure what a neural network is learning while it trains."
    )
    parser.add_argument("--version", action="version", version=f"lipcore {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
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
        help="folder for figure.png, metrics.json and runs/ (default: %(default)s)",
    )
    demo.add_argument("--quick", action="store_true", help="a few epochs, to see that it works; too few for the result")
    demo.add_argument(
        "--force", action="store_true", help="replace figure.png, metrics.json and the runs in a folder that exists"
    )
    about = "Print versions, instruction set, CUDA, threads, and which extras are there."
    commands.add_parser("doctor", help=about, description=about)
    about = "Write all numbers of a recorded run into a table: quantity, place, step, value, least and greatest value."
    export = commands.add_parser("export", help=about, description=about)
    export.add_argument("run", type=Path, metavar="RUN", help="the run's folder, or the file of one rank")
    export.add_argument("--rank", type=int, default=0, metavar="N", help="whose file, of a folder (default: 0)")
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--csv", type=Path, metavar="FILE", help="as comma-separated values")
    form.add_argument("--parquet", type=Path, metavar="FILE", help="as Parquet; needs pyarrow")
    about = "Write one page about a recorded run, which a browser opens without a network; needs the extra `report`."
    report = commands.add_parser("report", help=about, description=about)
    report.add_argument("run", type=Path, metavar="RUN", help="the run's folder, or the file of one rank")
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (default: report.html in RUN)")
    report.add_argument(
        *("--follow",),
        type=_seconds,
        metavar="SECONDS",
        help="write it anew whenever the run has gone on, until Ctrl-C; the page loads itself anew",
    )
    report.add_argument("--rank", type=int, default=0, metavar="N", help="whose file, of a folder (default: 0)")
    about = "Say what went wrong in a step: what moved first, how it spread, which samples stand out, what to check."
    postmortem = commands.add_parser("postmortem", help=about, description=about)
    postmortem.add_argument("run", type=Path, metavar="RUN", help="the run's folder, or the file of one rank")
    postmortem.add_argument("--step", type=int, metavar="N", help="which (default: that of the worst alarm)")
    postmortem.add_argument(
        *("-o", "--output"),
        type=Path,
        metavar="FILE",
        help="write it as a page, which needs the extra `report`, in place of words in the terminal",
    )
    postmortem.add_argument(
        "--rank", type=int, metavar="N", help="whose file, of a folder (default: that of the rank with the worst alarm)"
    )
    about = "Write one page that compares recorded runs: where they part, their settings, their curves at equal loss."
    compare = commands.add_parser("compare", help=about, description=about)
    compare.add_argument("run", type=Path, metavar="RUN", help="what the others are compared with")
    compare.add_argument("others", type=Path, nargs="+", metavar="OTHER", help="the other runs")
    compare.add_argument(
        *("-o", "--output"),
        type=Path,
        default=Path("compare.html"),
        metavar="FILE",
        help="the page (default: %(default)s)",
    )
    compare.add_argument(
        "--by", metavar="AXIS", help="step, loss, or a logged name that only grows (default: step, and loss for theory)"
    )
    compare.add_argument("--rank", type=int, default=0, metavar="N", help="whose file, of folders (default: 0)")
    about = "Show a run in the terminal as it goes on: loss, norms, the hottest layers, alarms; needs the extra `top`."
    top = commands.add_parser("top", help=about, description=about)
    top.add_argument("run", type=Path, metavar="RUN", help="the run's folder, or the file of one rank")
    top.add_argument(
        *("--every",),
        type=_seconds,
        default=1.0,
        metavar="SECONDS",
        help="between two looks at the record (default: %(default)s)",
    )
    top.add_argument("--rank", type=int, default=0, metavar="N", help="whose file, of a folder (default: 0)")
    return parser


def _seconds(text: str) -> float:
    from lipcore.report.follow import checked_seconds

    try:
        return checked_seconds(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of seconds >= 0.1, got {text!r}") from None


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return number
