"""Per-sample norms in real training loops: nothing changes, and every sample of every step counts once."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import Graph
from per_sample_models import MODELS, Transformer, assert_equal, made, mlp, sum_loss, tokens, train, weights
from per_sample_oracle import assert_norms, check, norms_sq, samples_of, to_float64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import Monitor, PerSampleGradNorms

each_model = pytest.mark.parametrize(("build", "inputs"), list(MODELS.values()), ids=list(MODELS))
SIZES = pytest.mark.parametrize("size", [1, 4])


def totals(model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor] = sum_loss) -> Tensor:
    return torch.stack(list(norms_sq(model, samples_of((x,), len(x)), loss).values())).sum(0).sqrt()


# ---- nothing changes


@SIZES
@pytest.mark.parametrize("options", [{}, {"every_steps": 2}, {"normalized": True}], ids=str)
@each_model
def test_training_is_bitwise_unchanged(build: Any, inputs: Any, options: dict[str, Any], size: int) -> None:
    def loss(output: Tensor) -> Tensor:
        return sum_loss(output.flatten(1).mean(1, keepdim=True) if "normalized" in options else output)

    def run(watched: bool) -> list[Tensor]:
        model = Graph(lambda m, x: m.body(x).flatten(1).mean(1), body=made(build))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        metric = PerSampleGradNorms(loss_reduction="mean", **options)
        monitor = Monitor(model, optimizer, metrics=[metric]) if watched else None
        torch.manual_seed(1)
        train(model, optimizer, [inputs(size) for _ in range(5)], lambda y: y.sin().sum())
        found = [*weights(model), *(p.grad for p in model.parameters()), torch.get_rng_state()]
        if monitor is not None:
            count = monitor.compute()["per_sample_grad_norm"].norm["total"].mean.count
            assert count == size * (3 if "every_steps" in options else 5)
            monitor.close()
        return found

    assert_equal(run(True), run(False))


@each_model
def test_the_outputs_and_the_gradients_of_inputs_are_bitwise_unchanged(build: Any, inputs: Any) -> None:
    model, x = made(build), inputs(3)
    found = []
    if x.is_floating_point():
        x.requires_grad_()
    for watched in (False, True):
        metric = PerSampleGradNorms(model, loss_reduction="sum") if watched else None
        model.zero_grad()
        output = model(x)
        sum_loss(output).backward()
        found.append([output.detach(), *([x.grad] if x.is_floating_point() else []), *weights(model)])
        x.grad = None
        if metric is not None:
            metric.close()
    assert_equal(*found)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_full_backward_hooks_of_someone_else() -> None:
    """They see the proof's passes too, and then the training's."""

    def run(watched: bool) -> list[Tensor]:
        model = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
        seen: list[Tensor] = []
        for layer in model:
            layer.register_full_backward_hook(lambda module, grads_in, grads: seen.extend(g.clone() for g in grads))
        x = torch.linspace(-1, 1, 15).reshape(3, 5).requires_grad_()
        if watched:
            expected = norms_sq(made(lambda: nn.Sequential(*model)), samples_of((x.detach(),), 3), sum_loss)
            seen.clear()
            with PerSampleGradNorms(model, loss_reduction="sum") as metric:
                sum_loss(model(x)).backward()
                assert_norms(metric, expected)
        else:
            sum_loss(model(x)).backward()
        return [*seen[-3:], *(p.grad for p in model.parameters())]

    assert_equal(run(True), run(False))


ACTIVATIONS = {
    "relu_": lambda y: y.relu_(),
    "mul_": lambda y: y.mul_(2).add_(1),
    "slice": lambda y: y[:, :2].clamp_(min=0),
    "chunk": lambda y: y.chunk(2, 1)[0] * 2,
    "masked_fill_": lambda y: y.masked_fill_(y < 0, 0.5),
    "relu_ on 3-d": lambda y: y.unsqueeze(1).expand(-1, 2, -1).relu(),
    "inplace dropout in eval": lambda y: nn.functional.dropout(y, 0.5, training=False, inplace=True),
}


@SIZES
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(5, 6), lambda: nn.LayerNorm(5), lambda: nn.PReLU()], ids="lnp")
def test_in_place_activations(layer: Any, name: str, size: int) -> None:
    model = made(
        lambda: Graph(lambda m, x: ACTIVATIONS[name](m.layer(m.first(x))), first=nn.Linear(5, 5), layer=layer())
    )
    check(model, (torch.randn(size, 5),), loss=sum_loss)


# ---- accumulation, scalers, autocast


@pytest.mark.parametrize("sizes", [(3, 3), (2, 3, 1), (1, 1, 1)], ids=str)
@each_model
def test_accumulation(build: Any, inputs: Any, sizes: tuple[int, ...]) -> None:
    """One record per micro-batch and sample, whatever has accumulated before."""
    model = made(build)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    metric = PerSampleGradNorms(loss_reduction="mean", scale=1 / len(sizes))
    expected = []
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            for size in sizes:
                x = inputs(size)
                expected.append(totals(model, x))
                (sum_loss(model(x)) / size / len(sizes)).backward()
                assert torch.allclose(metric.per_sample, expected[-1], rtol=1e-5)
            optimizer.step()
        result = monitor.compute()["per_sample_grad_norm"].norm["total"]
    every = torch.cat(expected)
    assert result.mean.count == len(every)
    assert result.mean.value == pytest.approx(float(every.mean()), rel=1e-5)
    assert result.max.value == pytest.approx(float(every.max()), rel=1e-5)


def test_a_scale_by_hand() -> None:
    model, x = made(mlp), torch.randn(4, 5)
    with PerSampleGradNorms(model, loss_reduction="mean", scale=1024.0) as metric:
        (1024 * sum_loss(model(x)) / 4).backward()
        assert torch.allclose(metric.per_sample, totals(model, x), rtol=1e-5)


@SIZES
def test_a_scaler_and_its_skipped_steps(size: int) -> None:
    model = made(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    metric = PerSampleGradNorms(loss_reduction="mean")
    expected = []
    with Monitor(model, optimizer, metrics=[metric], scaler=scaler) as monitor:
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(size, 5)
            overflow = float("inf") if step == 3 else 1.0
            wanted = totals(model, x)
            scaler.scale(overflow * sum_loss(model(x)) / size).backward()
            if step == 3:
                assert not metric.per_sample.isfinite().any()
            else:
                assert torch.allclose(metric.per_sample, wanted, rtol=1e-5)
                expected.append(wanted)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
        result = monitor.compute()["per_sample_grad_norm"]
    every = torch.cat(expected)
    assert result.norm["total"].mean.count == len(every)
    assert result.norm["total"].mean.value == pytest.approx(float(every.mean()), rel=1e-5)
    assert result.norm["total"].missing.value == 0
    assert result.details["dropped_samples"] == size


def test_a_scaler_of_a_metric_that_stands_alone() -> None:
    model, x = made(mlp), torch.randn(4, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with PerSampleGradNorms(model, loss_reduction="mean", scaler=scaler) as metric:
        scaler.scale(sum_loss(model(x)) / 4).backward()
        assert torch.allclose(metric.per_sample, totals(model, x), rtol=1e-5)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    with PerSampleGradNorms(model, loss_reduction="mean", scaler=disabled) as metric:
        disabled.scale(sum_loss(model(x)) / 4).backward()
        assert torch.allclose(metric.per_sample, totals(model, x), rtol=1e-5)


@SIZES
@each_model
def test_autocast(build: Any, inputs: Any, size: int) -> None:
    """bfloat16 activations, float32 parameters: as far as the gradients themselves are right."""

    def gradients(model: nn.Module, x: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        sum_loss(output.float()).backward()

    model = made(build)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(3):
            x = inputs(size)
            wanted = []
            for row in x.split(1):
                twin = made(build)
                twin.load_state_dict(model.state_dict())
                gradients(twin, row)
                wanted.append(sum(p.grad.double().square().sum() for p in twin.parameters()))
            model.zero_grad()
            gradients(model, x)
            assert torch.allclose(metric.per_sample, torch.stack(wanted).sqrt(), rtol=2e-2)


@SIZES
def test_a_model_in_bfloat16(size: int) -> None:
    model, x = made(mlp).bfloat16(), torch.randn(size, 5).bfloat16()
    expected = totals(model, x)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(x).float()).backward()
            assert metric.per_sample.dtype == torch.float64
            assert torch.allclose(metric.per_sample, expected, rtol=3e-2)


@SIZES
def test_optimizers_that_step_inside_the_backward_pass(size: int) -> None:
    """They take the gradients away, and parameters move while others still wait for theirs."""
    model = made(mlp)
    optimizers = {p: torch.optim.SGD([p], lr=1e-3) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(4):
            x = torch.randn(size, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            sum_loss(model(x)).backward()
            assert_norms(metric, expected)


# ---- activation checkpointing


class Checkpointed(nn.Module):
    """Blocks, each under a checkpoint, between ordinary layers."""

    def __init__(self, reentrant: bool, build: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(build() for _ in range(depth))
        self.reentrant, self.enabled = reentrant, True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        for block in self.blocks:
            if self.enabled and torch.is_grad_enabled() and x.dtype != torch.float64:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        y: Tensor = self.last(x)
        return y


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 6), nn.Dropout(0.0))


def shared_block() -> Callable[[], nn.Module]:
    one = block()
    return lambda: one


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.linear(x).tanh())
        return y


BLOCKS: dict[str, Callable[[], Callable[[], nn.Module]]] = {
    "own": lambda: block,
    "shared": shared_block,
    "called twice inside": lambda: Twice,
}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpoints(reentrant: bool, blocks: str, size: int) -> None:
    model = made(lambda: Checkpointed(reentrant, BLOCKS[blocks]()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = PerSampleGradNorms(loss_reduction="mean")
    every = []
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for _ in range(4):
            x = torch.randn(size, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            every.append(torch.stack(list(expected.values())).sum(0).sqrt())
            train(model, optimizer, [x])
            assert_norms(metric, expected)
        result = monitor.compute()["per_sample_grad_norm"].norm["total"]
        assert result.mean.count == 4 * size
        assert result.mean.value == pytest.approx(float(torch.cat(every).mean()), rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpoints_in_accumulated_and_interleaved_passes(reentrant: bool) -> None:
    model = made(lambda: Checkpointed(reentrant, block))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for size in (3, 1, 2):
            xs = [torch.randn(size, 5) for _ in range(2)]
            losses = [sum_loss(model(x)) for x in xs]
            with torch.no_grad():
                model(xs[0])
            for x, loss in zip(xs, losses, strict=True):
                loss.backward()
                found, broken = metric.per_sample, metric.broken
                assert torch.allclose(found, totals(model, x), rtol=1e-5) or (found.isnan().all() and broken)
                if not reentrant:
                    assert found.isfinite().all()
        model.zero_grad()
        (sum_loss(model(xs[0])) + sum_loss(model(xs[1]))).backward()
        assert torch.allclose(metric.per_sample, totals(model, xs[0]), rtol=1e-5) or metric.broken


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointed_training_is_bitwise_unchanged(reentrant: bool) -> None:
    def run(watched: bool) -> list[Tensor]:
        model = made(lambda: Checkpointed(reentrant, block))
        optimizer = torch.optim.Adam(model.parameters())
        metric = PerSampleGradNorms(loss_reduction="mean")
        monitor = Monitor(model, optimizer, metrics=[metric]) if watched else None
        torch.manual_seed(3)
        train(model, optimizer, [torch.randn(size, 5) for size in (3, 3, 1, 1, 2)])
        if monitor is not None:
            monitor.close()
        return weights(model)

    assert_equal(run(True), run(False))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpoints_in_steps_that_are_not_recorded(reentrant: bool, size: int) -> None:
    """Losses that somebody keeps keep the graphs of recorded passes, too."""
    model = made(lambda: Checkpointed(reentrant, block))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    metric = PerSampleGradNorms(loss_reduction="sum", every_steps=3)
    losses, kept = [], []
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for step in range(7):
            x = torch.randn(size, 5)
            kept.append(model(x))  # never comes back
            expected = totals(model, x)
            optimizer.zero_grad()
            losses.append(sum_loss(model(x)))
            losses[-1].backward()
            if step % 3 == 0:
                assert torch.allclose(metric.per_sample, expected, rtol=1e-5)
            optimizer.step()
        assert monitor.compute()["per_sample_grad_norm"].norm["total"].mean.count == 3 * size


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_an_error_under_a_checkpoint_does_not_reach_the_training(reentrant: bool) -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.c(self.b(torch.cat([self.a(x)] * 2)).tanh()[: len(x)])
            return y

    def run(watched: bool) -> list[Tensor]:
        model = made(lambda: Checkpointed(reentrant, Flattened))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        metric = PerSampleGradNorms(loss_reduction="sum", max_replay_bytes=0)
        monitor = Monitor(model, optimizer, metrics=[metric]) if watched else None
        torch.manual_seed(3)
        data = [torch.randn(3, 5) for _ in range(3)]
        if monitor is None:
            train(model, optimizer, data)
            return weights(model)
        with pytest.warns(RuntimeWarning, match="expected 3 samples"):
            train(model, optimizer, data)
        with pytest.raises(ValueError, match=r"module 'blocks.[02].b' \(Linear\): expected 3 samples"):
            monitor.close()
        return weights(model)

    assert_equal(run(True), run(False))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_the_whole_model_under_a_checkpoint(reentrant: bool, size: int) -> None:
    """A reentrant one runs the model without grad first: there is no pass, which is said and not guessed."""
    model, x = made(mlp), torch.randn(size, 5)
    expected = norms_sq(model, samples_of((x,), size), sum_loss)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(3):
            model.zero_grad()
            sum_loss(checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)).backward()
            if not reentrant:
                assert_norms(metric, expected)
        if reentrant:
            with pytest.raises(RuntimeError, match="no backward pass was recorded yet"):
                _ = metric.per_sample


@contextmanager
def counted_saved_tensors() -> Iterator[list[int]]:
    """Bytes of tensors that autograd keeps, views of one storage once."""
    sizes: list[int] = []
    seen: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@each_model
def test_nothing_more_is_kept_for_the_backward_pass(build: Any, inputs: Any) -> None:
    """The activations that a layer needs for its own backward pass, and no others; embeddings keep indices."""
    model, x = made(build), inputs(64)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "zeros"  # in the others torch keeps the padded input, lipcore the input
    kept = []
    for watched in (False, True):
        metric = PerSampleGradNorms(model, loss_reduction="sum") if watched else None
        with counted_saved_tensors() as sizes:
            output = model(x)
        kept.append(sum(sizes))
        del output
        if metric is not None:
            metric.close()
    assert kept[1] <= 1.05 * kept[0]


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpoints_still_free_their_activations(reentrant: bool) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            alive.append(weakref.ref(h))
            h = h.tanh()
            alive.append(weakref.ref(h))
            y: Tensor = self.b(h)
            return y

    model = made(lambda: Checkpointed(reentrant, Watched))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        output = model(torch.randn(4, 5))
        gc.collect()
        assert len(alive) >= 6
        assert all(ref() is None for ref in alive)
        sum_loss(output).backward()
        assert metric.per_sample.isfinite().all()


def test_nothing_stays_alive_after_a_backward_pass() -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum"):
        gc.disable()
        try:
            for size in (3, 1, 1, 3):
                x = torch.randn(size, 5)
                output = model(x)
                sum_loss(output).backward()
                model.zero_grad()
                alive = [weakref.ref(x), weakref.ref(output)]
                del x, output
                assert [ref() for ref in alive] == [None, None]
        finally:
            gc.enable()


def test_an_abandoned_graph_is_freed_at_once() -> None:
    model = made(Transformer)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        gc.disable()
        try:
            for _ in range(2):
                output = model(tokens(4))
                assert metric._capture is not None
                alive = weakref.ref(metric._capture.passes._last)
                del output
                model(tokens(4))
                assert alive() is None
        finally:
            gc.enable()


# ---- phases of a training


def test_freezing_and_unfreezing_in_mid_run() -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for frozen in (False, True, False, True):
            model[0].requires_grad_(not frozen)
            for size in (3, 1):
                x = torch.randn(size, 5)
                model.zero_grad()
                sum_loss(model(x)).backward()
                assert torch.allclose(metric.per_sample, totals(model, x), rtol=1e-5)
                assert bool(metric.per_parameter["0.weight"].isnan().all()) == frozen
        assert metric.per_parameter.reasons["0.weight"] == "is frozen"


def test_a_model_that_is_frozen_for_a_while_is_not_recorded() -> None:
    """As a discriminator is, while its generator is trained through it."""
    model, generator = made(mlp), nn.Linear(2, 5)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for size in (3, 1, 1):
            x = torch.randn(size, 5)
            model.zero_grad()
            sum_loss(model(x)).backward()
            expected = totals(model, x)
            model.requires_grad_(False)
            sum_loss(model(generator(torch.randn(size + 1, 2)))).backward()
            model.requires_grad_(True)
            assert torch.allclose(metric.per_sample, expected, rtol=1e-5)
        assert metric._capture is not None
        assert metric._capture.records == 3


@SIZES
def test_a_frozen_parameter_that_is_trained_later_is_an_error(size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)
    model[0].requires_grad_(False)
    metric = PerSampleGradNorms(loss_reduction="sum")
    monitor = Monitor(model, metrics=[metric])
    sum_loss(model(x)).backward()
    model[0].requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="stopped recording"):
        sum_loss(model(x)).backward()
    with pytest.raises(ValueError, match=r"parameter '0.weight' was frozen .* Monitor.rebind"):
        monitor.compute()
    monitor.rebind()
    for _ in range(3):
        model.zero_grad()
        sum_loss(model(x)).backward()
        assert_norms(metric, norms_sq(model, samples_of((x,), size), sum_loss))
        monitor.step()
    result = monitor.compute()["per_sample_grad_norm"]
    assert result.norm["0"].mean.count == 3 * size
    monitor.close()


@SIZES
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_that_goes_into_train_mode_is_an_error(affine: bool, size: int) -> None:
    model = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 3))).eval()
    with pytest.raises(ValueError, match=r"module '1' \(BatchNorm1d\): normalises by the statistics of the batch"):
        with PerSampleGradNorms(model, loss_reduction="sum") as metric:
            sum_loss(model(torch.randn(2, 5))).backward()
            assert metric.per_sample.isfinite().all()
            model.train()
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(model(torch.randn(size + 1, 5))).backward()


def test_float64_arguments_reach_the_oracle() -> None:
    assert to_float64(torch.ones(1)).dtype == torch.float64


@pytest.mark.parametrize("fused", [False, True])
def test_an_in_place_activation_behind_a_linear_that_returns_a_view(fused: bool) -> None:
    """A Linear of three dimensions does: its output is passed on without a copy, and may be overwritten."""
    model = made(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)))
    x = torch.randn(2, 50, 5)
    plain = copy.deepcopy(model)
    sum_loss(plain(x)).backward()
    expected = norms_sq(model, samples_of((x,), 2), sum_loss)
    with PerSampleGradNorms(model, loss_reduction="sum", fused=fused) as metric:
        sum_loss(model(x)).backward()
        assert_norms(metric, expected)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5 if fused else 0, atol=1e-6 if fused else 0)
