"""PerSampleGradDots against float64 gradients of one sample at a time."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import few
from layer_cases import CASES, Case
from models_without_rules import WITHOUT_RULES, C, T
from per_sample_models import MODELS, assert_equal, made, sum_loss, train, weights
from per_sample_oracle import gradients, samples_of, seeded, weighted_sum
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lipcore
from lipcore import Monitor, PerSampleGradDots

Gradient = dict[str, Tensor]


def reference_of(model: nn.Module, seed: int = 5) -> Gradient:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in model.named_parameters()}


def assert_dots(found: Tensor, rows: Gradient, reference: Gradient, tolerance: float = 1e-5) -> None:
    flat = torch.cat([each.reshape(len(each), -1) for each in rows.values()], 1)
    other = torch.cat([reference[name].double().flatten() for name in rows])
    assert found.dtype == torch.float64
    lengths = flat.norm(dim=1)
    assert ((found - flat @ other).abs() <= tolerance * (lengths + 1e-3 * lengths.max()) * other.norm()).all()


def check(
    model: nn.Module,
    arguments: tuple[Any, ...],
    reduction: str = "sum",
    loss: Callable[[Any], Tensor] = weighted_sum,
    **options: Any,
) -> None:
    size = len(arguments[0])
    rows, reference = gradients(model, samples_of(arguments, size), loss), reference_of(model)
    with PerSampleGradDots(model, reference=reference, loss_reduction=reduction, **options) as dots:
        total = loss(model(*arguments))
        (total / size if reduction == "mean" else total).backward()
        assert not dots.broken
        assert set(dots.per_parameter) == set(rows)
        for name, each in rows.items():
            assert_dots(dots.per_parameter[name], {name: each}, reference)
        assert_dots(dots.per_sample, rows, reference)
        torch.testing.assert_close(torch.stack(list(dots.per_layer.values())).sum(0), dots.per_sample)


@pytest.mark.parametrize("reduction", few(["mean", "sum"], 1))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_rule(case: Case, reduction: str) -> None:
    with seeded(1):
        check(case.make(), case.arguments(5), reduction)


@pytest.mark.parametrize("size", [1, 2, 7])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, size: int) -> None:
    build, inputs = MODELS[name]
    check(made(build), (inputs(size),), "mean", sum_loss)


@pytest.mark.parametrize("name", WITHOUT_RULES)
def test_parameters_without_a_rule(name: str) -> None:
    check(made(WITHOUT_RULES[name]), (torch.randn(4, T, C),), max_replay_bytes=1 << 30)


def test_several_references() -> None:
    model, x = made(MODELS["tied transformer"][0]), torch.randint(11, (4, 5))
    rows = gradients(model, samples_of((x,), 4), sum_loss)
    references = [reference_of(model, seed) for seed in range(3)]
    with PerSampleGradDots(model, reference=references, loss_reduction="sum") as dots:
        dots.set_ids(torch.arange(4) + 10)
        sum_loss(model(x)).backward()
        assert dots.per_sample.shape == (4, 3)
        for k, reference in enumerate(references):
            assert_dots(dots.per_sample[:, k], rows, reference)
            torch.testing.assert_close(dots.scores[k].lookup([10, 11, 12, 13]).mean, dots.per_sample[:, k])
        result = dots.compute()
        assert result["dot_1"]["total"].mean.value == pytest.approx(float(dots.per_sample[:, 1].mean()))
        assert dots.per_layer["head" if "head" in dots.per_layer else "embedding"].shape == (4, 3)
        assert "total dot_2" in repr(dots)


def test_norms_come_out_of_the_metric_of_norms() -> None:
    """The product of a batch of one with its own gradient is its squared norm."""
    model, x = made(MODELS["cnn"][0]), torch.randn(1, 1, 6, 6)
    sum_loss(model(x)).backward()
    reference = {name: p.grad for name, p in model.named_parameters()}
    with (
        PerSampleGradDots(model, reference=reference, loss_reduction="sum") as dots,
        lipcore.PerSampleGradNorms(model, loss_reduction="sum") as norms,
    ):
        sum_loss(model(x)).backward()
        torch.testing.assert_close(dots.per_sample, norms.per_sample.square(), rtol=1e-5, atol=0)


def test_autocast() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(5, 5)
    rows, reference = gradients(model, samples_of((x,), 5), sum_loss), reference_of(model)
    with PerSampleGradDots(model, reference=reference, loss_reduction="sum") as dots:
        with torch.autocast("cpu", torch.bfloat16):
            sum_loss(model(x).float()).backward()
        assert_dots(dots.per_sample, rows, reference, 0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    class Model(nn.Sequential):
        checkpointed = False

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self[0](x)
            if self.checkpointed:
                return checkpoint(self[1], y, use_reentrant=reentrant)  # type: ignore[return-value]
            return self[1](y)

    model, x = Model(nn.Linear(5, 4), nn.LayerNorm(4)), torch.randn(4, 5)
    rows, reference = gradients(model, samples_of((x,), 4), sum_loss), reference_of(model)
    model.checkpointed = True
    with PerSampleGradDots(model, reference=reference, loss_reduction="sum") as dots:
        sum_loss(model(x)).backward()
        assert_dots(dots.per_sample, rows, reference)


def test_frozen_parameters_need_no_reference() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    model[0].requires_grad_(False)
    rows = gradients(model, samples_of((x,), 4), sum_loss)
    reference = reference_of(model) | {"0.weight": None}
    with PerSampleGradDots(model, reference=reference, loss_reduction="sum") as dots:
        sum_loss(model(x)).backward()
        assert_dots(dots.per_sample, rows, reference)


def test_the_reference_is_copied_and_may_be_exchanged() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    rows, reference = gradients(model, samples_of((x,), 4), sum_loss), reference_of(model)
    kept, other = copy.deepcopy(reference), reference_of(model, 9)
    with PerSampleGradDots(model, reference=reference, loss_reduction="sum") as dots:
        for tensor in reference.values():
            tensor.zero_()
        sum_loss(model(x)).backward()
        assert_dots(dots.per_sample, rows, kept)
        dots.set_reference(other)
        sum_loss(model(x)).backward()
        assert_dots(dots.per_sample, rows, other)


@pytest.mark.parametrize("name", MODELS)
def test_the_training_stays_the_same_bits(name: str) -> None:
    build, draw = MODELS[name]
    mine, inputs = made(build), [draw(size) for size in (4, 4, 3, 1)]
    theirs = copy.deepcopy(mine)
    train(theirs, torch.optim.SGD(theirs.parameters(), 0.01), inputs)
    optimizer = torch.optim.SGD(mine.parameters(), 0.01)
    metric = PerSampleGradDots(reference=reference_of(mine), loss_reduction="mean")
    with Monitor(mine, optimizer, metrics=[metric]):
        train(mine, optimizer, inputs)
        assert metric.per_sample.isfinite().all()
    assert_equal(weights(mine), weights(theirs))


# ---- windows, ids, states


def trained(steps: int = 3, micro: int = 2) -> tuple[PerSampleGradDots, Any, Tensor]:
    """A Monitor's window over some steps of micro-batches, and every product in it."""
    model, reference = made(MODELS["mlp"][0]), reference_of(made(MODELS["mlp"][0]))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    metric = PerSampleGradDots(reference=reference, loss_reduction="mean", scale=1 / micro)
    torch.manual_seed(3)
    found = []
    with Monitor(model, optimizer, metrics=[metric], window_steps=steps) as monitor:
        for _ in range(steps):
            for _ in range(micro):
                x = torch.randn(4, 5)
                metric.set_ids(torch.arange(4))
                (sum_loss(model(x)) / 4 / micro).backward()
                found.append(metric.per_sample)
            optimizer.step()
            optimizer.zero_grad()
        window = monitor.pop_window()
    assert window is not None
    return metric, window["per_sample_grad_dot"], torch.stack(found)


def test_a_window() -> None:
    metric, result, found = trained()
    total = result["dot"]["total"]
    assert total.mean.value == pytest.approx(float(found.mean()))
    assert total.min.value == pytest.approx(float(found.min()))
    assert total.max.value == pytest.approx(float(found.max()))
    assert total.negative.value == pytest.approx(float((found < 0).double().mean()))
    assert 0 < total.negative.value < 1
    assert total.mean.count == found.numel()
    assert total.missing.value == 0
    assert set(result["dot"]) == {"0", "2", "3", "total"}
    assert total.mean.label == "exact"
    torch.testing.assert_close(metric.scores.lookup([0, 1, 2, 3]).mean, found.mean(0))
    assert torch.equal(metric.scores.top(4).ids, found.mean(0).argsort(descending=True))


def test_missing_and_infinite_products_are_counted() -> None:
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    x[1], x[2] = torch.nan, 1e30
    reference = {"weight": torch.full((2, 3), 1e30).double(), "bias": torch.zeros(2)}
    with PerSampleGradDots(model, reference=reference, loss_reduction="sum", prove=False) as dots:
        (model(x) * 1.0).sum().backward()
        found = dots.per_sample
        total = dots.compute()["dot"]["total"]
        finite = found[found.isfinite()]
        assert total.missing.value == 6 - len(finite)
        assert total.mean.count == len(finite)
        assert total.min.value == pytest.approx(float(finite.min()))


def test_states_and_merges() -> None:
    metric, _, _ = trained()
    model, reference = made(MODELS["mlp"][0]), reference_of(made(MODELS["mlp"][0]))
    with PerSampleGradDots(model, reference=reference, loss_reduction="mean") as dots:
        sum_loss(model(torch.randn(4, 5))).backward()
        state = dots.state_dict()
        before = dots.compute()["dot"]["total"].mean.value
    with PerSampleGradDots(model, reference=reference, loss_reduction="mean") as other:
        other.load_state_dict(state)
        assert other.compute()["dot"]["total"].mean.value == before
        other.merge(dots)
        assert other.compute()["dot"]["total"].mean.count == 8
        with pytest.raises(TypeError, match="other: expected a PerSampleGradDots"):
            other.merge(lipcore.PerSampleGradNorms(loss_reduction="sum"))
    with PerSampleGradDots(model, reference=[reference] * 2, loss_reduction="mean") as several:
        with pytest.raises(ValueError, match="other: it has 2 distributions per layer, this one 4"):
            several.merge(other)
        with pytest.raises(ValueError, match="open"):
            several.load_state_dict(state)
        several.load_state_dict(several.state_dict())
        several.merge(several)
    for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)):
        assert torch.equal(twin.per_sample, metric.per_sample)
        assert torch.equal(twin.scores.top(4).ids, metric.scores.top(4).ids)


# ---- what has no number, or is not proved


def test_passes_without_a_record_have_no_products() -> None:
    model, x = made(MODELS["mlp"][0]), torch.randn(4, 5)
    for several in (False, True):
        reference: Any = [reference_of(model)] * 2 if several else reference_of(model)
        with PerSampleGradDots(model, reference=reference, loss_reduction="sum") as dots:
            with pytest.raises(RuntimeError, match="no backward pass"):
                _ = dots.per_sample
            sum_loss(model(x)).backward()
            torch.autograd.grad(sum_loss(model(x)), list(model.parameters()))
            assert dots.broken
            shape = (4, 2) if several else (4,)
            for numbers in (dots.per_sample, dots.per_layer["0"], dots.per_parameter["0.weight"]):
                assert numbers.shape == shape
                assert numbers.isnan().all()
            assert dots.per_layer.reasons["0"] == dots.broken


def test_mixed_samples_are_refused_by_name() -> None:
    class Mixing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x)
            y: Tensor = self[1](h - h.mean(0))
            return y

    model = Mixing(nn.Linear(5, 4), nn.Linear(4, 3))
    dots = PerSampleGradDots(model, reference=reference_of(model), loss_reduction="sum")
    with pytest.warns(RuntimeWarning, match=r"lipcore stopped recording: .*mixes its samples"):
        sum_loss(model(torch.randn(4, 5))).backward()
    with pytest.raises(ValueError, match="0.weight"):
        dots.close()


class Dead(nn.Module):
    """A model in which negative samples have no gradient at the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.a.bias.zero_()
            self.a.weight.abs_()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return y


def test_samples_that_no_proof_has_seen_are_nan() -> None:
    """In products, sums and Gram matrices as in norms."""
    model, x = made(Dead), torch.rand(5, 6)
    dead = x.clone()
    dead[3] = -1
    reference, rows = reference_of(model), gradients(model, samples_of((x,), 5), sum_loss)
    reference["a.weight"].zero_()  # a product of 0 is none either, where it is not known whose it is
    others = torch.arange(5) != 3
    norms = lipcore.PerSampleGradNorms(model, loss_reduction="sum", keep_factors=True)
    with PerSampleGradDots(model, reference=reference, loss_reduction="sum") as dots, norms:
        for _ in range(4):  # proved again and again, ever more rarely
            sum_loss(model(dead)).backward()
        assert dots.per_sample.isfinite().all()
        while True:
            sum_loss(model(dead)).backward()
            schedule = dots._capture.proofs._schedule  # type: ignore[union-attr, attr-defined]
            if min(schedule._again.values()) > schedule.passes + 1:
                break
        sum_loss(model(x)).backward()
        assert torch.equal(~dots.per_sample.isnan(), others)
        assert torch.equal(~dots.per_layer["a"].isnan(), others)
        assert torch.equal(~dots.per_parameter["a.weight"].isnan(), others)
        assert dots.per_layer["b"].isfinite().all()
        assert "in every proof so far" in dots.broken
        assert dots.per_layer.reasons == norms.per_layer.reasons
        assert_dots(dots.per_sample[others], {name: each[others] for name, each in rows.items()}, reference)
        assert norms.weighted_sum(torch.ones(5))["a.weight"].isnan().all()
        assert norms.weighted_sum(torch.ones(5))["b.weight"].isfinite().all()
        assert norms.weighted_sum(others.float())["a.weight"].isfinite().all()
        assert norms.weighted_sum(lambda n: lipcore.clip_factors(n, 1.0, missing="zero"))["a.weight"].isfinite().all()
        assert torch.equal(~norms.gram()["total"].isnan(), others & others[:, None])


def test_unproved_passes_say_so() -> None:
    model = made(MODELS["mlp"][0])
    with PerSampleGradDots(model, reference=reference_of(model), loss_reduction="sum", prove=False) as dots:
        sum_loss(model(torch.randn(4, 5))).backward()
        assert dots.unproved
        assert dots.compute()["dot"]["total"].mean.label == "heuristic"
        assert "not proved" in dots.compute()["dot"]["0"].mean.note


# ---- bad input

Change = Callable[[Gradient], Any]


class Sharded(Tensor):
    """What a DTensor is known by."""

    placements = ()


BAD: dict[str, tuple[Change, type[Exception], str]] = {
    "a tensor": (lambda r: r["0.weight"], TypeError, r"reference: expected a dict of parameter names.*got a tensor"),
    "nothing": (lambda r: [], TypeError, r"reference: .*got an empty list"),
    "a list of tensors": (lambda r: [r, r["0.weight"]], TypeError, r"reference\[1\]: expected a dict.*got a tensor"),
    "a number": (lambda r: r | {"0.weight": 1.0}, TypeError, r"reference\['0.weight'\]: expected a dense.*got float"),
    "integers": (lambda r: r | {"0.bias": torch.ones(7).long()}, TypeError, r"reference\['0.bias'\]: .*torch.int64"),
    "a sparse one": (
        lambda r: r | {"0.weight": r["0.weight"].to_sparse()},
        TypeError,
        r"reference\['0.weight'\]: .*sparse_coo; to_dense",
    ),
    "a sharded one": (
        lambda r: r | {"0.weight": r["0.weight"].as_subclass(Sharded)},
        TypeError,
        r"reference\['0.weight'\]: .*a DTensor.*full_tensor\(\) a sharded one",
    ),
    "an unknown name": (
        lambda r: r | {"9.weight": torch.ones(2)},
        ValueError,
        r"reference\['9.weight'\]: the model has no parameter of that name.*it has '0.weight'",
    ),
    "a shape": (
        lambda r: r | {"0.weight": torch.ones(5, 7)},
        ValueError,
        r"reference\['0.weight'\]: expected shape \[7, 5\] on cpu, as the parameter, got \[5, 7\] on cpu",
    ),
    "a device": (
        lambda r: r | {"0.weight": torch.ones(7, 5, device="meta")},
        ValueError,
        r"reference\['0.weight'\]: expected shape \[7, 5\] on cpu, .*on meta",
    ),
    "a missing parameter": (
        lambda r: {name: t for name, t in r.items() if name != "3.bias"},
        ValueError,
        r"reference: expected a gradient of every measured parameter, found none of '3.bias'; give zeros",
    ),
    "no gradient": (
        lambda r: r | {"3.bias": None},
        ValueError,
        r"reference: expected a gradient .*, found none of '3.bias'",
    ),
    "one that lacks a name": (
        lambda r: [r, {}],
        ValueError,
        r"reference\[1\]: has no '0.weight', which reference\[0\]",
    ),
    "one with a name more": (
        lambda r: [{"0.weight": r["0.weight"]}, r],
        ValueError,
        r"reference\[1\]\['0.bias'\]: \[7\] on cpu, where reference\[0\] has nothing",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_references(name: str) -> None:
    change, kind, words = BAD[name]
    model = made(MODELS["mlp"][0])
    good = reference_of(model)
    with pytest.raises(kind, match=words):
        PerSampleGradDots(model, reference=change(good), loss_reduction="sum")
    metric = functools.partial(PerSampleGradDots, reference=change(good), loss_reduction="sum")
    with pytest.raises(kind, match=words):
        Monitor(model, torch.optim.SGD(model.parameters(), 0.1), metrics=[metric()])
    several = isinstance(change(good), list) and bool(change(good))
    with PerSampleGradDots(model, reference=[good] * 2 if several else good, loss_reduction="sum") as dots:
        with pytest.raises((kind, ValueError), match=r"reference"):
            dots.set_reference(change(good))
        sum_loss(model(torch.randn(4, 5))).backward()
        assert dots.per_sample.isfinite().all()


def test_other_bad_arguments() -> None:
    model = made(MODELS["mlp"][0])
    good = reference_of(model)
    with PerSampleGradDots(model, reference=good, loss_reduction="sum") as dots:
        with pytest.raises(ValueError, match=r"reference: expected one dict, as before"):
            dots.set_reference([good])
        with pytest.raises(ValueError, match=r"metrics: this PerSampleGradDots watches a model already"):
            Monitor(model, torch.optim.SGD(model.parameters(), 0.1), metrics=[dots])
    with pytest.raises(ValueError, match=r"compiled.*eager"):
        PerSampleGradDots(torch.compile(model, backend="aot_eager"), reference=good, loss_reduction="sum")
    with pytest.raises(TypeError, match="output: expected"):
        PerSampleGradDots(model, reference=good, loss_reduction="sum", output=3)  # type: ignore[arg-type]


def test_plan_names_the_memory() -> None:
    model = made(MODELS["mlp"][0])
    size = sum(p.numel() for p in model.parameters())
    with PerSampleGradDots(model, reference=[reference_of(model)] * 3, loss_reduction="sum") as dots:
        (line,) = [line for line in dots.plan() if line.what == "reference"]
        assert line.bytes == 3 * 4 * size
        assert "Linear" in "".join(line.rule for line in dots.plan())
