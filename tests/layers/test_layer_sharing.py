"""Parameters that are used more than once: packed and unequal lengths, an embedding tied to a head; compiled rules."""

from __future__ import annotations

import pytest
import torch
from few import few
from rule_cases import CASES
from rule_factors import factors_of, make
from rule_oracle import norms_sq
from torch import Tensor, nn

from lipcore import layers
from lipcore.layers import Batch, Dense, Indexed, Outer, RowSum, Sum

LENGTHS = [3, 0, 5, 1]
OFFSETS = torch.tensor([0, 3, 3, 8, 9])


def close(factor, want, tolerance=1e-12):
    torch.testing.assert_close(factor.norms_sq(), want, rtol=tolerance, atol=tolerance**2)
    dense = torch.stack([factor.dense(b).square().sum() for b in range(factor.samples)])
    torch.testing.assert_close(dense, want, rtol=tolerance, atol=tolerance**2)


def document(value, b):
    return (
        value[OFFSETS[b] : OFFSETS[b + 1]] if isinstance(value, Tensor) and value.shape[:1] == (9,) else value[b][None]
    )


PACKED = {
    "linear": (lambda: nn.Linear(7, 5), lambda *n: torch.randn(*n, 7)),
    "layer_norm": (lambda: nn.LayerNorm(7), lambda *n: torch.randn(*n, 7)),
    "rms_norm": (lambda: nn.RMSNorm((2, 3)), lambda *n: torch.randn(*n, 2, 3)),
    "embedding": (lambda: nn.Embedding(4, 3, padding_idx=2), lambda *n: torch.randint(4, n)),
    "prelu": (lambda: nn.PReLU(), lambda *n: torch.randn(*n, 3)),
    "bilinear": (lambda: nn.Bilinear(7, 7, 2), lambda *n: torch.randn(*n, 7)),
}


@pytest.mark.parametrize("leading", [(9,), (1, 9)], ids=["N", "1xN"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents(name, leading):
    module, inputs = PACKED[name][0]().double(), PACKED[name][1](*leading)
    arguments = tuple(
        inputs.double() if inputs.is_floating_point() else inputs for _ in range(1 + (name == "bilinear"))
    )
    factors, (cotangent,) = factors_of(module, [(arguments, {})], Batch(4, offsets=OFFSETS))
    flat = [(tuple(a.reshape(9, *inputs.shape[len(leading) :]) for a in arguments), {})]
    truth = norms_sq(module, flat, [cotangent.flatten(0, len(leading) - 1)], document, 4)
    for key, factor in factors.items():
        close(factor, truth[key])


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_join_with_sequences_of_another_length(name):
    module, draw = PACKED[name][0]().double(), PACKED[name][1]
    both = []
    for shape in ((9,), (4, 2)):
        x = draw(*shape)
        x = x.double() if x.is_floating_point() else x
        both.append(((x,) * (1 + (name == "bilinear")), {}))
    first, (c1,) = factors_of(module, both[:1], Batch(4, offsets=OFFSETS))
    second, (c2,) = factors_of(module, both[1:], Batch(4), seed=1)
    truth = norms_sq(module, both, [c1, c2], document, 4)
    for key in first:
        joined = first[key].join(second[key])
        assert not isinstance(joined, Sum)
        close(joined, truth[key])
        close(second[key].join(first[key]), truth[key])


def tied(tokens, positions, padding_idx=1):
    torch.manual_seed(3)
    ids, e = torch.randint(5, (3, tokens)), torch.randn(3, tokens, 4).double()
    x, g = torch.randn(3, positions, 4).double(), torch.randn(3, positions, 5).double()
    return Indexed(ids, e, 5, padding_idx=padding_idx), Outer(x, g)


def gradients(*factors):
    return sum(torch.stack([f.dense(b) for b in range(f.samples)]) for f in factors)


@pytest.mark.parametrize(("tokens", "positions"), [(1, 1), (7, 7), (17, 3), (2, 0)])
def test_embedding_tied_to_a_head(tokens, positions):
    embedding, head = tied(tokens, positions)
    want = gradients(embedding, head).square().sum((1, 2))
    for joined in (embedding.join(head), head.join(embedding)):
        assert isinstance(joined, layers.Tied)
        close(joined, want)
    more, other = tied(4, 6, padding_idx=None)
    want = gradients(embedding, head, more, other).square().sum((1, 2))
    for joined in (
        embedding.join(head).join(more).join(other),
        head.join(more.join(other)).join(embedding),
        embedding.join(head).join(more.join(other)),
    ):
        close(joined, want, 1e-11)


def test_tied_uses_that_cancel_keep_their_digits():
    torch.manual_seed(0)
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3]])
    e = torch.randn(2, 4, 4)
    head = Outer((-e).contiguous(), torch.eye(4).expand(2, 4, 4))
    head.x = head.x * (1 + 1e-3)
    joined = Indexed(ids, e, 4).join(head)
    want = gradients(Indexed(ids, e, 4), head).square().sum((1, 2))
    torch.testing.assert_close(joined.norms_sq(), want, rtol=1e-6, atol=0)


def test_factors_without_a_closed_form_add_up():
    torch.manual_seed(0)
    x, g = torch.randn(3, 2, 4).double(), torch.randn(3, 2, 4).double()
    parts = [Outer(x, g), Dense(torch.randn(3, 4, 4).double()), Outer(g, x)]
    joined = parts[0].join(parts[1]).join(parts[2])
    assert isinstance(joined, Sum)
    close(joined, gradients(*parts).square().sum((1, 2)))
    row, dense = RowSum(g), Dense(torch.randn(3, 4).double())
    close(dense.join(row), gradients(row, dense).square().sum(1))


COMPILED = ["linear", "linear_3d", "conv2d", "conv_circular", "conv_transpose2d", "embedding_padding", "layer_norm"]
COMPILED += ["rms_norm", "group_norm", "instance_norm1d", "batch_norm2d", "prelu", "bilinear", "mha_self", "bag_sum"]


@pytest.mark.parametrize("name", few(COMPILED, 4))
def test_factors_are_traced_whole(name):
    torch._dynamo.reset()
    module, arguments, keywords = make(CASES[name], 3, torch.float32)
    rule, batch = layers.rule_for(module), Batch(3)
    y = module(*arguments, **keywords)
    y = y[0] if isinstance(y, tuple) else y
    saved, extra = rule.save(module, arguments, keywords, batch)

    def norms(grad, *saved):
        return {key: factor.norms_sq() for key, factor in rule.factors(module, grad, extra, *saved).items()}

    grad = torch.randn_like(y)
    traced = torch.compile(norms, fullgraph=True, backend="aot_eager")(grad, *saved)
    for key, want in norms(grad, *saved).items():
        torch.testing.assert_close(traced[key], want, rtol=1e-5, atol=1e-12)
