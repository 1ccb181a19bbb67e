"""Trains three small models with and without faults, and writes what each alarm found: python bench/spikes

python bench/spikes                record the final trainings, evaluate them with the frozen thresholds, draw the figure
python bench/spikes --evaluate     the same from trainings that were recorded before
python bench/spikes --calibrate    choose the thresholds anew, from trainings of other seeds
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a process has one core
BENCH = Path(__file__).parents[1]
sys.path[0] = str(BENCH)  # this folder is the package `spikes` there


def main(arguments: list[str] | None = None) -> None:
    """Run the suite."""
    from report import machine

    from spikes import figure, suite

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true", help="choose the thresholds anew")
    parser.add_argument("--evaluate", action="store_true", help="from trainings that were recorded before")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=BENCH.parent / "build" / "spikes", help="of recorded trainings")
    options = parser.parse_args(arguments)
    suite.prepare()
    size = suite.Size()
    work = suite.jobs(size, calibration=options.calibrate)
    if not options.evaluate:
        for job in work:
            suite.path_of(job, options.folder).unlink(missing_ok=True)
    suite.record_all(work, options.folder, options.processes)
    if options.calibrate:
        suite.calibrate(size, options.folder, suite.THRESHOLDS)
        print(suite.THRESHOLDS)
        return
    limits = json.loads(suite.THRESHOLDS.read_text(encoding="utf-8"))
    found = suite.results(size, options.folder, limits, machine())
    suite.write(suite.RESULTS, found)
    figure.draw(found, suite.FIGURE)
    print(suite.RESULTS, suite.FIGURE)


if __name__ == "__main__":
    main()
