"""Batches of one: served from the gradients after these have proved right, and never when they are something else."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from per_sample_oracle import seeded
from torch import Tensor, nn

from lipcore import PerSampleGradNorms

_SERVED_AFTER = 5  # the audit, and the proofs


def made() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 1))


def x(seed: int) -> Tensor:
    return torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))


def truth(model: nn.Module, inputs: Tensor) -> float:
    model = copy.deepcopy(model)  # which is not watched
    grads = torch.autograd.grad(model(inputs).sum(), [p for p in model.parameters() if p.requires_grad])
    return float(torch.stack([g.square().sum() for g in grads]).sum().sqrt())


def hooked(model: nn.Module) -> bool:
    return any(module._forward_hooks for module in list(model.modules())[1:])


def serve(model: nn.Module, metric: PerSampleGradNorms) -> None:
    for seed in range(_SERVED_AFTER):
        model.zero_grad()
        model(x(seed)).sum().backward()
        assert float(metric.per_sample) == pytest.approx(truth(model, x(seed)), rel=1e-5)
    model.zero_grad()
    assert not hooked(model)


def test_numbers_stay_right_and_proofs_come_back() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        tapped = 0
        for seed in range(150):
            model.zero_grad()
            tapped += hooked(model)
            model(x(seed)).sum().backward()
            assert metric.per_parameter.reasons == {}
            assert float(metric.per_sample) == pytest.approx(truth(model, x(seed)), rel=1e-5)
        assert 4 <= tapped <= 20
    assert not hooked(model)


def test_a_larger_batch_in_between_is_tapped() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        both = torch.cat([x(0), x(1)])
        model(both).sum().backward()
        expected = torch.tensor([truth(model, x(0)), truth(model, x(1))], dtype=torch.float64)
        torch.testing.assert_close(metric.per_sample, expected, rtol=1e-5, atol=0)
        model.zero_grad()
        serve(model, metric)


def twice(model: nn.Module) -> None:
    first, second = model(x(0)), model(x(1))
    (first + second).sum().backward()


def again(model: nn.Module) -> None:
    out = model(x(0)).sum()
    out.backward(retain_graph=True)
    out.backward()


def added(model: nn.Module) -> None:
    out = model(x(0)).sum()
    sum(p.square().sum() for p in model.parameters()).backward()
    out.backward()


def some(model: nn.Module) -> None:
    model(x(0)).sum().backward(inputs=list(model[0].parameters()))


def graph(model: nn.Module) -> None:
    model(x(0)).sum().backward(create_graph=True)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("surprise", [again, added, some, graph])
def test_gradients_that_are_something_else_give_nan_with_a_reason(surprise: Callable[[nn.Module], None]) -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        surprise(model)
        assert metric.per_sample.isnan().all()
        assert metric.broken
        model.zero_grad()
        model(x(3)).sum().backward()
        assert float(metric.per_sample) == pytest.approx(truth(model, x(3)), rel=1e-5)
        assert hooked(model) == (surprise is not some)  # from now on, where gradients may be more than a sample's


def test_two_forward_passes_for_one_backward() -> None:
    model = made()
    records: list[Tensor] = []
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        assert metric.per_layer  # the record of the last pass is made when it is asked for
        observe = metric.observe_layers

        def keep(record: object) -> None:
            observe(record)  # type: ignore[arg-type]
            assert metric._last is not None
            records.append(metric._last.per_sample)

        metric._capture.tapped._on_record = keep  # type: ignore[union-attr]
        twice(model)
    assert len(records) == 2
    numbers = [float(r) for r in records]
    assert sum(n != n for n in numbers) == 1
    assert any(n == pytest.approx(truth(model, x(1)), rel=1e-5) for n in numbers)


def test_autograd_grad_is_not_recorded_and_the_backward_after_it_is() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        out = model(x(7)).sum()
        torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
        out.backward()
        assert float(metric.per_sample) == pytest.approx(truth(model, x(7)), rel=1e-5)


def test_what_changes_while_passes_are_served_is_seen() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        model[0].requires_grad_(False)
        model(x(0)).sum().backward()
        assert float(metric.per_sample) == pytest.approx(truth(model, x(0)), rel=1e-5)
        model[0].requires_grad_(True)
        model.zero_grad()
        serve(model, metric)
        model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
        model(x(0)).sum().backward()
        assert float(metric.per_sample) == pytest.approx(truth(model, x(0)), rel=1e-5)


def test_a_penalty_on_the_parameters_is_never_served() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        for seed in range(10):
            model.zero_grad()
            (model(x(seed)).sum() + sum(p.square().sum() for p in model.parameters())).backward()
            assert float(metric.per_sample) == pytest.approx(truth(model, x(seed)), rel=1e-5)
            assert hooked(model)


def test_a_backward_pass_that_never_comes() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        for seed in range(8):
            model(x(20 + seed))  # in grad mode, and thrown away
            model.zero_grad()
            model(x(seed)).sum().backward()
            assert float(metric.per_sample) == pytest.approx(truth(model, x(seed)), rel=1e-5)


def test_windows_have_the_passes_that_made_no_record() -> None:
    """Alone, served norms go into the distributions without a record; a surprise in between does not lose any."""
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="mean", scale=0.5) as metric:
        total: list[float] = []
        last: list[float] = []
        for seed in range(40):
            model.zero_grad()
            if seed == 30:
                added(model)
                continue
            (0.5 * model(x(seed)).sum()).backward()
            total.append(truth(model, x(seed)))
            if seed % 7 == 0:
                last.append(float(metric.per_layer["3"]))
        window = metric.compute().norm
        assert window["total"].mean.count == 39
        assert window["total"].mean.value == pytest.approx(sum(total) / 39, rel=1e-6)
        assert window["total"]["missing"].value == 1.0
        assert window["3"].max.value >= max(last)
        metric.reset()
        model.zero_grad()
        (0.5 * model(x(3)).sum()).backward()
        again = metric.compute().norm
        assert again["total"].mean.count == 1
        assert again["total"].mean.value == pytest.approx(truth(model, x(3)), rel=1e-6)


def test_ids_of_served_passes_reach_the_scores() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        for seed in (4, 5, 6):
            model.zero_grad()
            metric.set_ids([seed])
            model(x(seed)).sum().backward()
        found = metric.scores.lookup([4, 5, 6])
        assert found.count.tolist() == [1, 1, 1]
        assert found.mean.tolist() == pytest.approx([truth(model, x(seed)) for seed in (4, 5, 6)])


def test_a_copied_model_is_not_watched_while_passes_are_served() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        model(x(1)).sum().backward()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.zero_grad()
            other(x(2)).sum().backward()
        assert float(metric.per_sample) == pytest.approx(truth(model, x(1)), rel=1e-5)


def test_the_metric_can_go_while_passes_are_served() -> None:
    model = made()
    metric = PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum")
    serve(model, metric)
    out = model(x(0)).sum()
    watched = weakref.ref(metric)
    del metric
    gc.collect()
    assert watched() is None
    out.backward()
    model(x(0)).sum().backward()


def test_an_exception_in_a_served_forward_pass() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                model(torch.randn(1, 4))
        model(x(0)).sum().backward()
        assert float(metric.per_sample) == pytest.approx(truth(model, x(0)), rel=1e-5)
        assert not hooked(model)


def penalty(model: nn.Module) -> None:
    (model(x(7)).sum() + 1e-2 * sum(p.square().sum() for p in model.parameters())).backward()


def scaled(model: nn.Module) -> None:
    out = model(x(7)).sum()
    handle = model[0].weight.register_hook(lambda grad: 3 * grad)
    out.backward()
    handle.remove()


@pytest.mark.parametrize("surprise", [penalty, scaled])
def test_what_begins_while_passes_are_served_is_found_at_once(surprise: Callable[[nn.Module], None]) -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        surprise(model)
        assert metric.per_sample.isnan().all()
        assert metric.broken
        model.zero_grad()
        surprise(model)
        expected = truth(model, x(7)) if surprise is penalty else None
        assert expected is None or float(metric.per_sample) == pytest.approx(expected, rel=1e-5)


def test_a_small_penalty_from_the_beginning_is_never_served() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        for seed in range(20):
            model.zero_grad()
            (model(x(seed)).sum() + 1e-4 * sum(p.square().sum() for p in model.parameters())).backward()
            assert float(metric.per_sample) == pytest.approx(truth(model, x(seed)), rel=1e-5)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


PACKINGS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda logits, hidden: (logits, hidden),
    "list": lambda logits, hidden: [logits, hidden],
    "dict": lambda logits, hidden: {"logits": logits, "hidden": hidden},
    "dataclass": Output,
}
LOGITS: dict[str, Callable[[Any], Tensor]] = {
    "tuple": lambda out: out[0],
    "list": lambda out: out[0],
    "dict": lambda out: out["logits"],
    "dataclass": lambda out: out.logits,
}


class Packed(nn.Module):
    def __init__(self, packing: str) -> None:
        super().__init__()
        self.body, self.head, self.pack = nn.Linear(5, 4), nn.Linear(4, 1), PACKINGS[packing]

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.body(inputs).tanh()
        return self.pack(self.head(hidden), hidden)


@pytest.mark.parametrize("packing", PACKINGS)
def test_outputs_that_are_no_tensor(packing: str) -> None:
    with seeded(0):
        model = Packed(packing)
    logits = LOGITS[packing]
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        for seed in range(20):
            model.zero_grad()
            logits(model(x(seed))).sum().backward()
            plain = copy.deepcopy(model)
            grads = torch.autograd.grad(logits(plain(x(seed))).sum(), list(plain.parameters()))
            expected = float(torch.cat([g.flatten() for g in grads]).norm())
            assert float(metric.per_sample) == pytest.approx(expected, rel=1e-5)
            if seed == _SERVED_AFTER + 1:
                assert not hooked(model)


def test_a_forward_pass_between_forward_and_backward_costs_this_pass_alone() -> None:
    model = made()
    with PerSampleGradNorms(model, batch_of_one="fast", loss_reduction="sum") as metric:
        serve(model, metric)
        loss = model(x(7)).sum()
        model(x(8))
        loss.backward()
        assert "another forward pass began before its backward pass" in metric.broken
        for seed in range(9, 9 + 2 * _SERVED_AFTER):
            model.zero_grad()
            model(x(seed)).sum().backward()
            assert float(metric.per_sample) == pytest.approx(truth(model, x(seed)), rel=1e-5)
        assert not hooked(model)  # served again
