"""The first section: the loss, what each layer's updates were like, and the norms, above each other by step."""

from __future__ import annotations

from lipcore.report.binned import Binned
from lipcore.report.facts import Facts
from lipcore.report.html import Html, Table, joined, name_of, number, shortened_name
from lipcore.report.parts import other_parts
from lipcore.report.plots import Plots
from lipcore.report.ratio_map import RatioMap
from lipcore.report.section import Figure, Missing, Section, with_metric

_LOSS = "logged/loss"
_NORMS = {
    "trajectory/grad_norm": "gradient norm",
    "trajectory/clipped_grad_norm": "gradient norm after clipping",
    "trajectory/update_norm": "update norm",
}


def training(facts: Facts, plots: Plots, ratios: RatioMap | None) -> tuple[Section, list[Missing]]:
    """Return the section, and what of it was not measured."""
    figures, missing = [], []
    if _LOSS in facts.lines:
        plots.lines("loss", [("loss", facts.lines[_LOSS], 0)], "loss", height=140)
        figures.append(
            Figure("loss", "Loss", _sentence("The loss", facts.lines[_LOSS]), _table({"loss": facts.lines[_LOSS]}))
        )
    else:
        missing.append(Missing("Loss", "call monitor.log(loss=loss) in the loop, before optimizer.step()"))
    if ratios is not None:
        figures += ratios.figures(plots)
    else:
        missing.append(Missing("Updates of each layer", with_metric("Trajectory()", ", or no metrics at all")))
    figures += _norms(facts, plots)
    notes: list[object] = [facts.covered.sentence()] if facts.covered.several and facts.lines else []
    others = {
        name.partition("/")[2]: line
        for name, line in facts.lines.items()
        if name.startswith("logged/") and name != _LOSS
    }
    for i, (own, line) in enumerate(others.items()):
        low, _, high = line.span(0)
        if not low < high:
            notes.append(joined([name_of(own), f", as logged, was {number(low)} throughout."]))
        elif i < _MOST_LOGGED:
            plots.lines(f"logged-{i}", [(own, line, 0)], shortened_name(own, 20), height=120)
            title = f"{shortened_name(own)}, as logged"
            figures.append(Figure(f"logged-{i}", title, _sentence(shortened_name(own), line), _table({own: line})))
    if facts.lines:
        width = max(line.width for line in facts.lines.values())
        if width > 1:
            notes.append(
                f"A point of a line is the mean of {width:,} steps; the band reaches from the least to the greatest of "
                "them, so that no step is hidden."
            )
    if facts.folded:
        notes.append("Older steps of this record were folded to least value, mean and greatest value of 64 each.")
    if any(line.lost.any() for line in facts.lines.values()):
        notes.append("Grey: steps in which the number is NaN or infinite.")
    notes += [
        f"Norms of single steps are not alike before and behind step {one.last:,}: {one}."
        for one in other_parts(facts.starts)
        if facts.first_step <= one.last < facts.last_step
    ]
    if facts.alarms:
        notes.append("Dashed lines and circles are alarms.")
    return Section("training", "Step by step", figures=figures, notes=notes), missing


_MOST_LOGGED = 6


def _norms(facts: Facts, plots: Plots) -> list[Figure]:
    """Return the figure of the norms by step; where those are of a part of the model, behind the one of the whole
    model's by window."""
    norms = {words: facts.lines[name] for name, words in _NORMS.items() if name in facts.lines}
    found = {words: facts.windows.whole_norm(name.partition("/")[2]) for name, words in _NORMS.items()}
    whole = {words: line for words, line in found.items() if line is not None} if facts.covered.partial else {}
    figures = []
    if whole:
        plots.lines("norms-whole", [(words, line, 0) for words, line in whole.items()], "norm")
        said = joined([_sentence(f"The {words}", line, of_windows=True) for words, line in whole.items()], " ")
        title = "Gradient and update norm of the whole model: mean and greatest of each window of all ranks"
        figures.append(Figure("norms-whole", title, said))
    if norms:
        plots.lines("norms", [(words, line, 0) for words, line in norms.items()], "norm")
        said = joined([_sentence(f"The {words}", line) for words, line in norms.items()], " ")
        figures.append(Figure("norms", f"Gradient and update norm of {facts.covered.model}", said, _table(norms)))
    return figures


def _sentence(what: str, line: Binned, *, of_windows: bool = False) -> Html:
    means = line.mean[:, 0]
    there = means[line.count[:, 0] > 0]
    if not len(there):
        return joined([f"{what} has no finite number in this record."])
    low, _, high = line.span(0)
    said = f"{what} went from {number(there[0])} to {number(there[-1])}"
    where = "in a step of the window up to" if of_windows else "at"
    said += f"; its greatest value is {number(high)}, {where} step {line.step_of_greatest(0):,}" if high > low else ""
    if line.not_finite[0] and what == "The loss":
        said += (
            f"; it is not finite in {line.not_finite[0]:,} steps, for the first time at {line.first_not_finite[0]:,}"
        )
    return joined([said + "."])


def _table(lines: dict[str, Binned]) -> Table:
    rows = []
    for name, line in lines.items():
        low, mean, high = line.span(0)
        steps = f"{int(line.count[:, 0].sum()):,}", f"{int(line.not_finite[0]):,}"
        rows.append((name_of(name), number(low), number(mean), number(high), f"{line.step_of_greatest(0):,}", *steps))
    return Table(("", "least", "mean", "greatest", "at step", "finite", "not finite"), rows)
