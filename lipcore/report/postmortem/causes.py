"""What an account suggests: the kind of cause, and what to check."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lipcore.report.html import number
from lipcore.report.postmortem.account import Account
from lipcore.report.postmortem.rates import Rate
from lipcore.report.postmortem.samples import Samples

_WRITTEN = (
    "Code that writes to weights besides the optimizer: callbacks, hooks, averages of weights, a wrapper around the "
    "optimizer. What is meant to do so is announced by rebase() of the Trajectory.",
    "Memory: a flipped bit changes one element of one parameter (nvidia-smi -q -d ECC; a memory test of the host).",
    "Collectives: a broadcast or all-reduce that brings other values; whether all ranks hold the same weights.",
)
_FAR = 3.0  # times the usual gradient norm: clipping would have acted


def cause_of(account: Account) -> str:
    """Return in a sentence what the order of the changes says about the cause; "" where nothing changed."""
    found = account.at_begin if account.changes else []
    what = {one.what for one in found}
    lost = [one for one in found if not one.finite]
    if lost:
        named = next((one for one in account.samples if one.step == account.begin), None)
        suspects = [] if named is None else named.suspects
        doubt = "" if named is None else _in_brackets(named.doubt_of_suspects)
        who = f" Of its {named.count} samples, {_few(suspects)}{doubt}." if named and suspects else ""
        return _not_finite({one.what for one in lost}) + who
    if any(one.step <= account.begin for one in account.unexplained):
        return "What is told above began with it or after it: something else than the optimizer had changed weights."
    if what == {"weight norm"}:
        return "Weights changed without an update of the optimizer: something else wrote to them."
    if by_optimizer(account):
        usual = account.gradients_usual
        said = "The gradients were as usual, the updates were not" if usual else "The updates were not as usual"
        if account.beyond is not None:
            place, times = account.beyond
            said = f"The update of {place} is {number(times)} times as large as its gradient explains"
        if account.jumps:
            return f"{said}: the learning rate of {account.jumps[0].group} {_jump(account.jumps[0])}."
        return f"{said}: the optimizer's state, or other code that wrote to the weights."
    if "loss" in what or "gradient norm" in what:
        return _data(account, what)
    return ""


def by_optimizer(account: Account) -> bool:
    """Say whether it began in the step from gradients to weights: not in the samples, nor in the backward pass."""
    found = account.at_begin if account.changes else []
    only = {one.what for one in found} <= {"update norm", "weight norm"}
    return bool(found) and all(one.finite for one in found) and (only or account.beyond is not None)


def checks_of(account: Account) -> list[str]:
    """Return what to check, the likeliest first."""
    found: list[str] = []
    what = {one.what for one in account.at_begin} if account.changes else set()
    lost = {one.what for one in account.at_begin if not one.finite} if account.changes else set()
    named = next((one for one in account.samples if one.step == account.begin), None)
    if account.unexplained:
        found += _WRITTEN
    found += [f"Who set the learning rate of {rate.group}: it {_jump(rate)}." for rate in account.jumps[:3]]
    optimizer_only = by_optimizer(account)
    if named is not None and named.verdict == "single" and not optimizer_only:
        ids = ", ".join(map(str, named.suspects[:5])) + (" and others" if len(named.suspects) > 5 else "")
        many = "samples" if len(named.suspects) > 1 else "sample"
        what_of = f"the inputs' scale, values that are not finite, the labels{_doubt(named)}"
        found.append(f"Look at {many} {ids}: {what_of}.")
    if named is not None and named.verdict == "batch" and not optimizer_only:
        found.append(
            f"Look at the whole batch of step {account.begin} ({named.count} samples): its labels, its preprocessing, "
            f"the shard or file that it is from. No single sample explains it{_doubt(named)}."
        )
    if optimizer_only and not account.jumps and not account.unexplained:
        found.append(
            "The optimizer's state of the layer that moved first: a second moment near 0 (eps, a layer that was frozen "
            "or just added), a state loaded for other parameters, weights that other code has written to."
        )
    alone = "gradient norm" in what and "loss" not in what and not lost and not optimizer_only
    if alone and (named is None or named.verdict == "usual"):
        found.append("Gradients of two steps added up (zero_grad() left out), or another number of micro-batches.")
    if lost:
        found.append(
            "Where the first value that is not finite is made: logarithms, divisions and roots of 0 in the loss and in "
            "the layer named first; float16 without a GradScaler; torch.autograd.set_detect_anomaly(True) on this step."
        )
    clipping = account.clipping
    unclipped = clipping is not None and (np.isnan(clipping.after) or clipping.after > 0.99 * clipping.before)
    if clipping is not None and unclipped and not optimizer_only and clipping.before > _FAR * clipping.usual:
        found.append(
            f"Clipping: the gradient's norm was {number(clipping.before)}, and {number(clipping.usual)} usually; "
            f"clip_grad_norm_ at {number(2 * clipping.usual)} would have bounded this step."
        )
    of_data = bool(what & {"loss", "gradient norm"}) and not lost and not optimizer_only
    if of_data and (named is None or named.verdict in ("usual", "unknown")):
        found.append(
            f"The step before, {account.begin - 1}: with usual samples, the weights that it left are the cause. Is the "
            "learning rate at its highest there?"
        )
    if named is None and account.changes and not optimizer_only:
        found.append(
            "Which samples they were: name them by monitor.log_batch(ids, losses=...) and run these steps once more."
        )
    if named is not None and named.has_generator:
        found.append(
            f"To make the batch once more: torch.set_rng_state() with run.batches({account.begin}, {account.begin})"
            "[0].rng_state, before it is made."
        )
    return found


def _not_finite(what: set[str]) -> str:
    for first, said in (
        ("loss", "The loss is the first value that is not finite: the forward pass, or the samples."),
        (
            "gradient norm",
            "Gradients are the first values seen that are not finite: the backward pass, or the loss.",
        ),
    ):
        if first in what:
            return said
    return "Parameters became NaN or infinite in the update: by their gradients, the optimizer, or other code."


def _data(account: Account, what: set[str]) -> str:
    named = next((one for one in account.samples if one.step == account.begin), None)
    both = "The loss and the gradients" if what >= {"loss", "gradient norm"} else "The loss" if "loss" in what else ""
    both = both or "The gradients"
    verb = "was" if both == "The loss" else "were"
    begun = f"{both} {verb} not as usual before anything had moved"
    if named is None:
        return f"{begun}: the samples of this step, or the weights that the step before left."
    if named.verdict == "single":
        return f"{begun}, and of its {named.count} samples {_few(named.suspects)}{_doubt(named)}."
    if named.verdict == "batch":
        return f"{begun}, and so was the whole batch, not single samples{_doubt(named)}."
    if named.verdict == "usual":
        said = f"{begun}, though no sample stands out{_doubt(named)}"
        return f"{said}: hard samples together, or the weights that the step before left."
    return f"{begun}: the samples of this step, or the weights that the step before left."


def _doubt(named: Samples) -> str:
    """Return, in brackets, the doubt that the gradient norms have by which samples were looked at; "" for none."""
    return _in_brackets(named.doubt)


def _in_brackets(doubt: str) -> str:
    return f" (by gradient norms with a doubt: {doubt})" if doubt else ""


def _few(ids: Sequence[int]) -> str:
    """Say of samples that they stand out."""
    said = ", ".join(map(str, ids[:3])) + (" and others" if len(ids) > 3 else "")
    return f"{said} stand{'' if len(ids) > 1 else 's'} out"


def _jump(rate: Rate) -> str:
    times = rate.here / rate.before
    said = f"{number(times)} times" if times >= 1 else f"1/{number(1 / times)} of"
    return f"was {number(rate.here)} in this step, {said} the {number(rate.before)} of the step before"
