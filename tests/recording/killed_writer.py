"""A process that writes steps into a record for ever, and says which it has flushed; the tests kill it."""

from __future__ import annotations

import sys

import numpy as np

from lipcore.recording import RunRecord

NAMES, LEVELS = ["a.weight", "a", "b", "total"], ["tensor", "group", "group", "total"]

path, step = sys.argv[1], int(sys.argv[2])
record = RunRecord(path)
record.begin(step)
print("ready", flush=True)
while True:
    count = 1 + step % 67
    values = np.arange(step + 1, step + count + 1)[:, None] + np.arange(len(NAMES)) / 8
    record.add_steps(step + 1, {"update_norm": values}, NAMES, LEVELS)  # type: ignore[arg-type]
    step += count
    record.flush()
    print(step, flush=True)
