"""Writes the tables of docs/evidence.md from the committed results: python bench/evidence_page.py"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
PAGE = BENCH.parent / "docs" / "evidence.md"
SOURCES = {
    "spikes": BENCH / "results" / "spikes.json",
    "evidence": BENCH / "results" / "evidence.json",
    "models": BENCH / "results" / "models.json",
    "figure6": BENCH / "paper" / "results" / "figure6.json",
    "studies": BENCH / "paper" / "results" / "studies.json",
    "trainscope": BENCH / "results" / "trainscope.json",
    "speed": BENCH / "results" / "cpu-intel-r-xeon-r-processor-family-6-2-cores.json",
}

Results = Mapping[str, Any]
_SHIPPED, _PRACTICE = 'alarms="default"', "6 sigma of 128 steps, loss and gradient norm, as shipped"
_LOWER, _LIGHT = "Alarms(least_multiplier=0.5)", "warning light"
_JOINT, _GLOBAL = "loss + update norm + gradient norm per group", "loss + global gradient norm"
_BY_FAULT = (_SHIPPED, _LOWER, _JOINT, _GLOBAL, _PRACTICE, _LIGHT)
_LEADS = (
    "activation kurtosis",
    "loss",
    "CUSUM of the loss",
    "global gradient norm",
    "gradient norm per group",
    "update norm per group",
    "RMS_t per parameter",
    "normalized_update_rms",
    _LIGHT,
    _SHIPPED,
    _LOWER,
)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(detector: str) -> str:
    return f"`{detector}`" if detector in (_SHIPPED, _LOWER) else detector


def detectors(all_results: Results) -> str:
    """Faults found by every detector, its false alarms, and the layers it names."""
    found = all_results["spikes"]
    tasks = list(found["models"])
    rows = []
    for name, total in sorted(found["totals"].items(), key=lambda item: -item[1]["found"] / item[1]["runs"]):
        cells = [_of_model(found, task, name) for task in tasks]
        share = 100 * total["found"] / total["runs"]
        cells.append(f"{share:.0f} % ({100 * total['low']:.0f} to {100 * total['high']:.0f})")
        quiet = [found["false_alarms"][task][name] for task in tasks if name in found["false_alarms"][task]]
        cells.append(", ".join(f"{row['per_1000']:.1f}" for row in quiet))
        named = total["named"]
        cells.append(f"{total['right']} of {named} (>= {100 * total['right_low']:.0f} %)" if named else "")
        rows.append([_name(name), *cells])
    heads = ["alarm", *tasks, "all, 95 %", f"false alarms per 1000 steps: {', '.join(tasks)}", "layer named right"]
    return table(heads, rows)


def _of_model(found: Results, task: str, name: str) -> str:
    rows = [by_detector.get(name) for fault, by_detector in found["faults"][task].items() if "control" not in fault]
    there = [row for row in rows if row is not None]
    return f"{sum(row['found'] for row in there)} of {sum(row['runs'] for row in there)}" if there else "no AdamW"


def by_fault(all_results: Results) -> str:
    """Each kind of fault, found by some detectors in all models."""
    found = all_results["spikes"]
    rows = []
    for fault in next(iter(found["faults"].values())):
        cells = []
        for name in _BY_FAULT:
            each = [faults[fault][name] for faults in found["faults"].values() if name in faults[fault]]
            cells.append(f"{sum(row['found'] for row in each)} of {sum(row['runs'] for row in each)}")
        rows.append([fault, *cells])
    return table(["fault", *map(_name, _BY_FAULT)], rows)


def samples(all_results: Results) -> str:
    """Which score puts the sample of a fault first of its batch."""
    rows = []
    for task, by_kind in all_results["spikes"]["samples"].items():
        for fault, row in by_kind.items():
            cells = [f"{row[key]} of {row['runs']}" for key in ("sample_loss", "sample_norm")]
            rows.append([task, fault, *cells])
    return table(["model", "fault", "has the greatest loss of 16", "has the greatest gradient norm of 16"], rows)


def _range(numbers: list[float]) -> str:
    if not numbers:
        return "none"
    low, high = min(numbers), max(numbers)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def published_rule(all_results: Results) -> str:
    """The rule by which a lead of kurtosis was published, on our models and on trainings without a ramp."""
    rows = []
    for task, found in all_results["spikes"]["explosions"].items():
        for name, row in found["published_rule"].items():
            fired = f"{row['controls_fired']} of {row['controls']}"
            lead = f"{len(row['leads'])} of {len(found['explosions'])}"
            rows.append([task, name, lead, _range(row["leads"]), fired, _range(row["control_leads"])])
    heads = ("model", "number", "fired before", "steps of lead", "fired without a ramp", "the lead it would have had")
    return table(heads, rows)


def leads(all_results: Results) -> str:
    """Steps of lead before an explosion at equal false alarms."""
    explosions = all_results["spikes"]["explosions"]
    rows = []
    for name in _LEADS:
        cells = []
        for found in explosions.values():
            row = found["detectors"].get(name)
            if row is None:
                cells.append("no AdamW")
                continue
            median = f", {statistics.median(row['leads']):.0f} steps" if row["leads"] else ""
            cells.append(f"{len(row['leads'])} of {len(found['explosions'])}{median}")
        rows.append([_name(name), *cells])
    return table(["alarm", *explosions], rows)


def hot(all_results: Results) -> str:
    """How often an alarm was up in the 10 steps before a spike, and in quiet stretches."""
    found = all_results["spikes"]["spikes"]
    rows = []
    for name in (
        _LIGHT,
        "normalized_update_rms",
        "activation kurtosis",
        "global gradient norm",
        "update norm per group",
        _SHIPPED,
        _LOWER,
    ):
        each = [by_task["detectors"][name] for by_task in found.values() if name in by_task["detectors"]]
        before, spikes, quiet, stretches = (
            sum(row[key] for row in each) for key in ("before", "spikes", "quiet", "quiet_stretches")
        )
        rows.append([_name(name), f"{before} of {spikes}", f"{quiet} of {stretches}"])
    return table(["alarm", "up in the 10 steps before a spike of the loss", "up in quiet stretches of 10 steps"], rows)


def labels(all_results: Results) -> str:
    """Area under the curve for wrong labels."""
    found = all_results["evidence"]["wrong_labels"]
    rows = [[name, *(_spread(row[score]) for score in ("loss", "gradient norm"))] for name, row in found.items()]
    return table(["a tenth of the labels wrong", "AUC of the mean loss", "AUC of the mean gradient norm"], rows)


def other_inputs(all_results: Results) -> str:
    """Area under the curve for inputs of another kind."""
    found = all_results["evidence"]["other_inputs"]
    kinds = list(dict.fromkeys(key.partition(": ")[0] for key in found))
    scores = list(dict.fromkeys(key.partition(": ")[2] for key in found))
    rows = [[kind, *(_spread(found[f"{kind}: {score}"]) for score in scores)] for kind in kinds]
    return table(["AUC against test inputs", *scores], rows)


def _spread(row: Mapping[str, float]) -> str:
    return f"{row['mean']:.2f} ± {row['sd']:.2f}"


def batch(all_results: Results) -> str:
    """Steps by batch size, and the noise scale."""
    found = all_results["evidence"]["critical_batch"]
    steps = found["steps_by_batch"]
    cells = [f"{row['steps']:.0f}" for row in steps.values()]
    cells += [f"{found['fitted_critical_batch']:.0f}", f"{found['noise_scale_median']:.0f}"]
    return table([*(f"batch {size}" for size in steps), "critical batch fitted", "noise scale, median"], [cells])


def equal_loss(all_results: Results) -> str:
    """What goes with the test loss, and with the label corruption, at equal training loss."""
    found = {name: rows for name, rows in all_results["evidence"]["at_equal_loss"].items() if isinstance(rows, dict)}
    names = next(iter(found.values()))
    rows = [[name, *(f"{each[name]['rho']:.2f} ± {each[name]['se']:.2f}" for each in found.values())] for name in names]
    return table(["quantity at equal training loss", *found], rows)


def dropout(all_results: Results) -> str:
    """Numbers of Theorem 3 with and without Dropout at equal training loss."""
    found = all_results["evidence"]["dropout"]
    shares = [share for share in next(iter(found["numbers"].values())) if share != "0"]
    rows = []
    for name, row in found["numbers"].items():
        cells = [_between(row["0"])]
        cells += [f"{_between(row[share])}; lower in {row[share]['below']} of {found['seeds']}" for share in shares]
        rows.append([name, *cells])
    return table(["at equal training loss", "without", *(f"Dropout {share}" for share in shares)], rows)


def _between(row: Mapping[str, float]) -> str:
    mean, low, high = (_short(row[key]) for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


def _short(number: float) -> str:
    if number < 1e4:
        return f"{number:.2g}" if number < 100 else f"{number:.0f}"
    return f"{number:.0e}".replace("e+", "e").replace("e0", "e")


def peer_costs(all_results: Results) -> str:
    """What a step costs, and its record, beside trainscope."""
    found = all_results["trainscope"]
    step, size = found["step"], found["bytes_per_step"]
    rows = [
        ["no tool, once more (control)", f"{step['control']:.2f}", ""],
        ["lipcore, the default `watch()`", f"{step['watched']:.2f}", f"{size['lipcore']:,.0f}"],
        [f"trainscope {found['version']}, its default", f"{step['trainscope']:.2f}", f"{size['trainscope']:,.0f}"],
        ["trainscope, activations in every 50th step", f"{step['trainscope, light']:.2f}", ""],
    ]
    if "alarms" in step:  # not in results of before it was measured
        rows.insert(2, ['lipcore, `watch(alarms="default")`', f"{step['alarms']:.2f}", ""])
    return table(["", f"CPU time of a step of {step['plain_ms']:.0f} ms", "bytes of a step's record"], rows)


def peer_clock(all_results: Results) -> str:
    """What a step of the same model costs with alarms, by the clock."""
    of_watch = [row for row in all_results["speed"]["rows"] if row["benchmark"].startswith("bench_watch.py")]
    without, alarms = sorted(of_watch, key=lambda row: "with alarms" in row["name"])
    details = alarms["details"]
    rows = [
        ["no tool, once more (control)", f"{details['control']:.2f}"],
        ["lipcore, the default `watch()`", f"{without['measured']:.2f}"],
        ['lipcore, `watch(alarms="default")`', f"{alarms['measured']:.2f}"],
    ]
    return table(["", f"time of a step of {details['plain_ms']:.0f} ms, by the clock"], rows)


def peer_faults(all_results: Results) -> str:
    """Faults found by trainscope's detectors beside those of lipcore."""
    ours, theirs = all_results["spikes"], all_results["trainscope"]["detectors"]
    tasks, control = list(ours["models"]), "none (control)"
    rows = []
    for name in (_SHIPPED, _LOWER, _JOINT, "loss"):
        quiet = [ours["false_alarms"][task][name] for task in tasks]
        chance = [ours["faults"][task][control][name] for task in tasks]
        rows.append(_peer(f"lipcore: {_name(name)}", ours["totals"][name], quiet, chance))
    for name, row in theirs.items():
        chance = [row["faults"][task][control] for task in tasks]
        rows.append(_peer(f"trainscope: {name}", row["total"], [row["false_alarms"][task] for task in tasks], chance))
    heads = ["alarm", "faults found", "95 %", f"false alarms per 1000 steps: {', '.join(tasks)}", "without a fault"]
    return table(heads, rows)


def _peer(
    name: str,
    total: Mapping[str, float],
    quiet: Iterable[Mapping[str, float]],
    chance: Sequence[Mapping[str, int]],
) -> list[str]:
    share = f"{100 * total['found'] / total['runs']:.0f} % ({100 * total['low']:.0f} to {100 * total['high']:.0f})"
    false = ", ".join(f"{row['per_1000']:.1f}" for row in quiet)
    control = f"{sum(row['found'] for row in chance)} of {sum(row['runs'] for row in chance)}"
    return [name, f"{total['found']:.0f} of {total['runs']:.0f}", share, false, control]


def exact(all_results: Results) -> str:
    """Largest error of per-sample norms over public architectures."""
    rows = all_results["models"]["rows"]
    worst = max(row["error"] for row in rows.values())
    return f"Largest relative error of per-sample norms against autograd, over {len(rows)} architectures: {worst:.0e}."


def bound(all_results: Results) -> str:
    """How loose the bound of Theorem 2 was on the slice of Figure 6."""
    found = all_results["figure6"]
    shares = ", ".join(f"{100 * share:.0f} % {status}" for status, share in found["share"].items())
    ratio = found["bound_over_truth"]["0.5"]
    return f"On the slice of Figure 6: {shares}; the bound is {ratio:.1f} times the truth in the median."


def lengths(all_results: Results) -> str:
    """Rank correlation of each quantity with the final test loss, at the end of training."""
    found = all_results["studies"]["rank_correlation_with_test_loss"]
    names = list(next(iter(found.values())))
    rows = [[name.replace("_", " "), *(_correlation(each[name]) for each in found.values())] for name in names]
    return table(["quantity at the end of training", *found], rows)


def _correlation(row: Mapping[str, float]) -> str:
    return f"{row['rho']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


TABLES: dict[str, Callable[[Results], str]] = {
    make.__name__: make
    for make in (detectors, by_fault, samples, published_rule, leads, hot, labels, other_inputs, batch, equal_loss)
} | {make.__name__: make for make in (exact, bound, lengths, dropout, peer_costs, peer_clock, peer_faults)}


def read() -> Results:
    """Return the committed results."""
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def page(all_results: Results, text: str) -> str:
    """Return docs/evidence.md with the tables that these results make, each between its comments."""

    def filled(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]](all_results)}\n<!-- end -->"

    return re.sub(r"<!-- (?!end)(\w+) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(read(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
