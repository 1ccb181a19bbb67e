"""The weighted pass: samples that a model moves or mixes are refused by name, and all others proved, in every dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from per_sample_models import cnn, made, mlp, sum_loss
from per_sample_oracle import assert_norms, check, norms_sq, samples_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lipcore import PerSampleGradNorms

SIZE = 5
ORDER = torch.tensor([3, 1, 4, 0, 2])


class Way(nn.Module):
    def __init__(self, way: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(6, 8), nn.Linear(8, 1), way

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def measured(model: nn.Module, x: Tensor, context: Any = None, **options: Any) -> PerSampleGradNorms:
    with PerSampleGradNorms(model, loss_reduction="sum", **options) as metric:
        with context or nullcontext():
            output = model(x)
        sum_loss(output).backward()
        assert metric.per_sample.shape == (len(x),)
    return metric


def refused(way: Callable[[Any, Tensor], Any], message: str, x: Tensor | None = None, **options: Any) -> None:
    x = torch.randn(SIZE, 6) if x is None else x
    with pytest.warns(RuntimeWarning, match="stopped recording"), pytest.raises(ValueError, match=message):
        measured(made(lambda: Way(way)), x, **options)


# ---- samples that are moved

MOVED: dict[str, Callable[[Any, Tensor], Any]] = {
    "flipped and back": lambda m, x: m.b(torch.tanh(m.a(x.flip(0))).flip(0)),
    "rolled and back": lambda m, x: m.b(torch.tanh(m.a(x.roll(1, 0)))).roll(-1, 0),
    "sorted and back": lambda m, x: m.b(torch.tanh(m.a(x[(o := x[:, 0].argsort())])))[o.argsort()],
    "in an order": lambda m, x: m.b(torch.tanh(m.a(x))[ORDER])[ORDER.argsort()],
    "between layers": lambda m, x: m.b(torch.tanh(m.a(x))[ORDER]),
}


@pytest.mark.parametrize("way", MOVED)
def test_moved_samples(way: str) -> None:
    """What comes back in the order of the batch is measured, through the place where it does."""
    torch.manual_seed(1)
    words = "is that of sample [0-9]: the model moves its samples"
    refused(MOVED[way], words, max_replay_bytes=0)
    if way in ("in an order", "between layers"):  # of this batch size alone; that comes back in another order
        refused(MOVED[way], words)
    else:
        metric = check(made(lambda: Way(MOVED[way])), (torch.randn(SIZE, 6),), loss=sum_loss)
        assert not metric.unproved


def test_every_permutation_is_seen() -> None:
    torch.manual_seed(0)
    for _ in range(60):
        order = torch.randperm(SIZE)
        if torch.equal(order, torch.arange(SIZE)):
            continue

        def way(m: Any, x: Tensor, order: Tensor = order) -> Tensor:
            back: Tensor = m.b(torch.tanh(m.a(x[order])))[order.argsort()]
            return back

        refused(way, "the model moves its samples", max_replay_bytes=0)


def test_an_order_of_the_samples_own() -> None:
    """Another one in every pass."""
    model = made(lambda: Way(lambda m, x: m.b(torch.tanh(m.a(x[(o := x[:, 0].argsort())])))[o.argsort()]))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(5):
            x = torch.randn(SIZE, 6)
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(metric, norms_sq(model, samples_of((x,), SIZE), sum_loss))
            assert not metric.unproved


def test_the_remedy_for_moved_samples() -> None:
    model, x = made(lambda: Way(lambda m, x: m.b(torch.tanh(m.a(x))))), torch.randn(SIZE, 6)
    metric = measured(model, x[ORDER])
    expected = norms_sq(model, samples_of((x[ORDER],), SIZE), sum_loss)
    torch.testing.assert_close(metric.per_sample, torch.stack(list(expected.values())).sum(0).sqrt(), rtol=1e-5, atol=0)
    assert not metric.unproved


def test_an_order_of_outputs() -> None:
    """All layers see the same order, which is not that of the input."""
    refused(lambda m, x: m.b(torch.tanh(m.a(x[ORDER]))), "returns its samples in another order")


# ---- samples that are mixed

MIXED: dict[str, Callable[[Any, Tensor], Any]] = {
    "mean": lambda m, x: m.b(torch.tanh((h := m.a(x)) - h.mean(0))),
    "small part": lambda m, x: m.b(torch.tanh((h := m.a(x)) - 1e-3 * h.mean(0))),
    "batch norm": lambda m, x: m.b(F.batch_norm(m.a(x), None, None, training=True)),
    "attention over the batch": lambda m, x: m.b((m.a(x) @ m.a(x).T).softmax(1) @ m.a(x)),
    "similarities": lambda m, x: (h := F.normalize(m.a(x))) @ h.T + m.b(h),
    "both orders": lambda m, x: m.b(torch.tanh((h := m.a(x)) + h.flip(0))),
    "halves of two": lambda m, x: m.b(torch.cat([(h := m.a(x))[:, :4], h.flip(0)[:, 4:]], 1)),
    "next sample": lambda m, x: m.b(torch.tanh((h := m.a(x)) + h.roll(1, 0))),
}


@pytest.mark.parametrize("way", MIXED)
def test_mixed_samples(way: str) -> None:
    refused(MIXED[way], "of one sample's outputs alone, its gradient has parts at other samples|is used")


def test_the_batch_with_itself() -> None:
    """Of what comes behind the batch nothing is used."""
    model = made(lambda: Way(lambda m, x: m.b(torch.cat([h := torch.tanh(m.a(x)), h.flip(0)]))[: len(x)]))
    check(model, (torch.randn(SIZE, 6),), loss=sum_loss)


def test_rows_of_another_order_that_get_a_gradient_later() -> None:
    gate = torch.zeros(())
    model = made(lambda: Way(lambda m, x: _halves(m.b(torch.cat([h := torch.tanh(m.a(x)), h.flip(0)])), gate)))
    x = torch.randn(SIZE, 6)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(x)).backward()
        assert not metric.per_sample.isnan().any()
        gate.fill_(1)
        sum_loss(model(x)).backward()
        assert metric.per_sample.isnan().all()
        assert "some rows had no gradient" in metric.unproved


def _halves(y: Tensor, gate: Tensor) -> Tensor:
    half = len(y) // 2
    return y[:half] + gate * y[half:].flip(0)


DETACHED: dict[str, Callable[[Any, Tensor], Any]] = {
    "mean": lambda m, x: m.b(torch.tanh((h := m.a(x)) - h.mean(0).detach())),
    "norm": lambda m, x: m.b(m.a(x)) / x.norm(),
    "largest": lambda m, x: m.b(m.a(x)) - x.detach().amax(),
    "under no_grad": lambda m, x: m.b(m.a(x) * _scale(x)),
}


def _scale(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.std(0).sum()


@pytest.mark.parametrize("way", DETACHED)
def test_statistics_that_are_detached(way: str) -> None:
    refused(DETACHED[way], "the output of sample [04] is another one when the other samples are exchanged")


def test_detached_statistics_are_no_exact_number_in_skip_mode() -> None:
    model = made(lambda: Way(DETACHED["mean"]))
    metric = measured(model, torch.randn(SIZE, 6), on_unsupported="skip")
    assert "other samples are exchanged" in metric.unproved
    result = metric.compute()
    assert result.details["proved"] is False
    value = result.norm["a"].mean
    assert (value.label, value.valid) == ("heuristic", True)
    assert value.note.startswith("not proved: ")


def test_an_output_that_mixes_samples_matters_where_it_enters_the_loss() -> None:
    def way(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(model.a(x))
        return model.b(hidden), hidden @ hidden.T

    model, x = made(lambda: Way(way)), torch.randn(SIZE, 6)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(x)[0]).backward()
        expected = norms_sq(model, samples_of((x,), SIZE), lambda output: sum_loss(output[0]))
        total = torch.stack(list(expected.values())).sum(0).sqrt()
        torch.testing.assert_close(metric.per_sample, total, rtol=1e-5, atol=0)
        assert not metric.unproved
    with pytest.warns(RuntimeWarning, match="stopped"), pytest.raises(ValueError, match="parts at other samples"):
        with PerSampleGradNorms(model, loss_reduction="sum") as metric:
            sum(map(sum_loss, model(x))).backward()
            assert metric.per_sample is not None


def test_an_output_of_detached_statistics_matters_where_it_enters_the_loss() -> None:
    model, x = made(lambda: Way(lambda m, x: (m.b(h := m.a(x)), m.b(h - h.mean(0).detach())))), torch.randn(SIZE, 6)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(x)[0]).backward()
        assert not metric.unproved
    with pytest.warns(RuntimeWarning, match="stopped"), pytest.raises(ValueError, match="samples are exchanged"):
        with PerSampleGradNorms(model, loss_reduction="sum") as metric:
            sum(map(sum_loss, model(x))).backward()
            assert metric.per_sample is not None


# ---- samples that are neither


class Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Clips(Plain):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.01, 0.01)


class Clears(torch.autograd.Function):
    """Its backward empties all that it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = torch.ones_like(x)
        ctx.save_for_backward(x * 0 + 1)
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        result = grad * ctx.slope * ctx.saved_tensors[0]
        ctx.slope.zero_()
        ctx.saved_tensors[0].data.zero_()
        return result


GOOD: dict[str, Callable[[Any, Tensor], Any]] = {
    "plain": lambda m, x: m.b(torch.tanh(m.a(x))),
    "dead rows": lambda m, x: m.b(torch.relu(m.a(x) - 1.2)),
    "a Function": lambda m, x: m.b(Plain.apply(m.a(x))),
    "a Function that empties": lambda m, x: m.b(Clears.apply(m.a(x))),
    "a checkpoint": lambda m, x: m.b(checkpoint(lambda z: torch.tanh(m.a(z)), x, use_reentrant=False)),
    "called twice": lambda m, x: m.b(torch.tanh(m.a(x)) + torch.tanh(m.a(2 * x))),
    "changes its input": lambda m, x: m.b(torch.tanh(m.a(x.mul_(0.5)))),
}


@pytest.mark.parametrize("way", GOOD)
def test_samples_that_stay_apart(way: str) -> None:
    model, x = made(lambda: Way(GOOD[way])), torch.randn(SIZE, 6)
    expected = norms_sq(model, samples_of((x.clone(),), SIZE), sum_loss)
    metric = measured(model, x)
    total = torch.stack(list(expected.values())).sum(0).sqrt()
    torch.testing.assert_close(metric.per_sample, total, rtol=1e-5, atol=0)
    assert metric.unproved == ""
    assert metric.compute().details["proved"] is True
    assert "KB beside the pass" in metric.plan()[0].rule
    assert metric.compute().norm["total"].mean.label == "exact"


@pytest.mark.parametrize("size", [2, 16, 17, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype: torch.dtype, size: int) -> None:
    for build, shape in ((cnn, (1, 6, 6)), (mlp, (5,))):
        model = made(build).to(dtype)
        assert measured(model, torch.randn(size, *shape).to(dtype)).unproved == ""
        moved = nn.Sequential(Flip(), made(build).to(dtype), Flip())
        with pytest.warns(RuntimeWarning, match="stopped"), pytest.raises(ValueError, match="moves its samples"):
            measured(moved, torch.randn(size, *shape).to(dtype), max_replay_bytes=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    for build, shape in ((cnn, (1, 6, 6)), (mlp, (5,))):
        x = torch.randn(40, *shape)
        assert measured(made(build), x, torch.autocast("cpu", dtype)).unproved == ""
        moved = nn.Sequential(Flip(), made(build), Flip())
        with pytest.warns(RuntimeWarning, match="stopped"), pytest.raises(ValueError, match="moves its samples"):
            measured(moved, x, torch.autocast("cpu", dtype), max_replay_bytes=0)
        metric = measured(moved, x, torch.autocast("cpu", dtype))
        alike = measured(moved[1], x, torch.autocast("cpu", dtype))
        torch.testing.assert_close(metric.per_sample, alike.per_sample, rtol=2e-2, atol=1e-3)


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_sample_that_is_not_finite(bad: float) -> None:
    """The others are right and proved in that pass, and it is proved in the next one."""
    model, x = made(mlp), torch.randn(6, 5)
    expected = torch.stack(list(norms_sq(model, samples_of((x,), 6), sum_loss).values())).sum(0).sqrt()
    broken = x.clone()
    broken[2, 1] = bad
    others = torch.arange(6) != 2
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(broken)).backward()
        assert metric.per_sample.isnan().tolist() == (~others).tolist()
        torch.testing.assert_close(metric.per_sample[others], expected[others], rtol=1e-5, atol=0)
        sum_loss(model(x)).backward()
        torch.testing.assert_close(metric.per_sample, expected, rtol=1e-5, atol=0)
        assert metric.unproved == metric.broken == ""


def test_a_batch_that_is_not_finite_postpones_the_proof() -> None:
    model = made(lambda: Way(MOVED["flipped and back"]))
    with pytest.warns(RuntimeWarning, match="stopped"), pytest.raises(ValueError, match="moves its samples"):
        with PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=0) as metric:
            sum_loss(model(torch.full((SIZE, 6), torch.nan))).backward()
            assert metric.per_layer["a"].isnan().all()
            assert "not finite" in metric.broken
            sum_loss(model(torch.randn(SIZE, 6))).backward()
            assert metric.per_sample is not None


def test_rows_that_no_proof_has_seen_are_not_used() -> None:
    """A sample without a gradient in the proof has none in that pass; later it has, and is NaN until it is proved."""
    model = made(lambda: Way(lambda m, x: m.b(torch.relu(m.a(x)))))
    with torch.no_grad():
        model.a.bias.zero_()
        model.a.weight.abs_()
    x = torch.rand(SIZE, 6)
    dead = x.clone()
    dead[3] = -1
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(4):  # proved again and again, ever more rarely
            sum_loss(model(dead)).backward()
        while True:
            sum_loss(model(dead)).backward()
            due = metric._capture.proofs._schedule._again  # type: ignore[union-attr, attr-defined]
            if min(due.values()) > metric._capture.proofs._schedule.passes + 1:  # type: ignore[union-attr, attr-defined]
                break
        sum_loss(model(x)).backward()
        assert metric.per_sample.isnan().tolist() == [False, False, False, True, False]
        assert "no proof" not in metric.unproved
        assert "in every proof so far" in metric.broken
        assert "in every proof so far" in metric.per_layer.reasons["a"]
        assert not metric.per_layer["b"].isnan().any()
        for _ in range(8):
            sum_loss(model(x)).backward()
        assert not metric.per_sample.isnan().any()


UNPROVED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "clipped": (lambda m, x: m.b(Clips.apply(torch.tanh(m.a(x)))), "not linear"),
    "its loss": (lambda m, x: m.b(m.a(x)).square().sum(), "none of the model's outputs has a batch dimension"),
    "reentrant": (lambda m, x: checkpoint(lambda z: m.b(m.a(z)), x.requires_grad_(), use_reentrant=True), "reentrant"),
}


@pytest.mark.parametrize("way", UNPROVED)
def test_what_cannot_be_proved_says_so(way: str) -> None:
    forward, why = UNPROVED[way]
    model = made(lambda: Way(forward))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        model(torch.randn(SIZE, 6)).sum().backward()
        assert why in metric.unproved
        assert not metric.per_sample.isnan().any()
    assert "; not proved: " in metric.plan()[0].rule
    result = metric.compute()
    assert why in next(iter(result.details["not_proved"]))
    assert result.norm["total"].mean.label == "heuristic"
    assert f"not proved: {metric.unproved}" == result.norm["total"].mean.note


def test_without_a_proof() -> None:
    model = made(lambda: Way(GOOD["plain"]))
    metric = measured(model, torch.randn(SIZE, 6), prove=False)
    assert metric.unproved == "prove=False was passed"
    assert metric.compute().details["not_proved"] == {"prove=False was passed": 1}
    assert "not proved" in str(metric)


# ---- whose rows they are


def whose(metric: PerSampleGradNorms, samples: int = SIZE) -> dict[str, list[list[int]]]:
    proofs = metric._capture.proofs  # type: ignore[union-attr, attr-defined]
    return {name: [call.ids.tolist() for call in calls] for name, calls in proofs.sample_ids((2, samples)).items()}


def test_the_samples_of_rows_that_are_moved_are_known() -> None:
    torch.manual_seed(1)
    model = made(lambda: Way(MOVED["between layers"]))
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip", noise_scale=False) as metric:
        sum_loss(model(torch.randn(SIZE, 6))).backward()
    order = ORDER.argsort().tolist()
    assert whose(metric) == {"a": [order], "b": [list(range(SIZE))]}
    assert whose(metric, 7) == {}
    ids = metric._capture.proofs.sample_ids((2, SIZE))["a"][0]  # type: ignore[union-attr, attr-defined]
    assert ids.is_permutation
    assert not ids.in_order


def test_the_samples_of_every_call_of_a_layer() -> None:
    torch.manual_seed(1)
    metric = measured(
        made(lambda: Way(lambda m, x: m.b(torch.tanh(m.a(x))) + m.b(torch.sin(m.a(2 * x))))), torch.randn(SIZE, 6)
    )
    rows = list(range(SIZE))
    assert whose(metric) == {"a": [rows, rows], "b": [rows, rows]}


def test_rows_without_a_gradient_get_their_sample_from_a_later_pass() -> None:
    torch.manual_seed(1)
    model = made(lambda: Way(lambda m, x: m.b(torch.relu(m.a(x))) * x[:, :1].sign().relu()))
    x = torch.randn(SIZE, 6)
    x[0, 0] = -1.0
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(x)).backward()
        assert whose(metric)["b"][0][0] < 0
        for _ in range(4):
            sum_loss(model(x.abs())).backward()
    assert whose(metric)["b"] == [list(range(SIZE))]


def _holds_it_too(model: nn.Module) -> nn.Module:
    model.holder = nn.Linear(6, 8)
    model.holder.weight = model.a.weight
    return model


def test_a_module_that_only_holds_a_weight_leaves_its_user_proved() -> None:
    model = _holds_it_too(made(lambda: Way(GOOD["plain"])))
    assert not measured(model, torch.randn(SIZE, 6)).unproved


def test_a_loss_inside_the_model_is_not_proved() -> None:
    """Whatever else holds its layer's weight."""
    model = _holds_it_too(made(lambda: Way(lambda m, x: (m.b(m.a(x)), m.holder(x).square().sum()))))
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        output, own = model(torch.randn(SIZE, 6))
        (output.sum() + own).backward()
        assert "no gradient to layer 'holder'" in metric.unproved
