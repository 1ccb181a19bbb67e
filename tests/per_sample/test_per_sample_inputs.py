"""What the user has to say about the loss and the batch, and what is said when it does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Graph
from per_sample_models import Transformer, made, mlp, sum_loss, tokens
from per_sample_oracle import assert_norms, check, norms_sq, samples_of
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import Monitor, PerSampleGradNorms

IGNORED = -100


def refused(match: str, model: nn.Module, *arguments: Any, keywords: Any = None, **options: Any) -> None:
    """The error is raised after the pass, in which training goes on."""
    with pytest.raises(ValueError, match=match):
        with PerSampleGradNorms(model, **{"loss_reduction": "sum", **options}):
            with pytest.warns(RuntimeWarning, match="stopped recording"):
                sum_loss(model(*arguments, **(keywords or {}))).backward()
            assert any(p.grad is not None for p in model.parameters())


# ---- the loss


def targets(ids: Tensor) -> Tensor:
    """Next tokens; the second sample's are all ignored, the first's in part."""
    wanted = ids.roll(-1, 1)
    wanted[0, 3:] = IGNORED
    wanted[1] = IGNORED
    return wanted


def token_loss(logits: Tensor, wanted: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction=reduction)


@pytest.mark.parametrize("terms", ["number", "tensor", "function", "function of a tensor"])
def test_a_mean_over_tokens_that_are_not_ignored(terms: str) -> None:
    model, ids = made(Transformer), tokens(4)
    wanted = targets(ids)
    count = (wanted != IGNORED).sum()
    given = {
        "number": int(count),
        "tensor": count,
        "function": lambda: int(count),
        "function of a tensor": lambda: (wanted != IGNORED).sum(),
    }[terms]
    expected = []
    for i in range(4):
        loss = token_loss(model(ids[i : i + 1]), wanted[i : i + 1], "sum")
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        expected.append(sum(g.double().square().sum() for g in grads if g is not None) ** 0.5)
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms=given) as metric:
        token_loss(model(ids), wanted, "mean").backward()
        assert torch.allclose(metric.per_sample, torch.tensor(expected, dtype=torch.float64), rtol=1e-5)
        assert metric.per_sample[1] == 0
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        token_loss(model(ids), wanted, "sum").backward()
        assert torch.allclose(metric.per_sample, torch.tensor(expected, dtype=torch.float64), rtol=1e-5)


def test_a_mean_over_features_too() -> None:
    model, x = made(mlp), torch.randn(3, 5)
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms=3) as metric:
        model(x).square().mean().backward()  # over 12 values: l_i is here the mean over the sample's own
        expected = norms_sq(model, samples_of((x,), 3), lambda y: y.square().mean(1).sum())
        assert_norms(metric, expected)


def test_terms_that_change_from_pass_to_pass() -> None:
    model, terms = made(mlp), [0]
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms=lambda: terms[0]) as metric:
        for size, terms[0] in ((3, 7), (1, 2), (1, 5)):
            x = torch.randn(size, 5)
            expected = norms_sq(model, samples_of((x,), size), sum_loss)
            model.zero_grad()
            (sum_loss(model(x)) / terms[0]).backward()
            assert_norms(metric, expected)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, TypeError, "loss_reduction"),
        ({"loss_reduction": "none"}, ValueError, "loss_reduction: expected 'mean', 'sum' or 'auto', got 'none'"),
        ({"loss_reduction": None}, ValueError, "loss_reduction: expected 'mean', 'sum' or 'auto'"),
        ({"loss_reduction": "sum", "loss_terms": 3}, ValueError, "loss_terms: a loss that is summed"),
        ({"loss_reduction": "mean", "loss_terms": "7"}, TypeError, "loss_terms: expected the number"),
        ({"loss_reduction": "mean", "loss_terms": True}, TypeError, "loss_terms: expected the number"),
        ({"loss_reduction": "mean", "loss_terms": [3]}, TypeError, "loss_terms: expected the number"),
        ({"loss_reduction": "mean", "loss_terms": 0}, ValueError, "loss_terms: expected a finite number > 0, got 0"),
        ({"loss_reduction": "mean", "loss_terms": -2.0}, ValueError, "loss_terms: expected a finite number > 0"),
        ({"loss_reduction": "mean", "loss_terms": float("nan")}, ValueError, "loss_terms: expected a finite number"),
        ({"loss_reduction": "mean", "loss_terms": torch.ones(2)}, ValueError, "loss_terms: expected one number"),
        (
            {"loss_reduction": "mean", "loss_terms": torch.tensor(0)},
            ValueError,
            "> 0, got 0; a mean over",
        ),
        ({"loss_reduction": "mean", "loss_terms": torch.tensor(-1.0)}, ValueError, "finite number > 0, got -1.0"),
        ({"loss_reduction": "mean", "loss_terms": torch.tensor(torch.inf)}, ValueError, "finite number > 0, got inf"),
        ({"loss_reduction": "mean", "loss_terms": torch.tensor(True)}, TypeError, "got a tensor of torch.bool"),
        ({"loss_reduction": "mean", "loss_terms": np.bool_(True)}, TypeError, "loss_terms: expected the number"),
        ({"loss_reduction": "mean", "loss_terms": np.int64(0)}, ValueError, "loss_terms: expected a finite number > 0"),
        ({"loss_reduction": "sum", "scale": 0}, ValueError, "scale: expected a finite number > 0, got 0"),
        ({"loss_reduction": "sum", "scale": True}, ValueError, "scale: expected a finite number > 0"),
        ({"loss_reduction": "sum", "scale": float("inf")}, ValueError, "scale: expected a finite number > 0"),
        ({"loss_reduction": "sum", "scale": "1"}, ValueError, "scale: expected a finite number > 0"),
        ({"loss_reduction": "sum", "every_steps": 0}, ValueError, "every_steps: expected an integer >= 1"),
        ({"loss_reduction": "sum", "every_steps": 1.0}, ValueError, "every_steps: expected an integer >= 1"),
        (
            {"loss_reduction": "sum", "every_steps": 3},
            ValueError,
            r"every_steps: 3 counts .* Monitor\(model, op",
        ),
        ({"loss_reduction": "sum", "on_unsupported": "warn"}, ValueError, "on_unsupported: expected 'error' or 'skip'"),
        ({"loss_reduction": "sum", "batch_dim": 2}, ValueError, "batch_dim: expected 0 or 1, got 2"),
        ({"loss_reduction": "sum", "batch_dim": True}, ValueError, "batch_dim: expected 0 or 1"),
        ({"loss_reduction": "sum", "broadcast": "0"}, TypeError, "broadcast: expected a sequence of layer names"),
        ({"loss_reduction": "sum", "broadcast": ["x"]}, ValueError, "broadcast: the model has no tapped layer 'x'"),
        ({"loss_reduction": "sum", "methods": {"0": "fast"}}, ValueError, r"methods\['0'\]: expected 'gram'"),
        ({"loss_reduction": "sum", "methods": ["gram"]}, TypeError, r"methods: expected a dict .* got \['gram'\]"),
        ({"loss_reduction": "sum", "methods": {"2": "gram"}}, ValueError, "no choice; those that have are '0', '3'"),
        ({"loss_reduction": "sum", "methods": {"x": "gram"}}, ValueError, "methods: the model has no tapped layer 'x'"),
        ({"loss_reduction": "sum", "cu_seqlens": torch.ones(2)}, TypeError, "cu_seqlens: expected the name"),
        ({"loss_reduction": "sum", "cu_seqlens": 3}, TypeError, "cu_seqlens: expected the name"),
    ],
    ids=str,
)
def test_arguments_that_will_not_do(options: dict[str, Any], error: type[Exception], match: str) -> None:
    model = made(mlp)
    with pytest.raises(error, match=match):
        PerSampleGradNorms(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("terms", "match"),
    [
        (lambda: None, "loss_terms: expected the number of averaged terms"),
        (lambda: 0, "loss_terms: expected a finite number > 0, got 0"),
        (lambda: torch.ones(3), "loss_terms: expected one number"),
        (lambda: 1 / 0, "division by zero"),
    ],
    ids=["None", "0", "tensor", "raises"],
)
def test_functions_that_return_nonsense(terms: Any, match: str) -> None:
    model = made(mlp)
    with pytest.raises(Exception, match=match), PerSampleGradNorms(model, loss_reduction="mean", loss_terms=terms):
        with pytest.warns(RuntimeWarning, match="stopped recording"):
            sum_loss(model(torch.randn(3, 5))).backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "terms", [np.int64(6), np.float32(6), np.uint8(6), torch.tensor(6), torch.tensor(6.0)], ids=repr
)
@pytest.mark.parametrize("function", [False, True], ids=["given", "returned"])
def test_numbers_of_terms_of_all_kinds(terms: Any, function: bool) -> None:
    model, x = made(mlp), torch.randn(3, 5)
    given: Any = (lambda: terms) if function else terms
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms=given) as metric:
        (sum_loss(model(x)) / 6).backward()
        assert_norms(metric, norms_sq(model, samples_of((x,), 3), sum_loss))


# ---- models that cannot be measured at all


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it moves this function
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear})


@pytest.mark.parametrize("skip", [False, True], ids=["error", "skip"])
@pytest.mark.parametrize(
    "build",
    [nn.ReLU, lambda: nn.Linear(2, 2).requires_grad_(False), quantized],
    ids=["no parameters", "frozen", "quantized"],
)
def test_a_model_with_nothing_to_train(build: Callable[[], nn.Module], skip: bool) -> None:
    model = build()
    with pytest.raises(ValueError, match="model: nothing in it is trainable"):
        PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip" if skip else "error")
    with pytest.raises(ValueError, match="model: nothing in it is trainable"):
        Monitor(model, metrics=[PerSampleGradNorms(loss_reduction="sum")])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("ask", [lambda m: m.per_sample, lambda m: m.per_layer, lambda m: m.coverage()])
def test_a_metric_without_a_model(ask: Callable[[PerSampleGradNorms], Any]) -> None:
    with pytest.raises(RuntimeError, match="watches no model yet: pass model=, or give it to a Monitor"):
        ask(PerSampleGradNorms(loss_reduction="mean"))


# ---- where the batch is


class SequenceFirst(nn.Module):
    """[T, B, features] to [B, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.norm(self.a(x).relu_()).mean(0))
        return y


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("length", [2, 4, 7])
def test_sequence_first(length: int, size: int) -> None:
    check(made(SequenceFirst), (torch.randn(length, size, 5),), loss=sum_loss, dim=1)


def test_embeddings_with_the_sequence_first() -> None:
    model = made(lambda: Graph(lambda m, ids: m.b(m.a(ids).tanh()).mean(0), a=nn.Embedding(11, 4), b=nn.Linear(4, 3)))
    check(model, (torch.randint(11, (6, 3)),), loss=sum_loss, dim=1)


def test_sequence_first_without_batch_dim_is_refused() -> None:
    refused(
        r"module 'b' \(Linear\): expected 7 samples at dimension 0, got shape \[4, 6\]; pass batch_dim=",
        made(SequenceFirst),
        torch.randn(7, 4, 5),
    )


def test_batch_first_with_batch_dim_1_is_refused() -> None:
    model = made(lambda: Graph(lambda m, x: m.b(m.a(x).mean(1)), a=nn.Linear(5, 6), b=nn.Linear(6, 3)))
    refused(r"module 'b' \(Linear\): expected 7 samples", model, torch.randn(4, 7, 5), batch_dim=1)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_batch_and_sequence_flattened(length: int) -> None:
    model, x = made(lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(5, 4))), torch.randn(3, length, 5)
    check(model, (x,), loss=sum_loss)
    if length > 1:
        refused(r"module '1' \(Linear\): expected 3 samples .*never flatten", model, x, max_replay_bytes=0)


def test_rows_that_are_left_out_are_refused() -> None:
    """An expert that sees some of the rows."""
    model = made(lambda: Graph(lambda m, x: m.b(m.a(x)[1:]), a=nn.Linear(5, 4), b=nn.Linear(4, 3)))
    refused(r"module 'b' \(Linear\): expected 3 samples at dimension 0, got shape \[2, 4\]", model, torch.randn(3, 5))


def test_a_channel_layout_without_a_batch_is_refused() -> None:
    model = made(lambda: Graph(lambda m, x: m.a(x), a=nn.Conv2d(3, 4, 3)))
    refused(
        r"module 'a' \(Conv2d\): expected \[B, C, \*space\] with 4 dimensions, got shape", model, torch.randn(3, 5, 5)
    )


def test_no_tensor_among_the_arguments_is_refused() -> None:
    model = made(lambda: Graph(lambda m, x: m.a(torch.tensor(x)), a=nn.Linear(3, 4)))
    refused("model: none of its arguments is a tensor with a dimension 0", model, [[1.0, 2.0, 3.0]])


# ---- positions


class Positions(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(11, 6), nn.Embedding(9, 6), nn.Linear(6, 4)
        self.form = form

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        if self.form == "[1, T]":
            places = places[None]
        elif self.form == "[B, T]":
            places = places.expand_as(ids)
        added = self.positions(places)
        if self.form == "unsqueezed":
            added = added.unsqueeze(0)
        elif self.form == "expanded":
            added = added.expand(len(ids), -1, -1)
        y: Tensor = self.head(torch.tanh(self.tokens(ids) + added))
        return y


FORMS = ["[T]", "[1, T]", "unsqueezed", "expanded"]


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("form", FORMS)
def test_positions_that_are_broadcast(form: str, size: int) -> None:
    model, ids = made(lambda: Positions(form)), tokens(size)
    if form == "unsqueezed" and size > 1:  # the model's own way of adding the batch dimension is in the way
        refused(r"give the layer an input of shape \[1, T\] instead", model, ids, broadcast=["positions"])
    else:
        check(model, (ids,), loss=sum_loss, broadcast=["positions"])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_positions_per_sample(size: int) -> None:
    check(made(lambda: Positions("[B, T]")), (tokens(size),), loss=sum_loss)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("form", FORMS)
def test_positions_that_are_broadcast_without_a_word(form: str, size: int) -> None:
    """Also where the sequence is as long as the batch is large, and shapes do not tell."""
    check(made(lambda: Positions(form)), (tokens(size),), loss=sum_loss)
    message = r"module 'positions' \(Embedding\): .*broadcast="
    refused(message, made(lambda: Positions(form)), tokens(size), max_replay_bytes=0)


def test_one_token_per_sample_is_no_position() -> None:
    """A class embedding [B, D] that is spread over the sequence."""
    model = made(
        lambda: Graph(
            lambda m, ids, label: m.head(torch.tanh(m.tokens(ids) + m.label(label).unsqueeze(1))),
            tokens=nn.Embedding(11, 6),
            label=nn.Embedding(4, 6),
            head=nn.Linear(6, 3),
        )
    )
    check(model, (tokens(5), torch.randint(4, (5,))), loss=sum_loss)


# ---- packed sequences


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        y: Tensor = self.head(self.norm(self.embedding(ids)).tanh())
        return y


def packed_loss(y: Tensor) -> Tensor:
    return (y.sin() * torch.arange(1, 5, dtype=y.dtype)).sum()


LENGTHS = [(3, 5, 1), (4,), (0, 2, 7, 0), (1, 1)]


@pytest.mark.parametrize("given", ["name", "function"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_sequences(lengths: tuple[int, ...], given: str) -> None:
    model, ids = made(Packed), torch.randint(11, (sum(lengths),))
    offsets = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).to(torch.int32)
    expected = norms_sq(model, [(part,) for part in ids.split(list(lengths))], packed_loss)
    option: Any = "cu_seqlens" if given == "name" else lambda arguments, keywords: offsets.long()
    with PerSampleGradNorms(model, loss_reduction="sum", cu_seqlens=option) as metric:
        for _ in range(2):
            model.zero_grad()
            packed_loss(model(ids, cu_seqlens=offsets)).backward()
            assert_norms(metric, expected)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({}, "called with a keyword argument 'cu_seqlens'"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens: expected boundaries, integers of shape"),
        ({"cu_seqlens": torch.tensor([0, 2, 6])}, "cu_seqlens: the boundaries end at [46], but there are 5 rows"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "cu_seqlens: the boundaries end at [46], but there are 5 rows"),
        ({"cu_seqlens": torch.tensor([1, 2, 5])}, "cu_seqlens: expected boundaries from 0"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, "cu_seqlens: expected boundaries from 0"),
    ],
    ids=str,
)
def test_boundaries_that_do_not_fit(keywords: Any, match: str) -> None:
    refused(match, made(Packed), torch.randint(11, (5,)), keywords=keywords, cu_seqlens="cu_seqlens")


def test_packed_sequences_without_a_dimension_of_features() -> None:
    offsets = torch.tensor([0, 2, 3, 7])
    x = torch.randn(7)
    before = Graph(lambda m, x, cu_seqlens=None: m.act(x.unsqueeze(-1)), act=nn.PReLU())
    after = Graph(lambda m, x, cu_seqlens=None: m.act(x).unsqueeze(-1), act=nn.PReLU())
    expected = norms_sq(before, [(part,) for part in x.split([2, 1, 4])], torch.sum)
    with PerSampleGradNorms(before, loss_reduction="sum", cu_seqlens="cu_seqlens") as metric:
        before(x, cu_seqlens=offsets).sum().backward()
        assert_norms(metric, expected)
    refused(
        r"module 'act' \(PReLU\): cu_seqlens: expected packed rows \[total, features\], got an output of shape \[7\]",
        *(after, x),
        keywords={"cu_seqlens": offsets},
        cu_seqlens="cu_seqlens",
    )


# ---- normalized


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1, 4])
def test_normalized(size: int, reduction: str) -> None:
    """r_i of every layer: float64, one sample at a time; the loss's factors cancel."""
    model = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 1)))
    x = torch.randn(size, 5)
    exact = nn.Sequential(*model).double()
    expected: dict[str, list[Tensor]] = {"0": [], "2": [], "3": []}
    for row in x.double().split(1):
        h, outputs = row, {}
        for name, layer in exact.named_children():
            h = outputs[name] = layer(h)
        for name, rows in expected.items():
            rows.append(torch.autograd.grad(h.sum(), outputs[name], retain_graph=True)[0].norm())
    model.float()
    with PerSampleGradNorms(model, loss_reduction=reduction, normalized=True, scale=7.0) as metric:
        for _ in range(2):
            model.zero_grad()
            loss = (model(x) - 3).square()
            (7 * (loss.sum() if reduction == "sum" else loss.mean())).backward()
            for name, rows in expected.items():
                assert torch.allclose(metric.normalized[name], torch.stack(rows), rtol=1e-5)


def test_normalized_needs_one_output_per_sample() -> None:
    refused("normalized=True needs one output per sample, 3 of them", made(mlp), torch.randn(3, 5), normalized=True)


def test_normalized_where_the_output_gets_no_gradient() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))
    with PerSampleGradNorms(model, loss_reduction="sum", normalized=True) as metric:
        (model(torch.randn(3, 5)) * torch.tensor([[1.0], [0], [1]])).sum().backward()
        assert metric.normalized["0"].isnan().tolist() == [False, True, False]
        with pytest.raises(KeyError, match="no layer 'x' was measured"):
            _ = metric.normalized["x"]


def test_normalized_was_not_asked_for() -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(torch.randn(3, 5))).backward()
        with pytest.raises(RuntimeError, match="pass normalized=True"):
            _ = metric.normalized


# ---- ids


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.tensor([0.5, 1, 2]), "ids: expected integers of shape"),
        (torch.tensor([[0], [1], [2]]), "ids: expected integers of shape"),
        (3, "ids: expected integers of shape"),
        (["a", "b", "c"], "ids: expected integers of shape"),
        (torch.tensor([True, False, True]), "ids: expected integers of shape"),
    ],
    ids=str,
)
def test_ids_that_are_none(ids: Any, match: str) -> None:
    with PerSampleGradNorms(made(mlp), loss_reduction="sum") as metric:
        with pytest.raises((ValueError, TypeError), match=match):
            metric.set_ids(ids)


@pytest.mark.parametrize("alone", [True, False])
def test_ids_of_another_batch(alone: bool) -> None:
    model = made(mlp)
    metric = PerSampleGradNorms(model if alone else None, loss_reduction="sum")
    monitor = metric._engine if alone else Monitor(model, metrics=[metric])
    metric.set_ids([1, 2])
    with pytest.warns(RuntimeWarning, match="stopped recording"):
        sum_loss(model(torch.randn(3, 5))).backward()
    with pytest.raises(ValueError, match="ids: 2 ids were given for a micro-batch of 3 samples"):
        monitor.compute()
    monitor.close()
