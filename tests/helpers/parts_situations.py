"""Situations of ranks that hold parts of the parameters (tensor parallelism), for per-sample norms and the noise scale:
each beside one float64 process that computes the gradient of every sample by itself."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rank_situations import STEPS, WINDOW, Columns, Data, data_of, fsdp, made, planned
from sample_situations import (
    DDP,
    NAME,
    Truth,
    _per_layer,
    collectives,
    compared,
    loaded_amid,
    mean_loss,
    merged,
    monitored,
    quiet,
    sum_loss,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from lipcore import PerSampleGradDots, PerSampleGradNorms, Trajectory

VOCABULARY, PADDING, LENGTH = 12, 3, 5
LAYERS = ("emb", "norm", "a", "b", "head")


class Words(nn.Module):
    """A table of 12 rows, a normalised pair of layers with a residual connection, a head."""

    def __init__(self, tied: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, 6, padding_idx=PADDING)
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, VOCABULARY, bias=not tied)
        self._checkpointed = checkpointed
        if tied:
            self.head.weight = self.emb.weight

    def block(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.tanh(self.a(self.norm(x))))
        return x + found

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self._checkpointed else self.block(x)
        found: Tensor = self.head(x)
        return found


def words_loss(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="sum")


def words_of(ranks: Sequence[int], size: int = 3) -> list[Data]:
    found = []
    for rank in ranks:
        generator = torch.Generator().manual_seed(200 + rank)
        found.append([
            (torch.randint(VOCABULARY, (size, LENGTH), generator=generator),
             torch.randint(VOCABULARY, (size, LENGTH), generator=generator))
            for _ in range(STEPS)
        ])  # fmt: skip
    return found


def words_plan(**more: Any) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"a": ColwiseParallel(), "b": RowwiseParallel(), **more}


def trained(model: Any, data: Data, loss: Callable[[Tensor, Tensor], Tensor], **settings: Any) -> list[Any]:
    """The global windows of a run on tokens."""
    optimizer, monitor = monitored(model, **settings)
    found: list[Any] = []
    with monitor:
        for x, y in data:
            optimizer.zero_grad()
            (loss(model(x), y) / len(x)).backward()
            optimizer.step()
            if (window := monitor.global_window()) is not None:
                found.append(window)
    return found


def words(model: Any, plan: dict[str, Any], world: int, **options: Any) -> dict[str, Any]:
    """A model of words under a plan, beside one process."""
    from torch.distributed.tensor.parallel import parallelize_module

    tied = model.head.weight is model.emb.weight
    layers = LAYERS[:-1] if tied else LAYERS
    expected = Truth(made(lambda: Words(tied)), layers=layers, loss=words_loss).windows(words_of([0]))
    model = parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    if tied:
        model.head.weight = model.emb.weight
    return compared(trained(model, words_of([0])[0], options.pop("loss", words_loss), **options), expected)


def tensor_parallel(rank: int, world: int) -> dict[str, Any]:
    expected = Truth(made(Columns)).windows(data_of([0]))
    return compared(merged(planned(made(Columns), init_device_mesh("cpu", (world,))), data_of([0])[0]), expected)


def vocabulary(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    emb, head = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
    return words(made(Words), words_plan(emb=emb, head=head), world)


def tied(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    emb, head = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
    return words(made(lambda: Words(tied=True)), words_plan(emb=emb, head=head), world)


def logits_in_parts(rank: int, world: int) -> dict[str, Any]:
    """The model returns a DTensor, of which the loss is computed in parts; the table is cut along its features."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel

    plan = words_plan(emb=ColwiseParallel(output_layouts=Replicate()), head=ColwiseParallel(use_local_output=False))
    with loss_parallel():
        return words(made(Words), plan, world)


def checkpointed(rank: int, world: int) -> dict[str, Any]:
    return words(made(lambda: Words(checkpointed=True)), words_plan(), world)


def every_second_step(rank: int, world: int) -> dict[str, Any]:
    expected = Truth(made(Columns), every=2).windows(data_of([0]))
    model = planned(made(Columns), init_device_mesh("cpu", (world,)))
    metric = PerSampleGradNorms(loss_reduction="mean", every_steps=2)
    return compared(merged(model, data_of([0])[0], metrics=[metric]), expected)


def late_call(rank: int, world: int) -> dict[str, Any]:
    """All windows are merged by one call at the end, two micro-batches a step."""
    expected = Truth(made(Columns), micro=2).windows(data_of([0]))
    model = planned(made(Columns), init_device_mesh("cpu", (world,)))
    optimizer, monitor = monitored(model, scale=0.5, window_steps=WINDOW // 2)
    data = data_of([0])[0]
    with monitor:
        for step in range(STEPS // 2):
            optimizer.zero_grad()
            for x, y in data[2 * step : 2 * step + 2]:
                (0.5 * mean_loss(model(x), y)).backward()
            optimizer.step()
        monitor.global_window()
    return compared(list(monitor.global_history), expected)


def loaded_within(rank: int, world: int) -> dict[str, Any]:
    """A state of the middle of a window holds what was not added up."""
    expected = Truth(made(Columns)).windows(data_of([0]))
    return compared(loaded_amid(planned(made(Columns), init_device_mesh("cpu", (world,))), data_of([0])[0]), expected)


def proved(rank: int, world: int) -> dict[str, Any]:
    """The user's proof; the norms are exact from then on."""
    model = planned(made(Columns), init_device_mesh("cpu", (world,)))
    optimizer, monitor = monitored(model)
    data = data_of([0])[0]
    with monitor:
        said = monitor.prove(data[0][0])
        for x, y in data:
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        window = monitor.global_window()
    assert window is not None
    return {"said": said, "label": window[NAME].norm["total"].mean.label, "proved": window[NAME].details["proved"]}


def late(rank: int, world: int) -> dict[str, Any]:
    """Rank 1 makes its Monitor later, and the model's last collective is behind the end of its forward pass."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(layers, init_device_mesh("cpu", (world,)), plan)
    time.sleep(0.3 * rank)
    optimizer, monitor = monitored(model)
    with monitor:
        for x, y in data_of([0])[0][:WINDOW]:
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        window = monitor.global_window()
    assert window is not None
    return {"said": list(window[NAME].details["not_proved"])}


def last_pass(rank: int, world: int) -> dict[str, Any]:
    """The norms of the last pass, refused until the ranks have added them up; scores by id, and losses."""
    model, twin = planned(made(Columns), init_device_mesh("cpu", (world,))), Truth(made(Columns))
    metric = PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    data, worst, refused = data_of([0])[0], 0.0, ""
    expected: dict[int, list[float]] = {}
    with monitor:
        for step, (x, y) in enumerate(data):
            squares = _per_layer(twin.model, twin._samples([data], step)[0])
            ids = [(step + i) % 5 for i in range(len(x))]
            for i, norm in zip(ids, squares[:, -1].sqrt().tolist(), strict=True):
                expected.setdefault(i, []).append(norm)
            metric.set_ids(ids)
            metric.set_losses(torch.full((len(x),), float(step)))
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            try:
                _ = metric.per_sample
            except RuntimeError as error:
                refused = str(error)
            found = metric.sync_norms()
            worst = max(worst, float((found - squares[:, -1].sqrt()).abs().max()))
            for place, layer in enumerate(("a", "b", "c")):
                worst = max(worst, float((metric.per_layer[layer] - squares[:, place].sqrt()).abs().max()))
            optimizer.step()
            with torch.no_grad():
                for mine, theirs in zip(twin.model.parameters(), model.parameters(), strict=True):
                    mine.copy_(theirs.full_tensor() if hasattr(theirs, "full_tensor") else theirs)
            if step == WINDOW:
                monitor.global_window()
        scores, losses = metric.sync_scores().to_numpy(), metric.sync_scores(losses=True).to_numpy()
    for i, mean, count in zip(scores["ids"], scores["mean"], scores["count"], strict=True):
        assert count == len(expected[int(i)]), (i, count)
        worst = max(worst, abs(float(mean) - sum(expected[int(i)]) / len(expected[int(i)])))
    assert losses["count"].tolist() == scores["count"].tolist()
    return {"error": worst, "refused": refused}


def counted(rank: int, world: int) -> dict[str, Any]:
    """Collectives of training steps and of global_window()."""
    found: dict[str, int] = {}
    data = data_of([0])[0]

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            mean_loss(model(data[step][0]), data[step][1]).backward()
            optimizer.step()

    model = planned(made(Columns), init_device_mesh("cpu", (world,)))
    metrics = [PerSampleGradNorms(loss_reduction="mean", prove=False), Trajectory()]
    optimizer, monitor = monitored(model, metrics=metrics)
    with monitor:
        found["training"] = collectives(lambda: train(model, optimizer, range(WINDOW)))
        found["first"] = collectives(monitor.global_window)
        train(model, optimizer, range(WINDOW, STEPS))
        found["second"] = collectives(monitor.global_window)
    twin = planned(made(Columns), init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    found["plain"] = collectives(lambda: train(twin, optimizer, range(WINDOW)))
    return found


def taken_back(rank: int, world: int) -> dict[str, Any]:
    """A failed proof takes back the samples of steps 3 and 4; the ids of the two before keep their scores."""
    model = planned(made(Columns), init_device_mesh("cpu", (world,)))
    metric = PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    with monitor:
        for step, (x, y) in enumerate(data_of([0])[0][:WINDOW]):
            metric.set_ids([10 * step + i for i in range(len(x))])
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
            if step == 1:
                metric.observe_proof("", served=False)
                metric._window.mark()
            metric._window.unproved.tapped = True
            if step == 2:
                metric.sync_scores()
        metric.observe_proof("a test", served=False)
        window = monitor.global_window()
        ids = metric.sync_scores().to_numpy()["ids"].tolist()
    return {"off": "" if window is None else window.off.get(NAME, ""), "ids": ids}


def with_fsdp2(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    expected = Truth(made(Columns)).windows(data_of(range(2)))
    model = fsdp(planned(made(Columns), mesh["tp"]), mesh["dp"])
    return compared(merged(model, data_of(range(2))[mesh["dp"].get_local_rank()]), expected)


def with_fsdp2_unequal(rank: int, world: int) -> dict[str, Any]:
    """Other numbers of samples on the replicas, and a table whose rows are in parts."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    batches = [words_of([0], 2)[0], words_of([1], 5)[0]]
    expected = Truth(made(Words), layers=LAYERS, loss=words_loss).windows(batches)
    plan = words_plan(emb=RowwiseParallel(input_layouts=Replicate()))
    model = fsdp(parallelize_module(made(Words), mesh["tp"], plan), mesh["dp"])
    return compared(trained(model, batches[mesh["dp"].get_local_rank()], words_loss), expected)


def with_ddp(rank: int, world: int) -> dict[str, Any]:
    """DistributedDataParallel(device_mesh=) takes parts of parameters for parameters, and nobody knows of what."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model = DDP(planned(made(Columns), mesh["tp"]), device_mesh=mesh["dp"])
    return said_of(model, data_of(range(2))[mesh["dp"].get_local_rank()])


class Scaled(nn.Module):
    """A norm of the user's own type."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Turned(nn.Module):
    """A layer whose weight is [I, O], as GPT-2 has them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class OwnTypes(nn.Module):
    """Modules of types without a rule, which compute what rules know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Scaled(), Turned(6, 8), Turned(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.a(x))))  # type: ignore[no-any-return]


def placed(model: nn.Module, mesh: Any, **dims: int | None) -> Any:
    """Make DTensors of parameters, cut along a dimension or whole: `b_weight=1`."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    for name, dim in dims.items():
        owner, key = model.get_submodule(name.rpartition("_")[0]), name.rpartition("_")[2]
        placement = Replicate() if dim is None else Shard(dim)
        setattr(owner, key, nn.Parameter(distribute_tensor(getattr(owner, key).detach(), mesh, [placement])))
    return model


def called_whole(module: nn.Module, mesh: Any, *, first: bool = False, last: bool = False) -> None:
    """Make DTensors of what a module is called with (`first`), and plain tensors of what it returns (`last`)."""
    from torch.distributed.tensor import DTensor, Replicate

    if first:
        module.register_forward_pre_hook(
            lambda _, arguments: (DTensor.from_local(arguments[0], mesh, [Replicate()], run_check=False),)
        )
    if last:
        module.register_forward_hook(lambda *call: call[2].redistribute(placements=[Replicate()]).to_local())


def own_types(rank: int, world: int) -> dict[str, Any]:
    expected = Truth(made(OwnTypes)).windows(data_of([0]))
    mesh = init_device_mesh("cpu", (world,))
    model = placed(made(OwnTypes), mesh, b_weight=1, b_bias=0, c_weight=0, c_bias=None)
    called_whole(model.b, mesh, first=True)
    called_whole(model.c, mesh, last=True)
    return compared(merged(model, data_of([0])[0]), expected)


def own_types_fsdp2(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    expected = Truth(made(OwnTypes)).windows(data_of(range(world)))
    model = fully_shard(made(OwnTypes), mesh=init_device_mesh("cpu", (world,)))
    return compared(merged(model, data_of(range(world))[rank]), expected)


def misplaced(rank: int, world: int, **dims: int | None) -> dict[str, Any]:
    """A model of DTensors alone, of which one layer's gradients do not come of what a rank has."""
    twin, mesh = Truth(made(Columns)), init_device_mesh("cpu", (world,))
    data = data_of([0])[0]
    squares = _per_layer(twin.model, twin._samples([data], 0)[0], twin.layers)
    model = placed(made(Columns), mesh, **dims)
    called_whole(model, mesh, first=True, last=True)
    metric = PerSampleGradNorms(loss_reduction="mean", on_unsupported="skip")
    optimizer, monitor = monitored(model, metrics=[metric], window_steps=1)
    optimizer.param_groups[0]["lr"] = 0.0
    worst = 0.0
    with monitor:
        for _ in range(2):  # the first one may show it
            optimizer.zero_grad()
            mean_loss(model(data[0][0]), data[0][1]).backward()
            found = metric.sync_norms()
            optimizer.step()
            window = monitor.global_window()
            assert window is not None
            assert not window.off, window.off
        for name, norms in metric.per_parameter.items():
            layer = "abc".index(name[0])
            if name.endswith("weight") and f"{name[0]}.bias" in metric.per_parameter:
                both = norms.square() + metric.per_parameter[f"{name[0]}.bias"].square()
                worst = max(worst, float((both - squares[:, layer]).abs().max()))
    measured = sorted(metric.per_parameter)
    return {"error": worst, "total": bool(found.isfinite().all()), "measured": measured}


def bias_whole(rank: int, world: int) -> dict[str, Any]:
    return misplaced(rank, world, a_weight=0, a_bias=None, b_weight=1, b_bias=None, c_weight=None, c_bias=None)


def bias_cut(rank: int, world: int) -> dict[str, Any]:
    return misplaced(rank, world, a_weight=0, a_bias=0, b_weight=1, b_bias=0, c_weight=None, c_bias=None)


def empty_batch(rank: int, world: int) -> dict[str, Any]:
    """A step without samples, in which the gradient is 0."""
    model = planned(made(Columns), init_device_mesh("cpu", (world,)))
    data = [(x[: len(x) * (step != 1)], y[: len(y) * (step != 1)]) for step, (x, y) in enumerate(data_of([0])[0])]
    window = merged(model, data, lambda output, y: sum_loss(output, y) / max(len(y), 1))[0]
    return {"off": dict(window.off), "details": dict(window[NAME].details), "numbers": len(window[NAME].flat())}


def scores_alone(rank: int, world: int) -> dict[str, Any]:
    """Each rank's own scores, where it is asked for those of nobody else; norms of a pass under another default
    device."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model = fsdp(planned(made(Columns), mesh["tp"]), mesh["dp"])
    metric = PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    replica = mesh["dp"].get_local_rank()
    with monitor:
        for step, (x, y) in enumerate(data_of(range(2))[replica][:WINDOW]):
            metric.set_ids([1000 * replica + 10 * step + i for i in range(len(x))])
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            with torch.device("meta"):
                metric.sync_norms()
            optimizer.step()
        monitor.global_window()
        counts = [len(metric.sync_scores(group).to_numpy()["ids"]) for group in (None, mesh["dp"], "auto")]
    return {"counts": counts, "own": len(metric.scores.to_numpy()["ids"])}


def four_parts(rank: int, world: int) -> dict[str, Any]:
    return tensor_parallel(rank, world)


# ---- what is refused, or left out


def said_of(model: Any, data: Data, **settings: Any) -> dict[str, Any]:
    """What windows say of a metric that is left out, or of its numbers."""
    windows = merged(model, data, **settings)
    return {"said": " ".join(window.off.get(NAME, "") for window in windows), "trained": len(windows)}


def other_samples(rank: int, world: int) -> dict[str, Any]:
    """The ranks are given other numbers of samples, which torch cannot notice before a layer cut by rows."""
    model = planned(made(Columns), init_device_mesh("cpu", (world,)))
    metric = PerSampleGradNorms(loss_reduction="mean")
    optimizer, monitor = monitored(model, metrics=[metric])
    with monitor:
        for step, (x, y) in enumerate(data_of([0])[0][:WINDOW]):
            metric.set_ids([step + rank + i for i in range(len(x))])
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            optimizer.step()
        window = monitor.global_window()
    return {"said": window.off.get(NAME, "")}


class Heads(nn.Module):
    """A normalisation of heads that are on several ranks, by a plain parameter that none of them has the gradient
    of."""

    def __init__(self, bent: bool = False) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(4, bias=False), nn.Linear(8, 1)
        self._bent = bent

    def forward(self, x: Tensor) -> Tensor:
        heads = self.a(x).unflatten(-1, (-1, 4))
        heads = self.norm(torch.tanh(heads) if self._bent else heads).flatten(-2)
        found: Tensor = self.b(torch.tanh(heads))
        return found


def heads(rank: int, world: int) -> dict[str, Any]:
    """Nothing of the graph shows that the norm's input is a part."""
    model = planned(made(lambda: Heads(bent=True)), init_device_mesh("cpu", (world,)))
    optimizer, monitor = monitored(model)
    with monitor:
        for x, y in data_of([0])[0][:WINDOW]:
            optimizer.zero_grad()
            mean_loss(model(x), y).backward()
            torch.distributed.all_reduce(model.norm.weight.grad)  # as a loop would that is right
            optimizer.step()
        window = monitor.global_window()
    return {"said": window[NAME].details.get("norms_off", ""), "numbers": len(window[NAME].flat())}


def heads_left_out(rank: int, world: int) -> dict[str, Any]:
    """The norm's input is seen to be a view of a projection's part."""
    twin, data = Truth(made(Heads), layers=("a", "norm", "b")), data_of([0])[0]
    squares = _per_layer(twin.model, twin._samples([data], 0)[0], twin.layers)
    model = planned(made(Heads), init_device_mesh("cpu", (world,)))
    metric = PerSampleGradNorms(loss_reduction="mean", on_unsupported="skip")
    optimizer, monitor = monitored(model, metrics=[metric], window_steps=1)
    with monitor:
        mean_loss(model(data[0][0]), data[0][1]).backward()
        torch.distributed.all_reduce(model.norm.weight.grad)  # as a loop would that is right
        metric.sync_norms()
        optimizer.step()
        window = monitor.global_window()
    assert window is not None
    norms = metric.per_layer
    worst = max(float((norms[layer] - squares[:, place].sqrt()).abs().max()) for place, layer in ((0, "a"), (2, "b")))
    return {
        "error": worst,
        "places": sorted(window[NAME].norm),
        "not_covered": str(window[NAME].details["not_covered"]),
    }


def sequences(rank: int, world: int) -> dict[str, Any]:
    """Parameters of which each rank has an addend of the gradient are left out, by the user's choice."""
    from sample_situations import Sequences, halves_of_sequences
    from sample_situations import sequences as cut

    halves = zip(halves_of_sequences(0), halves_of_sequences(1), strict=True)
    data = [(torch.cat([x, rest], 1), y) for (x, y), (rest, _) in halves]
    twin = Truth(made(Sequences), layers=("norm", "a", "b"))
    grads = [_per_layer(twin.model, twin._samples([data], 0)[0], twin.layers)]
    model = cut(world)
    metric = PerSampleGradNorms(loss_reduction="mean", on_unsupported="skip")
    optimizer, monitor = monitored(model, metrics=[metric], window_steps=1)
    with monitor:
        x, y = halves_of_sequences(rank)[0]
        mean_loss(model(x), y).backward()
        optimizer.step()
        window = monitor.global_window()
    squares = grads[0]
    norms = window[NAME].norm
    worst = max(abs(norms[layer].max.value - float(squares[:, i].sqrt().max())) for i, layer in ((1, "a"), (2, "b")))
    return {"error": worst, "places": sorted(norms), "not_covered": str(window[NAME].details["not_covered"])}


def refused(rank: int, world: int) -> dict[str, Any]:
    """What is said where a Monitor is made."""
    model, said = planned(made(Columns), init_device_mesh("cpu", (world,))), dict[str, str]()
    reference = {name: torch.zeros(p.shape) for name, p in made(Columns).named_parameters()}
    metrics: dict[str, Callable[[], Any]] = {
        "normalized": lambda: PerSampleGradNorms(loss_reduction="mean", normalized=True),
        "keep_factors": lambda: PerSampleGradNorms(loss_reduction="mean", keep_factors=True),
        "methods": lambda: PerSampleGradNorms(loss_reduction="mean", methods={"a": "estimate"}),
        "reference": lambda: PerSampleGradDots(loss_reduction="mean", reference=reference),
    }

    def ask(name: str, of: Any, make: Callable[[], Any]) -> None:
        try:
            monitored(of, metrics=[make()])[1].close()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    for name, make in metrics.items():
        ask(name, model, make)
    ask("compiled", torch.compile(model, backend="eager"), lambda: PerSampleGradNorms(loss_reduction="mean"))
    return said


def part_of_the_group(rank: int, world: int) -> dict[str, Any]:
    """group= has one of the ranks that hold parts."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model = fsdp(planned(made(Columns), mesh["tp"]), mesh["dp"])
    return said_of(model, data_of(range(2))[mesh["dp"].get_local_rank()], group=mesh["dp"])


def situations(ranks: int) -> Iterator[tuple[str, int, Callable[[int, int], Any]]]:
    """Name, ranks and work of each that needs so many."""
    two = (tensor_parallel, vocabulary, tied, logits_in_parts, checkpointed, every_second_step, late_call,
           loaded_within, own_types, own_types_fsdp2, bias_whole, bias_cut, empty_batch, proved, late, last_pass,
           counted, taken_back, other_samples, heads, heads_left_out, sequences, refused)  # fmt: skip
    for work in (
        two if ranks == 2 else (with_fsdp2, with_fsdp2_unequal, with_ddp, scores_alone, four_parts, part_of_the_group)
    ):
        yield work.__name__, ranks, quiet(work)


if __name__ == "__main__":
    import sys
    import tempfile
    from pathlib import Path

    from rank_runs import run_situations

    warnings.simplefilter("ignore")
    for several in map(int, sys.argv[1:] or ["2"]):
        for name, found in run_situations(Path(tempfile.mkdtemp()), "parts_situations", several).items():
            print(several, name, *(str(each)[:1200] for each in found), sep="\n   ")
