"""Per-sample norms of compiled models: the same numbers, no graph break, bounded recompiles, the same training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_rank import one_rank
from per_sample_models import Transformer, assert_equal, cnn, floats, made, mlp, sum_loss, tokens, train, weights
from per_sample_oracle import assert_norms, norms_sq, samples_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import Monitor, PerSampleGradNorms

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


def embedded() -> nn.Module:
    return Transformer(tied=False)


COMPILED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, floats(5)),
    "cnn": (cnn, floats(1, 6, 6)),
    "transformer": (embedded, tokens),
}
each_model = pytest.mark.parametrize(("build", "inputs"), list(COMPILED.values()), ids=list(COMPILED))


def compare(
    model: nn.Module, inner: nn.Module, inputs: Callable[[int], Tensor], sizes: tuple[int, ...], **options: Any
) -> None:
    optimizer = torch.optim.SGD(inner.parameters(), lr=1e-4)
    metric = PerSampleGradNorms(loss_reduction="mean", **options)
    every = []
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for size in sizes:
            x = inputs(size)
            expected = norms_sq(inner, samples_of((x,), size), sum_loss)
            every.append(torch.stack(list(expected.values())).sum(0).sqrt())
            train(model, optimizer, [x])
            assert_norms(metric, expected)
            with torch.no_grad():
                model(x)
        result = monitor.compute()["per_sample_grad_norm"].norm["total"]
        assert result.mean.count == sum(sizes)
        assert result.mean.value == pytest.approx(float(torch.cat(every).mean()), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("transformer", "cnn"))]
)
def test_aot_eager(name: str, fresh_dynamo: Any) -> None:
    """Sizes become symbols with the second one."""
    build, inputs = COMPILED[name]
    inner = made(build)
    compare(torch.compile(inner, fullgraph=True, backend="aot_eager"), inner, inputs, (4, 3, 6, 1))
    assert sum(fresh_dynamo["graph_break"].values()) == 0
    assert fresh_dynamo["stats"]["unique_graphs"] <= 6  # training and evaluation: this size, any size, size one


@pytest.mark.ci
def test_inductor(fresh_dynamo: Any) -> None:
    inner = made(mlp)
    compare(torch.compile(inner, fullgraph=True), inner, floats(5), (4, 4))
    assert sum(fresh_dynamo["graph_break"].values()) == 0


@pytest.mark.slow
@each_model
def test_inductor_on_every_model(build: Any, inputs: Any, fresh_dynamo: Any) -> None:
    inner = made(build)
    compare(torch.compile(inner, fullgraph=True), inner, inputs, (4, 4, 3, 1, 6))
    assert sum(fresh_dynamo["graph_break"].values()) == 0


@pytest.mark.ci
def test_training_is_bitwise_unchanged_and_recompiles_are_bounded(fresh_dynamo: Any) -> None:
    graphs = {}

    def run(watched: bool, every_steps: int = 1) -> list[Tensor]:
        torch._dynamo.reset()
        fresh_dynamo.clear()
        inner = made(mlp)
        model = torch.compile(inner, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(inner.parameters(), lr=1e-2)
        metric = PerSampleGradNorms(loss_reduction="mean", every_steps=every_steps)
        monitor = Monitor(model, optimizer, metrics=[metric]) if watched else None
        torch.manual_seed(1)
        train(model, optimizer, [torch.randn(size, 5) for size in (4, 4, 3, 5, 6, 2, 4)])
        if monitor is not None:
            count = monitor.compute()["per_sample_grad_norm"].norm["total"].mean.count
            assert count == (28 if every_steps == 1 else 4 + 3 + 6 + 4)
            monitor.close()
        graphs[watched, every_steps] = fresh_dynamo["stats"]["unique_graphs"]
        return weights(inner)

    plain = run(False)
    assert_equal(run(True), plain)
    assert_equal(run(True, 2), plain)
    assert graphs[True, 1] == graphs[False, 1]
    assert graphs[True, 2] <= 2 * graphs[False, 1]  # with taps and without


@pytest.mark.ci
def test_accumulation_interleaved_passes_and_autograd_grad(fresh_dynamo: Any) -> None:
    inner = made(mlp)
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        xs = [torch.randn(3, 5) for _ in range(3)]
        expected = [norms_sq(inner, samples_of((x,), 3), sum_loss) for x in xs]
        for x, wanted in zip(xs, expected, strict=True):
            sum_loss(model(x)).backward()
            assert_norms(metric, wanted)
        losses = [sum_loss(model(x)) for x in xs]
        torch.autograd.grad(sum_loss(model(xs[1])), list(inner.parameters()))
        assert "autograd.grad" in metric.broken
        assert bool(metric.per_sample.isnan().all())
        for i in (1, 0, 2):
            losses[i].backward()
            assert_norms(metric, expected[i])
        assert metric._capture is not None
        assert metric._capture.records == 6


@pytest.mark.ci
def test_an_evaluation_between_forward_and_backward(fresh_dynamo: Any) -> None:
    inner = made(mlp)
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        x = torch.randn(3, 5)
        loss = sum_loss(model(x))
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                model(torch.randn(7, 5))
        loss.backward()
        assert_norms(metric, norms_sq(inner, samples_of((x,), 3), sum_loss))


def test_normalized_and_methods(fresh_dynamo: Any) -> None:
    inner = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))
    model, x = torch.compile(inner, fullgraph=True, backend="aot_eager"), torch.randn(3, 5)
    found = []
    for watched in (inner, model):
        with PerSampleGradNorms(watched, loss_reduction="sum", normalized=True, methods={"0": "direct"}) as metric:
            inner.zero_grad()
            watched(x).square().sum().backward()
            found.append(metric.normalized)
    assert sorted(found[0]) == sorted(found[1]) == ["0", "2"]
    for layer in found[0]:
        assert torch.allclose(found[0][layer], found[1][layer], rtol=1e-6)


@pytest.mark.ci
def test_other_regions_are_named_until_a_pass_with_them_is_proved(fresh_dynamo: Any) -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.doubles = nn.Linear(5, 4), nn.Linear(4, 2), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(self.body(x).tanh())
            return 2 * y if self.doubles else y

    inner = made(Flagged)
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    keeps = torch._functorch.config.patch(donated_buffer=False)  # else some regions allow no proof
    with keeps, PerSampleGradNorms(model, loss_reduction="sum") as norms:
        found = []
        for doubles in (False, True, True):
            inner.doubles = doubles
            sum_loss(model(torch.ones(4, 5))).backward()
            found.append(norms.unproved)
    assert found[0] == found[2] == ""
    assert found[1].startswith("no pass that ran these compiled regions was proved yet")


def test_there_is_no_estimate() -> None:
    with pytest.raises(ValueError, match="methods: a compiled model has no 'estimate'"):
        PerSampleGradNorms(torch.compile(nn.Linear(2, 2)), loss_reduction="sum", methods={"model": "estimate"})


@pytest.mark.ci
def test_packed_sequences_with_batch_dim(fresh_dynamo: Any) -> None:
    """Sequence first: [T, B, features]."""
    inner = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)))
    model, x = torch.compile(inner, fullgraph=True, backend="aot_eager"), torch.randn(6, 3, 5)

    def loss(y: Tensor) -> Tensor:
        return (y.sin() * torch.arange(1.0, 3.0)).sum()

    expected = norms_sq(inner, samples_of((x,), 3, 1), loss)
    with PerSampleGradNorms(model, loss_reduction="sum", batch_dim=1) as metric:
        loss(model(x)).backward()
        assert_norms(metric, expected)


def test_a_compiled_part_of_an_eager_model(fresh_dynamo: Any) -> None:
    """Its hooks are traced without a probe in the pass of an outer module that is not compiled."""
    inner = made(mlp)
    model = nn.Sequential(torch.compile(inner, backend="aot_eager"), nn.Linear(4, 2))
    x = torch.randn(3, 5)
    expected = norms_sq(nn.Sequential(inner, model[1]), samples_of((x,), 3), sum_loss)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(x)).backward()
            total = torch.stack(list(expected.values())).sum(0).sqrt()
            assert torch.allclose(metric.per_sample, total, rtol=1e-5)


class Halves(nn.Module):
    """Two regions, or one with a checkpoint in it."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 6), nn.Linear(6, 3)
        self.b = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 6))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu_()
        if not self.checkpointed:
            torch._dynamo.graph_break()
        again = self.checkpointed and x.dtype != torch.float64
        x = checkpoint(self.b, x, use_reentrant=False) if again else self.b(x)
        y: Tensor = self.c(x)
        return y


@pytest.mark.ci
@pytest.mark.parametrize("checkpointed", [False, True], ids=["graph break", "checkpoint"])
def test_regions_and_checkpoints(checkpointed: bool, fresh_dynamo: Any) -> None:
    inner = made(lambda: Halves(checkpointed))
    compare(torch.compile(inner, fullgraph=checkpointed, backend="aot_eager"), inner, floats(4, 5), (3, 4))


@pytest.mark.ci
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
@pytest.mark.parametrize("outside", [False, True], ids=["DDP of compiled", "compiled DDP"])
def test_distributed_data_parallel(outside: bool, fresh_dynamo: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    with one_rank():
        inner = made(lambda: Halves(True))
        if outside:
            model = torch.compile(DistributedDataParallel(inner), backend="aot_eager")
        else:
            model = DistributedDataParallel(torch.compile(inner, backend="aot_eager"))
        compare(model, inner, floats(4, 5), (3, 3))


@pytest.mark.ci
def test_freezing_in_mid_run_and_two_passes_in_one_backward(fresh_dynamo: Any) -> None:
    inner = made(mlp)
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for frozen in (False, True):
            inner[0].requires_grad_(not frozen)
            xs = torch.randn(2, 3, 5)
            expected = [torch.stack(list(norms_sq(inner, samples_of((x,), 3), sum_loss).values())).sum(0) for x in xs]
            inner.zero_grad()
            sum(sum_loss(model(x)) for x in xs).backward()
            assert any(torch.allclose(metric.per_sample, total.sqrt(), rtol=1e-5) for total in expected)
            assert metric._capture is not None
            assert metric._capture.records == (4 if frozen else 2)


@pytest.mark.ci
def test_a_chain_of_passes_has_no_number(fresh_dynamo: Any) -> None:
    inner = made(lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh()))
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(model(torch.randn(3, 5)))).backward()
        assert metric.per_sample.isnan().all()
        assert "output of another forward pass" in metric.broken


def test_batch_norm_that_goes_into_train_mode_is_an_error(fresh_dynamo: Any) -> None:
    inner = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))).eval()
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"module '1' \(BatchNorm1d\): .*statistics"):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            sum_loss(model(torch.randn(3, 5))).backward()
            inner.train()
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(model(torch.randn(3, 5))).backward()


# ---- what cannot be done is said


def test_compiled_in_place_is_refused() -> None:
    model = made(mlp)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled in place by model\.compile\(\)"):
        PerSampleGradNorms(model, loss_reduction="sum")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.a(x), self.b.weight, self.b.bias)


def test_a_layer_whose_weight_is_used_without_it_is_an_error(fresh_dynamo: Any) -> None:
    model = torch.compile(made(Direct), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="'b.weight': is used 1 times in the forward pass, but only 0 times"):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(model(torch.randn(3, 5))).backward()


def test_wrong_shapes_inside_a_region_are_an_error_and_training_goes_on(fresh_dynamo: Any) -> None:
    inner = made(lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(5, 4)))
    model = torch.compile(inner, backend="aot_eager")
    with pytest.raises(ValueError, match=r"module '1' \(Linear\): a compiled region makes a call of other shapes"):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(model(torch.randn(3, 2, 5))).backward()
            assert all(p.grad is not None for p in inner.parameters())


def test_hooks_that_come_after_the_first_compiled_call_say_so(fresh_dynamo: Any) -> None:
    inner = made(mlp)
    model = torch.compile(inner, backend="eager")
    optimizer = torch.optim.SGD(inner.parameters(), lr=1e-2)
    train(model, optimizer, [torch.randn(4, 5)] * 2)
    with pytest.raises(ValueError, match=r"before its first call \(or torch\._dynamo\.reset\(\)\)"):
        with Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="mean")]):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                train(model, optimizer, [torch.randn(4, 5)] * 3)


def test_hooks_that_come_too_late_for_a_metric_that_stands_alone(fresh_dynamo: Any) -> None:
    model = torch.compile(made(mlp), backend="eager")
    sum_loss(model(torch.randn(4, 5))).backward()
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(torch.randn(4, 5))).backward()
        with pytest.raises(RuntimeError, match=r"before its first call \(or torch\._dynamo\.reset\(\)\)"):
            _ = metric.per_sample


class Otherwise(nn.Module):
    """A layer that is called with another weight than its own, which depends on that."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(5, 5), nn.Linear(5, 5), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        if self.way == "its own":
            return self.b(x)  # type: ignore[no-any-return]
        weights = {"weight": 2 * self.b.weight if self.way == "twice" else self.b.weight.T, "bias": self.b.bias}
        return torch.func.functional_call(self.b, weights, (x,))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["its own", "twice", "transposed"])
def test_a_layer_that_is_called_with_another_weight_is_refused(way: str, fresh_dynamo: Any) -> None:
    model = torch.compile(made(lambda: Otherwise(way)), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5)
    if way == "its own":
        with PerSampleGradNorms(model, loss_reduction="sum") as metric:
            sum_loss(model(x)).backward()
            assert metric.per_sample.isfinite().all()
        return
    with pytest.raises(ValueError, match=r"'b.weight': in a pass of lipcore's own in eager mode its gradient is not"):
        with PerSampleGradNorms(model, loss_reduction="sum"):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(model(x)).backward()
