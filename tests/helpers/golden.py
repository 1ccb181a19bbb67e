"""Curves of Task 1 recorded by an independent implementation (data/task1.json), and how near others must come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "task1.json").read_text())
_TIGHT = ("traj_grad", "train", "lam_avg_end")
_LATE = {"cum_traj_grad_over_N": 0.02, "traj_grad": 0.05, "lam_step_sum": 0.05, "lam_avg_end": 0.05, "var": 0.3}


def band(name: str, epoch: int) -> float | None:
    """Relative error that a correct float32 run stays within; None where rounding has been amplified too far to say."""
    if name == "nzero":
        return 0.0 if epoch <= 100 else None
    if epoch <= 10:
        return 1e-6 if name in _TIGHT else 1e-5
    if epoch == 100:
        return 1e-5 if name == "traj_grad" else 1e-4
    return _LATE.get(name) if epoch == 3000 else None


def compare(curves: dict[str, np.ndarray], frequencies: list[float], seeds: list[int]) -> dict[str, Any]:
    """{"checked": count, "wrong": [...], "largest": {epoch: share of the band}}; curves [F, S, epochs]."""
    curves = curves | {"cum_traj_grad_over_N": np.cumsum(curves["traj_grad"], axis=2) / 100}
    checked, wrong, largest = 0, [], {}
    for name, recorded in RECORDED.items():
        if name not in curves:
            continue
        for k, epoch in enumerate(RECORDED["epochs"]):
            allowed = band(name, epoch)
            if allowed is None or epoch > curves[name].shape[2]:
                continue
            for f in set(frequencies) & set(RECORDED["freqs"]):
                for s in set(seeds) & set(RECORDED["seeds"]):
                    expected = recorded[RECORDED["freqs"].index(f)][RECORDED["seeds"].index(s)][k]
                    found = float(curves[name][frequencies.index(f), seeds.index(s), epoch - 1])
                    error = abs(found - expected)
                    checked += 1
                    if not error <= allowed * abs(expected):
                        wrong.append(f"{name}, frequency {f}, seed {s}, epoch {epoch}: {found:.9g}, not {expected:.9g}")
                    elif expected and allowed:
                        key = f"epoch {epoch}"
                        largest[key] = max(largest.get(key, 0.0), error / abs(expected) / allowed)
    return {"checked": checked, "wrong": wrong, "largest_share_of_band": largest}
