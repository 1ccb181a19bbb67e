"""The factor of a loss, read from its graph, against gradients of single samples' terms."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lipcore import Monitor, PerSampleGradNorms
from lipcore.per_sample.loss_graph import read_factor

Z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 3, 1, -100, 2, 2])
W = torch.tensor([1.0, 0.5, 2.0, 4.0])
T = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))  # [B, classes, T]
TARGETS = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(3))

# name: loss, its unreduced terms of one sample's outputs (index i), outputs
Loss = Callable[[Tensor], Tensor]
Terms = Callable[[Tensor, int], Tensor]


def ce(z: Tensor, i: int) -> Tensor:
    return nnf.cross_entropy(z[i : i + 1], Y[i : i + 1], reduction="sum")


def cew(z: Tensor, i: int) -> Tensor:
    return nnf.cross_entropy(z[i : i + 1], Y[i : i + 1], W, reduction="sum")


def mse(z: Tensor, i: int) -> Tensor:
    return (z[i] - T[i]).square().sum()


def tokens(z: Tensor, i: int) -> Tensor:
    return nnf.cross_entropy(z[i : i + 1], TARGETS[i : i + 1], reduction="sum")


def bce(z: Tensor, i: int) -> Tensor:
    return nnf.binary_cross_entropy_with_logits(z[i], T[i], reduction="sum")


def first(z: Tensor, i: int) -> Tensor:
    return nnf.mse_loss(z[i], T[i])  # the mean over its elements


CASES: dict[str, tuple[Loss, Terms, Tensor]] = {
    "cross entropy": (lambda z: nnf.cross_entropy(z, Y), ce, Z),
    "cross entropy, summed": (lambda z: nnf.cross_entropy(z, Y, reduction="sum"), ce, Z),
    "cross entropy, weighted": (lambda z: nnf.cross_entropy(z, Y, W), cew, Z),
    "cross entropy, not reduced, mean": (lambda z: nnf.cross_entropy(z, Y, reduction="none").mean(), ce, Z),
    "cross entropy, summed over a number of items": (lambda z: nnf.cross_entropy(z, Y, reduction="sum") / 37, ce, Z),
    "over a tensor of items": (lambda z: nnf.cross_entropy(z, Y, reduction="sum") / torch.tensor(37), ce, Z),
    "accumulated": (lambda z: nnf.cross_entropy(z, Y) / 8, ce, Z),
    "scaled": (lambda z: 1024 * nnf.cross_entropy(z, Y), ce, Z),
    "scaled by a tensor": (lambda z: nnf.cross_entropy(z, Y) * torch.tensor(3.0), ce, Z),
    "shifted": (lambda z: nnf.cross_entropy(z, Y) - 0.5, ce, Z),
    "other dtype and shape": (lambda z: nnf.cross_entropy(z, Y).double().view(1, 1).squeeze(), ce, Z),
    "negative": (lambda z: nnf.cross_entropy(z, Y).neg().neg(), ce, Z),
    "reduced twice": (lambda z: nnf.cross_entropy(z, Y).mean().sum(), ce, Z),
    "one sample": (lambda z: nnf.cross_entropy(z, Y[:1], reduction="none").mean(), ce, Z[:1]),
    "one sample, by hand": (lambda z: (z - T[:1]).square().sum(1).mean(), mse, Z[:1]),
    "by hand": (lambda z: -z.log_softmax(1).gather(1, Y.clamp(min=0)[:, None]).squeeze(1)[Y >= 0].mean(), ce, Z),
    "masked": (lambda z: (nnf.cross_entropy(z, Y, reduction="none") * (Y >= 0)).sum() / (Y >= 0).sum(), ce, Z),
    "tokens": (lambda z: nnf.cross_entropy(z, TARGETS), tokens, TOKENS),
    "tokens, flat": (lambda z: nnf.cross_entropy(z.movedim(1, 2).reshape(-1, 4), TARGETS.flatten()), tokens, TOKENS),
    "squared error": (lambda z: nnf.mse_loss(z, T), mse, Z),
    "squared error by hand": (lambda z: (z - T).square().sum(1).mean(), mse, Z),
    "squared error per sample": (lambda z: (z - T).square().mean(1).mean(), first, Z),
    "logits": (lambda z: nnf.binary_cross_entropy_with_logits(z, T), bce, Z),
    "probabilities": (lambda z: nnf.binary_cross_entropy(z.sigmoid(), T), bce, Z),
    "smooth": (lambda z: nnf.smooth_l1_loss(z, T), lambda z, i: nnf.smooth_l1_loss(z[i], T[i], reduction="sum"), Z),
    "absolute": (lambda z: nnf.l1_loss(z, T), lambda z, i: (z[i] - T[i]).abs().sum(), Z),
    "huber": (lambda z: nnf.huber_loss(z, T), lambda z, i: nnf.huber_loss(z[i], T[i], reduction="sum"), Z),
    "divergence": (
        lambda z: nnf.kl_div(z.log_softmax(1), T, reduction="batchmean"),
        lambda z, i: nnf.kl_div(z[i].log_softmax(0), T[i], reduction="sum"),
        Z,
    ),
    "margins": (
        lambda z: nnf.multi_margin_loss(z, Y.clamp(min=0)),
        lambda z, i: nnf.multi_margin_loss(z[i], Y.clamp(min=0)[i]),
        Z,
    ),
    "soft margins": (
        lambda z: nnf.soft_margin_loss(z, T.round() * 2 - 1),
        lambda z, i: nnf.soft_margin_loss(z[i], T[i].round() * 2 - 1, reduction="sum"),
        Z,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_single_samples_say(name: str) -> None:
    loss, terms, outputs = CASES[name]
    z = outputs.clone().requires_grad_()
    value = loss(z)
    factor = read_factor(value).value
    (brought,) = torch.autograd.grad(value, z)
    for i in range(len(z)):
        (alone,) = torch.autograd.grad(terms(z, i), z)
        assert torch.allclose(float(factor) * brought[i], alone[i], rtol=1e-5, atol=1e-7)


SIGNS: dict[str, tuple[float, Loss]] = {
    "-(mean)": (-1, lambda e: -e.mean()),
    "-1 * mean": (-1, lambda e: -1 * e.mean()),
    "mean * tensor": (-1, lambda e: e.mean() * torch.tensor(-3.0)),
    "sum / -24": (-1, lambda e: e.sum() / -24),
    "-sum / -24": (1, lambda e: -e.sum() / -24),
    "(-e).mean()": (-1, lambda e: (-e).mean()),
    "-2 * mean(0), summed": (-1, lambda e: (-2 * e.mean(0)).sum()),
    "0 - mean": (-1, lambda e: 0 - e.mean()),
    "sub(0, mean, alpha=2)": (-1, lambda e: torch.sub(torch.zeros(()), e.mean(), alpha=2)),
    "sub(mean, 0, alpha=2)": (1, lambda e: torch.sub(e.mean(), torch.zeros(()), alpha=2)),
    "add(0, mean, alpha=-2)": (-1, lambda e: torch.add(torch.zeros(()), e.mean(), alpha=-2)),
    "rsub(mean, 0, alpha=2)": (-1, lambda e: torch.rsub(e.mean(), 0, alpha=2)),
    "add(0, mean(0), alpha=2), summed": (1, lambda e: torch.add(torch.zeros(4), e.mean(0), alpha=2).sum()),
}


@pytest.mark.parametrize("name", SIGNS)
def test_the_sign_is_the_losss_own(name: str) -> None:
    """A constant's size is undone, and its sign is not, as that of a minus."""
    sign, loss = SIGNS[name]
    z = Z.clone().requires_grad_()
    value = loss(z.square())
    factor = read_factor(value).value
    assert torch.allclose(float(factor) * torch.autograd.grad(value, z)[0], sign * 2 * z.detach())


def test_reading_it_leaves_the_graph_as_it_was() -> None:
    model = nn.Linear(4, 4)
    grads = []
    for read in (False, True):
        model.zero_grad()
        value = nnf.cross_entropy(model(Z), Y)
        if read:
            read_factor(value)
        value.backward()
        grads.append(model.weight.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z: nnf.mse_loss(z, T) + z.square().sum(), r"AddBackward0, and it adds parts"),
        (
            lambda z: nnf.mse_loss(z, T) + nnf.cross_entropy(z, Y),
            r"divided by different numbers, 24 and 5; .* set_loss",
        ),
        (lambda z: nnf.mse_loss(z, T).sqrt(), r"SqrtBackward0, and what it does"),
        (lambda z: torch.stack([nnf.mse_loss(z, T), nnf.l1_loss(z, T)]).mean(), r"StackBackward0, and it joins losses"),
        (lambda z: nnf.mse_loss(z, T) * z.mean(), r"MulBackward0, and both"),
        (lambda z: nnf.mse_loss(z, T) / z.mean(), r"DivBackward0, and both"),
        (lambda z: 1 / nnf.mse_loss(z, T), r"(Reciprocal|Div)Backward0"),
        (lambda z: 0 * nnf.mse_loss(z, T), r"its constant is 0"),
        (lambda z: z.logsumexp((0, 1)), r"LogsumexpBackward"),
        (lambda z: z.sum(1), r"expected the one number .* has shape \[6\]"),
        (lambda z: z.detach().sum(), r"this tensor has no graph"),
    ],
)
def test_what_is_not_known_is_named(loss: Loss, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_factor(loss(Z.clone().requires_grad_()))


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="loss: expected the loss, a tensor with a graph, got float"):
        read_factor(0.5)  # type: ignore[arg-type]


# ---- in the metric


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))


def truth(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms of single samples' gradients."""
    norms = []
    for i in range(len(x)):
        loss = nnf.cross_entropy(model(x[i : i + 1]), y[i : i + 1], reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms.append(torch.cat([g.double().flatten() for g in grads]).norm())
    return torch.stack(norms)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("scale", [1.0, 1 / 8, 1024.0])
def test_norms_are_of_the_loss_that_was_set(scale: float, batch: int) -> None:
    model, x, y = classifier(), Z[:batch], Y.clamp(min=0)[:batch]
    expected = truth(model, x, y)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for reduction in ("mean", "sum", "mean"):
            loss = scale * nnf.cross_entropy(model(x), y, reduction=reduction)
            norms.set_loss(loss)
            loss.backward()
            assert torch.allclose(norms.per_sample, expected, rtol=1e-5)
            model.zero_grad()


def halved(loss: Tensor) -> Tensor:
    return loss / 2


def halved_in_place(loss: Tensor) -> Tensor:
    loss /= 2
    return loss


def scaled_by_an_unknown_scaler(loss: Tensor) -> Tensor:
    scaled: Tensor = torch.amp.GradScaler("cpu", init_scale=1024.0).scale(loss)
    return scaled


def tripled_and_moved(loss: Tensor) -> Tensor:
    return loss * 3 + 1.0


AFTERWARDS = (halved, halved_in_place, scaled_by_an_unknown_scaler, tripled_and_moved)


@pytest.mark.parametrize("change", AFTERWARDS)
@pytest.mark.parametrize("batch", [1, 6])
def test_what_is_done_to_a_loss_after_it_was_set(change: Callable[[Tensor], Tensor], batch: int) -> None:
    """A trainer that accumulates divides the loss that it was given; its gradient says by what."""
    model, x, y = classifier(), Z[:batch], Y.clamp(min=0)[:batch]
    expected = truth(model, x, y)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for _ in range(3):
            loss = nnf.cross_entropy(model(x), y)
            norms.set_loss(loss)
            change(loss).backward()
            assert torch.allclose(norms.per_sample, expected, rtol=1e-5)
            model.zero_grad()


def test_a_scaler_is_taken_out_once() -> None:
    """Whether the loss was set before or after it was scaled."""
    model, x, y = classifier(), Z, Y.clamp(min=0)
    expected, scaler = truth(model, x, y), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with PerSampleGradNorms(model, loss_reduction="auto", scaler=scaler) as norms:
        for before in (True, False):
            loss = nnf.cross_entropy(model(x), y)
            scaled = scaler.scale(loss)
            norms.set_loss(loss if before else scaled)
            scaled.backward()
            assert torch.allclose(norms.per_sample, expected, rtol=1e-5)


def test_a_loss_that_the_backward_pass_does_not_come_to() -> None:
    model, x, y = classifier(), Z, Y.clamp(min=0)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        norms.set_loss(nnf.cross_entropy(model(x), y))
        nnf.cross_entropy(model(x), y).backward()
        assert norms.per_sample.isnan().all()
        assert "the backward pass did not come to the loss that was set" in norms.broken


def test_a_loss_that_weighs_nothing_has_no_number() -> None:
    model, x, y = classifier(), Z, Y.clamp(min=0)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        loss = nnf.cross_entropy(model(x), y)
        norms.set_loss(loss)
        (loss * 0).backward()
        assert norms.per_sample.isnan().all()


def test_a_trainers_loss_over_all_items_of_a_step() -> None:
    """Micro-batches of different sizes, each summed and divided by the number of items of all of them."""
    model, parts = classifier(), [(Z[:2], Y[:2]), (Z[2:], Y[2:])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = PerSampleGradNorms(loss_reduction="auto")
    with Monitor(model, optimizer, [metric], window_steps=1) as monitor:
        items = sum(int((y >= 0).sum()) for _, y in parts)
        expected = [truth(model, x, y) for x, y in parts]
        for (x, y), norms in zip(parts, expected, strict=True):
            loss = nnf.cross_entropy(model(x), y, reduction="sum") / items
            metric.set_loss(loss)
            loss.backward()
            assert torch.allclose(metric.per_sample, norms, rtol=1e-5)
        optimizer.step()
        (window,) = monitor.history
    found = window["per_sample_grad_norm"].norm["total"].mean
    assert found.value == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)


def test_without_a_loss_there_is_no_number() -> None:
    model, x, y = classifier(), Z, Y.clamp(min=0)
    metric = PerSampleGradNorms(loss_reduction="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [metric], window_steps=None) as monitor:
        for given in (True, False, True):
            loss = nnf.cross_entropy(model(x), y)
            if given:
                metric.set_loss(loss)
            loss.backward()
            assert bool(metric.per_sample.isfinite().all()) == given
            assert ("set_loss(loss)" in metric.broken) != given
            optimizer.step()
            optimizer.zero_grad()
        window = monitor.compute()
    assert window is not None
    result = window["per_sample_grad_norm"]
    assert result.norm["total"].mean.count == 12
    assert [count for why, count in result.details["unrecorded"].items() if "set_loss(loss)" in why] == [1]


def test_a_loss_that_was_set_for_another_pass_is_forgotten() -> None:
    model, x, y = classifier(), Z, Y.clamp(min=0)
    metric = PerSampleGradNorms(loss_reduction="auto", every_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [metric], window_steps=None):
        for step in range(4):
            loss = nnf.cross_entropy(model(x), y)
            if step != 2:  # recorded, as step 0 is
                metric.set_loss(loss)
            loss.backward()
            if step % 2 == 0:
                assert bool(metric.per_sample.isfinite().all()) == (step == 0)
            optimizer.step()


def test_other_reductions_have_no_loss_to_set() -> None:
    with pytest.raises(RuntimeError, match="set_loss: is for loss_reduction='auto'; this metric has 'mean'"):
        PerSampleGradNorms(loss_reduction="mean").set_loss(Z.sum())
    for argument in ({"loss_terms": 3}, {"scale": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(argument))}: loss_reduction='auto' reads it"):
            PerSampleGradNorms(loss_reduction="auto", **argument)  # type: ignore[arg-type]


# ---- the loss that a model returns beside other things


class Returns(nn.Module):
    """A model that returns its loss, divided as trainers ask it to, or not."""

    def __init__(self, listens: bool, mapping: bool = True) -> None:
        super().__init__()
        self.net, self.listens, self.mapping = classifier(), listens, mapping

    def forward(self, x: Tensor, y: Tensor, num_items_in_batch: Tensor | int | None = None) -> Any:
        logits = self.net(x)
        if self.listens and num_items_in_batch is not None:
            loss = nnf.cross_entropy(logits, y, reduction="sum") / num_items_in_batch
        else:
            loss = nnf.cross_entropy(logits, y)
        found = {"loss": loss, "logits": logits}
        return found if self.mapping else SimpleNamespace(**found)


BY_NAME: dict[str, Any] = {"loss_reduction": "mean", "loss_terms": "num_items_in_batch"}
BY_FUNCTION: dict[str, Any] = {
    "loss_reduction": "mean",
    "loss_terms": lambda arguments, keywords: keywords["num_items_in_batch"],
}


@pytest.mark.parametrize("mapping", [True, False])
@pytest.mark.parametrize("listens", [True, False])
def test_a_loss_that_the_model_returns_is_read(listens: bool, mapping: bool) -> None:
    """Nothing has to be set; what is done to it afterwards is read too."""
    model, y = Returns(listens, mapping), Y.clamp(min=0)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for size in (6, 1, 1, 4):
            expected = truth(model.net, Z[:size], y[:size])
            output = model(Z[:size], y[:size], num_items_in_batch=torch.tensor(9))
            loss = output["loss"] if mapping else output.loss
            (loss / 3).backward()
            assert torch.allclose(norms.per_sample, expected, rtol=1e-5)


def test_a_loss_that_was_set_goes_before_the_models_own() -> None:
    model, y = Returns(False), Y.clamp(min=0)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        loss = nnf.cross_entropy(model(Z, y)["logits"], y, reduction="sum")
        norms.set_loss(loss)
        loss.backward()
        assert torch.allclose(norms.per_sample, truth(model.net, Z, y), rtol=1e-5)
        nnf.cross_entropy(model(Z, y)["logits"], y).backward()  # neither was set, nor is it the model's
        assert norms.per_sample.isnan().all()
        assert "the backward pass did not come to the loss that was set" in norms.broken


@pytest.mark.parametrize("settings", [BY_NAME, BY_FUNCTION], ids=["name", "function"])
@pytest.mark.parametrize("items", [9, torch.tensor(9)], ids=["number", "tensor"])
def test_a_number_of_terms_that_the_models_loss_contradicts(items: Any, settings: dict[str, Any]) -> None:
    """As BertForSequenceClassification, which is given a trainer's number and takes the mean all the same."""
    y = Y.clamp(min=0)
    for listens in (True, False):
        model = Returns(listens)
        with PerSampleGradNorms(model, scale=0.5, **settings) as norms:
            (model(Z, y, num_items_in_batch=items)["loss"] / 2).backward()
            if listens:
                assert torch.allclose(norms.per_sample, truth(model.net, Z, y), rtol=1e-5)
                continue
            assert norms.per_sample.isnan().all()
            assert "was divided by something else" in norms.broken
            assert "loss_reduction='auto' reads it" in norms.broken
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:  # as the message says
        (model(Z, y, num_items_in_batch=items)["loss"] / 2).backward()
        assert torch.allclose(norms.per_sample, truth(model.net, Z, y), rtol=1e-5)


def test_a_number_of_terms_may_be_right_for_another_loss_than_the_models() -> None:
    model, y = Returns(False), Y.clamp(min=0)
    with PerSampleGradNorms(model, **BY_NAME) as norms:
        output = model(Z, y, num_items_in_batch=9)
        (nnf.cross_entropy(output["logits"], y, reduction="sum") / 9).backward()
        assert torch.allclose(norms.per_sample, truth(model.net, Z, y), rtol=1e-5)


def test_losses_of_several_forward_passes_with_one_backward_pass() -> None:
    model = nn.Linear(4, 1)
    first, second = torch.randn(2, 4), torch.randn(8, 4)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        losses = []
        for x in (first, second):
            losses.append(model(x).square().mean())
            norms.set_loss(losses[-1])
            norms.set_loss(losses[-1])  # the same once more is no other
        (sum(losses) / 2).backward()
        assert norms.per_sample.isnan().all()
        assert "another loss was set before this one" in norms.broken or "no loss" in norms.broken.lower()
        loss = model(first).square().mean()
        norms.set_loss(loss)
        loss.backward()
        assert norms.per_sample.isfinite().all()


def filled(terms: Tensor) -> Tensor:
    buffer = torch.zeros(2)
    buffer[0], buffer[1] = terms[:, 0].mean(), terms[:, 1].mean()
    return buffer.sum()


def written(terms: Tensor) -> Tensor:
    terms = terms.clone()
    terms[:, 2] = 0.0
    return terms.mean()


#: Of terms [12, 3]: what was reduced over the batch and is made into several terms again.
REDUCED_BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "a mean times weights": lambda e: (e.mean() * torch.rand(12)).sum(),
    "a loss times weights": lambda e: (nn.functional.mse_loss(e, torch.zeros_like(e)) * torch.rand(12)).sum(),
    "a buffer that was filled": filled,
    "means joined": lambda e: torch.cat([e.mean(0), e.abs().mean(0)]).sum(),
    "means stacked": lambda e: torch.stack([e.mean(0), e.abs().mean(0)]).sum(),
    "some of the means": lambda e: e.mean(0)[:2].sum(),
    "one of the sums": lambda e: e.sum(0)[1:2].mean(),
    "a product that averages": lambda e: ((torch.ones(12) / 12) @ e).sum(),
}
TERMS_KEPT: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "weights": (lambda e: (e.sum(1) * torch.arange(12.0)).sum(), 1.0),
    "a mean over the batch": (lambda e: e.mean(0).sum(), 12.0),
    "some columns": (lambda e: e[:, :2].mean(), 24.0),
    "columns written": (written, 36.0),
    "joined": (lambda e: torch.cat([e, e.abs()], 1).mean(), 72.0),
    "chosen": (lambda e: torch.where(e > 0, e, e.square()).sum(), 1.0),
    "gathered": (lambda e: e.gather(1, (torch.arange(12) % 3)[:, None]).mean(), 12.0),
}


@pytest.mark.parametrize("name", REDUCED_BEFORE)
def test_terms_that_were_reduced_before_are_no_samples(name: str) -> None:
    terms = nn.Linear(5, 3)(torch.randn(12, 5)).square()
    with pytest.raises(ValueError, match="loss: its graph has .*pass loss_reduction='mean' or 'sum'"):
        read_factor(REDUCED_BEFORE[name](terms))


@pytest.mark.parametrize("name", TERMS_KEPT)
def test_terms_that_are_samples_still(name: str) -> None:
    loss, factor = TERMS_KEPT[name]
    terms = nn.Linear(5, 3)(torch.randn(12, 5)).square()
    assert float(read_factor(loss(terms)).number) == pytest.approx(factor)
