"""loss_reduction="auto" from the loss that a model returns, and from one that is logged or set before backward()."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from one_rank import one_rank
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, Monitor, PerSampleGradNorms, Trajectory
from lipcore.per_sample import loss_nodes, loss_reduction, watched_loss


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


Named = namedtuple("Named", ["logits", "loss"])

PACKED: dict[str, Callable[[Any, Any], Any]] = {
    "dataclass": Output,
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "named tuple": lambda loss, logits: Named(logits, loss),
    "tuple": lambda loss, logits: (loss, logits),
    "alone": lambda loss, logits: loss,
}


class Trained(nn.Module):
    """A model that returns its loss, as a trainer's do."""

    def __init__(self, packed: str = "dict") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.packed = packed

    def forward(self, x: Tensor, labels: Tensor | None = None, items: Any = None) -> Any:
        logits = self.body(x)
        if labels is None:
            return PACKED[self.packed](None, logits)
        loss = nnf.cross_entropy(logits, labels, reduction="mean" if items is None else "sum")
        return PACKED[self.packed](loss if items is None else loss / items, logits)


def loss_in(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return output["loss"]
    return output.loss if hasattr(output, "loss") else output[0]


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, -100, 2, 2])


def made(packed: str = "dict") -> Trained:
    torch.manual_seed(0)
    return Trained(packed)


def truth(model: Trained, x: Tensor = X, y: Tensor = Y) -> Tensor:
    """Norms of the gradients of single samples' terms, in float64."""
    exact, norms = copy.deepcopy(model.body).double(), []
    for i in range(len(x)):
        loss = nnf.cross_entropy(exact(x[i : i + 1].double()), y[i : i + 1], reduction="sum")
        norms.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(exact.parameters()))]).norm())
    return torch.stack(norms)


@pytest.mark.parametrize("items", [None, 37])
@pytest.mark.parametrize("packed", PACKED)
def test_it_is_read_whatever_is_done_to_it_later(packed: str, items: int | None) -> None:
    model = made(packed)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    later: list[Callable[[Tensor], Tensor]] = [
        *(lambda loss: loss, lambda loss: loss / 8, lambda loss: 3 * loss, scaler.scale, lambda loss: loss.mul_(5)),
        *(lambda loss: loss + 1e-3 * sum(p.square().sum() for p in model.parameters()), lambda loss: loss.square()),
    ]
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for done in later:
            expected = truth(model)
            done(loss_in(model(X, Y, items))).backward()
            assert torch.allclose(norms.per_sample, expected, rtol=2e-5)
            assert not norms.broken
        found = norms.compute()
    assert found.norm["total"].mean.count == 6 * len(later)


def test_every_pass_has_its_own_factor() -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        first, second = model(X, Y)["loss"], model(X[:2], Y[:2], 9)["loss"]
        (3 * first - 5 * second).backward()
        window = norms.compute()
    expected = torch.cat([truth(model), truth(model, X[:2], Y[:2])])
    assert window.norm["total"].mean.value == pytest.approx(float(expected.mean()), rel=1e-5)
    assert window.norm["total"].mean.count == 8


def test_micro_batches_over_the_items_of_a_step() -> None:
    model, parts, items = made(), [(X[:2], Y[:2]), (X[2:], Y[2:])], torch.tensor(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    metric = PerSampleGradNorms(loss_reduction="auto")
    with Monitor(model, optimizer, [metric], window_steps=1, scaler=scaler) as monitor:
        for _ in range(2):
            expected = torch.cat([truth(model, x, y) for x, y in parts])
            for x, y in parts:
                scaler.scale(model(x, labels=y, items=items)["loss"]).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            found = monitor.history[-1]["per_sample_grad_norm"].norm["total"].mean
            assert found.value == pytest.approx(float(expected.mean()), rel=1e-5)


def test_training_stays_bit_for_bit_the_same() -> None:
    weights = []
    for watched in (False, True):
        model = made()
        metric = PerSampleGradNorms(loss_reduction="auto")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Monitor(model, optimizer, [metric] if watched else [Trajectory()]):
            for _ in range(3):
                (model(X, Y)["loss"] / 3).backward()
                optimizer.step()
                optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def of_the_prediction(norms: PerSampleGradNorms, model: Trained) -> None:
    nnf.cross_entropy(model(X, Y)["logits"], Y).backward()


def without_labels(norms: PerSampleGradNorms, model: Trained) -> None:
    nnf.cross_entropy(model(X)["logits"], Y).backward()


def stale(norms: PerSampleGradNorms, model: Trained) -> None:
    norms.set_loss(nnf.cross_entropy(model(X)["logits"], Y))
    nnf.cross_entropy(model(X)["logits"], Y).backward()


def zero(norms: PerSampleGradNorms, model: Trained) -> None:
    (0 * model(X, Y)["loss"]).backward()


def checkpointed(norms: PerSampleGradNorms, model: Trained) -> None:
    checkpoint(model, X, Y, use_reentrant=False)["loss"].backward()


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (of_the_prediction, "did not come to the loss that the model returned"),
        (without_labels, "no loss was set before this backward pass, nor has the model returned one"),
        (stale, "did not come to the loss that was set"),
        (zero, "or came with a gradient of 0"),
        (checkpointed, "under a checkpoint around the model"),
    ],
)
def test_without_a_loss_there_is_a_reason_and_a_way_out(
    step: Callable[[PerSampleGradNorms, Trained], None], reason: str
) -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        step(norms, model)
        assert bool(norms.per_sample.isnan().all())
        assert reason in norms.broken
        assert "set_loss(loss)" in norms.broken
        model.zero_grad()
        output = checkpoint(model, X, use_reentrant=False) if step is checkpointed else model(X)
        loss = nnf.cross_entropy(output["logits"], Y)
        norms.set_loss(loss)  # as it says
        loss.backward()
        assert torch.allclose(norms.per_sample, truth(model), rtol=1e-5)
        assert [n for why, n in norms.compute().details["unrecorded"].items() if reason in why] == [1]


def test_a_loss_with_an_unknown_operation_is_refused_by_name() -> None:
    class Odd(Trained):
        def forward(self, x: Tensor, labels: Tensor | None = None, items: Any = None) -> Any:
            output = super().forward(x, labels, items)
            return output | {"loss": output["loss"].exp()}

    model = Odd()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        model(X, Y)["loss"].backward()
        assert bool(norms.per_sample.isnan().all())
        assert "`loss` that the model returned cannot be read: loss: its graph has ExpBackward0" in norms.broken


def test_the_prediction_of_a_single_sample_is_no_loss() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0), nn.Unflatten(0, (1, 1)))

    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).sum()

    critic = Squeezed()
    with PerSampleGradNorms(critic, loss_reduction="auto") as norms:
        (critic(X[:1]) - 2).square().backward()
        assert "no loss was set" in norms.broken


def test_a_penalty_that_comes_first_is_no_loss() -> None:
    class Penalised(Trained):
        def forward(self, x: Tensor, labels: Tensor | None = None, items: Any = None) -> Any:
            hidden = self.body[1](self.body[0](x))
            return hidden.square().mean(), self.body[2](hidden)

    model = Penalised()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        penalty, logits = model(X)
        (nnf.cross_entropy(logits, Y) + 0.01 * penalty).backward()
        assert "nor has the model returned one" in norms.broken


def test_losses_of_single_samples_are_no_loss() -> None:
    class Unreduced(Trained):
        def forward(self, x: Tensor, labels: Tensor | None = None, items: Any = None) -> Any:
            return {"loss": nnf.cross_entropy(self.body(x), Y, reduction="none")}

    model = Unreduced()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for given in (False, True):
            loss = model(X)["loss"].mean()
            if given:
                norms.set_loss(loss)
            loss.backward()
            assert ("the `loss` that the model returned has shape [6]; call set_loss(loss)" in norms.broken) != given
            assert bool(norms.per_sample.isfinite().all()) == given


def test_a_loss_that_is_set_goes_first() -> None:
    """And its scale is read where it was set: what is done to it later counts too."""
    model = made()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        output = model(X, Y)
        mine = nnf.cross_entropy(output["logits"], Y, reduction="sum") / 11
        norms.set_loss(mine)
        (mine / 3).backward()
        assert torch.allclose(norms.per_sample, truth(model), rtol=1e-5)


def test_a_part_of_a_loss_may_be_set() -> None:
    model = made()
    expected = truth(model)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        part = nnf.cross_entropy(model(X)["logits"], Y)
        whole = part + 0.1 * sum(p.square().sum() for p in model.parameters())
        with pytest.raises(ValueError, match="call set_loss\\(\\) with the samples' own loss alone"):
            norms.set_loss(whole)
        norms.set_loss(part)
        whole.backward()
        assert torch.allclose(norms.per_sample, expected, rtol=1e-5)


def test_passes_that_are_not_the_trainings_tell_nothing() -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for _ in range(2):
            loss = model(X, Y)["loss"]
            torch.autograd.grad(7 * loss, model.body[0].weight, retain_graph=True)
            (loss / 2).backward()
            assert torch.allclose(norms.per_sample, truth(model), rtol=1e-5)
        with torch.no_grad():
            model(X, Y)


def test_a_second_backward_pass_has_its_own_gradient() -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        loss = model(X, Y)["loss"]
        for scale in (2.0, 0.25):
            (scale * loss).backward(retain_graph=True)
            assert torch.allclose(norms.per_sample, truth(model), rtol=1e-5)


@pytest.mark.parametrize("fast", ["exact", "fast"])
def test_of_single_samples(fast: Any) -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="auto", batch_of_one=fast) as norms:
        for items in (1, 7, 3, 5, 2, 9):
            model.zero_grad()
            (model(X[:1], Y[:1], items)["loss"] / items).backward()
            assert torch.allclose(norms.per_sample, truth(model, X[:1], Y[:1]), rtol=1e-5)


def test_it_is_copied_and_pickled() -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        loss = model(X, Y)["loss"]
        norms.set_loss(loss)
        loss.backward()
        for other in (copy.deepcopy(norms), pickle.loads(pickle.dumps(norms))):
            assert torch.equal(other.per_sample, norms.per_sample)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_what_distributed_data_parallel_returns() -> None:
    with one_rank():
        inner = made()
        model = nn.parallel.DistributedDataParallel(inner, find_unused_parameters=True)  # outputs go through a node
        with PerSampleGradNorms(model, loss_reduction="auto") as norms:
            (model(X, Y)["loss"] / 7).backward()
            assert torch.allclose(norms.per_sample, truth(inner), rtol=1e-5)


# ---- Monitor.log


def test_a_logged_loss_is_read_by_the_metric_that_wants_it() -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = PerSampleGradNorms(loss_reduction="auto")
    with Monitor(model, optimizer, [Trajectory(), metric], window_steps=None) as monitor:
        for items in (3, 5):
            expected = truth(model)
            loss = nnf.cross_entropy(model(X)["logits"], Y, reduction="sum") / items
            monitor.log(loss=loss)
            monitor.log(loss=loss)
            (loss / 4).backward()
            assert torch.allclose(metric.per_sample, expected, rtol=1e-5)
            optimizer.step()
            optimizer.zero_grad()


def test_a_loss_may_be_logged_whatever_the_metrics_are() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fixed = PerSampleGradNorms(loss_reduction="mean")
    for metrics in ([Trajectory(), Lipschitz(), fixed], None, []):
        with Monitor(model, optimizer, metrics) as monitor:
            loss = model(X).square().mean()
            monitor.log(loss=loss)
            loss.backward()
            optimizer.step()
            monitor.log(loss=loss)  # after it
            monitor.log(loss=loss.detach())
            monitor.log(loss=loss.item())


def test_a_logged_loss_that_cannot_be_read_gives_no_number_and_stops_nothing() -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = PerSampleGradNorms(loss_reduction="auto")
    with Monitor(model, optimizer, [metric], window_steps=None) as monitor:
        for readable in (False, True):
            loss = nnf.cross_entropy(model(X)["logits"], Y)
            loss = loss if readable else loss.exp()
            monitor.log(loss=loss)
            loss.backward()
            assert bool(metric.per_sample.isfinite().all()) == readable
            assert ("the loss that was logged cannot be read: loss: its graph has Exp" in metric.broken) != readable
            optimizer.step()
            monitor.log(loss=loss)  # too late: its graph was freed


def test_what_is_no_loss_is_refused_by_log() -> None:
    monitor = Monitor(made(), metrics=[Trajectory()])
    for loss, error, message in [
        ("0.5", TypeError, "loss: expected a tensor with one number, got str"),
        (True, TypeError, "got bool"),
        (torch.ones(3), ValueError, r"of shape \[3\]; reduce it"),
    ]:
        with pytest.raises(error, match=message):
            monitor.log(loss=loss)  # type: ignore[arg-type]
    monitor.close()


# ---- confirmed by the gradient at the logits


class Tokens(nn.Module):
    """A language model's head: the loss is over flat tokens."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.cast = cast

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        flat = (logits.double() if self.cast else logits).view(-1, 3)
        return {"loss": nnf.cross_entropy(flat, labels.flatten(), WEIGHTS.to(flat.dtype)), "logits": logits}


WEIGHTS = torch.tensor([1.0, 0.5, 3.0])


def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the numbers of a loss be known to the device only."""
    for module in (loss_nodes, watched_loss):
        monkeypatch.setattr(module, "of_host", lambda tensor: tensor.detach().reshape(()).double())
    monkeypatch.setattr(watched_loss, "_is_known", lambda tensor: False)


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("cast", [False, True])
def test_another_loss_of_the_same_logits_is_seen(cast: bool, device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Tokens(cast)
    x, labels = torch.randn(5, 4, 4), torch.randint(0, 3, (5, 4))
    labels[0, :3] = -100
    if device:
        on_a_device(monkeypatch)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for other in (0.0, 1e-2, 0.0, 1e-2, 1e-2):
            output = model(x, labels)
            loss = output["loss"] / 3 + (other * output["logits"].square().mean() if other else 0)
            loss.backward()
            assert bool(norms.per_sample.isnan().all()) == bool(other)
            assert ("gradient at the logits of the cross-entropy is another one" in norms.broken) == bool(other)


def test_once_it_was_another_one_every_pass_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_reduction, "_FIRST", 1)
    model = made()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for other in (1.0, 0.0, 0.0, 1.0, 1.0):
            output = model(X, Y)
            (output["loss"] + other * output["logits"].square().sum()).backward()
            assert bool(norms.per_sample.isnan().all()) == bool(other)


class TwoHeads(Trained):
    """A model with a second head, whose loss is another output."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None, items: Any = None) -> Any:
        hidden = self.body[1](self.body[0](x))
        logits, others = self.body[2](hidden), self.second(hidden)
        loss = nnf.cross_entropy(logits, Y)
        return {"loss": loss, "second": nnf.cross_entropy(others, Y.clamp(0, 1)), "hidden": hidden, "others": others}


def test_a_loss_of_another_head_is_seen() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for both in (False, True, False, True):
            output = model(X)
            loss = output["loss"] + output["second"] if both else output["loss"]
            loss.backward()
            assert bool(norms.per_sample.isnan().all()) == both
            assert ("comes from more than the `loss` that the model returned" in norms.broken) == both
        output = model(X)  # as it says
        loss = output["loss"] * 5 + output["second"] * 6
        with pytest.raises(ValueError, match="different numbers, 5 and 6"):
            norms.set_loss(loss)
        loss = nnf.cross_entropy(output["others"], Y.clamp(0, 1)) + output["hidden"].square().sum(1).mean()
        norms.set_loss(loss)
        loss.backward()
        assert bool(norms.per_sample.isfinite().all())


def test_a_hook_that_changes_the_logits_gradient_is_seen() -> None:
    model = made()
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        output = model(X, Y)
        output["logits"].register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        output["loss"].backward()
        assert "a hook changes their gradient" in norms.broken


def test_with_another_loss_of_the_same_logits_the_number_is_said() -> None:
    """As the reason says it."""
    model = made()
    exact = copy.deepcopy(model.body).double()
    expected = []
    for i in range(len(X)):
        logits = exact(X[i : i + 1].double())
        loss = nnf.cross_entropy(logits, Y[i : i + 1], reduction="sum") + 5 * logits.square().sum()
        expected.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(exact.parameters()))]).norm())
    with PerSampleGradNorms(model, loss_reduction="mean", loss_terms=5) as norms:
        output = model(X, Y)
        (output["loss"] + output["logits"].square().sum()).backward()
        assert torch.allclose(norms.per_sample, torch.stack(expected), rtol=1e-5)


def test_a_wrong_factor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the graph read wrongly, the gradient at the logits would show it."""
    model = made()
    read = watched_loss.read_loss

    def misread(loss: Tensor, batch_dim: int) -> Any:
        found = read(loss, batch_dim)
        return found._replace(factor=replace(found.factor, number=found.factor.number * 1.01))

    monkeypatch.setattr(watched_loss, "read_loss", misread)
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        model(X, Y)["loss"].backward()
        assert bool(norms.per_sample.isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = made().to(dtype)
    x, y = torch.randn(64, 4).to(dtype), torch.randint(0, 3, (64,))
    with PerSampleGradNorms(model, loss_reduction="auto") as norms:
        for scale in (1.0, 1024.0):
            (scale * model(x, y)["loss"]).backward()
            assert not norms.broken
            assert bool(norms.per_sample.isfinite().all())
