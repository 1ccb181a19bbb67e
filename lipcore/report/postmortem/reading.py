"""The account of what went wrong in a step, read from a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lipcore.report.alarms_told import SAMPLES
from lipcore.report.parts import other_parts
from lipcore.report.postmortem.account import UPDATE, Account, Clipping
from lipcore.report.postmortem.changes import (
    AFTER,
    BEFORE,
    GAP,
    LEAD,
    STAGES,
    Change,
    Scores,
    begin_of,
    changes,
    scores,
    without_drift,
)
from lipcore.report.postmortem.no_norms import why_no_norms
from lipcore.report.postmortem.ranks import Looked, cut_off, happened_on, looked_into
from lipcore.report.postmortem.rates import RATES, log_rates, rates_of
from lipcore.report.postmortem.samples import samples_of
from lipcore.report.postmortem.words import text_of
from lipcore.report.source import Happened, Source
from lipcore.report.stretch import Array, Stretch, stretch

LOSS, SCALE = "logged/loss", "optimizer/loss_scale"
_SIGNALS = {"loss": LOSS, "grad_norm": "trajectory/grad_norm", "update_norm": UPDATE}  #: of alarms on a step's numbers
_PROPORTION = 3.0  # times as many as of the gradient: an update is more than that explains


def account_of(run: Source, step: int | None = None, *, follow: bool | None = None) -> Account:
    """Return what a record says of a step: by default of the worst alarm, without alarms of the end of the run by an
    exception.

    Args:
        follow: look into the record of the rank that has the worst alarm, or ended first; default: from rank 0's.

    Raises:
        ValueError: the step is not in the record; there is no alarm, and no step was asked for.
    """
    with looked_into(run, step, follow=follow) as looked:
        return account_from(looked, step)


def account_from(looked: Looked, step: int | None) -> Account:
    """Return what the record that is looked into says of a step; default: that of its event."""
    with looked.run.as_of_now():
        account = _account(looked, step)
    account.text = text_of(account)
    return account


def _account(looked: Looked, step: int | None) -> Account:
    run, event = looked.run, looked.event
    events, extent = list(run.events), (run.first_step, run.last_step)
    if not extent[1]:
        raise ValueError(f"{run.path}: nothing was recorded yet: this run has no step")
    if step is None:
        if event is None:
            raise ValueError(
                f"{run.path}: this run has no alarm; choose a step with --step, from {extent[0]} to {extent[1]}"
                + _why_no_alarm(looked)
            )
        step = min(max(event.step, extent[0]), extent[1])
    elif not extent[0] <= step <= extent[1]:
        raise ValueError(f"step: the record has steps {extent[0]} to {extent[1]}, and not {step}")
    around = max(extent[0], step - BEFORE - LEAD), min(extent[1], step + AFTER)
    changed = [one for one in other_parts(run.starts) if around[0] <= one.last < around[1]]
    first = max([around[0], *(one.last + 1 for one in changed if one.last < step)])
    last = min([around[1], *(one.last for one in changed if one.last >= step)])
    account = Account(run.name, step, event, first, last, step)
    named = [one for one in events if one.kind == SAMPLES]
    account.named = [one.text for one in named if first <= one.data.get("alarm", 0) <= last]
    account.parted = [str(one) for one in changed]
    account.rank, account.asked, account.ranks = run.rank, looked.asked, [one.rank for one in looked.others]
    account.elsewhere = happened_on(looked.others, first, last)
    account.cut_off = cut_off(looked)
    left = [*named, *([] if event is None else [event])]
    account.others = [
        one
        for one in events
        if first <= one.step <= last and one not in left and one.data.get("rank") not in account.ranks
    ]
    names = list(run.step_quantities)
    stretches = {name: stretch(run, name, first, last) for name in STAGES if name in names}
    account.folded = any(one.folded for one in stretches.values())
    logs = log_rates(run, names, first, last, step - LEAD)
    every = {
        name: scores(
            _chosen_places(one),
            step,
            upwards=name == LOSS,
            log_rates=logs if name == UPDATE else None,
            alarmed=_alarmed(events, name),
        )
        for name, one in stretches.items()
    }
    every = {name: one for name, one in every.items() if one.stretch.places}
    account.compared = max((one.compared for one in every.values()), default=0)
    account.begin = begin_of(list(every.values()), step)
    every = without_drift(every)
    account.changes = changes(every, account.begin, last)
    account.begin = account.changes[0].step if account.changes else step
    account.beyond = _beyond(every, account.changes)
    account.gradients_usual = _gradients_usual(every, events, account)
    account.changes = [_with_parameter(run, one, names, first, step, logs) for one in account.changes]
    account.weakest = None if account.changes else _weakest(every, step)
    account.rates = rates_of(run, names, first, account.begin)
    account.clipping = _clipping(run, names, first, last, account.begin)
    account.scale = _scale(run, names, account.begin)
    account.logged = _logged(run, names, account.begin)
    batches = run.batches(first, last)
    steps = dict.fromkeys([account.begin, step])
    account.samples = [one for one in (samples_of(batches, each) for each in steps) if one is not None]
    has_details = "flight/tensor_update_norm" in names
    account.missing = _missing(account, names, why_no_norms(run, account.begin, first, last), has_details=has_details)
    return account


def _why_no_alarm(looked: Looked) -> str:
    starts = looked.run.starts
    off = bool(starts) and starts[-1].config.get("alarms") == "off"
    why = ['Alarms were off; pass alarms="default" to watch()'] if off else []
    why += cut_off(looked)
    ends = [(one.rank, event) for one in looked.others for event in one.events if event.kind in ("alarm", "exception")]
    why += [f"Rank {rank} has an {event.kind} of step {event.step}: --rank {rank}" for rank, event in ends[:1]]
    return "".join(f". {said}" for said in why)


def _chosen_places(found: Stretch) -> Stretch:
    """Return the groups of parameters; single ones, or the total, where there are none."""
    for level in ("group", "tensor", "total"):
        where = found.at(level)
        if where:
            places, levels = [found.places[i] for i in where], [found.levels[i] for i in where]
            return replace(found, places=places, levels=levels, values=found.values[:, where])
    return found


def _alarmed(events: Sequence[Happened], quantity: str) -> list[tuple[int, str]]:
    """Return steps and places of this record's own alarms on a quantity."""
    own = [one for one in events if one.kind == "alarm" and _SIGNALS.get(one.data.get("signal", "")) == quantity]
    of = [(one.step, str(one.data.get("place", "total"))) for one in own if one.data.get("rank") is None]
    return [(at, "total") for at, _ in of] if quantity == LOSS else of


def _with_parameter(run: Source, one: Change, names: Sequence[str], first: int, step: int, logs: Array) -> Change:
    """Return a change with the parameter of its group whose number changed most."""
    own = f"flight/tensor_{one.quantity.partition('/')[2]}"
    if own not in names and one.quantity in names:
        own = one.quantity  # a record of every parameter
    if one.quantity == LOSS or own not in names:
        return one
    found = stretch(run, own, first, first + len(logs) - 1)
    where = [i for i in found.at("tensor") if found.places[i].startswith(f"{one.place}.") or one.place == "total"]
    if not where or not found.there[found.row(one.step)]:
        return one
    part = replace(found, places=[found.places[i] for i in where], values=found.values[:, where])
    compared = scores(part, step, log_rates=logs if one.quantity == UPDATE else None)
    sizes = np.nan_to_num(np.abs(compared.z[part.row(one.step)]), nan=-1.0, posinf=np.inf)
    return replace(one, parameter=part.places[int(sizes.argmax())]) if sizes.max() > 0 else one


def _beyond(every: Mapping[str, Scores], found: Sequence[Change]) -> tuple[str, float] | None:
    """Return the update that is more times its usual size than its gradient is, in the step in which it began."""
    gradients = every.get("trajectory/grad_norm")
    most: tuple[str, float] | None = None
    for one in found:
        if one.quantity == UPDATE and one.step == found[0].step and one.finite and gradients is not None:
            places, row = gradients.stretch.places, gradients.stretch.row(one.step)
            column = places.index(one.place) if one.place in places else -1
            own = float(gradients.times[row, column]) if column >= 0 else float("nan")
            times = one.times / max(1.0, own)
            if np.isfinite(own) and times > max(_PROPORTION, most[1] if most else 0.0):
                most = one.place, times
    return most


def _gradients_usual(every: Mapping[str, Scores], events: Sequence[Happened], account: Account) -> bool:
    """Say whether the norms of gradients are known where it began, without an alarm on them, of any rank, from there to
    the step that is looked at."""
    one = every.get("trajectory/grad_norm")
    if one is None or not np.isfinite(one.z[one.stretch.row(account.begin)]).any():
        return False
    between = range(min(account.begin, account.step), max(account.begin, account.step) + 1)
    alarms = [event for event in events if event.kind == "alarm" and event.data.get("signal") == "grad_norm"]
    return not any(event.step in between for event in alarms)


def _weakest(every: Mapping[str, Scores], step: int) -> tuple[str, str, int, float] | None:
    """Return the most unusual number near the step: quantity, place, step, score."""
    found: tuple[str, str, int, float] | None = None
    for quantity, one in every.items():
        begin = max(0, one.stretch.row(step - GAP))
        sizes = np.abs(one.z[begin:])
        if np.isfinite(sizes).any():
            at, column = np.unravel_index(int(np.nanargmax(sizes)), sizes.shape)
            score = float(sizes[at, column])
            if found is None or score > found[3]:
                found = (STAGES[quantity], one.stretch.places[column], int(one.stretch.steps[begin + at]), score)
    return found


def _clipping(run: Source, names: Sequence[str], first: int, last: int, step: int) -> Clipping | None:
    if "trajectory/grad_norm" not in names:
        return None
    raw = stretch(run, "trajectory/grad_norm", first, last)
    total = raw.at("total")
    if not total or not raw.there[raw.row(step)]:
        return None
    row = raw.row(step)
    earlier = raw.values[: max(row, 0), total[0]]
    usual = float(np.median(earlier[np.isfinite(earlier)])) if np.isfinite(earlier).any() else float("nan")
    after = float("nan")
    if "trajectory/clipped_grad_norm" in names:
        clipped = stretch(run, "trajectory/clipped_grad_norm", first, last)
        after = float(clipped.values[row, clipped.at("total")[0]]) if clipped.at("total") else after
    return Clipping(float(raw.values[row, total[0]]), after, usual)


def _scale(run: Source, names: Sequence[str], step: int) -> tuple[float, float] | None:
    if SCALE not in names:
        return None
    one = stretch(run, SCALE, max(1, step - 1), step)
    if not one.places or not one.there[-1] or not np.isfinite(one.values[-1, 0]):
        return None
    return float(one.values[-1, 0]), float(one.values[0, 0]) if len(one.steps) > 1 else float("nan")


def _logged(run: Source, names: Sequence[str], step: int) -> list[tuple[str, float, float]]:
    found = []
    for name in names:
        if name.startswith("logged/"):
            one = stretch(run, name, max(1, step - 1), step)
            if one.places and one.there[-1]:
                before = float(one.values[0, 0]) if len(one.steps) > 1 else float("nan")
                found.append((name.partition("/")[2], float(one.values[-1, 0]), before))
    return found


def _missing(account: Account, names: Sequence[str], norms: str, *, has_details: bool) -> list[tuple[str, str]]:
    trajectory = "pass metrics=[..., lipcore.Trajectory()] to watch(), or no metrics at all"
    found = []
    if account.folded:
        found.append(("older steps one by one", "they were folded to 64 each; raise max_bytes= of watch()"))
    if LOSS not in names:
        found.append(("the loss", "call monitor.log(loss=loss) in the loop, before optimizer.step()"))
    if "trajectory/update_norm" not in names:
        found.append(("how each layer moved", trajectory))
    elif not has_details and not any(one.parameter for one in account.changes):
        found.append(("single parameters", "the record is of an older version, or too small for them: max_bytes="))
    if RATES not in names and not account.rates:
        found.append(("the learning rate", "pass the optimizer to watch(), or call monitor.log(lr=...)"))
    if not account.samples:
        said = "pass their ids to monitor.log_batch(ids, losses=...) before loss.backward()"
        found.append((f"the samples of step {account.begin}", f"{said}; the last 512 steps and alarms are kept"))
    else:
        by = [ranking.by for ranking in account.samples[0].rankings]
        if "gradient norm" not in by:
            found.append(("gradient norms of samples", norms))
        if "loss" not in by:
            found.append(("losses of samples", "pass them to monitor.log_batch(ids, losses=...)"))
    if account.clipping is not None and np.isnan(account.clipping.after):
        found.append(("the gradient after clipping", 'lipcore.Trajectory(stats=[..., "clipped_grad_norm"]) has it'))
    return found
