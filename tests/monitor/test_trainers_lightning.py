"""lipcore with Lightning's Trainer: callbacks that make the Monitor from what the Trainer has."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from trainers import (
    NORM,
    PATH,
    Recorder,
    X,
    gradient_norm,
    loader,
    metrics,
    near,
    network,
    no_word_of_ours,
    run_both,
    vector,
)

from lipcore import Monitor, PerSampleGradNorms, Trajectory

pytestmark = pytest.mark.ci


def fit(module: Any, callback: Any, **arguments: Any) -> None:
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
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
    trainer.fit(module, loader())


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
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

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
    fit(Module(), callback, **arguments)
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


# ---- scalers, refusals, several optimizers

SCALE = 1024.0


def module_of(record: Recorder) -> Any:
    """A LightningModule whose training_step calls a module inside it, and overflows in its second step."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            record.step(self.net)

        def training_step(self, batch: Any, index: int) -> Any:
            self.overflows = index == 1 and record.overflow
            return mse_loss(self.net(batch[0]), batch[1]) * (math.inf if self.overflows else 1.0)

        def on_after_backward(self) -> None:
            if not self.overflows:
                record.before.append(gradient_norm(self.net) / record.scale)

        def on_train_batch_end(self, *_: Any) -> None:
            if not self.overflows:
                record.step(self.net)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

    return Module()


class Scaled(Recorder):
    scale, overflow = SCALE, True


def monitored(make: Callable[[Any, Any], Monitor]) -> Any:
    lightning = pytest.importorskip("lightning")

    class Callback(lightning.Callback):  # type: ignore[misc,name-defined]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.monitor = make(trainer, pl_module)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.window = self.monitor.compute()
            self.monitor.close()

    return Callback()


def mixed(scaler: torch.amp.GradScaler) -> Any:
    pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


SCALERS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "of the wrapper": lambda trainer, module: {"optimizer": module.optimizers()},
    "given": lambda trainer, module: {
        "optimizer": trainer.optimizers,
        "scaler": trainer.strategy.precision_plugin.scaler,
    },
}


@pytest.mark.parametrize("how", SCALERS)
def test_lightnings_scaler(how: str) -> None:
    # Its scale stays nearly what it is, so that the record beside the loop knows it.
    record = Scaled()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, backoff_factor=0.999999, growth_interval=1000)
    callback = monitored(lambda t, m: Monitor(m.net, metrics=[Trajectory()], window_steps=None, **SCALERS[how](t, m)))
    with no_word_of_ours():
        fit(module_of(record), callback, plugins=mixed(scaler))
    found = callback.window[PATH]
    assert callback.window.steps == record.steps == 10
    assert found.details["skipped_steps"] == 2
    assert found.path_length["total"].sum.value == near(record.path, 1e-5)
    assert found.grad_norm["total"].mean.value == near(sum(record.before) / 10, 1e-5)


def test_lightnings_scaler_that_nobody_passed() -> None:
    callback = monitored(lambda t, m: Monitor(m.net, t.optimizers, [Trajectory()], window_steps=None))
    with pytest.warns(RuntimeWarning, match=r"pass it as scaler= \(Lightning's: trainer.strategy.precision_plugin"):
        fit(module_of(Scaled()), callback, plugins=mixed(torch.amp.GradScaler("cpu", init_scale=SCALE)))


class Unscaled(Recorder):
    scale, overflow = 1.0, False


def test_a_lightning_module_whose_step_calls_a_module_inside() -> None:
    """It is refused by name, with the module that does work."""

    def both() -> list[Any]:
        return [Trajectory(), PerSampleGradNorms(loss_reduction="mean")]

    callback = monitored(lambda t, m: Monitor(m, t.optimizers, both(), window_steps=None))
    with pytest.raises(ValueError, match=r"pass the module inside it that the loop calls \('net'\?\)"):
        with pytest.warns(RuntimeWarning, match="lipcore stopped recording per_sample_grad_norm"):
            fit(module_of(Unscaled()), callback)
    record = Unscaled()
    callback = monitored(lambda t, m: Monitor(m.net, t.optimizers, both(), window_steps=None))
    with no_word_of_ours():
        fit(module_of(record), callback)
    assert callback.window[PATH].path_length["total"].sum.value == near(record.path, 1e-5)
    assert callback.window[NORM].norm["total"].mean.count == 2 * len(X)


@pytest.mark.parametrize("wrapped", [False, True])
def test_two_optimizers_of_lightning(wrapped: bool) -> None:
    """They step in turn, each with the other's parameters frozen, as in a GAN."""
    lightning = pytest.importorskip("lightning")

    class Pair(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            torch.manual_seed(0)
            self.maker, self.judge = nn.Linear(5, 4), nn.Linear(4, 1)
            self.record = Recorder([vector(self)])

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                self.manual_backward(mse_loss(self.judge(self.maker(batch[0])), batch[1]))
                optimizer.step()
                self.untoggle_optimizer(optimizer)
            self.record.step(self)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.maker.parameters(), lr=0.1), torch.optim.AdamW(self.judge.parameters(), lr=0.01)

    module, control = Pair(), Pair()
    callback = monitored(
        lambda t, m: Monitor(m, m.optimizers() if wrapped else t.optimizers, [Trajectory()], window_steps=None)
    )
    with no_word_of_ours():
        fit(control, lightning.Callback())
        fit(module, callback)
    assert torch.equal(vector(module), vector(control))
    assert callback.window.steps == control.record.steps
    assert callback.window[PATH].path_length["total"].sum.value == near(control.record.path, 1e-5)
