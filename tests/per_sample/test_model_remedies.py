"""Every way out that messages about models name is tried: the norms come, and are those of single samples."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from adapters import AttentionLoRA, DoRA, OneByOne
from models import Graph
from per_sample_models import sum_loss
from per_sample_oracle import check, norms_sq, samples_of
from remedies import Remedy, try_it
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_sequence

from lipcore import Monitor, PerSampleGradNorms, layers
from lipcore.layers import registry

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(7, (6, 3), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def registry_put_back() -> Iterator[None]:
    before = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(before)


def net(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def graph(rule: Callable[..., Any], **parts: nn.Module) -> Graph:
    torch.manual_seed(0)
    return Graph(rule, **parts)


def run(model: nn.Module, *arguments: Any, loss: Callable[[Any], Tensor] = sum_loss, **options: Any) -> Tensor:
    options.setdefault("max_replay_bytes", 0)  # with it, most of these models are measured
    with PerSampleGradNorms(model, loss_reduction="sum", **options) as norms:
        loss(model(*arguments)).backward()
        return norms.per_sample


def right(model: nn.Module, *arguments: Any, **options: Any) -> None:
    """All norms are those of float64, one sample at a time, and that is proved."""
    metric = check(model, arguments, loss=options.pop("loss", sum_loss), **options)
    assert metric.broken == metric.unproved == ""


def right_without(left_out: set[str], model: nn.Module, *arguments: Any, **options: Any) -> None:
    """The same, of all parameters but these."""
    expected = norms_sq(model, samples_of(arguments, len(arguments[0])), sum_loss)
    model.zero_grad()
    with PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=0, **options) as norms:
        sum_loss(model(*arguments)).backward()
        found, total = norms.per_parameter, norms.per_sample
        assert set(expected) - set(found) == left_out
    for name in found:
        assert torch.allclose(found[name], expected[name].sqrt(), rtol=1e-5, atol=1e-7)
    squares = torch.stack([row for name, row in expected.items() if name not in left_out])
    assert torch.allclose(total, squares.sum(0).sqrt(), rtol=1e-5)


# ---- layers without a rule


class LayerNorm(nn.LayerNorm):
    """As many projects have it: the same, in the dtype of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).type_as(x)


class Reversed(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x


def registered(kind: type[nn.Module], rule: layers.Rule, model: nn.Module, *arguments: Any) -> None:
    layers.register(kind, rule)
    right(model, *arguments)


def replaced_forward() -> nn.Sequential:
    model = net()
    model[0].forward = lambda x: F.linear(x, model[0].weight, model[0].bias)
    return model


def with_its_own_forward() -> nn.Sequential:
    model = replaced_forward()
    del model[0].forward
    return model


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if any(name.startswith(prefix) for prefix in names):
            parameter.requires_grad_(False)
    return model


def adapted(whole: bool) -> nn.Sequential:
    """Attention with LoRA; everything else is frozen, or is trained too."""
    torch.manual_seed(0)
    attention = AttentionLoRA(nn.MultiheadAttention(4, 2, batch_first=True))
    model = nn.Sequential(nn.Linear(4, 4), attention, nn.Linear(4, 2))
    return model if whole else frozen(model, "0", "2")


def dora(whole: bool) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), DoRA(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2))
    return model if whole else frozen(model, "0", "4")


MATRICES = {f"1.{name}.weight" for name in "AB"}
OF_DORA = {"2.magnitude", "2.A.weight", "2.B.weight"}
SUBCLASS = (
    r"no rule for test_model_remedies\.LayerNorm, a subclass of LayerNorm with its own forward\(\), which may compute "
    r"something else\. Where it computes the same, "
    r"lipcore\.layers\.register\(LayerNorm, lipcore\.layers\.registered\(\)\[LayerNorm\]\)"
)

LAYERS: dict[str, Remedy] = {
    "a subclass, registered": Remedy(
        lambda: run(net(LayerNorm(6)), X),
        SUBCLASS,
        lambda: registered(LayerNorm, layers.registered()[nn.LayerNorm], net(LayerNorm(6)), X),
    ),
    "a subclass, from the graph": Remedy(
        lambda: run(net(LayerNorm(6)), X),
        "max_replay_bytes= above 0 measures them from the autograd graph",
        lambda: right(net(LayerNorm(6)), X, max_replay_bytes=1 << 20),
    ),
    "a subclass, left out": Remedy(
        lambda: run(net(LayerNorm(6)), X),
        "Ways out: .*on_unsupported='skip' measures the other parameters",
        lambda: right_without({"1.weight", "1.bias"}, net(LayerNorm(6)), X, on_unsupported="skip"),
    ),
    "a subclass, frozen": Remedy(
        lambda: run(net(LayerNorm(6)), X),
        r"requires_grad_\(False\) freezes what is not trained",
        lambda: right(frozen(net(LayerNorm(6)), "1"), X),
    ),
    "a subclass with a rule of its own": Remedy(
        lambda: run(net(Reversed(6)), X),
        r"lipcore\.layers\.register\(\) takes a rule for the module",
        lambda: registered(Reversed, OneByOne(), net(Reversed(6)), X),
    ),
    "a forward that was replaced": Remedy(
        lambda: run(replaced_forward(), X),
        "`del module.forward` where the class's own will do",
        lambda: right(with_its_own_forward(), X),
    ),
    "LSTM, left out": Remedy(
        lambda: run(graph(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(4, 3, batch_first=True), b=nn.Linear(3, 2)), ROWS),
        "on_unsupported='skip'",
        lambda: right_without(
            {f"a.{name}" for name, _ in nn.LSTM(4, 3).named_parameters()},
            graph(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(4, 3, batch_first=True), b=nn.Linear(3, 2)),
            ROWS,
            on_unsupported="skip",
        ),
    ),
    "LoRA on attention, left out": Remedy(
        lambda: run(adapted(whole=True), ROWS),
        "'1.A.weight': is used 1 times in the forward pass, but only 0 times .*on_unsupported='skip'",
        lambda: right_without(MATRICES, adapted(whole=True), ROWS, on_unsupported="skip"),
    ),
    "LoRA on attention, and nothing else": Remedy(
        lambda: run(adapted(whole=False), ROWS, on_unsupported="skip"),
        r"2 trainable parameters cannot .*Ways out: lipcore\.layers\.register\(\) takes a rule for the module",
        lambda: registered(AttentionLoRA, OneByOne(), adapted(whole=False), ROWS),
    ),
    "DoRA, left out": Remedy(
        lambda: run(dora(whole=True), X),
        "'2.magnitude': there is no rule for DoRA.*on_unsupported='skip'",
        lambda: right_without(OF_DORA, dora(whole=True), X, on_unsupported="skip"),
    ),
    "DoRA, and nothing else": Remedy(
        lambda: run(dora(whole=False), X, on_unsupported="skip"),
        r"3 trainable parameters cannot be measured .*Ways out: .*lipcore\.layers\.register\(\)",
        lambda: registered(DoRA, OneByOne(), dora(whole=False), X),
    ),
    "everything is frozen": Remedy(
        lambda: run(net().requires_grad_(False), X),
        r"unfreeze what is trained \(requires_grad_\(True\)\) first",
        lambda: right(net().requires_grad_(False).requires_grad_(True), X),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_a_rule(name: str) -> None:
    try_it(LAYERS[name])


def test_a_subclass_that_computes_something_else_is_found_out() -> None:
    layers.register(Reversed, layers.registered()[nn.LayerNorm])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="the rule is not that of this layer"):
            run(net(Reversed(6)), X)


# ---- settings of layers, and how they are called


def batch_normalised(**settings: Any) -> nn.Sequential:
    return net(nn.BatchNorm1d(6, **settings))


def eval_of(model: nn.Sequential, part: int) -> nn.Sequential:
    model[part].eval()
    return model


def attention(dropout: float = 0.0) -> Graph:
    return graph(lambda m, x: m.b(m.a(x, x, x, need_weights=False)[0]), **attending(dropout))


def attending(dropout: float = 0.0) -> dict[str, nn.Module]:
    return {"a": nn.MultiheadAttention(4, 2, dropout, batch_first=True), "b": nn.Linear(4, 2)}


def weights_in_loss(detached: bool = False) -> Graph:
    def rule(m: Any, x: Tensor) -> Tensor:
        y, weights = m.a(x, x, x)
        return m.b(y) + (weights.detach() if detached else weights).mean((1, 2))[:, None, None]

    return graph(rule, **attending())


def positions(form: str) -> Graph:
    """Embeddings of positions, without the batch dimension."""

    def rule(m: Any, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        row = m.a(places[None]) if form == "[1, T]" else m.a(places)
        if form == "in front":
            return (m.b(m.c(ids)) + row[None]).reshape(*ids.shape, 2)
        return m.b(m.c(ids)) + row

    return graph(rule, a=nn.Embedding(3, 2), b=nn.Linear(4, 2), c=nn.Embedding(7, 4))


def embedded(**settings: Any) -> Graph:
    return graph(lambda m, ids: m.b(m.a(ids)), a=nn.Embedding(7, 4, **settings), b=nn.Linear(4, 2))


def bagged(mode: str) -> Graph:
    return graph(lambda m, ids: m.b(m.a(ids)), a=nn.EmbeddingBag(7, 4, mode=mode), b=nn.Linear(4, 2))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2)

    def forward(self, steps: Any, cu_seqlens: Any = None) -> Tensor:
        return self.linear(getattr(steps, "data", steps))


SEQUENCES = [ROWS[0], ROWS[1, :2], ROWS[2]]


def padded() -> None:
    right(Steps(), pad_sequence(SEQUENCES, batch_first=True))


def rows_with_boundaries() -> None:
    model, bounds = Steps(), torch.tensor([0, 3, 5, 8])
    expected = [norms_sq(model, [(rows[None],)], sum_of_rows)["linear.weight"] for rows in SEQUENCES]
    with PerSampleGradNorms(model, loss_reduction="sum", cu_seqlens="cu_seqlens") as norms:
        sum_of_rows(model(torch.cat(SEQUENCES), cu_seqlens=bounds)).backward()
        assert torch.allclose(norms.per_parameter["linear.weight"], torch.cat(expected).sqrt(), rtol=1e-5)


def sum_of_rows(output: Tensor) -> Tensor:
    return output.sin().sum()


def behind_batch_norm() -> None:
    """What stands behind it has norms, which are those at the statistics of this batch."""
    model = batch_normalised()
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip") as norms:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sum_loss(model(X)).backward()
        hidden, head = model[:-1](X).detach(), model[-1]  # type: ignore[index]
        expected = norms_sq(head, samples_of((hidden,), len(X)), sum_loss)
        assert norms.per_layer["0"].isnan().all()
        found: Tensor = norms.per_layer["3"]
        torch.testing.assert_close(found, (expected["weight"] + expected["bias"]).sqrt(), rtol=1e-4, atol=1e-6)
        assert norms.unproved


def frozen_norm() -> nn.Sequential:
    model = batch_normalised()
    model[1].requires_grad_(False)  # type: ignore[index]
    return model


class Distances(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.body, self.codes, self.settings = nn.Linear(4, 6), nn.Parameter(torch.randn(7, 6)), settings

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.body(x), self.codes, **self.settings)


FIVE_TIMES_FIVE = torch.randn(25, 4, generator=torch.Generator().manual_seed(3))


def distances(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return Distances(**settings)


CALLS: dict[str, Remedy] = {
    "BatchNorm in train mode, eval()": Remedy(
        lambda: run(batch_normalised(), X),
        r"use eval\(\) on it \(frozen running statistics\)",
        lambda: right(eval_of(batch_normalised(), 1), X),
    ),
    "BatchNorm in train mode, replaced": Remedy(
        lambda: run(batch_normalised(), X), "or GroupNorm", lambda: right(net(nn.GroupNorm(2, 6)), X)
    ),
    "distances by another formula for one sample more": Remedy(
        lambda: run(distances(), FIVE_TIMES_FIVE, max_replay_bytes=1 << 30),
        r"compute_mode='use_mm_for_euclid_dist', or use another batch size",
        lambda: right(distances(compute_mode="use_mm_for_euclid_dist"), FIVE_TIMES_FIVE),
    ),
    "BatchNorm in train mode, left out": Remedy(
        lambda: run(batch_normalised(), X),
        r"Ways out: on_unsupported='skip' measures the other parameters$",
        lambda: behind_batch_norm(),
    ),
    "BatchNorm in train mode, whose weights are frozen": Remedy(
        lambda: run(frozen_norm(), X),
        r"'1': normalises by.*Ways out: on_unsupported='skip' measures the other parameters$",
        lambda: right(eval_of(frozen_norm(), 1), X),
    ),
    "BatchNorm without running statistics": Remedy(
        lambda: run(batch_normalised(track_running_stats=False).eval(), X),
        r"it has no running statistics, so that eval\(\) changes nothing: use GroupNorm",
        lambda: right(net(nn.GroupNorm(2, 6)), X),
    ),
    "attention weights in the loss, detached": Remedy(
        lambda: run(weights_in_loss(), ROWS), r"detach\(\) that output", lambda: right(weights_in_loss(True), ROWS)
    ),
    "attention weights in the loss, not needed": Remedy(
        lambda: run(weights_in_loss(), ROWS), "call it with need_weights=False", lambda: right(attention(), ROWS)
    ),
    "positions [T]": Remedy(
        lambda: run(positions("[T]"), IDS),
        "broadcast= names layers that are called without the batch dimension",
        lambda: right(positions("[T]"), IDS, broadcast=["a"]),
    ),
    "positions [1, T]": Remedy(
        lambda: run(positions("[1, T]"), IDS[:1].expand(6, -1)),
        "broadcast=",
        lambda: right(positions("[1, T]"), IDS, broadcast=["a"]),
    ),
    "positions with a dimension in front": Remedy(
        lambda: run(positions("in front"), IDS, broadcast=["a"]),
        r"give the layer an input of shape \[1, T\] instead",
        lambda: right(positions("[1, T]"), IDS, broadcast=["a"]),
    ),
    "gradients by frequency": Remedy(
        lambda: run(embedded(scale_grad_by_freq=True), IDS),
        "use scale_grad_by_freq=False",
        lambda: right(embedded(scale_grad_by_freq=False), IDS),
    ),
    "a packed sequence, padded": Remedy(
        lambda: run(Steps(), pack_sequence(SEQUENCES, enforce_sorted=False)), "pass padded sequences", padded
    ),
    "a packed sequence, as rows": Remedy(
        lambda: run(Steps(), pack_sequence(SEQUENCES, enforce_sorted=False)),
        "or rows with cu_seqlens=",
        rows_with_boundaries,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_settings_and_calls(name: str) -> None:
    try_it(CALLS[name])


# ---- modules that are called by others


class Scaled(nn.Module):
    """A layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class ScaledRule(layers.Rule):
    def save(self, module: nn.Module, arguments: Any, keywords: Any, batch: layers.Batch) -> Any:
        return (arguments[0],), batch

    def factors(self, module: nn.Module, grad_output: Tensor, extra: Any, *saved: Tensor) -> dict[str, layers.Factor]:
        return {"scale": layers.RowSum(extra.tokens(grad_output), extra.tokens(saved[0]))}


def compiled(scaled: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    torch._dynamo.reset()
    inner = net(Scaled() if scaled is None else scaled)
    return inner, torch.compile(inner, fullgraph=True, backend="aot_eager")


def compiled_without_rule() -> None:
    PerSampleGradNorms(compiled()[1], loss_reduction="sum")


def compiled_skipped() -> None:
    inner, model = compiled()
    expected = norms_sq(inner, samples_of((X,), 6), sum_loss)
    with PerSampleGradNorms(model, loss_reduction="sum", on_unsupported="skip") as norms:
        assert any("torch.compile leaves no autograd graph" in line.rule for line in norms.plan())
        sum_loss(model(X)).backward()
        for name, found in norms.per_parameter.items():
            assert torch.allclose(found, expected.pop(name).sqrt(), rtol=1e-5)
    assert set(expected) == {"1.scale"}


def compiled_with_a_rule() -> None:
    layers.register(Scaled, ScaledRule())
    inner, model = compiled()
    expected = torch.stack(list(norms_sq(inner, samples_of((X,), 6), sum_loss).values())).sum(0)
    with PerSampleGradNorms(model, loss_reduction="sum") as norms:
        sum_loss(model(X)).backward()
        assert torch.allclose(norms.per_sample, expected.sqrt(), rtol=1e-5)


def compiled_but_for_every_third_step() -> None:
    """Norms are right, and training is that of the same loop without the metric."""
    trained = []
    for measured in (True, False):
        inner, model = compiled()
        optimizer = torch.optim.SGD(inner.parameters(), lr=1e-3)
        norms = PerSampleGradNorms(loss_reduction="sum")
        monitor = Monitor(inner, optimizer, metrics=[norms]) if measured else None
        for step in range(8):
            expected = norms_sq(inner, samples_of((X,), 6), sum_loss)
            optimizer.zero_grad()
            sum_loss((model if step % 3 else inner)(X)).backward()
            if measured and step % 3 == 0:
                total = torch.stack(list(expected.values())).sum(0).sqrt()
                assert torch.allclose(norms.per_sample, total, rtol=1e-5)
            optimizer.step()
        if monitor is not None:
            assert monitor.compute()["per_sample_grad_norm"].norm["total"].mean.count == 18
            monitor.close()
        trained.append([p.detach().clone() for p in inner.parameters()])
    assert all(map(torch.equal, *trained))


@pytest.mark.parametrize(
    ("said", "tried"),
    [
        (r"on_unsupported='skip' measures the other parameters", compiled_skipped),
        (r"lipcore\.layers\.register\(\) takes a rule for the module", compiled_with_a_rule),
        (r"make the metric of that module, and call it, not the compiled one", compiled_but_for_every_third_step),
    ],
    ids=["skip", "rule", "eager steps"],
)
def test_compiled_models_with_a_layer_without_a_rule(said: str, tried: Callable[[], None]) -> None:
    try_it(Remedy(compiled_without_rule, said, tried))


class Lightning(nn.Module):
    """As a LightningModule: its training_step calls what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = net()

    def training_step(self, x: Tensor) -> Tensor:
        return sum_loss(self.encoder(x))


@contextmanager
def watched(model: nn.Module, whole: nn.Module) -> Iterator[tuple[Monitor, PerSampleGradNorms]]:
    norms = PerSampleGradNorms(loss_reduction="sum")
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.0)
    with Monitor(model, optimizer, metrics=[norms]) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            whole.training_step(X).backward()
            optimizer.step()
        yield monitor, norms


def all_of_it() -> None:
    model = Lightning()
    with watched(model, model):
        pass


def the_module_inside() -> None:
    model = Lightning()
    expected = torch.stack(list(norms_sq(copy.deepcopy(model.encoder), samples_of((X,), 6), sum_loss).values())).sum(0)
    with watched(model.encoder, model) as (_, norms):
        assert torch.allclose(norms.per_sample, expected.sqrt(), rtol=1e-5)


def test_a_module_whose_inner_module_is_called() -> None:
    try_it(Remedy(all_of_it, r"pass the module inside it that the loop calls \('encoder'\?\)", the_module_inside))
