"""Where other implementations of per-sample gradient norms are wrong or give up: each is one test.

Most also compute the wrong number, so that the test shows that it would notice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graph
from per_sample_models import Transformer, cnn, floats, made, mlp, sum_loss, tokens, train
from per_sample_oracle import check, norms_sq, samples_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lipcore import Monitor, PerSampleGradNorms


def right(model: nn.Module, *arguments: Any, dim: int = 0, **options: Any) -> Tensor:
    """Norms in total, which are those of the oracle."""
    return check(model, arguments, loss=sum_loss, dim=dim, **options).per_sample


def grads_at(model: nn.Module, x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What a tap sees of a layer's only call: (its input, the gradient at its output)."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen.append(arguments[0].detach())
        output.register_hook(seen.append)

    handle = layer.register_forward_hook(keep)
    sum_loss(model(x)).backward()
    handle.remove()
    return seen[0], seen[1]


def off(wrong: Tensor, found: Tensor) -> float:
    return float(((wrong - found) / found).abs().max())


# ---- convolutions


def conv_model(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.Flatten(), nn.Tanh())


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_that_is_not_zeros(mode: str) -> None:
    """Unfolding a zero-padded input: 15 % off."""
    model, x = made(lambda: conv_model(padding=1, padding_mode=mode, bias=False)), torch.randn(3, 4, 5, 5)
    found = right(model, x)
    _, grad = grads_at(model, x, model[0])
    wrong = torch.bmm(grad.flatten(2), F.unfold(x, 3, padding=1).mT).flatten(1).norm(dim=1)
    assert off(wrong, found) > 0.02


def test_grouped_convolutions() -> None:
    """Taking every input channel for every output channel: 9 to 19 % off, and more."""
    model, x = made(lambda: conv_model(groups=2, bias=False)), torch.randn(3, 4, 5, 5)
    found = right(model, x)
    _, grad = grads_at(model, x, model[0])
    wrong = torch.bmm(grad.flatten(2), F.unfold(x, 3).mT).flatten(1).norm(dim=1)
    assert off(wrong, found) > 0.05


@pytest.mark.parametrize("options", [{"dilation": 2}, {"stride": 2, "padding": 1}, {"groups": 4}], ids=str)
def test_dilated_strided_and_depthwise_convolutions(options: dict[str, Any]) -> None:
    right(made(lambda: conv_model(**options)), torch.randn(3, 4, 7, 6))


# ---- weights that are used more than once


def test_an_embedding_tied_to_the_head() -> None:
    """Adding the squares of the two: 22 to 47 % off."""
    tied, untied, ids = made(Transformer), made(lambda: Transformer(tied=False)), tokens(4)
    untied.load_state_dict(tied.state_dict())
    found = right(tied, ids)
    wrong = right(untied, ids)
    assert off(wrong, found) > 0.01


def test_a_module_that_is_called_twice() -> None:
    """Keeping the last call only, or adding squares."""
    model = made(lambda: Graph(lambda m, x: m.a(m.a(x).tanh()), a=nn.Linear(5, 5)))
    copies = made(lambda: Graph(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(5, 5), b=nn.Linear(5, 5)))
    copies.b.load_state_dict(model.a.state_dict())
    copies.a.load_state_dict(model.a.state_dict())
    x = torch.randn(4, 5)
    assert off(right(copies, x), right(model, x)) > 0.01


def test_repeated_tokens() -> None:
    """Taking each position's gradient for a row of its own: 32 % off."""
    model = made(lambda: nn.Sequential(nn.Embedding(3, 4), nn.Tanh()))
    ids = torch.randint(3, (4, 9))
    found = right(model, ids)
    _, grad = grads_at(model, ids, model[0])
    assert off(grad.flatten(1).norm(dim=1), found) > 0.05


def test_padding_tokens() -> None:
    model = made(lambda: nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 3)))
    ids = torch.randint(5, (4, 9))
    ids[:, 5:] = 0
    right(model, ids)


# ---- where the batch is


def positions(length: int) -> nn.Module:
    return Graph(
        lambda m, ids: m.head(torch.tanh(m.tokens(ids) + m.positions(torch.arange(length)))),
        tokens=nn.Embedding(11, 6),
        positions=nn.Embedding(length, 6),
        head=nn.Linear(6, 3),
    )


def test_as_many_positions_as_samples() -> None:
    """Taking position t for sample t where T = B: 12 % off. By rules alone it is an error without
    broadcast=, never a number."""
    model, ids = made(lambda: positions(5)), tokens(5)
    found = right(model, ids, broadcast=["positions"])
    parts = norms_sq(model, samples_of((ids,), 5), sum_loss)
    _, grad = grads_at(model, ids, model.positions)
    wrong = sum(row for name, row in parts.items() if name != "positions.weight") + grad.square().sum(1)
    assert off(wrong.sqrt(), found) > 0.01
    right(model, ids)
    with pytest.raises(ValueError, match="module 'positions' .*broadcast="):
        with PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=0), pytest.warns(RuntimeWarning):
            sum_loss(model(ids)).backward()


def test_the_sequence_first() -> None:
    """Taking dimension 0 for the batch where T = B: 53 to 89 % off."""
    model = made(lambda: Graph(lambda m, x: m.a(x).tanh().sum(0), a=nn.Linear(5, 4)))
    x = torch.randn(4, 4, 5)
    found = right(model, x, dim=1)
    _, grad = grads_at(model, x, model.a)
    weight = torch.einsum("bto,bti->boi", grad, x)
    wrong = (weight.square().sum((1, 2)) + grad.sum(1).square().sum(1)).sqrt()
    assert off(wrong, found) > 0.05


def test_batch_and_sequence_flattened() -> None:
    model = made(lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(5, 4)))
    check(model, (torch.randn(3, 2, 5),), loss=sum_loss)


# ---- numbers


def test_float16_squares_overflow() -> None:
    """Squares in float16: infinite where the norm is 5e3."""
    model = made(lambda: nn.Linear(8, 4)).half()
    x = torch.full((2, 8), 40.0).half()

    def loss(y: Tensor) -> Tensor:
        return 20 * y.float().sum()

    expected = norms_sq(model, samples_of((x,), 2), loss)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        loss(model(x)).backward()
        total = torch.stack(list(expected.values())).sum(0).sqrt()
        assert total.min() > 4e3
        assert torch.allclose(metric.per_sample, total, rtol=1e-3)
    grad = torch.full((2, 4), 20.0).half()
    assert (x.square().sum(1) * grad.square().sum(1)).isinf().all()


def test_small_gradients_underflow() -> None:
    model, x = made(mlp), torch.randn(3, 5)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        (sum_loss(model(x)) * 1e-25).backward()
        expected = norms_sq(model, samples_of((x,), 3), sum_loss)
        total = torch.stack(list(expected.values())).sum(0).sqrt() * 1e-25
        assert torch.allclose(metric.per_sample, total, rtol=1e-5, atol=0)


# ---- training loops


def test_every_micro_batch_of_an_accumulated_step() -> None:
    """Only the last one's norms are there, or those of all of them added up."""
    model = made(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    metric = PerSampleGradNorms(loss_reduction="mean", scale=0.25)
    every = []
    with Monitor(model, optimizer, metrics=[metric]) as monitor:
        for _ in range(4):
            x = torch.randn(3, 5)
            every.append(torch.stack(list(norms_sq(model, samples_of((x,), 3), sum_loss).values())).sum(0).sqrt())
            (sum_loss(model(x)) / 3 / 4).backward()
        optimizer.step()
        found = monitor.compute()["per_sample_grad_norm"].norm["total"].mean
    assert found.count == 12
    assert found.value == pytest.approx(float(torch.cat(every).mean()), rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_reduction(reduction: str) -> None:
    """Off by the size of the batch."""
    right(made(mlp), torch.randn(6, 5), reduction=reduction)


# ---- what is refused elsewhere


def test_four_dimensional_linear() -> None:
    right(made(lambda: nn.Linear(5, 4)), torch.randn(3, 2, 4, 5))


def test_layer_norm_without_bias() -> None:
    right(made(lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4, bias=False))), torch.randn(3, 2, 5))


def test_every_norm_layer() -> None:
    model = made(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)))
    right(made(lambda: nn.Sequential(model, nn.Flatten(), nn.LayerNorm(36), nn.RMSNorm(36))), torch.randn(3, 2, 5, 5))


def test_in_place_activations() -> None:
    right(made(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))), torch.randn(3, 5))


def test_keyword_inputs() -> None:
    model = made(lambda: Graph(lambda m, x: m.b(input=m.a(input=x)), a=nn.Linear(5, 4), b=nn.LayerNorm(4)))
    x = torch.randn(3, 5)
    expected = norms_sq(model, samples_of((x,), 3), sum_loss)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(x=x)).backward()
        assert torch.allclose(metric.per_sample, torch.stack(list(expected.values())).sum(0).sqrt(), rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.c(checkpoint(m.b, h, use_reentrant=reentrant) if x.dtype == torch.float32 else m.b(h))

    right(made(lambda: Graph(rule, a=nn.Linear(5, 4), b=mlp_of(4), c=nn.Linear(4, 3))), torch.randn(3, 5))


def mlp_of(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 7), nn.ReLU(inplace=True), nn.Linear(7, features))


def test_frozen_parts() -> None:
    model = made(mlp)
    model[0].requires_grad_(False)
    right(model, torch.randn(3, 5))


# ---- torch.compile


def test_no_graph_break(fresh_dynamo: Any) -> None:
    """Three of them with hooks that keep state on parameters."""
    inner = made(cnn)
    model, x = torch.compile(inner, backend="aot_eager"), floats(1, 6, 6)(3)
    expected = norms_sq(inner, samples_of((x,), 3), sum_loss)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(x)).backward()
        assert torch.allclose(metric.per_sample, torch.stack(list(expected.values())).sum(0).sqrt(), rtol=1e-5)
    assert sum(fresh_dynamo["graph_break"].values()) == 0


# ---- nothing on the user's objects


def test_no_attribute_on_parameters_and_no_hook_left() -> None:
    model = made(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    keys: Callable[[], list[set[str]]] = lambda: [set(p.__dict__) for p in model.parameters()]  # noqa: E731
    before = keys()
    with Monitor(model, optimizer, metrics=[PerSampleGradNorms(loss_reduction="sum")]):
        train(model, optimizer, [torch.randn(3, 5)])
        assert keys() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
