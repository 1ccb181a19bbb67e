"""Proofs that ranks run together: training goes on bit for bit, what is wrong is told on all ranks, and nothing is run
where they would not run the same."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from one_rank import one_rank
from prove_situations import NAME, Net, batch_of, made, monitored, situations, train
from rank_runs import Found, run_situations
from rank_situations import fsdp
from torch import nn

from lipcore import Lipschitz, Monitor, PerSampleGradDots, PerSampleGradNorms, TensorStats, Trajectory
from lipcore.alarms import Alarms
from lipcore.distributed.group import Group
from lipcore.monitor import prove

FLAWS = {
    "ddp_detaches": "samples are exchanged",
    "ddp_mixes": "parts at other samples",
    "fsdp2_detaches": "samples are exchanged",
    "fsdp2_mixes": "parts at other samples",
}
REFUSED = {
    "other_metrics": r"ValueError: monitor.prove\(\): rank 0 would prove per_sample_grad_norm, and rank 1 "
    r"per_sample_grad_norm, per_sample_grad_dot, so no rank has run anything",
    "apart": r"ValueError: group: the model's parameters are spread over ranks 0, 1, all of which have to",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Found:
    """What every rank has found; ranks are started once."""
    return run_situations(tmp_path_factory.mktemp("ranks"), "prove_situations", 2)


def test_every_situation_is_in_the_table() -> None:
    assert sorted(name for name, *_ in situations(2)) == sorted(
        ["ddp", "fsdp2", "on_rank_0_alone", "one_sample", "at_rest", "apart_after_alarms", *FLAWS, *REFUSED]
    )


@pytest.mark.ci
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_proof_leaves_no_trace_but_labels(found: Found, name: str) -> None:
    for numbers in found[name]:
        assert isinstance(numbers, dict), numbers
        all_of_them = [NAME, "per_sample_grad_dot", *(["lipschitz"] if name == "fsdp2" else [])]
        assert numbers["answer"] == numbers["second"] == dict.fromkeys(all_of_them, "")
        assert numbers["untouched"]
        assert numbers["weights"]
        assert numbers["windows"]
        without, with_proof = numbers["labels"]
        assert without == ["exact" if name == "ddp" else "heuristic"] * 3
        assert with_proof == [without[0], "exact", "exact"]


@pytest.mark.ci
@pytest.mark.parametrize("name", FLAWS)
def test_flaws_are_told_on_all_ranks(found: Found, name: str) -> None:
    first, second = found[name]
    assert isinstance(first, dict), first
    assert first["answer"] == second["answer"]
    assert FLAWS[name] in first["answer"]
    assert "rank 0: " in first["answer"]
    assert "; rank 1: " in first["answer"]
    assert FLAWS[name] in first["kept"]


@pytest.mark.ci
@pytest.mark.parametrize("name", REFUSED)
def test_refused(found: Found, name: str) -> None:
    for error in found[name]:
        assert isinstance(error, str), error
        assert re.search(REFUSED[name], error), error


@pytest.mark.ci
def test_what_one_rank_leaves_open_is_told_on_all(found: Found) -> None:
    """Rank 1 has a batch of one: no rank waits for passes that it does not run."""
    for numbers in found["one_sample"]:
        assert isinstance(numbers, dict), numbers
        assert "rank 0: statistics over the batch that the model may detach were not looked for" in numbers["answer"]
        assert "rank 1: a batch of one sample has nothing to prove" in numbers["answer"]
        assert not numbers["then"]


@pytest.mark.ci
def test_ranks_prove_together_where_some_are_at_rest(found: Found) -> None:
    for rank, numbers in enumerate(found["at_rest"]):
        assert isinstance(numbers, dict), numbers
        assert numbers["answers"] == [{NAME: ""}] * 2
        assert numbers["rests"] == [True, rank == 1]
        assert numbers["doubts"] == [""] * (2 - rank)


@pytest.mark.ci
def test_no_rank_waits_for_others_that_rest_after_an_alarm_of_its_own(found: Found) -> None:
    """And what was proved before stays so."""
    for numbers in found["apart_after_alarms"]:
        assert isinstance(numbers, dict), numbers
        assert numbers["True"] == ["", ""]
        for doubt in numbers["False"]:
            assert doubt.startswith("not proved: no batch of 4 samples was proved yet, and after alarms no pass of a")
            assert doubt.endswith("; call monitor.prove(batch) on all ranks")
        assert len(numbers["False"]) == 2
        assert numbers["seconds"] < 50  # what a rank waits for another in a proof


@pytest.mark.ci
def test_a_rank_that_does_not_come_is_named(found: Found) -> None:
    first, second = found["on_rank_0_alone"]
    assert isinstance(first, dict), first
    assert re.search(r"monitor.prove\(\): rank 0 has waited 0.5 s for rank 1 \(rank 1 never called it\)", first["said"])
    assert not second["said"]


def test_one_process() -> None:
    model = made()
    optimizer, monitor = monitored(model)
    random = torch.get_rng_state()
    assert monitor.prove(batch_of(0, 0)) == {NAME: ""}
    assert monitor.prove({"x": batch_of(0, 0)}) == {NAME: ""}
    assert "a batch of one sample has nothing to prove" in monitor.prove(batch_of(0, 0, 1))[NAME]
    assert torch.equal(random, torch.get_rng_state())
    assert not model.get_buffer("seen")
    assert all(p.grad is None for p in model.parameters())
    model(batch_of(0, 1)).square().mean().backward()
    optimizer.step()
    assert monitor.metrics[NAME].per_sample.isfinite().all()


def test_what_is_raised() -> None:
    model = made()
    _, monitor = monitored(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        monitor.prove(torch.ones(2, 3).double())
    assert monitor.prove(batch_of(0, 0)) == {NAME: ""}
    with pytest.raises(ValueError, match="metrics: there is none of single samples' gradients"):
        Monitor(made(), metrics=[Trajectory()]).prove(batch_of(0, 0))


@pytest.fixture
def sharded() -> Iterator[tuple[Net, Any, Monitor]]:
    """A sharded model whose one rank is this process, and that has trained for a window."""
    with one_rank():
        model: Any = fsdp(made(drops=False))
        optimizer, monitor = monitored(model)
        train(model, optimizer, 0, range(3))
        yield model, optimizer, monitor


@pytest.mark.parametrize("proves", [False, True])
def test_a_sharded_model_at_rest_is_proved_for_the_steps_after_an_alarm(
    sharded: tuple[Net, Any, Monitor], proves: bool
) -> None:
    model, optimizer, monitor = sharded
    monitor.close()
    alarms = Alarms(signals=["loss"], per_sample=2)
    metrics = [Trajectory(), PerSampleGradNorms(loss_reduction="mean")]
    optimizer, monitor = monitored(model, metrics, alarms=alarms)
    with monitor:
        train(model, optimizer, 0, range(2))
        if proves:
            assert monitor.prove(batch_of(0, 100)) == {NAME: ""}
        train(model, optimizer, 0, range(2, 3))
        assert metrics[1].rests
        assert monitor.history[0][NAME].norm["total"].mean.count == 0
        monitor.log_batch([1, 1, 2, 3], epoch=0)
        train(model, optimizer, 0, range(3, 6))
    assert alarms.samples[0].count == 8
    assert alarms.samples[0].doubt.startswith("" if proves else "not proved: no batch of 4 samples was proved yet")
    assert bool(alarms.samples[0].doubt) is not proves


def proved_windows(sharded: tuple[Net, Any, Monitor], steps: int) -> list[bool]:
    """Whether each of the next windows is proved."""
    model, optimizer, monitor = sharded
    before = monitor.history[-1].index
    train(model, optimizer, 0, range(steps))
    return [window[NAME].details["proved"] for window in monitor.history if window.index > before]


@pytest.mark.ci
def test_passes_that_do_something_else_after_a_proof(sharded: Any) -> None:
    """They detach statistics, which no further proof of a sharded model looks for: neither at once, nor in the passes
    that are proved again."""
    model, _, monitor = sharded
    assert monitor.prove(batch_of(0, 0)) == {NAME: ""}
    assert proved_windows(sharded, 66) == [True] * 22  # the passes of numbers 64 and 66 are in it
    model.detaches = True
    assert not any(proved_windows(sharded, 90))  # and number 128 in it


@pytest.mark.ci
def test_a_proof_of_other_operations_than_those_of_the_training(sharded: Any) -> None:
    model, _, monitor = sharded
    model.detaches = True  # as in training mode, say
    assert not any(proved_windows(sharded, 3))
    model.detaches = False
    assert monitor.prove(batch_of(0, 0)) == {NAME: ""}
    model.detaches = True
    assert not any(proved_windows(sharded, 6))


@pytest.mark.ci
def test_a_proof_that_is_broken_off_keeps_nothing(sharded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, monitor = sharded
    graphs = []

    def raises(module: Any, arguments: Any, output: torch.Tensor) -> None:
        graphs.append(weakref.ref(output.grad_fn))  # type: ignore[arg-type]
        if broken == "in its pass":
            raise OSError(broken)

    def met(*arguments: Any) -> Any:
        if broken == "after its pass" and "second part" in arguments[-1]["call"]:
            raise OSError("after its pass")
        return [arguments[-1]]

    monkeypatch.setattr(prove, "_met", met)
    for broken in ("in its pass", "after its pass"):
        with model.register_forward_hook(raises), pytest.raises(OSError, match=broken):
            monitor.prove(batch_of(0, 0))
        gc.collect()
        assert graphs.pop()() is None
        assert not any(proved_windows(sharded, 3))
    monkeypatch.undo()
    assert monitor.prove(batch_of(0, 0)) == {NAME: ""}
    assert all(proved_windows(sharded, 3))


def test_a_batch_of_another_size_and_mode() -> None:
    """A pass of a shape that was proved once, and does something else, is not proved by that."""
    model = made()
    optimizer, monitor = monitored(model)
    train(model, optimizer, 0, range(3))
    run = monitor.metrics[NAME]._capture.proofs  # type: ignore[attr-defined]
    model.eval()
    assert monitor.prove(batch_of(0, 0, 6)) == {NAME: ""}
    assert run.operations._known[6, 6]


@pytest.mark.parametrize("size", [4, 1])
def test_windows_of_other_metrics_do_not_notice(size: int) -> None:
    """Every window with proofs in it is the one without, with all that results tell beside; batches of one are served
    in other ways."""
    found = []
    for asks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)).double()
        metrics = [PerSampleGradNorms(loss_reduction="mean"), TensorStats(every_steps=1), Lipschitz(), Trajectory(),
                   PerSampleGradDots(reference={n: torch.ones_like(p) for n, p in model.named_parameters()},
                                     loss_reduction="mean", every_steps=2)]  # fmt: skip
        optimizer, monitor = monitored(model, metrics)
        for step in range(9):
            if asks and step in (1, 3, 5):
                assert monitor.prove(batch_of(1, step, 5))[NAME] == ""
            optimizer.zero_grad()
            loss = model(batch_of(0, step, size)).square().mean()
            if asks and step == 6:  # between its forward and its backward pass
                assert monitor.prove(batch_of(1, step, 5))[NAME] == ""
            loss.backward()
            optimizer.step()
        told = [
            {name: (str(each), each.details) for name, each in window.results.items()} for window in monitor.history
        ]
        found.append((told, [window.flat() for window in monitor.history]))
    for without, with_proofs in zip(*found, strict=True):
        assert repr(without) == repr(with_proofs)


def test_a_rank_at_another_call_is_named_whatever_that_says() -> None:
    """Headers of other calls have other words."""
    group = Group(None, (0, 1), 1)
    with pytest.raises(ValueError, match=r"monitor\.global_window\(\) \(rank 0\) and .* \(rank 1\)"):
        prove._check_alike([{"call": "monitor.global_window()"}, {"call": "prove", "metrics": []}], group)
