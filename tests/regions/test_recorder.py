"""Which models have linear regions: what happens to what depends on x is recorded, known to be affine, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Graph
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import local_lipschitz
from lipcore.regions import Coverage, activation_patterns


def around(middle: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> nn.Module:
    """Linear(3, 6), ReLU, what is given, Linear, ReLU, Linear: the middle's output has 6 columns unless a module
    `last` says otherwise."""
    modules = {"last": nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))} | modules
    first = nn.Linear(3, 6)
    return Graph(lambda m, x: m.last(middle(m, m.first(x).relu())), first=first, **modules).eval()


def squares_in_place(h: Tensor) -> Tensor:
    h[h < 0.5] = 0.0
    return h


def masked_copy(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :3] = h[:, 3:].sigmoid()
    return out


NOT_LINEAR: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "softsign": (lambda m, h: F.softsign(h), "div in the model's own forward is not piecewise linear"),
    "glu": (lambda m, h: F.glu(torch.cat([h, h], 1)), "glu"),
    "instance norm": (lambda m, h: F.instance_norm(h[:, None])[:, 0], "native_batch_norm"),
    "norm by std": (lambda m, h: (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-5), "std"),
    "gate of its own": (lambda m, h: h * (h * 2 - 1).clamp(0, 1), "mul"),
    "square": (lambda m, h: h * h, "mul"),
    "power": (lambda m, h: h**2, "pow"),
    "bmm": (lambda m, h: (h[:, :, None] @ h[:, None])[:, 0], "bmm"),
    "einsum": (lambda m, h: torch.einsum("bi,bj->bi", h, h), "mul|bmm"),
    "share": (lambda m, h: h / (1 + h.sum(1, keepdim=True)), "div"),
    "normalize": (lambda m, h: F.normalize(h), "linalg_vector_norm"),
    "logsumexp": (lambda m, h: h + h.logsumexp(1, keepdim=True), "logsumexp"),
    "norm": (lambda m, h: h + h.norm(dim=1, keepdim=True), "norm"),
    "norm p=1": (lambda m, h: h + h.norm(p=1, dim=1, keepdim=True), "norm"),
    "atan": (lambda m, h: h.atan(), "atan"),
    "asinh": (lambda m, h: h.asinh(), "asinh"),
    "log1p": (lambda m, h: h.log1p(), "log1p"),
    "smooth l1": (lambda m, h: F.smooth_l1_loss(h, torch.zeros_like(h), reduction="none"), "smooth_l1_loss"),
    "bilinear": (lambda m, h: F.bilinear(h, h, torch.ones(6, 6, 6)), "_trilinear"),
    "remainder": (lambda m, h: h.remainder(0.3), "calls remainder"),
    "distance": (lambda m, h: h + F.pairwise_distance(h, h + 1)[:, None], "norm"),
    "mask": (lambda m, h: h * (h > 0.5), "calls gt"),
    "masked fill": (lambda m, h: h.masked_fill(h < 0.5, 0.0), "calls lt"),
    "set by mask": (lambda m, h: squares_in_place(h), "calls lt"),
    "where": (lambda m, h: torch.where(h > 0.5, h, 2 * h), "calls gt"),
    "sign": (lambda m, h: h.sign(), "calls sign"),
    "cummax": (lambda m, h: h.cummax(1).values, "calls cummax"),
    "round": (lambda m, h: h + h.round(), "calls round"),
    "to integers": (lambda m, h: h.long().float(), "calls _to_copy"),
    "gather": (lambda m, h: h + h.gather(1, h.argmax(1, keepdim=True)), "calls argmax"),
    "top": (lambda m, h: h + h.max(1, keepdim=True).values, "calls max"),
    "sort": (lambda m, h: h.sort(1).values, "calls sort"),
    "scatter max": (lambda m, h: h.scatter_reduce(1, torch.zeros(len(h), 1).long(), h, "amax"), "calls scatter_reduce"),
    "floor division": (lambda m, h: h.div(0.3, rounding_mode="floor"), "calls div|div in"),
    "into a part": (lambda m, h: masked_copy(h), "sigmoid"),
    "in place": (lambda m, h: h.clone().tanh_(), "tanh"),
    "branch": (lambda m, h: 2 * h if h.sum() > 3 else h, r"reads a value that depends on x \(_local_scalar_dense"),
    "numpy": (
        lambda m, h: h + torch.tensor(h.detach().numpy().max() > 0.5),
        r"the model's own forward reads a value that depends on x \(numpy\(\)\)",
    ),
    "array": (lambda m, h: h + float(np.asarray(h.detach()).max()), r"reads a value .* \(__array__\(\)\)"),
    "list": (lambda m, h: h + max(h[0].tolist()), r"reads a value .* \(tolist\(\)\)"),
    "list of a mask": (lambda m, h: h + sum((h[:, 0] > 1).tolist()), r"reads a value .* \(tolist\(\)\)"),
    "dlpack": (lambda m, h: h + float(np.from_dlpack(h.detach()).max()), r"reads a value .* \(__dlpack__\(\)\)"),
    "equality": (lambda m, h: h if torch.equal(h, h) else 2 * h, "reads a value that depends on x"),
    "bits": (lambda m, h: h.view(torch.int32).view(torch.float32), "calls view"),
    "dropout": (lambda m, h: F.dropout(h, 0.5), "calls bernoulli, so its output is random"),
    "noise": (lambda m, h: h + torch.randn_like(h), "calls randn_like, so its output is random"),
    "random slopes": (lambda m, h: F.rrelu(h, training=True), "calls rrelu_with_noise, so its output is random"),
    "batch mean": (lambda m, h: h - h.mean(0), "of one sample depends on the other samples"),
    "batch sum": (lambda m, h: h + h.cumsum(0).flip(0), "of one sample depends on the other samples"),
    "earlier samples": (lambda m, h: h + h.cumsum(0), "of one sample depends on the other samples"),
    "later samples": (lambda m, h: h + h.flip(0).cumsum(0).flip(0), "of one sample depends on the other samples"),
    "next sample": (lambda m, h: h + h.roll(1, 0), "of one sample depends on the other samples"),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_known_to_be_piecewise_linear_is_refused_by_name(name: str) -> None:
    torch.manual_seed(0)
    middle, message = NOT_LINEAR[name]
    with pytest.raises(ValueError, match=message):
        activation_patterns(around(middle), torch.randn(9, 3))


def test_recurrent_layers_are_refused() -> None:
    model = Graph(
        lambda m, x: m.head(m.rnn(x)[0][:, -1].relu()), rnn=nn.LSTM(3, 4, batch_first=True), head=nn.Linear(4, 1)
    )
    with pytest.raises(ValueError, match="mkldnn_rnn_layer|sigmoid|lstm"):
        activation_patterns(model, torch.randn(5, 2, 3))


def image(h: Tensor) -> Tensor:
    return h.reshape(-1, 1, 2, 3)


def slots(h: Tensor) -> Tensor:
    out = torch.zeros(len(h), 6)
    out[:, :3] = h[:, 3:]
    out[:, torch.tensor([4, 3])] += h[:, :2]
    return out


ODD = torch.tensor([True, False, True, False, True, False])
LINEAR: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "shapes": lambda m, h: (
        torch.cat([t.flip(1).roll(1, 1) for t in h.chunk(2, 1)], 1).unsqueeze(1).expand(-1, 2, -1).sum(1)
    ),
    "stack": lambda m, h: torch.stack([h, -h], 2).permute(0, 2, 1)[:, 1].contiguous().clone(),
    "pads": lambda m, h: F.pad(F.pad(h[:, None, 1:5], (1, 0), mode="replicate"), (1, 1), mode="reflect")[:, 0, :6],
    "circular pad": lambda m, h: F.pad(h[:, None, :4], (1, 1), mode="circular")[:, 0],
    "sums": lambda m, h: h.cumsum(1) - h.mean(1, keepdim=True) + h.sum(1, keepdim=True),
    "pooling": lambda m, h: F.interpolate(F.avg_pool2d(image(h), (1, 3)), size=(2, 3)).flatten(1),
    "adaptive": lambda m, h: F.interpolate(
        F.adaptive_avg_pool2d(image(h), (2, 2)), size=(2, 3), mode="bilinear"
    ).flatten(1),
    "double": lambda m, h: h.double().float() / 2,
    "fixed masks": lambda m, h: torch.where(ODD, h, 2 * h).masked_fill(ODD.flip(0), 0.0) * ODD,
    "fixed indices": lambda m, h: (
        h[:, torch.arange(5, -1, -1)].index_select(1, torch.arange(6)) + h.gather(1, torch.zeros(len(h), 6).long())
    ),
    "in place": lambda m, h: h.clone().add_(1).mul_(0.5).sub_(h),
    "into parts": lambda m, h: slots(h),
    "weights": lambda m, h: F.linear(h, m.w.weight.clamp(min=0).sin() / m.w.weight.norm()),
    "einsum": lambda m, h: torch.einsum("bi,ij->bj", h, m.w.weight),
    "batched": lambda m, h: (h.reshape(-1, 2, 3) @ m.v.weight[None].expand(len(h), -1, -1)).flatten(1),
    "numpy of constants": lambda m, h: h * torch.from_numpy(torch.arange(6.0).numpy()) + torch.tensor(ODD.tolist()),
    "position codes": lambda m, h: h + torch.sin(torch.arange(6.0)).relu().cumsum(0) ** 2,
    "batch norm": lambda m, h: m.norm(h),
    "instance norm in eval": lambda m, h: m.instance(h[:, None])[:, 0],
    "transposed convolution": lambda m, h: m.up(h[:, None])[:, 0, :6],
    "unfold": lambda m, h: F.unfold(image(h), (1, 3)).flatten(1),
    "lerp": lambda m, h: torch.lerp(h, 3 * h, torch.full((6,), 0.3)).addcmul(h, torch.ones(6)),
    "dropout off": lambda m, h: F.dropout(h, 0.5, training=False),
    "isnan": lambda m, h: h if not torch.isnan(h).any() else 2 * h,
    "side output": lambda m, h: (setattr(m, "seen", (h > 0).float().mean()), h)[1],
    "detached sign": lambda m, h: (h.detach().sign(), h)[1],
    "sparse": lambda m, h: (torch.eye(6).to_sparse() @ h.T).T,
}
MODULES = {
    "w": nn.Linear(6, 6),
    "v": nn.Linear(3, 3),
    "norm": nn.BatchNorm1d(6),
    "instance": nn.InstanceNorm1d(1, track_running_stats=True),
    "up": nn.ConvTranspose1d(1, 1, 3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_affine_operations_are_accepted_and_nothing_but_activations_recorded(name: str) -> None:
    """Within a region the gradient is constant: of points near one another with the same pattern."""
    torch.manual_seed(0)
    model = around(LINEAR[name], **MODULES).double() if name != "double" else around(LINEAR[name])
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        torch.set_default_dtype(dtype)
    try:
        x = torch.randn(1, 3) + 0.3 * torch.randn(60, 3)
        patterns = activation_patterns(model, x)
        gradients = local_lipschitz(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [gate.name for gate in patterns.layers] == ["model", "last.1"]
    ids = patterns.region_ids()
    for region in np.unique(ids):
        same = gradients[torch.from_numpy(np.flatnonzero(ids == region))]
        assert torch.allclose(same, same[:1].expand_as(same), rtol=1e-4)
    assert patterns.regions < 60


def head(output: Callable[[Tensor], Tensor]) -> nn.Module:
    return Graph(lambda m, x: output(m.last(m.first(x).relu())), first=nn.Linear(3, 6), last=nn.Linear(6, 2))


HEADS: dict[str, tuple[Callable[[Any], Tensor], str]] = {
    "square": (lambda z: z[:, 0] ** 2, "pow"),
    "product": (lambda z: z[:, 0] * z[:, 1], "mul"),
    "share": (lambda z: z.softmax(1)[:, 0], "_softmax"),
    "log odds": (lambda z: z.sigmoid()[:, 0].log() * 2 + 1, "sigmoid"),
}


@pytest.mark.parametrize("where", ["output", "model"])
@pytest.mark.parametrize("name", HEADS)
def test_a_smooth_head_is_named_and_refused_by_coverage(name: str, where: str) -> None:
    torch.manual_seed(0)
    function, op = HEADS[name]
    model, output = (head(lambda z: z), function) if where == "output" else (head(function), None)
    x = torch.randn(9, 3)
    assert activation_patterns(model, x, output=output).head.startswith(f"{op} in ")
    with pytest.raises(ValueError, match=f"its head \\({op} in .*pass the part before it"):
        Coverage(model, x, output=output)


KINKED_HEADS = {
    "margin": (lambda z: z.topk(2, dim=1).values.diff(dim=1)[:, 0], "calls topk"),
    "best": (lambda z: z.amax(1), "calls amax"),
    "hinge by mask": (lambda z: z[:, 0] * (z[:, 0] > 0), "calls gt"),
    "rounded probability": (lambda z: z.sigmoid()[:, 0].round(), "calls round"),
}


@pytest.mark.parametrize("name", KINKED_HEADS)
def test_an_output_with_hidden_kinks_is_refused(name: str) -> None:
    function, message = KINKED_HEADS[name]
    for model, output in ((head(lambda z: z), function), (head(function), None)):
        with pytest.raises(ValueError, match=message):
            activation_patterns(model, torch.randn(9, 3), output=output)


def test_activations_in_the_output_are_part_of_the_pattern() -> None:
    torch.manual_seed(0)
    model, x = head(lambda z: z), torch.randn(50, 3)
    margin = activation_patterns(model, x, output=lambda z: (z[:, 0] - z[:, 1]).abs())
    assert [gate.width for gate in margin.layers] == [6, 1]
    index = activation_patterns(model, x, output=0)
    assert [gate.width for gate in index.layers] == [6]
    found = Coverage(model, x[:30], output=lambda z: (z[:, 0] - z[:, 1]).abs()).query(x, solve=False)
    truth = local_lipschitz(model, x, output=lambda z: (z[:, 0] - z[:, 1]).abs())
    assert np.allclose(found.bound[found.status == "train"], truth.numpy()[found.status == "train"])


def test_only_the_chosen_output_counts() -> None:
    model = Graph(
        lambda m, x: {"z": m.last(h := m.first(x).relu())[:, 0], "best": h.amax(1), "label": h.argmax(1)},
        first=nn.Linear(3, 6),
        last=nn.Linear(6, 2),
    )
    x = torch.randn(9, 3)
    assert not activation_patterns(model, x, output=lambda found: found["z"]).head
    with pytest.raises(ValueError, match="calls amax"):
        activation_patterns(model, x)


def test_a_sequence_first_model_is_refused_where_its_sizes_coincide() -> None:
    """[S, B, F] with S = B: the first activation has as many rows as there are samples."""
    body = {"first": nn.Linear(3, 6), "last": nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))}
    over_time = Graph(lambda m, x: m.last(m.first(x).relu().mean(0)), **body)
    for samples in (5, 1):
        with pytest.raises(ValueError, match="has 5 rows for 2 samples|has 2 rows|has 1 rows|other samples"):
            activation_patterns(over_time, torch.randn(samples, samples if samples > 1 else 2, 3))
    fixed = Graph(lambda m, x: m.last(m.first(x.reshape(4, 3)).relu()), **body)
    with pytest.raises(ValueError, match="runs with 4 samples but not with two"):
        activation_patterns(fixed, torch.randn(4, 3))


@pytest.mark.parametrize("value", [0.5, 0.4999, 0.0, 1.0, -3.0, 1e6])
def test_samples_that_mix_are_seen_whatever_the_first_is(value: float) -> None:
    torch.manual_seed(0)
    model, x = around(lambda m, h: h - h.mean(0)), torch.randn(9, 3)
    x[0] = value
    with pytest.raises(ValueError, match="of one sample depends on the other samples"):
        activation_patterns(model, x)


@pytest.mark.parametrize("index", [0, 3])
def test_indices_that_mix_are_seen_though_all_rows_are_equal(index: int) -> None:
    torch.manual_seed(0)
    model = Graph(lambda m, x: m.last((m.first(x) - m.first(x).mean(0)).relu())[:, 0], **embedded())
    x = torch.full((4, 1), index)
    if index == 0:  # what else is an index is not known, so one row has to differ
        x[2] = 1
    with pytest.raises(ValueError, match="of one sample depends on the other samples"):
        activation_patterns(model, x)


def embedded() -> dict[str, nn.Module]:
    return {"first": nn.Embedding(5, 6), "last": nn.Linear(6, 1)}


def test_a_batch_of_indices() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    assert activation_patterns(model, torch.randint(5, (20, 2))).layers[0].width == 4


def test_weights_that_are_computed_are_neither_recorded_nor_refused() -> None:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    model = nn.Sequential(normed, nn.ReLU(), nn.Linear(4, 1))
    for mode in (True, False):
        assert [gate.name for gate in activation_patterns(model.train(mode), torch.randn(9, 3)).layers] == ["1"]
