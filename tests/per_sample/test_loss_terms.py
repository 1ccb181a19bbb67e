"""loss_reduction="auto" where terms of the loss may be of several samples: right, or refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from lipcore import PerSampleGradNorms

B, T, C = 12, 5, 3
Loss = Callable[[Tensor], Tensor]
X = torch.randn(B, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(B) % C
R = torch.randn(B, C, generator=torch.Generator().manual_seed(1))
W = torch.tensor([0.5, 2.0, 1.0])
TOKENS = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(2))
YT = torch.randint(0, C, (B, T), generator=torch.Generator().manual_seed(3))
KEPT = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) < 0.4
SOME = torch.tensor([0, 3, 4, 9, 10])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, C))


def truth(net: nn.Module, x: Tensor, terms: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Norms of the gradients of single samples' terms, given the outputs of all samples and a sample's number."""
    exact, norms = copy.deepcopy(net).double(), []
    for i in range(len(x)):
        grads = torch.autograd.grad(terms(exact(x.double()), i), list(exact.parameters()), allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm())
    return torch.stack(norms)


def measured(net: nn.Module, x: Tensor, loss: Loss, **options: Any) -> PerSampleGradNorms:
    with PerSampleGradNorms(net, loss_reduction="auto", **options) as norms:
        value = loss(net(x))
        norms.set_loss(value)
        value.backward()
    return norms


def squares(z: Tensor) -> Tensor:
    return (z - R.to(z.dtype)).square()


def pooled(z: Tensor, over: int = B) -> Tensor:
    return nnf.avg_pool1d(squares(z).sum(1)[None], over).sum()


def smeared(z: Tensor) -> Tensor:
    return nnf.conv1d(squares(z).sum(1)[None, None], torch.ones(1, 1, 3) / 3, padding=1).sum()


#: Terms of several samples: a loss of the outputs [12, 3].
SEVERAL: dict[str, Loss] = {
    "a pooled mean": pooled,
    "a pooled mean of two and two": lambda z: pooled(z, 2),
    "a pooled mean, of each class": lambda z: nnf.avg_pool1d(squares(z).T[None], B).sum(),
    "a convolution over the batch": smeared,
    "a convolution that averages": lambda z: nnf.conv1d(squares(z).T[None], torch.ones(1, C, B) / B).sum(),
    "a product that averages": lambda z: torch.einsum("b,bc->c", torch.ones(B) / B, squares(z)).sum(),
    "a softmax over the batch": lambda z: (z.softmax(0) * R).sum(),
    "similarities": lambda z: nnf.cross_entropy(z @ z.T, torch.arange(B)),
    "centred": lambda z: (z - z.mean(0)).square().mean(),
    "sorted sums": lambda z: squares(z).sum(1).sort()[0].cumsum(0).mean(),
    "pairs": lambda z: torch.pdist(z).mean(),
    "halves added": lambda z: (squares(z)[:6] + squares(z)[6:]).mean(),
    "a mean over some": lambda z: squares(z).view(6, 2, C).mean(0).sum(),
}

#: A loss, and one sample's terms.
SINGLE: dict[str, tuple[Loss, Callable[[Tensor, int], Tensor]]] = {
    "a mean": (lambda z: squares(z).mean(), lambda z, i: squares(z)[i].sum()),
    "a mean over the batch": (lambda z: squares(z).mean(0).sum(), lambda z, i: squares(z)[i].sum()),
    "a power": (lambda z: squares(z).sum(1).pow(0.7).mean(), lambda z, i: squares(z)[i].sum().pow(0.7)),
    "pooled over classes": (
        lambda z: nnf.avg_pool1d(squares(z)[:, None], C).mean(),
        lambda z, i: squares(z)[i].mean(),
    ),
    "turned": (lambda z: squares(z).T.contiguous().mean(), lambda z, i: squares(z)[i].sum()),
    "in reverse": (lambda z: squares(z).flip(0).sum(1).mean(), lambda z, i: squares(z)[i].sum()),
    "some samples": (lambda z: squares(z)[SOME].mean(), lambda z, i: squares(z)[i].sum() * (i in SOME)),
    "some of a half": (lambda z: squares(z)[:6].sum(1).mean(), lambda z, i: squares(z)[i].sum() * (i < 6)),
    "chosen by a mask": (
        lambda z: nnf.cross_entropy(z[Y > 0], Y[Y > 0]),
        lambda z, i: nnf.cross_entropy(z[i], Y[i], reduction="sum") * bool(Y[i] > 0),
    ),
    "two views": (
        lambda z: torch.cat([squares(z).sum(1), z.abs().sum(1)]).mean(),
        lambda z, i: squares(z)[i].sum() + z[i].abs().sum(),
    ),
    "lengths": (
        lambda z: torch.linalg.vector_norm(z, dim=1).mean(),
        lambda z, i: torch.linalg.vector_norm(z[i]),
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_terms_of_several_samples_are_refused(name: str) -> None:
    net = model()
    with PerSampleGradNorms(net, loss_reduction="auto") as norms:
        for _ in range(2):
            loss = SEVERAL[name](net(X))
            with pytest.raises(ValueError, match="loss: its graph has .*pass loss_reduction='mean' or 'sum'"):
                norms.set_loss(loss)
            loss.backward()
            assert bool(norms.per_sample.isnan().all())


@pytest.mark.parametrize("name", SINGLE)
def test_terms_of_single_samples_are_read(name: str) -> None:
    loss, terms = SINGLE[name]
    net = model()
    norms = measured(net, X, loss)
    assert torch.allclose(norms.per_sample.double(), truth(net, X, terms), rtol=1e-5, atol=1e-8)


def flat(z: Tensor, i: slice = slice(None)) -> Tensor:
    return nnf.cross_entropy(z[i].reshape(-1, C), YT[i].flatten(), reduction="sum")


TOKEN_LOSSES: dict[str, tuple[Loss, Callable[[Tensor, int], Tensor]]] = {
    "flat": (
        lambda z: nnf.cross_entropy(z.view(-1, C), YT.flatten()),
        lambda z, i: nnf.cross_entropy(z[i], YT[i], reduction="sum"),
    ),
    "shifted": (
        lambda z: nnf.cross_entropy(z[:, :-1].reshape(-1, C), YT[:, 1:].flatten()),
        lambda z, i: nnf.cross_entropy(z[i, :-1], YT[i, 1:], reduction="sum"),
    ),
    "time first": (
        lambda z: nnf.cross_entropy(z.transpose(0, 1).reshape(-1, C), YT.T.flatten()),
        lambda z, i: nnf.cross_entropy(z[i], YT[i], reduction="sum"),
    ),
    "masked": (
        lambda z: nnf.cross_entropy(z[KEPT], YT[KEPT]),
        lambda z, i: nnf.cross_entropy(z[i][KEPT[i]], YT[i][KEPT[i]], reduction="sum"),
    ),
    "masked by hand": (
        lambda z: -z.log_softmax(-1).gather(-1, YT[..., None])[KEPT].mean(),
        lambda z, i: nnf.cross_entropy(z[i][KEPT[i]], YT[i][KEPT[i]], reduction="sum"),
    ),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_tokens_are_their_samples(name: str) -> None:
    loss, terms = TOKEN_LOSSES[name]
    net = model()
    norms = measured(net, TOKENS, loss)
    assert torch.allclose(norms.per_sample.double(), truth(net, TOKENS, terms), rtol=1e-5, atol=1e-8)


def test_a_loss_that_averages_tokens_of_several_samples() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"elements of what it has made, of shape \[5, 3\]"):
        measured(net, TOKENS, lambda z: torch.einsum("btc,b->tc", z.square(), torch.ones(B) / B).sum())


def test_it_is_looked_at_again_where_the_kind_of_loss_is_another() -> None:
    net = model()
    with PerSampleGradNorms(net, loss_reduction="auto") as norms:
        for _ in range(4):
            loss = squares(net(X)).mean()
            norms.set_loss(loss)
            loss.backward()
        with pytest.raises(ValueError, match="not of one sample each"):
            norms.set_loss(pooled(net(X)))


def test_a_models_own_loss_is_looked_at() -> None:
    class Trained(nn.Module):
        def __init__(self, loss: Loss) -> None:
            super().__init__()
            self.net, self.loss = model(), loss

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"logits": logits, "loss": self.loss(logits)}

    for loss, known in ((pooled, False), (SINGLE["a power"][0], True)):
        net = Trained(loss)
        with PerSampleGradNorms(net, loss_reduction="auto") as norms, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net(X)["loss"].backward()
            assert bool(norms.per_sample.isfinite().all()) == known
            assert ("not of one sample each" in norms.broken) != known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = model().to(dtype)
    norms = measured(net, X.to(dtype), lambda z: squares(z).sum(1).pow(0.7).mean())
    assert not norms.broken
    with pytest.raises(ValueError, match="not of one sample each"):
        measured(net, X.to(dtype), lambda z: z.softmax(0).sum(1).square().mean())


def test_training_stays_bit_for_bit_the_same() -> None:
    grads = []
    for watched in (False, True):
        net = model()
        loss: Loss = lambda z: checkpoint(squares, z.relu(), use_reentrant=False).pow(0.7).mean()  # noqa: E731
        with PerSampleGradNorms(net, loss_reduction="auto") as norms:
            value = loss(net(X))
            if watched:
                norms.set_loss(value)
            value.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*grads)


def test_nothing_is_run_where_no_proof_is_wanted() -> None:
    net, calls = model(), []

    def loss(z: Tensor) -> Tensor:
        terms = squares(z).sum(1).pow(0.7)
        terms.register_hook(lambda g: calls.append(1))
        return terms.exp().mean()

    for prove in (False, True):
        measured(net, X, loss, prove=prove)
        assert (len(calls) > 1) == prove
        calls.clear()
