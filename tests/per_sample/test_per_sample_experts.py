"""Mixtures of experts: whose a row is comes through the routing's own indices, whatever they are in a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import spread
from per_sample_models import made
from per_sample_oracle import assert_norms, check, norms_sq, samples_of, weighted_sum
from torch import Tensor, nn
from torch.nn import functional as F

from lipcore import PerSampleGradNorms
from lipcore.capture.graph import structure
from lipcore.capture.graph.closed_forms import SampleRows
from lipcore.capture.graph.edge_ids import ids_behind
from lipcore.capture.graph.ids_step import NOBODY, Step
from lipcore.capture.graph.walk import shapes

C, E, T, B = 6, 3, 5, 8
Way = Callable[[Tensor, Tensor, nn.ModuleList], Tensor]


def _mask_put(f: Tensor, k: Tensor, experts: nn.ModuleList) -> Tensor:
    y = torch.zeros_like(f)
    for j, expert in enumerate(experts):
        y[k == j] = expert(f[k == j])
    return y


def _mask_add(f: Tensor, k: Tensor, experts: nn.ModuleList) -> Tensor:
    y = torch.zeros_like(f)
    for j, expert in enumerate(experts):
        y[k == j] += expert(f[k == j]) * 2
    return y


def _index_add(f: Tensor, k: Tensor, experts: nn.ModuleList) -> Tensor:
    y = torch.zeros_like(f)
    for j, expert in enumerate(experts):
        rows = torch.where(k == j)[0]
        y.index_add_(0, rows, expert(f[rows]))
    return y


def _sorted(f: Tensor, k: Tensor, experts: nn.ModuleList) -> tuple[Tensor, Tensor]:
    order = k.argsort(stable=True)
    parts = f[order].split(torch.bincount(k, minlength=E).tolist())  # type: ignore[no-untyped-call]
    return order, torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])


def _put_back(f: Tensor, k: Tensor, experts: nn.ModuleList) -> Tensor:
    order, parts = _sorted(f, k, experts)
    return parts[order.argsort()]


def _scattered(f: Tensor, k: Tensor, experts: nn.ModuleList) -> Tensor:
    order, parts = _sorted(f, k, experts)
    return torch.zeros_like(f).scatter(0, order[:, None].expand_as(f), parts)


def _copied(f: Tensor, k: Tensor, experts: nn.ModuleList) -> Tensor:
    order, parts = _sorted(f, k, experts)
    return torch.zeros_like(f).index_copy(0, order, parts)


WAYS: dict[str, Way] = {
    "mask put": _mask_put,
    "mask add": _mask_add,
    "index_add": _index_add,
    "put back": _put_back,
    "scattered": _scattered,
    "copied": _copied,
}
EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(C, C),
    "mlp": lambda: nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C)),
    "norm": lambda: nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C)),
}


class Mixture(nn.Module):
    """Experts of samples, or of tokens where there are some."""

    def __init__(self, way: Way, expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.way = way
        self.stem, self.router, self.head = nn.Linear(C, C), nn.Linear(C, E), nn.Linear(C, 3)
        self.experts = nn.ModuleList(expert() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        f = h.reshape(-1, C)
        weights, k = self.router(f).softmax(-1).max(-1)
        y = self.way(f, k, self.experts) * weights[:, None]
        out: Tensor = self.head(torch.tanh(y.view_as(h) + h))
        return out


class Stacked(nn.Module):
    """All experts' weights in one parameter."""

    def __init__(self, way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.way = way
        self.stem, self.router, self.head = nn.Linear(C, 8), nn.Linear(8, E), nn.Linear(8, 3)
        self.w = nn.Parameter(torch.randn(E, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        f = h.reshape(-1, 8)
        weights, k = self.router(f).softmax(-1).topk(2)
        y = self.way(f.repeat_interleave(2, 0), k.flatten(), self.w).view(-1, 2, 8)
        out: Tensor = self.head(torch.tanh((y * weights[..., None]).sum(1).view_as(h) + h))
        return out


def _grouped(f: Tensor, k: Tensor, w: Tensor) -> Tensor:
    order = k.argsort(stable=True)
    ends = torch.bincount(k, minlength=E).cumsum(0).int()
    if f.dtype == torch.float64:  # has no grouped product
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        return torch.cat([part @ w[j] for j, part in enumerate(f[order].split(sizes))])[order.argsort()]  # type: ignore[no-untyped-call]
    return F.grouped_mm(f[order], w, offs=ends)[order.argsort()]


def _one_by_one(f: Tensor, k: Tensor, w: Tensor) -> Tensor:
    y = torch.zeros_like(f)
    for j in range(E):
        rows = (k == j).nonzero().flatten()
        y = y.index_add(0, rows, f[rows] @ w[j])
    return y


def _batched(f: Tensor, k: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(f[:, None], w[k])[:, 0]


STACKED = {"grouped": _grouped, "one by one": _one_by_one, "batched": _batched}
needs_grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")


def _right(model: nn.Module, shape: tuple[int, ...], passes: int = 5, **options: Any) -> PerSampleGradNorms:
    """In every pass, of which each has another routing, and most are not proved."""
    generator = torch.Generator().manual_seed(3)
    with PerSampleGradNorms(model, loss_reduction="sum", **options) as metric:
        for _ in range(passes):
            x = torch.randn(shape, generator=generator)
            expected = norms_sq(model, samples_of((x,), len(x)), weighted_sum)
            model.zero_grad()
            weighted_sum(model(x)).backward()
            assert_norms(metric, {name: expected[name] for name in metric.per_parameter})
            assert set(metric.per_parameter) == set(expected)
    return metric


@pytest.mark.parametrize("shape", [(B, C), (B, T, C)], ids=["samples", "tokens"])
@pytest.mark.parametrize("expert", spread(EXPERTS, 2))
@pytest.mark.parametrize("way", WAYS)
def test_experts_against_one_sample_at_a_time(way: str, expert: str, shape: tuple[int, ...]) -> None:
    _right(made(lambda: Mixture(WAYS[way], EXPERTS[expert])), shape)


@pytest.mark.parametrize(
    "way", [pytest.param(name, marks=needs_grouped if name == "grouped" else ()) for name in STACKED]
)
def test_stacked_experts_take_no_replays(way: str) -> None:
    metric = _right(made(lambda: Stacked(STACKED[way])), (B, T, C), max_replay_flops=0)
    kind = {"grouped": "GroupedMm", "one by one": "Mm", "batched": "Index"}[way]
    assert f"graph: products of rows at {kind};" in str(metric.plan())


@needs_grouped
def test_the_kept_factors_of_stacked_experts() -> None:
    model, x = made(lambda: Stacked(_grouped)), torch.randn(B, T, C)
    with PerSampleGradNorms(model, loss_reduction="sum", keep_factors=True) as metric:
        weighted_sum(model(x)).backward()
        sums = metric.weighted_sum(torch.ones(B))
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(sums[name], parameter.grad, rtol=1e-4, atol=1e-4)
        gram = metric.gram()["total"]
        torch.testing.assert_close(gram.diagonal().sqrt(), metric.per_sample)


def test_rows_that_were_carried_wrongly_are_measured_where_they_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weighted backward passes of a proof find it."""
    carried = structure.carried

    def shifted(*arguments: Any) -> structure.Carried:
        frontier, whose = carried(*arguments)
        return structure.Carried(frontier, {place: ids.roll(1) for place, ids in whose.items()})

    monkeypatch.setattr(structure, "carried", shifted)
    metric = _right(made(lambda: Stacked(_batched)), (B, T, C))
    assert "replays at Index" not in str(metric.plan())
    assert "replays at" in str(metric.plan())


def test_an_experts_only_row() -> None:
    """Which python's setitem views as no row, where one sample more makes it two."""
    model = made(lambda: Mixture(_mask_put, EXPERTS["mlp"]))
    x = torch.randn(B, C)
    with torch.no_grad():
        k = model.router(torch.tanh(model.stem(x))).argmax(-1)  # type: ignore[operator, union-attr]
    others = [i for i in range(B) if k[i] != k[B - 1]]
    assert others
    check(model, (x[[*others, B - 1]],))


@pytest.mark.parametrize(
    "ids", [[0, 1, 2, 0, 1, 2], [0, 0, 1, 1, 2, 2], [0, 1, 2, 0], [2, NOBODY, 0], [NOBODY], []], ids=str
)
def test_the_rows_of_samples(ids: list[int]) -> None:
    rows, x = SampleRows(0, torch.tensor(ids, dtype=torch.int64), 3), torch.arange(len(ids)) + 10
    split, offsets = rows.split(x)
    for sample in range(3):
        mine = split[sample] if offsets is None else split[offsets[sample] : offsets[sample + 1]]
        assert mine.tolist() == [10 + i for i, owner in enumerate(ids) if owner == sample]


# ---- one step

INDEX, ROWS = torch.tensor([3, 0, 0, 2]), torch.tensor([True, False, True, True, False])
STEPS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], int]] = {
    "index": (lambda x: x[INDEX], [(5, 3)], 0),
    "index by a mask": (lambda x: x[ROWS], [(5, 3)], 0),
    "index by two": (lambda x: x[INDEX, INDEX], [(5, 4, 3)], 0),
    "index of features": (lambda x: x[:, INDEX], [(5, 4)], 0),
    "index of features, by feature": (lambda x: x[:, INDEX], [(5, 4)], 1),
    "index_put": (lambda x, v: torch.index_put(x, (INDEX[:2],), v), [(5, 3), (2, 3)], 0),
    "index_put of a mask": (lambda x, v: torch.index_put(x, (ROWS,), v), [(5, 3), (3, 3)], 0),
    "index_put of one row": (lambda x, v: torch.index_put(x, (INDEX[:1],), v), [(5, 3), (3,)], 0),
    "index_add": (lambda x, v: x.index_add(0, INDEX, v), [(5, 3), (4, 3)], 0),
    "index_add of features": (lambda x, v: x.index_add(1, INDEX, v), [(5, 4), (5, 4)], 0),
    "index_copy": (lambda x, v: x.index_copy(0, INDEX[:2], v), [(5, 3), (2, 3)], 0),
    "index_select": (lambda x: x.index_select(0, INDEX), [(5, 3)], 0),
    "gather": (lambda x: x.gather(0, INDEX[:, None].expand(-1, 3)), [(5, 3)], 0),
    "gather of features": (lambda x: x.gather(1, INDEX.expand(5, -1)), [(5, 4)], 0),
    "gather of other rows": (lambda x: x.gather(0, INDEX.reshape(2, 2)), [(5, 2)], 0),
    "scatter": (lambda x, v: x.scatter(0, INDEX[:2, None].expand(-1, 3), v), [(5, 3), (2, 3)], 0),
    "scatter_add": (lambda x, v: x.scatter_add(0, INDEX[:, None].expand(-1, 3), v), [(5, 3), (4, 3)], 0),
    "topk": (lambda x: x.topk(2)[0], [(5, 4)], 0),
    "sort": (lambda x: x.sort(-1)[0], [(5, 4)], 0),
    "max": (lambda x: x.max(-1)[0], [(5, 4)], 0),
    "softmax": (lambda x: x.softmax(-1), [(5, 4)], 0),
    "softmax over rows": (lambda x: x.softmax(0), [(5, 4)], 0),
    "sum": (lambda x: x.sum((1, 3)), [(5, 4, 3, 2)], 0),
    "mean": (lambda x: x.mean(-1, keepdim=True), [(5, 4)], 0),
    "sum of all": (lambda x: x.sum(), [(5, 4)], -1),
    "view": (lambda x: x.view(5, 2, 3), [(10, 3)], 0),
    "view of rows": (lambda x: x.view(10, 3), [(5, 2, 3)], 0),
    "view across": (lambda x: x.view(4, 5), [(5, 4)], 0),
    "unsqueeze": (lambda x: x.unsqueeze(1), [(5, 4)], 0),
    "squeeze": (lambda x: x.squeeze(1), [(5, 1, 4)], 0),
    "transpose": (lambda x: x.transpose(0, 1), [(5, 4, 3)], 1),
    "t": (lambda x: x.t(), [(5, 4)], 1),
    "permute": (lambda x: x.permute(2, 0, 1), [(5, 4, 3)], 1),
    "slice": (lambda x: x[1:4:2], [(5, 3)], 0),
    "slice of features": (lambda x: x[:, 1:], [(5, 3)], 0),
    "pad of rows": (lambda x: F.pad(x, (1, 0, 2, 1)), [(3, 4)], 0),
    "pad of features": (lambda x: F.pad(x, (0, 0, 2, 1)), [(5, 3, 2)], 0),
    "pad that crops": (lambda x: F.pad(x, (0, 0, -1, 1)), [(6, 3)], 0),
    "select": (lambda x: x[2], [(5, 4, 3)], 0),
    "select of features": (lambda x: x[:, 2], [(5, 4, 3)], 0),
    "cat": (lambda x, v: torch.cat([x, v]), [(5, 3), (2, 3)], 0),
    "cat of features": (lambda x, v: torch.cat([x, v], 1), [(5, 3), (5, 2)], 0),
    "stack": (lambda x, v: torch.stack([x, v]), [(5, 3), (5, 3)], 1),
    "stack of rows": (lambda x, v: torch.stack([x, v]), [(5, 3), (5, 3)], 0),
    "expand": (lambda x: x.expand(5, 3), [(1, 3)], 0),
    "product": (lambda x, w: x @ w, [(5, 3), (3, 4)], 0),
    "product, weights first": (lambda w, x: w @ x, [(5, 3), (3, 4)], 1),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w), [(4,), (5, 3), (3, 4)], 0),
    "bmm": (lambda x, w: torch.bmm(x, w), [(5, 2, 3), (5, 3, 4)], 0),
    "bmm, rows": (lambda x, w: torch.bmm(x, w), [(2, 5, 3), (2, 3, 4)], 1),
    "bmm, columns": (lambda w, x: torch.bmm(w, x), [(2, 5, 3), (2, 3, 4)], 2),
    "mul": (lambda x, w: x * w, [(5, 3), (3,)], 0),
    "mul by a number per row": (lambda x, w: x * w, [(5, 3), (5, 1)], 0),
    "where": (lambda x, v: torch.where(ROWS[:, None], x, v), [(5, 3), (5, 3)], 0),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), [(5, 3), (3,), (3,)], 0),
    "layer norm of rows": (lambda x: F.layer_norm(x, (5, 3)), [(2, 5, 3)], 1),
    "attention": (F.scaled_dot_product_attention, [(5, 2, 4, 3)] * 3, 0),
    "attention of heads": (F.scaled_dot_product_attention, [(2, 5, 4, 3)] * 3, 1),
    "no rows": (lambda x: x[:0].view(0, 1, 3), [(5, 3)], 0),
}
TOLD = {  # that ids go on through these
    *(
        "index",
        "index by a mask",
        "index_put",
        "index_add",
        "gather",
        "scatter",
        "topk",
        "sum",
        "view",
        "product",
        "cat",
    ),
    *("pad of rows", "pad of features"),
    *("slice", "select", "index by two", "stack", "softmax", "max", "bmm", "layer norm", "index_copy", "index_select"),
}


@pytest.mark.parametrize(
    "ids", [[4, 2, 2, NOBODY, 0, 1, 3, 4, 2, 0], [1] * 10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]], ids=["any", "one", "two"]
)
@pytest.mark.parametrize("name", STEPS)
def test_one_step_of_ids(name: str, ids: list[int]) -> None:
    """Where they say that a part is a sample's, no other sample's gradient comes to it."""
    build, sizes, dim = STEPS[name]
    out = build(*(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes))
    node = out.grad_fn
    rows = torch.tensor(ids)[: out.shape[dim] if dim >= 0 else 1]
    here = rows.reshape([-1 if d == dim else 1 for d in range(out.dim())])
    others = [None if child is None else shapes(child)[k] for child, k in node.next_functions]
    told = False
    for edge, (child, number) in enumerate(node.next_functions):
        if child is None:
            continue
        shape = shapes(child)[number]
        found = ids_behind(Step(node, edge, [here], shapes(node), shape, others))
        if found is None:
            continue
        told = True
        full = found.expand(shape)
        for sample in range(NOBODY, 5):
            grad = torch.where((here == sample) & (here != NOBODY), torch.randn_like(out), 0)
            each = node(grad, *[None] * (len(shapes(node)) - 1))
            came = (each[edge] if isinstance(each, tuple) else each).sum_to_size(shape)  # as the engine does
            assert not came[full != sample].any(), (edge, sample, found)
    # Rows that are taken twice are told where they are of one sample in both places.
    assert told or name not in TOLD or ids[:2] == [0, 0]


@pytest.mark.parametrize("size", [3, [3, 3]], ids=["size", "sizes"])
def test_parts_of_a_split(size: Any) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    node = x.split(size, 1)[0].grad_fn  # type: ignore[no-untyped-call]
    ids = torch.tensor([[2], [0], [0], [1]])
    step = Step(node, 0, [ids, ids], shapes(node), (4, 6), [(4, 6)])
    assert torch.equal(ids_behind(step), ids)  # type: ignore[arg-type]
    other = ids_behind(step._replace(ids=[ids, ids.flip(0)]))
    assert other is not None
    assert torch.equal(other, torch.cat([ids.expand(4, 3), ids.flip(0).expand(4, 3)], 1))
    assert ids_behind(step._replace(ids=[ids, None])) is None


@pytest.mark.parametrize("dim", [0, -1])
def test_parts_that_are_unbound(dim: int) -> None:
    x = torch.randn(2, 3, 2, requires_grad=True)
    node = x.unbind(dim)[0].grad_fn
    ids = torch.tensor([[2], [0], [1]]) if dim == 0 else torch.tensor([[2, 0, 1]])
    step = Step(node, 0, [ids, ids], shapes(node), (2, 3, 2), [(2, 3, 2)])
    found = ids_behind(step)
    assert found is not None
    assert torch.equal(found, ids.unsqueeze(dim))
    other = ids_behind(step._replace(ids=[ids, 2 - ids]))
    assert other is not None
    assert torch.equal(other, torch.stack([ids, 2 - ids], dim))
    assert ids_behind(step._replace(ids=[None, ids])) is None


class Dropping(nn.Module):
    """Experts with dropout inside: which row gets which mask depends on how many rows each expert has."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(C, E), nn.Linear(C, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(C, C), nn.Dropout(0.2)) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, None])
        y: Tensor = self.head(x + out)
        return y


@pytest.mark.filterwarnings("ignore:lipcore:UserWarning")
def test_dropout_in_experts_is_not_taken_for_mixing() -> None:
    torch.manual_seed(0)
    model, x, y = Dropping(), torch.randn(B, C), torch.arange(B) % 3
    with PerSampleGradNorms(model, loss_reduction="mean") as norms:
        losses = F.cross_entropy(model(x), y, reduction="none")
        losses.mean().backward(retain_graph=True)
        assert "draws random numbers" in norms.unproved
        found = norms.per_sample
    for loss, norm in zip(losses, found, strict=True):
        each = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        square = sum(float(g.double().square().sum()) for g in each if g is not None)
        assert float(norm) == pytest.approx(square**0.5, rel=1e-5)
