"""lipcore in loops whose model and optimizer accelerate and Fabric wrap; the truth was taken beside the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss
from trainers import (
    LAMBDA,
    NORM,
    PATH,
    Recorder,
    gradient_norm,
    loader,
    metrics,
    near,
    network,
    no_word_of_ours,
    run_both,
    vector,
)

from lipcore import Monitor

pytestmark = pytest.mark.ci
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


# ---- accelerate


def accelerated(
    watch: bool,
    *,
    made: str,
    precision: str,
    every: int,
    clip: float | None = None,
    early: bool = False,
    **settings: Any,
) -> tuple[Any, Recorder]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    trainer = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=every)
    model = network()
    optimizer = OPTIMIZERS[made](model.parameters())
    plan = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    chosen = metrics(**settings)
    record, monitor = Recorder([vector(model)]), None
    if watch and early:
        monitor = Monitor(model, optimizer, chosen, window_steps=None)
    called, optimizer, plan, data = trainer.prepare(model, optimizer, plan, loader())
    if watch and not early:
        monitor = Monitor(called, optimizer, chosen, window_steps=None)
    for _ in range(2):
        for x, y in data:
            record.batch(model, x, y)
            with trainer.accumulate(called):
                loss = mse_loss(called(x), y)
                if watch:
                    chosen[2].set_loss(loss)  # type: ignore[attr-defined]
                trainer.backward(loss)
                if trainer.sync_gradients:
                    record.before.append(gradient_norm(model))
                    if clip is not None:
                        trainer.clip_grad_norm_(called.parameters(), clip)
                    record.used.append(gradient_norm(model))
                optimizer.step()
                plan.step()
                optimizer.zero_grad()
                if trainer.sync_gradients:
                    record.step(model)
    if monitor is None:
        return None, record
    window = monitor.compute()
    monitor.close()
    return window, record


@pytest.mark.parametrize("early", [False, True], ids=["prepared", "before prepare"])
@pytest.mark.parametrize("source", ["difference", "optimizer", "snapshot"])
@pytest.mark.parametrize(("made", "every", "clip"), [("SGD", 1, None), ("AdamW", 2, 0.05), ("SGD", 3, None)], ids=str)
def test_accelerate(made: str, every: int, clip: float | None, source: str, early: bool) -> None:
    with no_word_of_ours():
        run_both(
            lambda watch: accelerated(
                watch, made=made, precision="no", every=every, clip=clip, early=early, source=source
            )
        )


@pytest.mark.parametrize("early", [False, True], ids=["prepared", "before prepare"])
def test_accelerate_in_bfloat16(early: bool) -> None:
    with no_word_of_ours():
        run_both(lambda watch: accelerated(watch, made="AdamW", precision="bf16", every=2, early=early), rel=2e-2)


def test_accelerates_scheduler_is_no_optimizer() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = network()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    trainer = accelerate.Accelerator(cpu=True)
    called, optimizer, plan = trainer.prepare(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2))
    with pytest.raises(TypeError, match=r"AcceleratedScheduler is a .*\(scheduler\.optimizers\)"):
        Monitor(called, plan)
    with no_word_of_ours(), Monitor(called, plan.optimizers, window_steps=None) as monitor:
        for x, y in loader():
            trainer.backward(mse_loss(called(x), y))
            optimizer.step()
            optimizer.zero_grad()
        assert monitor.compute().steps == 6  # type: ignore[union-attr]


def scaled(watch: bool, *, fused: bool) -> tuple[Any, Recorder]:
    """accelerate's optimizer with a GradScaler, which it makes on GPUs only; two of six steps overflow."""
    pytest.importorskip("accelerate").Accelerator(cpu=True)
    from accelerate.optimizer import AcceleratedOptimizer

    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused), scaler=scaler)
    record, chosen = Recorder([vector(model)]), metrics()
    monitor = Monitor(model, optimizer, chosen, window_steps=None) if watch else None
    for i, (x, y) in enumerate(loader()):
        loss, overflows = mse_loss(model(x), y), i in (1, 4)
        if watch:
            chosen[2].set_loss(loss)  # type: ignore[attr-defined]
        scaler.scale(loss * (math.inf if overflows else 1.0)).backward()
        if not overflows:
            record.batch(model, x, y)
            record.before.append(gradient_norm(model) / scaler.get_scale())
        optimizer.step()
        optimizer.zero_grad()
        if not overflows:
            record.step(model)
    record.used = record.before
    if monitor is None:
        return None, record
    window = monitor.compute()
    monitor.close()
    return window, record


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_accelerate_skips(fused: bool) -> None:
    with no_word_of_ours():
        _, control = scaled(False, fused=fused)
        window, watched = scaled(True, fused=fused)
    assert torch.equal(watched.points[-1], control.points[-1])
    assert window.steps == 4
    assert window[PATH].details["skipped_steps"] == 2
    assert window[PATH].path_length["total"].sum.value == near(control.path, 1e-5)
    assert window[PATH].grad_norm["total"].mean.value == near(sum(control.before) / 4, 1e-6)
    expected = control.sample_norms()
    assert window[NORM].norm["total"].mean.count == len(expected)
    assert window[NORM].norm["total"].mean.value == near(float(expected.mean()), 2e-5)


# ---- Fabric


def fabricated(watch: bool, precision: str, every: int, inside: bool) -> tuple[Any, Recorder]:
    pytest.importorskip("lightning")
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    model = network()
    called, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    record, chosen = Recorder([vector(model)]), metrics()
    monitor = Monitor(model if inside else called, optimizer, chosen, window_steps=None) if watch else None
    for i, (x, y) in enumerate(2 * list(loader())):
        record.batch(model, x, y)
        loss = mse_loss(called(x), y)
        if watch:
            chosen[2].set_loss(loss)  # type: ignore[attr-defined]
        fabric.backward(loss / every)
        if (i + 1) % every == 0:
            record.before.append(gradient_norm(model))
            fabric.clip_gradients(called, optimizer, max_norm=0.1)
            record.used.append(gradient_norm(model))
            optimizer.step()
            optimizer.zero_grad()
            record.step(model)
    if monitor is None:
        return None, record
    window = monitor.compute()
    monitor.close()
    return window, record


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("precision", "rel"), [("32-true", 2e-5), ("bf16-mixed", 2e-2)])
def test_fabric(precision: str, rel: float, inside: bool) -> None:
    with no_word_of_ours():
        window = run_both(lambda watch: fabricated(watch, precision, 2, inside), rel)
    assert window[LAMBDA].details["first_layer"] == "0"
    assert "0.weight" in window[PATH].path_length
