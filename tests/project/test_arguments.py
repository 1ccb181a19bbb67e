"""Integers and choices that public functions take: what is none is refused, by the name of the argument."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

import lipcore
from lipcore import alarms, regions, theory
from lipcore import functional as F
from lipcore.models.arguments import check_choice, check_count

ROOMS = (lipcore, F, alarms, regions, theory)
#: Methods that an engine calls, no user.
PROTOCOL = {"prepare", "observe_unrecorded"}


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions, constructors and methods under public names; what lipcore returns is not built by a user."""
    seen = set()
    for room in ROOMS:
        for name in room.__all__:
            thing = getattr(room, name)
            if isinstance(thing, types.ModuleType) or id(thing) in seen or dataclasses.is_dataclass(thing):
                continue
            seen.add(id(thing))
            if not inspect.isclass(thing):
                yield name, thing
                continue
            yield name, thing.__init__
            for method, function in vars(thing).items():
                if not method.startswith("_") and method not in PROTOCOL and inspect.isfunction(function):
                    yield f"{name}.{method}", function


def integers() -> set[str]:
    return {
        f"{name}({parameter.name})"
        for name, function in public()
        if callable(function)
        for parameter in (inspect.signature(function).parameters.values() if inspect.isroutine(function) else ())
        if re.fullmatch(r"int( \| None)?", str(parameter.annotation))
    }


def linear() -> nn.Module:
    return nn.Linear(2, 1)


def relu() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
ROWS = X.reshape(1, 6, 2)
IDS = torch.zeros(1, 6, dtype=torch.int64)


def history() -> Any:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lipcore.Monitor(model, optimizer, window_steps=1) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()
    return monitor.history


def recorded() -> str:
    folder = tempfile.mkdtemp()
    lipcore.watch(linear(), run=folder).close()
    return folder


def of_trajectory(name: str, **others: Any) -> Callable[[Any], Any]:
    return lambda value: lipcore.Trajectory(linear(), **{name: value}, **others)


def of_monitor(name: str) -> Callable[[Any], Any]:
    return lambda value: lipcore.Monitor(linear(), metrics=[], **{name: value})


def of_norms(name: str) -> Callable[[Any], Any]:
    return lambda value: lipcore.PerSampleGradNorms(loss_reduction="sum", **{name: value})


def of_dots(name: str) -> Callable[[Any], Any]:
    reference = {key: p.detach() for key, p in linear().named_parameters()}
    given = {"reference": reference, "loss_reduction": "sum"}
    return lambda value: lipcore.PerSampleGradDots(**given | {name: value})


def of_conv(**integer: Any) -> Any:
    x = torch.randn(2, 2, 4)
    return F.conv_norms_sq(x, x, kernel_size=[1], stride=[1], padding=[0], dilation=[1], **integer)


def of_method(**integer: Any) -> Any:
    return F.conv_method([1, 2, 4], [1, 2, 4], kernel_size=[1], padding=[0], **integer)


def of_windows(function: Callable[..., Any], name: str, *others: Any, **keywords: Any) -> Callable[[Any], Any]:
    return lambda value: function(history(), *others, **{name: value}, **keywords)


def slice_of(**integer: Any) -> Any:
    return regions.slice_map(relu(), regions.Plane.through(X[0], X[1], X[2]), **integer)


def step_of(count: Any) -> Any:
    w = [torch.ones(2)]
    return F.trajectory_step(w, [torch.zeros(2)], [torch.zeros(2)], count=count)


#: How a value is passed, and the least integer that is taken.
CALLS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "Alarms(per_sample)": (lambda v: alarms.Alarms(per_sample=v), 1),
    "Lipschitz(lambda_every)": (lambda v: lipcore.Lipschitz(lambda_every=v), 1),
    "Monitor(window_steps)": (of_monitor("window_steps"), 1),
    "Monitor(window_blocks)": (of_monitor("window_blocks"), 1),
    "Monitor(history_limit)": (of_monitor("history_limit"), 1),
    "Monitor(history_bytes)": (of_monitor("history_bytes"), 1),
    "Monitor.log_batch(epoch)": (lambda v: lipcore.Monitor(linear(), metrics=[]).log_batch([1], epoch=v), 0),
    "Monitor.probe(batch_size)": (lambda v: lipcore.Monitor(linear()).probe(X, "x", batch_size=v), 1),
    "PerSampleGradDots(every_steps)": (of_dots("every_steps"), 1),
    "PerSampleGradDots(batch_dim)": (of_dots("batch_dim"), 0),
    "PerSampleGradDots(max_replay_bytes)": (of_dots("max_replay_bytes"), 0),
    "PerSampleGradDots(max_replay_flops)": (of_dots("max_replay_flops"), 0),
    "PerSampleGradNorms(every_steps)": (of_norms("every_steps"), 1),
    "PerSampleGradNorms(batch_dim)": (of_norms("batch_dim"), 0),
    "PerSampleGradNorms(max_replay_bytes)": (of_norms("max_replay_bytes"), 0),
    "watch(max_bytes)": (lambda v: lipcore.watch(linear(), max_bytes=v), 1 << 20),
    "open_run(rank)": (lambda v: lipcore.open_run(recorded(), v), 0),
    "PerSampleGradNorms(max_replay_flops)": (of_norms("max_replay_flops"), 0),
    "SampleScores.top(k)": (lambda v: lipcore.SampleScores().top(v), 0),
    "TensorStats(every_steps)": (lambda v: lipcore.TensorStats(every_steps=v), 1),
    "Trajectory(every_steps)": (of_trajectory("every_steps"), 1),
    "Trajectory(window_blocks)": (of_trajectory("window_blocks"), 1),
    "Trajectory(ring)": (of_trajectory("ring"), 512),
    "Trajectory(buckets)": (of_trajectory("buckets", mode="sketch"), 256),
    "Trajectory(seed)": (of_trajectory("seed", mode="sketch"), 0),
    "Trajectory(keep_every)": (of_trajectory("keep_every", mode="sketch"), 1),
    "Trajectory(keep_limit)": (of_trajectory("keep_limit"), 1),
    "Trajectory(memory_budget)": (of_trajectory("memory_budget", mode="auto"), 1),
    "conv_method(groups)": (lambda v: of_method(groups=v), 1),
    "conv_norms_sq(groups)": (lambda v: of_conv(groups=v), 1),
    "embedding_norms_sq(padding_idx)": (lambda v: F.embedding_norms_sq(IDS, ROWS, padding_idx=v), -(2**63)),
    "linear_method(tokens)": (lambda v: F.linear_method(v, 2, 2), 0),
    "linear_method(in_features)": (lambda v: F.linear_method(2, v, 2), 0),
    "linear_method(out_features)": (lambda v: F.linear_method(2, 2, v), 0),
    "linear_norms_sq_estimate(probes)": (lambda v: F.linear_norms_sq_estimate(ROWS, ROWS, probes=v), 2),
    "sketch(buckets)": (lambda v: F.sketch([X], [0], buckets=v, seed=0), 256),
    "sketch(seed)": (lambda v: F.sketch([X], [0], buckets=256, seed=v), 0),
    "tied_cross(padding_idx)": (lambda v: F.tied_cross(IDS, ROWS, ROWS, torch.ones(1, 6, 3), padding_idx=v), -(2**63)),
    "trajectory_step(count)": (step_of, 1),
    "activation_patterns(batch_size)": (lambda v: regions.activation_patterns(relu(), X, batch_size=v), 1),
    "Coverage(batch_size)": (lambda v: regions.Coverage(relu(), X, batch_size=v), 1),
    "slice_map(resolution)": (lambda v: slice_of(resolution=v), 2),
    "slice_map(batch_size)": (lambda v: slice_of(batch_size=v, resolution=3), 1),
    "intrinsic_dimension(neighbors)": (lambda v: theory.intrinsic_dimension(X, neighbors=v), 2),
}
#: Numbers of steps, which are those of windows: any integer is one, and lies in a window or does not.
STEPS = {name for name in integers() if re.search(r"\((first_step|last_step|tau)\)", name)}
#: What is taken where the least integer is refused for another reason.
TAKEN = {"Trajectory(memory_budget)": 10**6}


def test_every_integer_is_in_the_table() -> None:
    assert integers() - STEPS == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_integer_is_refused_by_name(name: str) -> None:
    call, least = CALLS[name]
    argument = re.search(r"\((\w+)\)", name)[1]
    for bad in (True, False, 1.5, "3", least - 1, [2]):
        with pytest.raises((TypeError, ValueError), match=rf"^{argument}: "):
            call(bad)
    if least > -(2**63):
        call(TAKEN.get(name, least))


@pytest.mark.parametrize("bad", [True, 1.5, "3"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (theory.sandwich, "first_step"),
        (theory.sandwich, "last_step"),
        (theory.steadiness, "first_step"),
        (theory.steadiness, "last_step"),
        (theory.bias_variance, "first_step"),
        (theory.bias_variance, "last_step"),
        (theory.bias_distance, "last_step"),
    ],
)
def test_what_is_no_step_is_refused_by_name(function: Callable[..., Any], name: str, bad: Any) -> None:
    others = ["bias"] if function.__name__.startswith("bias") else []
    with pytest.raises(ValueError, match=rf"^{name}: "):
        function(history(), *others, **{name: bad})


def test_the_names_of_a_choice_are_those_of_its_type() -> None:
    """Every Literal of a public signature stands in the message that refuses another name."""
    calls: dict[str, Callable[[Any], Any]] = {
        "Trajectory(mode)": of_trajectory("mode"),
        "Trajectory(source)": of_trajectory("source"),
        "PerSampleGradDots(loss_reduction)": of_dots("loss_reduction"),
        "PerSampleGradDots(on_unsupported)": of_dots("on_unsupported"),
        "PerSampleGradNorms(loss_reduction)": lambda v: lipcore.PerSampleGradNorms(loss_reduction=v),
        "PerSampleGradNorms(on_unsupported)": of_norms("on_unsupported"),
        "PerSampleGradNorms(batch_of_one)": of_norms("batch_of_one"),
        "Lipschitz(batch_of_one)": lambda v: lipcore.Lipschitz(batch_of_one=v),
        "Lipschitz(quantity)": lambda v: lipcore.Lipschitz(quantity=v),
        "local_lipschitz(quantity)": lambda v: lipcore.local_lipschitz(linear(), X, quantity=v),
        "clip_factors(missing)": lambda v: lipcore.clip_factors(X[:, 0], 1.0, missing=v),
        "Distribution.reduced(label)": lambda v: lipcore.Distribution().reduced(v),
        "Monitor(alarms)": lambda v: lipcore.Monitor(linear(), alarms=v),
        "watch(record_level)": lambda v: lipcore.watch(linear(), record_level=v),
        "SampleScores.top(by)": lambda v: lipcore.SampleScores().top(1, v),
        "linear_norms_sq(method)": lambda v: F.linear_norms_sq(ROWS, ROWS, method=v),
        "conv_norms_sq(method)": lambda v: of_conv(method=v),
    }
    found = {}
    for name, function in public():
        if not inspect.isroutine(function):
            continue
        for argument, kind in get_type_hints(function).items():
            names = [name for part in (kind, *get_args(kind)) for name in get_args(part) if isinstance(name, str)]
            if names and argument not in ("return", "methods"):
                found[f"{name}({argument})"] = list(dict.fromkeys(names))
    assert set(found) == set(calls)
    for name, names in found.items():
        with pytest.raises(ValueError, match="^" + re.search(r"\((\w+)\)", name)[1] + ": ") as caught:
            calls[name]("no such")
        assert all(repr(choice) in str(caught.value) for choice in names), name


def test_one_helper_says_which_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"^kind: expected 'a', 'b' or 'c', got 'd'$"):
        check_choice("kind", "d", ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"^kind: expected 'a' or None, got True; so there$"):
        check_choice("kind", True, ("a",), optional=True, why="; so there")
    check_choice("kind", None, ("a",), optional=True)
    with pytest.raises(ValueError, match=r"^n: expected an integer >= 2 or None, got 1$"):
        check_count("n", 1, 2, optional=True)


def test_no_room_checks_integers_by_hand() -> None:
    """A count that is checked by hand is checked in its own way."""
    root = Path(lipcore.__file__).parent
    by_hand = re.compile(r"isinstance\(\w+, int\)")
    for room in ("trajectory", "per_sample", "metric", "monitor", "functional"):
        for path in (root / room).rglob("*.py"):
            if path.name != "state.py":  # whose numbers come from files, with bounds of their own
                assert not by_hand.search(path.read_text(encoding="utf-8")), path
