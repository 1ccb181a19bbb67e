"""lipcore with the trainers that people use, themselves: each number against one that was taken beside the loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from trainers import (
    NORM,
    PATH,
    Recorder,
    X,
    Y,
    gradient_norm,
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


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=4)


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


# ---- Lightning


def fitted(
    watch: bool,
    *,
    manual: str = "",
    every: int = 1,
    clip: float | None = None,
    given: str = "trainer.optimizers",
    calls: str = "net",
    **arguments: Any,
) -> tuple[Any, Recorder]:
    """Fit a LightningModule around the network.

    Args:
        manual: "" for automatic optimization, else how the module steps: plainly, or by a closure.
        every: micro-batches per step.
        given: what the Monitor gets as optimizer.
        calls: what training_step calls, and the Monitor watches: the module inside, or the LightningModule.
        arguments: of the Trainer.
    """
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    record, chosen = Recorder(), metrics()

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = network(), not manual

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def loss_of(self, x: Any, y: Any) -> Any:
            record.batch(self.net, x, y)
            return mse_loss((self.net if calls == "net" else self)(x), y)

        def training_step(self, batch: Any, index: int) -> Any:
            if not manual:
                return self.loss_of(*batch)
            optimizer = self.optimizers()
            if manual == "closure":

                def closure() -> Any:
                    loss = self.loss_of(*batch)
                    optimizer.zero_grad()
                    self.manual_backward(loss)
                    self.on_before_optimizer_step(optimizer)
                    return loss

                optimizer.step(closure=closure)
                record.used.append(gradient_norm(self.net))
                record.step(self.net)
                return None
            self.manual_backward(self.loss_of(*batch) / every)
            if (index + 1) % every == 0:
                self.on_before_optimizer_step(optimizer)
                if clip is not None:
                    self.clip_gradients(optimizer, clip, "norm")
                optimizer.step()
                record.used.append(gradient_norm(self.net))
                optimizer.zero_grad()
                record.step(self.net)
            return None

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if not manual or optimizer is self.optimizers():
                record.before.append(gradient_norm(self.net))

        def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
            super().optimizer_step(*arguments, **keywords)
            record.used.append(gradient_norm(self.net))
            record.step(self.net)

        def configure_optimizers(self) -> Any:
            return OPTIMIZERS["AdamW"](self.net.parameters())

    class Callback(lightning.Callback):  # type: ignore[misc,name-defined]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            record.step(pl_module.net)
            if watch:
                options = {
                    "trainer.optimizers": trainer.optimizers,
                    "trainer.strategy.optimizers": trainer.strategy.optimizers,
                    "pl_module.optimizers()": pl_module.optimizers(),
                }
                watched = pl_module.net if calls == "net" else pl_module
                self.monitor = Monitor(watched, options[given], chosen, window_steps=None)

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
            if watch:
                chosen[2].set_loss(loss)  # type: ignore[attr-defined]

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if watch:
                self.window = self.monitor.compute()
                self.monitor.close()

    callback = Callback()
    if not manual:
        arguments |= {"accumulate_grad_batches": every, "gradient_clip_val": clip}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **arguments,
    )
    module = Module()
    trainer.fit(module, loader())
    return callback.window if watch else None, record


GIVEN = ["trainer.optimizers", "trainer.strategy.optimizers", "pl_module.optimizers()"]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"every": 3},
        {"clip": 0.05},
        {"manual": "plain"},
        {"manual": "plain", "every": 2, "clip": 0.05},
        {"manual": "closure"},
        {"calls": "pl_module"},
    ],
    ids=str,
)
def test_lightning(settings: dict[str, Any], given: str) -> None:
    with no_word_of_ours():
        run_both(lambda watch: fitted(watch, given=given, **settings))


def test_lightning_in_bfloat16() -> None:
    with no_word_of_ours():
        run_both(lambda watch: fitted(watch, every=2, precision="bf16-mixed"), rel=2e-2)
