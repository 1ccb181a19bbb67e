"""Models that leave out layers at random: the norms are those of the very pass, and training draws what it would have
drawn."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from few import few
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import PerSampleGradNorms
from lipcore.models.held import Held
from lipcore.models.random_numbers import RandomNumbers

B, C = 3, 8


class LeftOut(nn.Module):
    """A model that leaves out blocks by numbers that are drawn behind dropout; `each` draws for every sample before."""

    def __init__(self, draw: Callable[[LeftOut], float], each: Callable[[Tensor], Tensor], alike: bool) -> None:
        super().__init__()
        self.draw, self.each = draw, each
        self.numbers, self.bits = random.Random(3), np.random.default_rng(4)
        self.generator = torch.Generator().manual_seed(5)
        wide = [C, 2 * C, C, C]
        self.first, self.last = nn.Linear(4, C), nn.Linear(C, 3)
        self.scales = nn.ParameterList([torch.rand(C) + 0.5 for _ in range(4)])
        self.blocks = nn.ModuleList(
            nn.Linear(C, C) if alike else nn.Sequential(nn.Linear(C, w), nn.Tanh(), nn.Linear(w, C)) for w in wide
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.each(F.dropout(self.first(x), 0.2, self.training))
        for block, scale in zip(self.blocks, self.scales, strict=True):
            if self.draw(self) >= 0.4:
                h = h + F.dropout(torch.tanh(block(h)) * scale, 0.1, self.training)
        found: Tensor = self.last(h)
        return found


def by_torch(_: LeftOut) -> float:
    return float(torch.rand([]))


def by_numpy() -> float:
    return float(np.random.rand())  # noqa: NPY002 - the global generator is what models use


def same(h: Tensor) -> Tensor:
    return h


def masked_one_by_one(h: Tensor) -> Tensor:
    return torch.stack([row * (torch.rand(C) > 0.1) for row in h])


def scaled_by_python(h: Tensor) -> Tensor:
    return torch.stack([row * random.uniform(0.5, 1) for row in h])


def scaled_by_numpy(h: Tensor) -> Tensor:
    return h * torch.tensor(np.array([by_numpy() for _ in h]), dtype=h.dtype).unsqueeze(1)


Case = tuple[Callable[[LeftOut], float], Callable[[Tensor], Tensor], bool]
CASES: dict[str, Case] = {
    "torch": (by_torch, same, True),
    "blocks of other sizes": (by_torch, same, False),
    "for every sample before": (by_torch, masked_one_by_one, False),
    "python": (lambda _: random.random(), same, False),
    "numpy": (lambda _: by_numpy(), same, False),
    "python, for every sample before": (lambda _: random.random(), scaled_by_python, False),
    "numpy, for every sample before": (lambda _: by_numpy(), scaled_by_numpy, False),
    "a generator of its own": (lambda model: float(torch.rand([], generator=model.generator)), same, False),
    "python's, of its own": (lambda model: model.numbers.random(), same, False),
    "numpy's, of its own": (lambda model: float(model.bits.random()), same, False),
}


@contextmanager
def once_more(model: nn.Module, begun: list[Any]) -> Iterator[None]:
    """A pass from the states that another one began with."""
    numbers = RandomNumbers(Held(model))
    numbers.set(begun)
    yield
    numbers.put_back()


def weighted(output: Tensor) -> Tensor:
    return (output * torch.cos(torch.arange(output.numel()) + 1.0).reshape(output.shape)).flatten(1).sum(1)


def trained(model: nn.Module, inputs: list[tuple[Tensor, ...]], of: Callable[[Any], Tensor]) -> int:
    """Check steps against the gradients of single samples' outputs in the same pass without the metric; return how many
    of them left out other parameters than the first."""
    plain, used = copy.deepcopy(model), list[list[bool]]()
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for x in inputs:
            begun = RandomNumbers(Held(model)).now()
            model.zero_grad()
            weighted(of(model(*x))).sum().backward()
            found = metric.per_sample
            with once_more(plain, begun):
                each = weighted(of(plain(*x)))
                plain.zero_grad()
                each.sum().backward(retain_graph=True)
                assert after(plain) == after(model)
                parameters = list(plain.parameters())
                rows = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in each]
            for mine, theirs in zip(model.parameters(), parameters, strict=True):
                assert (mine.grad is None) == (theirs.grad is None)
                assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
            norms = [
                torch.stack([g.double().square().sum() for g in row if g is not None]).sum().sqrt() for row in rows
            ]
            torch.testing.assert_close(found, torch.stack(norms), rtol=1e-6, atol=0)
            used.append([g is not None for g in rows[0]])
    return sum(each != used[0] for each in used)


def after(model: nn.Module) -> list[Any]:
    """What the model's generators draw next."""
    kept = RandomNumbers(Held(model))
    found = [float(torch.rand([])), random.random(), by_numpy()]
    if isinstance(model, LeftOut):
        found += [float(torch.rand([], generator=model.generator)), model.numbers.random(), float(model.bits.random())]
    kept.put_back()
    return found


def begin() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


@pytest.mark.parametrize("name", few(CASES, 2))
def test_blocks_that_are_left_out(name: str) -> None:
    begin()
    model = LeftOut(*CASES[name]).train()
    assert trained(model, [(torch.randn(B, 4),) for _ in range(12)], lambda output: output) > 5


class Repeated(nn.Module):
    """A model that goes through a layer and a scale a random number of times, and adds a shift wherever it does."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw, self.inside, self.last = draw, nn.Linear(C, C), nn.Linear(C, 3)
        self.scale, self.shift = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(self.draw() * 3)):
            x = torch.tanh(self.inside(x) * self.scale) + self.shift
        found: Tensor = self.last(x)
        return found


@pytest.mark.parametrize("name", few(["python", "numpy", "torch"], 1))
def test_loops_of_random_length(name: str) -> None:
    """The pass on one sample more is held to as many rounds, where it had others by chance."""
    begin()
    model = Repeated({"python": random.random, "numpy": by_numpy, "torch": lambda: float(torch.rand([]))}[name])
    assert trained(model, [(torch.randn(B, C),) for _ in range(20)], lambda output: output) > 0


@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_many_steps(name: str) -> None:
    begin()
    model = LeftOut(*CASES[name]).train()
    assert trained(model, [(torch.randn(B, 4),) for _ in range(70)], lambda output: output) > 40


@pytest.mark.ci
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_wav2vec2(share: float) -> None:
    """With its defaults but for sizes: layers left out, masks of spans by NumPy, dropout, layers behind weight norm."""
    transformers = pytest.importorskip("transformers", reason="its model needs the transformers library")
    begin()
    sizes = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = transformers.Wav2Vec2Config(
        **sizes,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_length=2,
        mask_feature_length=2,
        layerdrop=share,
    )
    model = transformers.Wav2Vec2Model(config).train()
    others = trained(model, [(torch.randn(B, 400),) for _ in range(70)], lambda output: output.last_hidden_state)
    assert others > 70 * share / 2 or not share


def test_a_layer_that_is_left_out_of_the_first_proof_is_proved_soon() -> None:
    begin()
    model = nn.Sequential(nn.Linear(4, C), Sometimes(nn.Linear(C, C)), nn.Linear(C, 3))
    unproved = []
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for step in range(4):
            model[1].used = step > 0
            model(torch.randn(B, 4)).sum().backward()
            unproved.append(metric.unproved)
    assert not unproved[0]
    assert "layer '1.inside' was not called in any pass that was proved so far" in unproved[1]
    assert unproved[2:] == ["", ""]


class Sometimes(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.used = inside, True

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) if self.used else x


class ByTheLast(nn.Module):
    """A model that draws numbers for its samples outside of torch, and chooses by the last."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        drawn = [random.random() for _ in x]
        return torch.sin(x * self.scale) if drawn[-1] < 0.5 else torch.cos(x * self.scale)


def test_a_choice_by_what_was_drawn_for_single_samples_is_refused_with_the_remedy() -> None:
    """Neither the numbers behind those of its pass serve, nor the same ones."""
    counts = (B + 1, 2 * B + 1)
    random.seed(next(s for s in range(99) if last_of(s, B) < 0.5 <= min(last_of(s, count) for count in counts)))
    model, remedy = ByTheLast(), "draw these with torch and one for all samples, or leave none out"
    with pytest.warns(RuntimeWarning, match=remedy), PerSampleGradNorms(model, loss_reduction="sum") as metric:
        model(torch.randn(B, 4)).sum().backward()
        with pytest.raises(ValueError, match=remedy):
            _ = metric.per_sample


def last_of(seed: int, count: int) -> float:
    numbers = random.Random(seed)
    return [numbers.random() for _ in range(count)][-1]
