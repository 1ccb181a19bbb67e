"""An account as text for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from lipcore.report.alarms_told import heard_from, is_unexplained, told
from lipcore.report.html import count, in_words, number, printable, shortened_name
from lipcore.report.postmortem.account import Account
from lipcore.report.postmortem.causes import cause_of, checks_of
from lipcore.report.postmortem.changes import BEFORE, GAP, LEAD, Change
from lipcore.report.postmortem.rates import Rate
from lipcore.report.postmortem.samples import Ranking, Sample, Samples
from lipcore.report.source import Happened

_WIDTH = 80
_ROWS = 12
_NAME = 28
_LONG = 240  # characters of an event
_MOST_UNEXPLAINED = 3
_SHARE = 0.3  # of a batch's loss, that is told of one sample


def text_of(account: Account) -> str:
    """Return an account in words, in lines of 80 characters."""
    parts = [_wrapped(headline(account)), *map(_wrapped, told_of(account))]
    if account.places:
        title = "How it spread" + ", update norms over the learning rate" * over_rate(account)
        parts.append("\n".join([title, *_rows(spread(account))]))
    for title, lines in (("Learning rate, clipping, and what was logged", settings(account)),):
        parts += ["\n".join([title, *(_item(line) for line in lines)])] if lines else []
    parts += ["\n".join(_samples(one)) for one in account.samples]
    for title, lines in (
        ("Samples in the steps after", [sentence(said) for said in account.named]),
        ("Near by", [beside(event) for event in account.others[:_ROWS]]),
        ("On other ranks", elsewhere(account)),
        ("What to check", checks_of(account)),
        ("Not in this record", [f"{what}: {how}" for what, how in account.missing]),
    ):
        parts += ["\n".join([title, *(_item(line) for line in lines)])] if lines else []
    return "\n".join(map(printable, "\n\n".join(parts).split("\n")))


def headline(account: Account) -> str:
    """Return what is looked at, and why."""
    rank = f", rank {account.rank}" if account.ranks else ""
    said = f"Run {account.run}{rank}, step {account.step:,}"
    event = account.event
    if event is None:
        first = account.at_begin[0] if account.changes else None
        return f"{said}: {change(first)}" if first is not None and first.step == account.step else f"{said}: no alarm"
    if is_unexplained(event):  # which the first sentence says in full
        return f"{said}: movement that the optimizer did not make"
    return f"{said}: {told(event) if event.kind == 'alarm' else f'ended by {event.text}'}"


def told_of(account: Account) -> list[str]:
    """Return sentences on what the optimizer did not move, on what moved first, and on the cause."""
    unexplained = map(_unexplained, account.unexplained[:_MOST_UNEXPLAINED])
    parted = [f"{sentence(said)}: the two are not compared." for said in account.parted]
    return [*unexplained, *_moved_first(account), *parted, *_of_ranks(account)]


def _of_ranks(account: Account) -> list[str]:
    """Say whose numbers all of this is of, where there are several ranks."""
    told = account.event.data.get("rank") if account.event is not None else None
    if told is not None:
        where = "Its record lies beside" if told in account.ranks else "Its record is not here, or does not have it"
        here = "another rank" if account.rank is None else f"rank {account.rank}"
        said = f"The alarm is of rank {told}, and all else here of {here}. {where}: --rank {told} looks into it."
        return [said, *(f"{said}." for said in account.cut_off)]
    if not account.ranks:
        return [f"{said}." for said in account.cut_off]
    ranks = sorted(account.ranks)
    others = f"--rank N shows those of others, {ranks[0]} to {ranks[-1]}"
    others = f"--rank {ranks[0]} shows those of rank {ranks[0]}" if len(ranks) == 1 else others
    why = "" if account.asked is None else f", not rank {account.asked}, since it is what happened there"
    said = f"Loss, samples and single steps are of rank {account.rank} alone{why}; {others}."
    return [said, *(f"{said}." for said in account.cut_off)]


def _unexplained(event: Happened) -> str:
    score = event.data.get("score")
    times = "" if score is None else f", {number(float(score))} times what rounding may make of it"
    said = f"In step {event.step:,}, {event.data.get('place', '?')} moved by what its optimizer did not do{times}"
    return f"{said}{heard_from(event)}."


def _moved_first(account: Account) -> list[str]:
    if account.compared == 0:
        nothing = "the steps around are in the record as means of 64 alone" if account.folded else "nothing before it"
        nothing = "those before were made on other ranks" if account.parted else nothing
        return [f"What moved first cannot be said: there is too little to compare the step with ({nothing})."]
    if not account.changes:
        said = (
            f"Nothing in steps {max(account.first, account.step - GAP):,} to {account.last:,} is beyond what is usual."
        )
        if account.weakest is not None:
            what, place, step, score = account.weakest
            said += f" The most unusual: {what}{_of(place)} in step {step:,}, with a score of {number(score)}."
        return [said, *_where(account)]
    first = account.at_begin[0]
    layers = [one for one in account.at_begin if one.place not in ("total", first.place)]
    others = ""
    if layers and first.place == "total":
        others = f"; in the same step {change(layers[0])}"
        layers = [one for one in layers if one.place != layers[0].place]
    if names := list(dict.fromkeys(one.place for one in layers)):
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        also = "also" if others else "in the same step also"
        others += f"; {also} in {', '.join(map(in_words, names[:4]))}{more}"
    parts, begun = [], f"step {first.step:,}, {change(first)}{others}."
    away = account.step - account.begin
    what = "the alarm" if account.event is not None else "the step that was asked for"
    if away < 0:
        beside = ", beside the alarm itself" if account.event is not None else ""
        said = f"in steps {max(account.first, account.step - GAP):,} to {account.step:,} is beyond what is usual"
        parts += [f"Nothing {said}{beside}.", f"After {what}, first: {begun}"]
    else:
        parts += [f"First: {begun}", *([f"That is {count(away, 'step')} before {what}."] if away else [])]
    earlier = [f"{one.step:,}" for one in account.others if one.kind == "alarm" and one.step < account.begin]
    if earlier:
        parts.append(f"There were alarms before, in step {', '.join(earlier[-3:])}: --step shows each.")
    return [" ".join(parts), *filter(None, [cause_of(account)]), *_where(account)]


def _where(account: Account) -> list[str]:
    """Say where an exception was raised."""
    where = account.event.data.get("where") if account.event is not None else None
    return [f"It was raised in {where}."] if where else []


def change(one: Change) -> str:
    """Return a change in words."""
    inside = f" (most in {one.parameter})" if one.parameter and one.parameter != one.place else ""
    if not one.finite:
        return f"{one.what}{_of(one.place)} is not finite{inside}"
    over = " over learning rate" if one.over_rate else ""
    return f"{one.what}{over}{_of(one.place)}, {number(one.times)} times its usual value{inside}"


def spread(account: Account) -> list[tuple[str, ...]]:
    """Return the first change of each place, in order: step, place, quantity, times, at the most, parameter."""
    return [
        (
            f"{one.step:,}",
            one.place,
            one.what,
            f"{number(one.times)} x" if one.finite else "not finite",
            f"{number(one.peak_times)} x in {one.peak_step:,}" if not math.isnan(one.peak_times) else "",
            one.parameter,
        )
        for one in account.places
    ]


def over_rate(account: Account) -> bool:
    """Say whether update norms that spread were judged without changes of the learning rate."""
    return any(one.over_rate for one in account.places)


def sentence(said: str) -> str:
    """Return what the alarms have said, with a capital letter."""
    return said[:1].upper() + said[1:]


def settings(account: Account) -> list[str]:
    """Return learning rates, clipping and what was logged in the step in which it began."""
    alike: dict[tuple[float, float, float], list[Rate]] = {}
    for rate in account.rates:
        alike.setdefault((rate.here, rate.before, rate.greatest), []).append(rate)
    lines = [_rate(same) for same in sorted(alike.values(), key=lambda same: not same[0].jumped)[:_ROWS]]
    clipping = account.clipping
    if clipping is not None:
        said = f"gradient norm {value_of(clipping.before)}, {number(clipping.usual)} usually"
        if clipping.after < 0.999 * clipping.before:
            said += f"; clipped to {number(clipping.after)}, by a factor of {number(clipping.before / clipping.after)}"
        elif not math.isnan(clipping.after):
            said += "; not clipped"
        lines.append(said)
    if account.scale is not None:
        here, before = account.scale
        same = here == before
        lines.append(
            f"scale of the GradScaler: {number(here)}{', as in the step before' if same else _step_before(before)}"
        )
    return lines + [f"{name}: {value_of(here)}{_step_before(before)}" for name, here, before in account.logged]


def _rate(same: Sequence[Rate]) -> str:
    """Return the learning rate of groups that have the same one."""
    rate, whose = same[0], same[0].group if len(same) == 1 else f"{len(same)} groups of parameters"
    if rate.jumped:
        return f"learning rate of {whose}: {number(rate.here)}{_step_before(rate.before)}"
    highest = rate.here >= rate.greatest * (1 - 1e-6)
    steps = "" if highest else f"; in the {BEFORE + LEAD} steps before up to {number(rate.greatest)}"
    return f"learning rate of {whose}: {number(rate.here)}, without a jump{steps}"


def _step_before(value: float) -> str:
    return "" if math.isnan(value) else f", {number(value)} in the step before"


def value_of(value: float) -> str:
    """Return a number, or that it is none."""
    return number(value) if math.isfinite(value) else "not finite"


def of_ranking(samples: Samples, ranking: Ranking) -> str:
    """Return what a ranking says."""
    one = ranking.outstanding == 1
    doubt = f"; {ranking.doubt}" if ranking.doubt else ""
    if samples.count > 1 and not ranking.top:
        return f"all {samples.count} are not finite{doubt}"
    said = {
        "single": f"{ranking.outstanding} of {samples.count} stand{'s' if one else ''} out",
        "batch": "the whole batch is not as usual",
        "usual": "none stands out",
        "unknown": "nothing to compare with",
    }[ranking.verdict]
    said += f"; median {number(ranking.median)}"
    if not math.isnan(ranking.usual):
        said += f", {number(ranking.usual)} in the steps before"
    if ranking.share > _SHARE:
        said += f"; the first one makes {round(100 * ranking.share)} % of the sum"
    return said + doubt


def cells(sample: Sample) -> tuple[str, str, str]:
    """Return id, gradient norm and loss of a sample."""
    norm, loss = ("-" if value is None else value_of(value) for value in (sample.norm, sample.loss))
    return str(sample.id), norm, loss


def beside(event: Happened) -> str:
    """Return another event in words."""
    return f"step {event.step:,}, {event.kind}: {told(event) if event.kind == 'alarm' else event.text}"


def elsewhere(account: Account) -> list[str]:
    """Return what happened near by on other ranks, in words."""
    lines = [f"rank {rank}, {beside(event)}" for rank, event in account.elsewhere[:_ROWS]]
    more = len(account.elsewhere) - len(lines)
    return [*(_short(line) for line in lines), *([f"and {more} more"] if more else [])]


IDS_ALONE = "their ids alone were recorded, neither gradient norms nor losses"


def _short(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG - 1].rstrip()}…"


def _samples(samples: Samples) -> list[str]:
    lines = [f"Samples of step {samples.step:,} ({samples.count})"]
    lines += [] if samples.rankings else [_item(IDS_ALONE)]
    for ranking in samples.rankings:
        lines.append(_item(f"by {ranking.by}: {of_ranking(samples, ranking)}"))
        if ranking.top:
            lines += _rows([("id", "gradient norm", "loss"), *map(cells, ranking.top)], "      ")
    return lines


def _rows(rows: Sequence[tuple[str, ...]], before: str = "  ") -> list[str]:
    shown = [tuple(shortened_name(cell, _NAME) for cell in row) for row in rows[:_ROWS]]
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
    lines = []
    for row in shown:
        line = before + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        lines.append(line if len(line) <= _WIDTH else line[: _WIDTH - 1].rstrip() + "…")
    return lines + ([f"{before}and {len(rows) - _ROWS} more"] if len(rows) > _ROWS else [])


def _of(place: str) -> str:
    return "" if place == "total" else f" of {in_words(place)}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _item(text: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
