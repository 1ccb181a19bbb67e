"""Losses of a batch of one sample, whose terms are one number before they are reduced, read by loss_reduction="auto":
the norm is that of the same sample among others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from few import few
from per_sample_oracle import seeded
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from lipcore import PerSampleGradNorms

C = 3
Loss = Callable[[Tensor, Tensor], Tensor]
CE = F.cross_entropy


def gathered(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(1, y[:, None]).squeeze(1)


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


LOSSES: dict[str, Loss] = {
    "cross-entropy": CE,
    "smoothed": lambda z, y: CE(z, y, label_smoothing=0.1),
    "smoothed, summed": lambda z, y: CE(z, y, label_smoothing=0.1, reduction="sum"),
    "smoothed, with terms": lambda z, y: CE(z, y, label_smoothing=0.1, reduction="none").mean(),
    "smoothed, some ignored": lambda z, y: CE(z, y, label_smoothing=0.1, ignore_index=2),
    "smoothed by hand, at targets": lambda z, y: -(0.9 * gathered(z, y) + 0.1 * z.log_softmax(-1).mean(-1)).mean(),
    "smoothed by hand": lambda z, y: 0.9 * CE(z, y) - 0.1 * z.log_softmax(-1).mean(),
    "smoothed by hand, summed": lambda z, y: 0.9 * CE(z, y, reduction="sum") - 0.1 / C * z.log_softmax(-1).sum(),
    "entropy": lambda z, y: CE(z, y) - 0.01 * entropy(z).mean(),
    "entropy of each": lambda z, y: (CE(z, y, reduction="none") - 0.01 * entropy(z)).mean(),
    "entropy, summed": lambda z, y: CE(z, y, reduction="sum") - 0.01 * entropy(z).sum(),
    "a policy": lambda z, y: -(Categorical(logits=z).log_prob(y) + 0.01 * Categorical(logits=z).entropy()).mean(),
    "smoothed, and entropy": lambda z, y: CE(z, y, label_smoothing=0.1) - 0.01 * Categorical(logits=z).entropy().mean(),
}


def norms(loss: Loss, samples: int) -> Tensor:
    with seeded(0):
        model, x, y = nn.Linear(4, C), torch.randn(3, 4), torch.tensor([0, 1, 1])
    with PerSampleGradNorms(model, loss_reduction="auto") as metric:
        found = loss(model(x[:samples]), y[:samples])
        metric.set_loss(found)
        found.backward()
        assert not metric.broken
        return metric.per_sample


@pytest.mark.parametrize("name", few(LOSSES, 7))
def test_a_single_sample_has_the_norm_that_it_has_among_others(name: str) -> None:
    torch.testing.assert_close(norms(LOSSES[name], 1), norms(LOSSES[name], 3)[:1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", few(LOSSES, 7))
def test_among_others_it_is_that_of_its_own_terms(name: str) -> None:
    """The sum of the losses of single samples is what autograd differentiates."""
    with seeded(0):
        model, x, y = nn.Linear(4, C), torch.randn(3, 4), torch.tensor([0, 1, 1])
    for sample, found in enumerate(norms(LOSSES[name], 3)):
        one = LOSSES[name](model(x[sample : sample + 1]), y[sample : sample + 1])
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(one, list(model.parameters()))]).double().norm()
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_penalty_over_other_terms_is_refused_in_whole_sentences_and_the_remedies_work(samples: int) -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7))
    ids = torch.randint(7, (samples, 4))

    def parts() -> tuple[Tensor, Tensor]:
        z = model(ids)
        return CE(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), -0.01 * entropy(z).mean()

    with PerSampleGradNorms(model, loss_reduction="auto") as metric:
        own, penalty = parts()
        with pytest.raises(ValueError, match="it adds parts that are divided by different numbers") as refused:
            metric.set_loss(own + penalty)
        assert str(refused.value).endswith("with loss_terms= or scale= in place of 'auto'")
        assert "call set_loss() with the samples' own loss alone (and backward() on all)" in str(refused.value)
        own, penalty = parts()
        metric.set_loss(own)
        (own + penalty).backward()
        first = metric.per_sample
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms=3 * samples) as metric:
        sum(parts()).backward()  # type: ignore[union-attr]
        torch.testing.assert_close(metric.per_sample, first)


def test_a_number_that_was_made_into_several_terms_again_is_no_samples() -> None:
    model = nn.Linear(4, 1)
    with PerSampleGradNorms(model, loss_reduction="auto") as metric:
        loss = model(torch.randn(1, 4)).sum().expand(3).mean()
        with pytest.raises(ValueError, match="several terms are made of its one number again, of which none is a"):
            metric.set_loss(loss)
