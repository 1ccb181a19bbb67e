"""What theory says of the run: Theorem 1, Definition 1 and Corollaries 1 to 3, each number with its label."""

from __future__ import annotations

from lipcore.report.facts import Facts
from lipcore.report.html import Html, Table, number, tag
from lipcore.report.plots import Plots
from lipcore.report.remedies import remedy_of
from lipcore.report.section import Figure, Made, Missing, Section, with_metric
from lipcore.report.statements import Statement

_SIDES = {"lower": "lower side", "middle": "mean of r", "upper": "upper side"}
_NOTE = (
    "Loukas, Poiitis, Jegelka, NeurIPS 2021. lambda: the local Lipschitz constant at a sample; r: the norm of the "
    "first layer's gradient over that of the output's; W_1: the first layer's weight, with singular values sigma."
)
_NO_BIAS = (
    "Corollaries 2 and 3 are about the first layer's bias, whose own way this record does not have; "
    'watch(record_level="tensor") with a Trajectory records it.'
)


def theory(facts: Facts, plots: Plots) -> Made:
    """Show the two sides of Theorem 1 by window, and what holds of the whole run."""
    if not facts.theory and "lipschitz" in facts.windows.metrics:
        why = next((why for why in facts.unread if why.startswith("theory: ")), "theory: no window has a ratio r")
        return Missing("What theory says", f"nothing, though the windows have lipschitz ({why})")
    if not facts.theory:
        remedy = with_metric("Lipschitz()", ", for a model whose first layer is a Linear")
        return Missing("What theory says", remedy_of(facts, "lipschitz", ["normalized_gradient_norm"], remedy))
    valid = sum(one.value.valid for one in facts.theory)
    said = f"{valid} of {len(facts.theory)} numbers about the whole run are valid"
    said += "." if valid == len(facts.theory) else "; the others are grey, each with the reason."
    heads = ("statement", "number", "value", "worth", "steps", "note")
    table = Table(heads, [_row(one) for one in facts.theory], "Over the whole run", most=12, of_numbers=False)
    notes = [_NOTE] if any(one.where == "Corollary 3" for one in facts.theory) else [_NOTE, _NO_BIAS]
    return Section("theory", "What theory says", [said], _figures(facts, plots), [table], notes=notes)


def _figures(facts: Facts, plots: Plots) -> list[Figure]:
    middle = facts.windows.get("lipschitz", "sandwich", "middle")
    figures = []
    for column, place in enumerate(middle.places[:2] if middle is not None else []):
        key, lines, labels = f"theorem-1-{column}", [], []
        for side, words in _SIDES.items():
            line = facts.windows.get("lipschitz", "sandwich", side)
            if line is not None and place in line.places:
                lines.append((words, line, line.places.index(place)))
                labels.append(f"{words}: {facts.windows.labels['lipschitz', 'sandwich', side]}")
        plots.lines(key, lines, "r")
        said = f"The first layer's normalised gradient norm r lies between means of the slope ({'; '.join(labels)})."
        if len(lines) < len(_SIDES):
            said += " A side that is not drawn is not valid here; the table says why."
        figures.append(Figure(key, f"Theorem 1 by window: {place}", said))
    return figures


def _row(one: Statement) -> list[Html]:
    value = one.value
    worth, steps = value.label if value.valid else "not valid", f"{one.first_step:,} to {one.last_step:,}"
    cells = (one.where.replace(" ", "\u00a0"), one.what, number(value.value), worth, steps, value.note)
    return [tag("span", cell, class_=None if value.valid else "greyed") for cell in cells]
