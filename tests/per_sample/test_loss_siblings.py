"""Losses as people write them: each factor right against float64, one sample at a time, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from lipcore.per_sample.loss_graph import read_factor

B, C, T = 6, 5, 4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z, TOKENS = drawn(B, C, seed=0), drawn(B, C, T, seed=1)
Y = torch.tensor([0, 3, 1, -100, 4, 2])
YT = torch.randint(0, C, (B, T), generator=torch.Generator().manual_seed(2)).where(drawn(B, T, seed=3) < 1, -100)
W = torch.tensor([1.0, 0.5, 2.0, 4.0, 0.3])
P = drawn(B, C, seed=4).softmax(1)
R = drawn(B, C, seed=5)
BITS = (R > 0).float()
MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
VARIANCE = R.exp()


class Case(NamedTuple):
    """A loss of (outputs, everything else); sample i's terms are the same with reduction "sum" of row i."""

    loss: Callable[[Tensor], Tensor]
    terms: Callable[[Tensor, Any], Tensor]  # of the outputs and the slice of one sample
    outputs: Tensor = Z


def smoothed(reduction: str, eps: float = 0.1, **more: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: nnf.cross_entropy(z, Y, reduction=reduction, label_smoothing=eps, **more)


def smoothed_terms(eps: float = 0.1, weight: Tensor | None = None, ignore: int = -100) -> Callable[..., Tensor]:
    def terms(z: Tensor, i: slice) -> Tensor:
        w = None if weight is None else weight.to(z.dtype)
        return nnf.cross_entropy(z[i], Y[i], w, ignore_index=ignore, reduction="sum", label_smoothing=eps)

    return terms


def ce(z: Tensor, i: slice) -> Tensor:
    return nnf.cross_entropy(z[i], Y[i], reduction="sum")


def mse(z: Tensor, i: slice) -> Tensor:
    return (z[i] - R[i]).square().sum()


def halved(z: Tensor, i: slice) -> Tensor:
    return 0.5 * z[i].square().sum()


def hf_smoother(z: Tensor, items: Any = None, eps: float = 0.1) -> Tensor:
    """What transformers' LabelSmoother computes."""
    log_probs = -nnf.log_softmax(z, dim=-1)
    labels = Y.unsqueeze(-1)
    padding = labels.eq(-100)
    nll, smooth = log_probs.gather(-1, labels.clamp(min=0)), log_probs.sum(-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(padding, 0.0)
    smooth.masked_fill_(padding, 0.0)
    count = padding.numel() - padding.long().sum() if items is None else items
    return (1 - eps) * (nll.sum() / count) + eps * (smooth.sum() / (count * log_probs.shape[-1]))


def gaussian(z: Tensor, i: slice) -> Tensor:
    return nnf.gaussian_nll_loss(z[i], R[i].to(z.dtype), VARIANCE[i].to(z.dtype), reduction="sum")


def of_elements(function: Callable[..., Tensor], target: Tensor, made: Callable[[Tensor], Tensor] = lambda z: z) -> Any:
    """The mean and the sum of a loss function, and what is written by hand with it."""

    def terms(z: Tensor, i: slice) -> Tensor:
        return function(made(z[i]), target[i].to(z.dtype), reduction="sum")

    return {
        "mean": Case(lambda z: function(made(z), target), terms),
        "sum": Case(lambda z: function(made(z), target, reduction="sum"), terms),
        "none, then mean": Case(lambda z: function(made(z), target, reduction="none").mean(), terms),
    }


def log_probabilities(z: Tensor) -> Tensor:
    return z.log_softmax(-1)


TABLES = {
    "MSE": of_elements(nnf.mse_loss, R),
    "L1": of_elements(nnf.l1_loss, R),
    "SmoothL1": of_elements(nnf.smooth_l1_loss, R),
    "Huber": of_elements(nnf.huber_loss, R),
    "BCE": of_elements(nnf.binary_cross_entropy, BITS, torch.sigmoid),
    "BCEWithLogits": of_elements(nnf.binary_cross_entropy_with_logits, BITS),
    "KLDiv": of_elements(nnf.kl_div, P, log_probabilities),
    "PoissonNLL": of_elements(nnf.poisson_nll_loss, R.abs()),
    "soft margin": of_elements(nnf.soft_margin_loss, 2 * BITS - 1),
}
CASES: dict[str, Case] = {f"{name}, {how}": case for name, cases in TABLES.items() for how, case in cases.items()}
CASES |= {
    "KLDiv, batchmean": Case(
        lambda z: nnf.kl_div(log_probabilities(z), P, reduction="batchmean"), TABLES["KLDiv"]["sum"].terms
    ),
    "GaussianNLL": Case(lambda z: nnf.gaussian_nll_loss(z, R, VARIANCE), gaussian),
    "GaussianNLL, sum": Case(lambda z: nnf.gaussian_nll_loss(z, R, VARIANCE, reduction="sum"), gaussian),
    "NLL": Case(lambda z: nnf.nll_loss(log_probabilities(z), Y), ce),
    "NLL, weighted": Case(lambda z: nnf.nll_loss(log_probabilities(z), Y, W), smoothed_terms(0.0, W)),
    "NLL, sum": Case(lambda z: nnf.nll_loss(log_probabilities(z), Y, reduction="sum"), ce),
    "cross entropy, probabilities": Case(
        lambda z: nnf.cross_entropy(z, P),
        lambda z, i: nnf.cross_entropy(z[i], P[i].to(z.dtype), reduction="sum"),
    ),
    "cross entropy, probabilities, smoothed": Case(
        lambda z: nnf.cross_entropy(z, P, label_smoothing=0.2),
        lambda z, i: nnf.cross_entropy(z[i], P[i].to(z.dtype), reduction="sum", label_smoothing=0.2),
    ),
    # label smoothing
    "smoothed": Case(smoothed("mean"), smoothed_terms()),
    "smoothed, sum": Case(smoothed("sum"), smoothed_terms()),
    "smoothed, none, then mean": Case(lambda z: smoothed("none")(z).mean(), smoothed_terms()),
    "smoothed, weighted": Case(smoothed("mean", weight=W), smoothed_terms(weight=W)),
    "smoothed, weighted, sum": Case(smoothed("sum", weight=W), smoothed_terms(weight=W)),
    "smoothed, another index ignored": Case(
        lambda z: nnf.cross_entropy(z, Y.clamp(min=0), ignore_index=2, label_smoothing=0.3),
        lambda z, i: nnf.cross_entropy(z[i], Y[i].clamp(min=0), ignore_index=2, label_smoothing=0.3, reduction="sum"),
    ),
    "smoothed, of a number of items": Case(lambda z: smoothed("sum")(z) / torch.tensor(37), smoothed_terms()),
    "smoothed, accumulated": Case(lambda z: smoothed("mean", 0.5)(z) / 8, smoothed_terms(0.5)),
    "smoothed, tokens": Case(
        lambda z: nnf.cross_entropy(z, YT, label_smoothing=0.1),
        lambda z, i: nnf.cross_entropy(z[i], YT[i], label_smoothing=0.1, reduction="sum"),
        TOKENS,
    ),
    "smoothed, tokens, weighted": Case(
        lambda z: nnf.cross_entropy(z, YT, W, label_smoothing=0.1),
        lambda z, i: nnf.cross_entropy(z[i], YT[i], W.to(z.dtype), label_smoothing=0.1, reduction="sum"),
        TOKENS,
    ),
    "smoothed, flat tokens": Case(
        lambda z: nnf.cross_entropy(z.movedim(1, 2).reshape(-1, C), YT.flatten(), label_smoothing=0.1),
        lambda z, i: nnf.cross_entropy(z[i], YT[i], label_smoothing=0.1, reduction="sum"),
        TOKENS,
    ),
    "transformers' smoother": Case(hf_smoother, smoothed_terms()),
    "transformers' smoother, of items": Case(lambda z: hf_smoother(z, 37), smoothed_terms()),
    "transformers' smoother, of a tensor": Case(lambda z: hf_smoother(z, torch.tensor(37)) / 2, smoothed_terms()),
    # by hand
    "losses.mean()": Case(lambda z: nnf.cross_entropy(z, Y, reduction="none").mean(), ce),
    "losses.mean(0)": Case(lambda z: nnf.cross_entropy(z, Y, reduction="none").mean(0), ce),
    "losses.sum() / len": Case(lambda z: nnf.cross_entropy(z, Y, reduction="none").sum() / B, ce),
    "masked": Case(
        lambda z: ((z - R).square().sum(1) * MASK).sum() / MASK.sum(), lambda z, i: mse(z, i) * MASK[i].sum()
    ),
    "mask @ losses": Case(
        lambda z: MASK @ (z - R).square().sum(1) / MASK.sum(), lambda z, i: mse(z, i) * MASK[i].sum()
    ),
    "loss / k": Case(lambda z: nnf.mse_loss(z, R) / 7, mse),
    "loss * scale": Case(lambda z: nnf.mse_loss(z, R) * torch.tensor(2.0**16), mse),
    "1 - loss": Case(lambda z: 1 - nnf.mse_loss(z, R), mse),
    "loss + constant": Case(lambda z: nnf.mse_loss(z, R) + torch.tensor(3.0), mse),
    # over the batch first
    "mean(0).sum()": Case(lambda z: (z - R).square().mean(0).sum(), mse),
    "mean(0).mean()": Case(lambda z: (z - R).square().mean(0).mean(), mse),
    "sum(0) / B, summed": Case(lambda z: ((z - R).square().sum(0) / B).sum(), mse),
    "tokens, mean(0), mean(1), sum": Case(
        lambda z: z.square().mean(0).mean(1).sum(), lambda z, i: z[i].square().sum(), TOKENS
    ),
    "weighted classes of mean(0)": Case(
        lambda z: 3 * (W * (z - R).square().mean(0)).sum(),
        lambda z, i: (W.to(z.dtype) * (z[i] - R[i]).square()).sum(),
    ),
    "two that are reduced over the batch": Case(
        lambda z: (2 * (z - R).square().mean(0) + 2 * z.abs().mean(0)).sum() / 7,
        lambda z, i: mse(z, i) + z[i].abs().sum(),
    ),
    "each sample's mean": Case(
        lambda z: 0.5 * z.square().mean(-1).mean(-1).mean(), lambda z, i: z[i].square().mean((1, 2)).sum(), TOKENS
    ),
    "each sample's sum": Case(lambda z: (0.5 * z.square().sum((1, 2))).mean(), halved, TOKENS),
    # sums
    "two means over the batch": Case(
        lambda z: nnf.cross_entropy(z, Y.clamp(min=0)) + 0.5 * (z - R).square().sum(1).mean(),
        lambda z, i: nnf.cross_entropy(z[i], Y[i].clamp(min=0), reduction="sum") + 0.5 * mse(z, i),
    ),
    "two sums": Case(
        lambda z: (ce(z, slice(None)) - 0.1 * mse(z, slice(None))) / 9, lambda z, i: ce(z, i) - 0.1 * mse(z, i)
    ),
    "three, in a list": Case(
        lambda z: sum([nnf.mse_loss(z, R), 3 * nnf.l1_loss(z, R), nnf.huber_loss(z, R)]) / 4,  # type: ignore[arg-type]
        lambda z, i: (
            mse(z, i)
            + 3 * nnf.l1_loss(z[i], R[i].to(z.dtype), reduction="sum")
            + nnf.huber_loss(z[i], R[i].to(z.dtype), reduction="sum")
        ),
    ),
    "both accumulated": Case(
        lambda z: nnf.mse_loss(z, R) / 4 + nnf.l1_loss(z, R) / 4,
        lambda z, i: mse(z, i) + nnf.l1_loss(z[i], R[i].to(z.dtype), reduction="sum"),
    ),
    "a sum and a penalty": Case(lambda z: mse(z, slice(None)) + 0.01 * PENALISED.square().sum(), mse),
}
PENALISED = torch.ones(3, requires_grad=True)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_single_samples_say(name: str) -> None:
    loss, terms, outputs = CASES[name]
    z = outputs.clone().requires_grad_()
    value = loss(z)
    factor = read_factor(value).value
    (brought,) = torch.autograd.grad(value, z)
    exact = outputs.double().requires_grad_()
    for i in range(B):
        (alone,) = torch.autograd.grad(terms(exact, slice(i, i + 1)), exact)
        found = float(factor) * brought[i].double()
        found = found if float((found * alone[i]).sum()) >= 0 else -found  # the sign of f is left open: norms have none
        assert torch.allclose(found, alone[i], rtol=2e-5, atol=1e-6)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a mean and a penalty": (
        lambda z: nnf.mse_loss(z, R) + 0.01 * PENALISED.square().sum(),
        r"adds parts that are divided by different numbers, 30 and 1; .* set_loss\(\)",
    ),
    "means over other numbers": (
        lambda z: nnf.cross_entropy(z, Y) + nnf.mse_loss(z, R),
        "different numbers, 5 and 30",
    ),
    "a smoothed loss and a penalty": (lambda z: smoothed("mean")(z) + PENALISED.sum(), "different numbers, 5 and 1"),
    "a part that is not known": (lambda z: nnf.mse_loss(z, R) + z.logsumexp((0, 1)), "LogsumexpBackward"),
    "a part with another log-softmax": (
        lambda z: nnf.cross_entropy(z, Y) - 0.1 * log_probabilities(2 * z).sum(1).sum(),
        "different numbers, 5 and 1",
    ),
    "parts of which one is over the batch": (
        lambda z: ((z - R).square().mean(0) + z.abs()[0]).sum(),
        "reduced over the batch in different ways",
    ),
    "a stack": (lambda z: torch.stack([nnf.mse_loss(z, R), nnf.l1_loss(z, R)]).mean(), "joins losses"),
    "a root": (lambda z: nnf.mse_loss(z, R).sqrt(), "SqrtBackward0"),
    "a maximum": (lambda z: nnf.mse_loss(z, R, reduction="none").mean(1).max(), "MaxBackward"),
    "a learned weight": (lambda z: nnf.mse_loss(z, R) * PENALISED[0], "depend on the model"),
    "a norm": (lambda z: (z - R).norm(), "LinalgVectorNorm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    loss, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_factor(loss(Z.clone().requires_grad_()))


def test_the_batch_may_be_the_second_dimension() -> None:
    z = TOKENS.clone().requires_grad_()
    for batch_dim, over, number in [(0, 0, B), (1, 1, C), (1, 0, 1), (0, 1, 1)]:
        assert read_factor(z.square().mean(over).sum(), batch_dim).value == number


def test_a_sum_of_very_many_losses() -> None:
    z = Z.clone().requires_grad_()
    losses = sum(nnf.mse_loss(k * z, R) for k in range(1, 2000))
    assert float(read_factor(losses).value) == B * C
    for _ in range(40):  # each is added to itself
        losses = losses + losses
    assert float(read_factor(losses).value) == B * C


def test_a_graph_that_was_freed() -> None:
    loss = nnf.cross_entropy(Z.clone().requires_grad_(), Y)
    loss.backward()
    with pytest.raises(ValueError, match="expected the loss before its backward pass"):
        read_factor(loss)


def test_a_loss_inside_a_checkpoint_is_refused_and_not_run_again() -> None:
    runs = []

    def inside(z: Tensor) -> Tensor:
        runs.append(1)
        return nnf.cross_entropy(z.sin(), Y)

    loss = torch.utils.checkpoint.checkpoint(inside, Z.clone().requires_grad_(), use_reentrant=False)
    with pytest.raises(ValueError, match="NllLossBackward0, and a checkpoint or saved_tensors_hooks have packed"):
        read_factor(loss)
    assert runs == [1]
    z = torch.utils.checkpoint.checkpoint(torch.sin, Z.clone().requires_grad_(), use_reentrant=False)
    assert read_factor(nnf.cross_entropy(z, Y)).value == 5  # outside, as it says


MOVED_BATCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda q: q.T.mean(1).sum(),
    "transposed, the other way": lambda q: q.transpose(0, 1).mean(0).sum(),
    "a dimension in front": lambda q: q[None].mean(1).sum(),
    "other rows": lambda q: q.reshape(2, -1).mean(0).sum(),
    "groups of samples": lambda q: q.view(3, 2, 4).mean(1).mean(),
}
GROUPED: dict[str, Callable[[Tensor], Tensor]] = {
    "several numbers after the batch": lambda q: (q.sum(0) / torch.tensor([6.0, 6.0, 6.0, 6.0])).sum(),
    "groups by index": lambda q: (q.new_zeros(2, 4).index_add(0, torch.arange(6) % 2, q) / 3).sum(),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_and_several_numbers_after_the_batch_are_refused(name: str) -> None:
    q = torch.randn(6, 4, requires_grad=True).square()
    with pytest.raises(ValueError, match="several numbers divide|sums up groups"):
        read_factor(GROUPED[name](q.clone()))


def test_tokens_in_a_row_are_read() -> None:
    losses = nnf.cross_entropy(torch.randn(6, 4, requires_grad=True), torch.arange(6) % 4, reduction="none")
    assert read_factor(losses.view(2, 3).mean(1).mean()).value == 2


@pytest.mark.parametrize("name", MOVED_BATCHES)
def test_a_batch_that_is_moved_before_it_is_reduced_is_refused(name: str) -> None:
    q = torch.randn(6, 4, requires_grad=True).square()
    with pytest.raises(ValueError, match="moves the batch's dimension"):
        read_factor(MOVED_BATCHES[name](q.clone()))
