"""Per-sample norms and unusual uses of autograd: what is recorded, what is not, and never a wrong number."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from few import few
from models import Graph
from per_sample_models import made, mlp, sum_loss
from per_sample_oracle import assert_norms, norms_sq, samples_of
from threads import at_once
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import Monitor, PerSampleGradNorms

SIZES = pytest.mark.parametrize("size", [1, 3])


def watched(model: nn.Module, **options: Any) -> PerSampleGradNorms:
    """Its first pass is made: batches of one are served from the gradients from now on."""
    metric = PerSampleGradNorms(model, loss_reduction="sum", **options)
    sum_loss(model(torch.randn(2, 5))).backward()
    model.zero_grad()
    return metric


def expected_of(model: nn.Module, x: Tensor, loss: Any = sum_loss) -> dict[str, Tensor]:
    return norms_sq(model, samples_of((x,), len(x)), loss)


def records(metric: PerSampleGradNorms) -> int:
    assert metric._capture is not None
    return metric._capture.records


@SIZES
def test_autograd_grad_is_not_recorded_and_disturbs_nothing(size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)
    with watched(model) as metric:
        expected = expected_of(model, x)
        for wanted in (list(model.parameters()), [model[3].weight]):
            loss = sum_loss(model(x))
            torch.autograd.grad(loss, wanted, retain_graph=True)
            assert records(metric) == 1
            loss.backward()
            assert records(metric) == 2
            assert_norms(metric, expected)
            metric._capture.passes.records = 1
            model.zero_grad()
        assert sum(metric._capture.unrecorded.values()) == 2


@SIZES
def test_backward_into_some_is_not_recorded(size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)
    with watched(model) as metric:
        loss = sum_loss(model(x))
        loss.backward(inputs=[model[0].weight, model[0].bias], retain_graph=True)
        assert records(metric) == 1
        assert sum(metric._capture.unrecorded.values()) == 1
        model.zero_grad()
        loss.backward()
        assert_norms(metric, expected_of(model, x))


def test_only_autograd_grad_says_why_there_is_nothing() -> None:
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        torch.autograd.grad(sum_loss(model(torch.randn(3, 5))), list(model.parameters()))
        assert metric.per_sample.isnan().tolist() == [True] * 3
        assert "autograd.grad" in metric.broken


@SIZES
def test_every_backward_pass_of_a_kept_graph_is_a_record_of_its_own(size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)
    with watched(model) as metric:
        output = model(x)
        for factor in (1, 3, 2):
            expected = expected_of(model, x, lambda y: factor * sum_loss(y))
            (factor * sum_loss(output)).backward(retain_graph=True)
            if size > 1:
                assert_norms(metric, expected)
            else:  # gradients have added up: no number, or the right one
                found = metric.per_sample
                total = torch.stack(list(expected.values())).sum(0).sqrt()
                assert torch.allclose(found, total, rtol=1e-5) or (found.isnan().all() and metric.broken)
        assert records(metric) == 4


@SIZES
def test_create_graph_has_no_number_but_a_reason(size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)
    with watched(model) as metric:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: backward(create_graph=True) may leak
            sum_loss(model(x)).backward(create_graph=True)
        assert records(metric) == 2
        assert metric.per_sample.isnan().all()
        assert "create_graph" in metric.broken
        assert "create_graph" in metric.per_parameter.reasons["0.weight"]
        sum(p.grad.square().sum() for p in model.parameters()).backward()
        assert metric.per_sample.isnan().all()
        model.zero_grad()
        sum_loss(model(x)).backward()
        assert_norms(metric, expected_of(model, x))


@SIZES
def test_a_gradient_penalty_is_never_a_wrong_number(size: int) -> None:
    """The penalty's gradient flows along ways that per-sample factors of one backward pass do not have."""
    model, x = made(mlp), torch.randn(size, 5, requires_grad=True)
    with watched(model) as metric:
        for _ in range(2):
            output = model(x)
            (slope,) = torch.autograd.grad(sum_loss(output), x, create_graph=True)
            (sum_loss(output) + slope.square().sum()).backward()
            assert metric.per_sample.isnan().all()
            assert "create_graph" in metric.broken
            model.zero_grad()
        x = x.detach()
        sum_loss(model(x)).backward()
        assert_norms(metric, expected_of(model, x))


def test_gradients_are_bitwise_the_same_under_second_derivatives() -> None:
    def gradients(model: nn.Module) -> list[Tensor]:
        x = torch.linspace(-1, 1, 15).reshape(3, 5).requires_grad_()
        output = model(x)
        (slope,) = torch.autograd.grad(sum_loss(output), x, create_graph=True)
        (sum_loss(output) + slope.square().sum()).backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(made(mlp))
    model = made(mlp)
    with PerSampleGradNorms(model, loss_reduction="sum"):
        found = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@SIZES
def test_interleaved_forward_passes(size: int) -> None:
    model = made(mlp)
    with watched(model) as metric:
        xs = [torch.randn(size, 5) for _ in range(3)]
        expected = [expected_of(model, x) for x in xs]
        losses = [sum_loss(model(x)) for x in xs]
        for i in (1, 0, 2):
            model.zero_grad()
            losses[i].backward()
            assert_norms(metric, expected[i])
        assert records(metric) == 4


@SIZES
def test_two_forward_passes_in_one_backward_pass_are_two_records(size: int) -> None:
    model = made(mlp)
    seen: list[Tensor] = []
    metric = PerSampleGradNorms(loss_reduction="sum")
    with Monitor(model, metrics=[metric]) as monitor:
        for step in range(4):
            a, b = torch.randn(size, 5), torch.randn(4 - size, 5)
            totals = [torch.stack(list(expected_of(model, x).values())).sum(0).sqrt() for x in (a, b)]
            model.zero_grad()
            if size == 1 and step < 3:
                sum_loss(model(a)).backward()
                seen += totals[:1]
            else:
                (sum_loss(model(a)) + sum_loss(model(b))).backward()
                seen += totals
            monitor.step()
        result = monitor.compute()["per_sample_grad_norm"].norm["total"]
        if result.missing.value:  # a batch of one was to be served from the gradients
            assert (size, result.missing.value) == (1, 1)
            del seen[-2]
        assert result.mean.count == torch.cat(seen).numel()
        assert result.mean.value == pytest.approx(float(torch.cat(seen).mean()), rel=1e-5)


@SIZES
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_forward_and_backward(context: Any, size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)
    with watched(model) as metric:
        loss = sum_loss(model(x))
        expected = expected_of(model, x)
        model.eval()
        with context():
            model(torch.randn(8, 5))
        model.train()
        loss.backward()
        assert_norms(metric, expected)


@SIZES
def test_forward_passes_without_a_backward_pass(size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)
    kept = []
    with watched(model) as metric:
        for keep in (False, True):
            for _ in range(3):
                output = model(torch.randn(size, 5))
                if keep:
                    kept.append(output)
                model.zero_grad()
                sum_loss(model(x)).backward()
                assert_norms(metric, expected_of(model, x))


class Stumbling(nn.Module):
    broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise ZeroDivisionError
        return x


@SIZES
def test_a_forward_pass_that_raises(size: int) -> None:
    model, x = made(lambda: nn.Sequential(nn.Linear(5, 4), Stumbling(), nn.Linear(4, 3))), torch.randn(size, 5)
    with watched(model) as metric:
        for _ in range(2):
            model[1].broken = True
            with pytest.raises(ZeroDivisionError):
                model(x)
            model[1].broken = False
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(metric, expected_of(model, x))


@SIZES
def test_a_backward_pass_that_raises(size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)

    def boom(grad: Tensor) -> None:
        raise ZeroDivisionError

    with watched(model) as metric:
        output = model[0](x)  # outside
        output = model(x)
        handle = model[0].weight.register_hook(boom)
        with pytest.raises(ZeroDivisionError):
            sum_loss(output).backward()
        handle.remove()
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(metric, expected_of(model, x))


@SIZES
def test_a_backward_pass_that_raised_and_is_made_again(size: int) -> None:
    """Through the same graph: the layers that it had reached come back once more."""
    model, x = made(mlp), torch.randn(size, 5)

    def boom(grad: Tensor) -> None:
        raise ZeroDivisionError

    with watched(model) as metric:
        loss = sum_loss(model(x))
        handle = model[0].weight.register_hook(boom)
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        loss.backward()
        assert_norms(metric, expected_of(model, x))


@SIZES
def test_a_layer_called_outside_the_forward_pass_is_no_wrong_number(size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)
    with watched(model) as metric:
        for _ in range(2):
            model.zero_grad()
            (sum_loss(model(x)) + model[0](x).square().sum()).backward()
            assert metric.per_sample.isnan().all()
            assert "called outside the model's forward pass" in metric.broken or "added to them" in metric.broken
        model.zero_grad()
        sum_loss(model(x)).backward()
        assert_norms(metric, expected_of(model, x))


def test_layers_that_are_only_called_outside_leave_nothing_behind() -> None:
    model = made(mlp)
    with watched(model) as metric:
        for _ in range(200):
            model[0](torch.randn(3, 5)).sum().backward()
        assert metric._capture is not None
        assert len(metric._capture.passes._stray) < 100
        x = torch.randn(3, 5)
        model.zero_grad()
        sum_loss(model(x)).backward()
        assert_norms(metric, expected_of(model, x))


@SIZES
def test_a_chain_of_forward_passes_is_no_wrong_number(size: int) -> None:
    """The output of one pass is the input of the next: its gradient reaches both, and neither alone is a sample's."""
    model = made(lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh()))
    x = torch.randn(size, 5)
    with watched(model) as metric:
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(model(x))).backward()
            assert metric.per_sample.isnan().all()
            assert "output of another forward pass" in metric.broken or "served from the gradients" in metric.broken


@SIZES
def test_a_model_that_calls_itself_under_no_grad(size: int) -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, inner: bool = False) -> Tensor:
            y: Tensor = self.b(self.a(x).tanh())
            if inner:
                return y
            with torch.no_grad():
                target = self(x, inner=True)
            return self.b(self.a(x).tanh()) * target + y

    model, x = made(Teacher), torch.randn(size, 5)
    with watched(model) as metric:
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(metric, expected_of(model, x))


@pytest.mark.parametrize("from_step", [0, 3])
def test_a_penalty_on_the_parameters_is_no_samples_gradient(from_step: int) -> None:
    """Batches of one are served from the gradients only where these tell the same."""
    model = made(mlp)
    with watched(model) as metric:
        for step, size in enumerate((3, 1, 1, 1, 3, *[1] * 80)):
            x = torch.randn(size, 5)
            model.zero_grad()
            loss = sum_loss(model(x))
            if step >= from_step:
                loss = loss + sum(p.square().sum() for p in model.parameters())
            loss.backward()
            if from_step == 0 or step < 3 or step > 80:  # one that begins later is noticed within 64 passes
                assert_norms(metric, expected_of(model, x))


# ---- threads


def test_models_trained_in_threads_of_their_own() -> None:
    failures: list[BaseException] = []

    def work(model: nn.Module, batches: list[Tensor]) -> None:
        try:
            with watched(model) as metric:
                for x in batches:
                    expected = expected_of(model, x)
                    model.zero_grad()
                    sum_loss(model(x)).backward()
                    assert_norms(metric, expected)
        except BaseException as error:
            failures.append(error)

    # Made here: of numbers that threads draw in turns, some in 10,000 are of a LayerNorm whose input hardly varies.
    torch.manual_seed(0)
    given = [(mlp(), [torch.randn(1 + (seed + step) % 3, 5) for step in range(20)]) for seed in range(4)]
    threads = [threading.Thread(target=work, args=one) for one in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@SIZES
def test_evaluation_in_another_thread_during_the_forward_pass(size: int) -> None:
    entered, evaluated = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and threading.current_thread() is threading.main_thread():
                entered.set()
                assert evaluated.wait(20)
            return x

    model = made(lambda: nn.Sequential(nn.Linear(5, 4), Waiting(), nn.Linear(4, 2)))

    def evaluate() -> None:
        for _ in range(2):
            assert entered.wait(20)
            entered.clear()
            with torch.no_grad():
                model(torch.randn(7, 5))
            evaluated.set()

    thread = threading.Thread(target=evaluate)
    thread.start()
    x = torch.randn(size, 5)
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(x)).backward()
            evaluated.clear()
            found = metric.per_sample
    thread.join()
    expected = expected_of(nn.Sequential(model[0], model[2]), x)
    assert torch.allclose(found, torch.stack(list(expected.values())).sum(0).sqrt(), rtol=1e-5)


@pytest.mark.parametrize("sizes", few([(2, 3, 4), (1, 2, 3), (1, 1, 1)], 1), ids=str)
@pytest.mark.parametrize("served", [False, True], ids=["tapped", "served"])
def test_one_model_trained_by_several_threads(sizes: tuple[int, ...], served: bool) -> None:
    """As Hogwild does: every pass is its own thread's, and no thread's gradient becomes another's."""
    rounds = 20
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        xs = [torch.randn(size, 5, dtype=torch.float64) for size in sizes]
        expected = [torch.stack(list(expected_of(model, x).values())).sum(0).sqrt() for x in xs]
        gradients = [torch.autograd.grad(sum_loss(model(x)), list(model.parameters())) for x in xs]
        found: list[Tensor] = []
        metric = PerSampleGradNorms(model, loss_reduction="sum")

        def work(x: Tensor, model: nn.Module = model) -> None:
            for _ in range(rounds):
                sum_loss(model(x)).backward()

        with metric:
            for _ in range(5 * served):  # of one sample: from here on its norms are read from the gradients
                model.zero_grad()
                sum_loss(model(xs[0][:1])).backward()
            model.zero_grad()
            record = metric._window.take_in

            def keep(batch: Any, record: Any = record, found: list[Tensor] = found) -> None:
                found.append(batch.norms.per_sample.clone())
                record(batch)

            metric._window.take_in = keep  # type: ignore[method-assign]
            at_once(work, xs)
        assert len(found) >= len(sizes) * (rounds - 2)
        for norms in found:
            rows = [row for row in expected if row.shape == norms.shape]
            assert any(torch.allclose(norms, row, rtol=1e-9) for row in rows) or bool(norms.isnan().all())
        assert sum(bool(norms.isnan().any()) for norms in found) <= 2 * len(sizes)
        for parameter, *parts in zip(model.parameters(), *gradients, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, rounds * sum(parts))


@SIZES
def test_function_transforms_are_left_alone(size: int) -> None:
    """torch.func.vmap and grad on a model that is watched."""
    model, x = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), torch.randn(size, 5)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Any, row: Tensor) -> Tensor:
        return sum_loss(torch.func.functional_call(model, parameters, (row[None],)))

    with watched(model) as metric:
        output = sum_loss(model(x))
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        total = sum(g.double().flatten(1).square().sum(1) for g in grads.values()).sqrt()
        output.backward()
        assert torch.allclose(metric.per_sample, total, rtol=1e-5)
        assert records(metric) == 2


@SIZES
def test_backward_in_another_thread(size: int) -> None:
    model, x = made(mlp), torch.randn(size, 5)
    with watched(model) as metric:
        for _ in range(2):
            model.zero_grad()
            loss = sum_loss(model(x))
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
            assert_norms(metric, expected_of(model, x))


# ---- the model changes in mid-run


@SIZES
def test_another_dtype_and_loaded_weights_in_mid_run(size: int) -> None:
    model = made(mlp)
    other = made(mlp, 1).state_dict()
    with watched(model) as metric:
        for change in ("double", "load", "data", "float"):
            if change == "load":
                model.load_state_dict(other)
            elif change == "data":
                for parameter in model.parameters():
                    parameter.data = parameter.data * 0.5
            else:
                model.to(torch.float64 if change == "double" else torch.float32)
            for _ in range(2):
                x = torch.randn(size, 5, dtype=model[0].weight.dtype)
                model.zero_grad()
                sum_loss(model(x)).backward()
                assert_norms(metric, expected_of(model, x), 1e-4)


@SIZES
def test_a_parameter_that_is_replaced(size: int) -> None:
    model = made(mlp)
    with watched(model) as metric:
        model[3].weight = nn.Parameter(torch.randn(4, 7))
        for _ in range(2):
            x = torch.randn(size, 5)
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(metric, expected_of(model, x))


@SIZES
def test_another_hook_that_rewrites_an_output(size: int) -> None:
    """Registered after lipcore's it is a part of what follows; before, of the layer itself, and is refused."""
    model, x = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), torch.randn(size, 5)
    with watched(model) as metric:
        handle = model[0].register_forward_hook(lambda module, arguments, output: output * 3)
        expected = expected_of(nn.Sequential(model[0], model[1], model[2]), x)
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert_norms(metric, expected)
        handle.remove()


@SIZES
def test_a_hook_that_rewrites_an_input(size: int) -> None:
    model, x = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), torch.randn(size, 5)
    model[2].register_forward_pre_hook(lambda module, arguments: (arguments[0] * 3,))
    twin = Graph(lambda m, x: m.b(m.a(x).tanh() * 3), a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    twin.a.load_state_dict(model[0].state_dict())
    twin.b.load_state_dict(model[2].state_dict())
    expected = torch.stack(list(expected_of(twin, x).values())).sum(0).sqrt()
    with watched(model) as metric:
        for _ in range(2):
            model.zero_grad()
            sum_loss(model(x)).backward()
            assert torch.allclose(metric.per_sample, expected, rtol=1e-5)


@SIZES
def test_an_earlier_hook_that_rewrites_an_output(size: int) -> None:
    model, x = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), torch.randn(size, 5)
    model[0].register_forward_hook(lambda module, arguments, output: output * 3)
    expected = expected_of(model, x)
    with watched(model) as metric:
        sum_loss(model(x)).backward()
        assert_norms(metric, expected)


def test_a_hook_that_is_put_before_ours_is_refused() -> None:
    model = made(mlp)
    with pytest.raises(ValueError, match=r"module '0' \(Linear\): another forward hook"), watched(model):
        model[0].register_forward_hook(lambda module, arguments, output: output * 3, prepend=True)
        with pytest.warns(RuntimeWarning, match="stopped recording"):
            sum_loss(model(torch.randn(3, 5))).backward()


def test_gradients_that_a_tensor_hook_changes_behind_the_layer() -> None:
    """A hook on an activation changes what every sample's backpropagation is: so the norms change with it."""
    model, x = made(mlp), torch.randn(3, 5)
    with watched(model) as metric:
        sum_loss(model(x)).backward()
        before = metric.per_layer["0"]
        model.zero_grad()
        hook = model[2].register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,))
        sum_loss(model(x)).backward()
        assert torch.allclose(metric.per_layer["0"], 2 * before, rtol=1e-6)
        hook.remove()


class Reuses(torch.autograd.Function):
    """Its backward works in the memory that it kept, so that it can run once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.slope.mul_(grad)


class Frees(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = x.exp()
        return ctx.y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out = grad * ctx.y
        del ctx.y
        return out


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(5, 4), nn.Linear(4, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function.apply(self.a(x)))


@pytest.mark.parametrize("function", [Reuses, Frees])
def test_functions_of_the_users_that_expect_one_backward_pass(function: Any) -> None:
    model, x = made(lambda: Applied(function)), torch.randn(3, 5)
    grads = torch.autograd.grad(sum_loss(model(x)), list(model.parameters()))
    expected = [torch.autograd.grad(sum_loss(model(x[i : i + 1])), list(model.parameters())) for i in range(3)]
    with PerSampleGradNorms(model, loss_reduction="sum") as metric:
        sum_loss(model(x)).backward()
        assert not metric.unproved
        norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in expected])
        assert torch.allclose(metric.per_sample, norms.double(), rtol=1e-5)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)

    def part(self, x: Tensor) -> Tensor:
        return checkpoint(lambda z: self.a(z).relu(), x, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.part(x))


@pytest.mark.parametrize("sizes", [(5, 3), (3, 5), (1, 4)], ids=str)
def test_checkpoints_in_passes_of_unlike_size(sizes: tuple[int, int]) -> None:
    """Labelled and unlabelled samples in one loss."""
    model = made(Checkpointed)
    xs = [torch.randn(size, 5) for size in sizes]
    parameters = list(model.parameters())
    grads = torch.autograd.grad(sum_loss(model(xs[0])) + sum_loss(model(xs[1])), parameters)
    with watched(model):
        (sum_loss(model(xs[0])) + sum_loss(model(xs[1]))).backward()
    for parameter, grad in zip(parameters, grads, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad)


def test_a_checkpointed_part_that_is_called_alone() -> None:
    model, x = made(Checkpointed), torch.randn(3, 5)
    with watched(model) as metric:
        sum_loss(model.part(x)).backward()
        assert "called outside the model's forward pass" in metric.broken
        model.zero_grad()
        sum_loss(model(x)).backward()
        assert_norms(metric, expected_of(model, x))


def _alone(model: nn.Module, x: Tensor) -> None:
    sum_loss(model[2](x[:, :4])).backward()


def _in_a_checkpoint(model: nn.Module, x: Tensor) -> None:
    sum_loss(checkpoint(model, x.requires_grad_(), use_reentrant=True)).backward()


def _by_grad(model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(sum_loss(model(x)), list(model.parameters()))


@pytest.mark.parametrize("unusual", [_alone, _in_a_checkpoint, _by_grad])
def test_numbers_of_an_unrecorded_pass_are_not_those_of_the_one_before(unusual: Any) -> None:
    model = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    with watched(model) as metric:
        metric.set_ids([7, 8, 9])
        unusual(model, torch.randn(3, 5))
        assert metric.broken
        assert bool(metric.per_sample.isnan().all())
        model.zero_grad()
        x = torch.randn(3, 5)
        sum_loss(model(x)).backward()
        assert_norms(metric, expected_of(model, x))
    assert not len(metric.scores)


def test_tracing_a_watched_model() -> None:
    model = made(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    with watched(model) as metric, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, torch.randn(2, 5))
        x = torch.randn(3, 5)
        assert torch.equal(traced(x), model(x))
        sum_loss(model(x)).backward()
        assert_norms(metric, expected_of(model, x))


def test_a_batch_norm_put_in_train_mode_spoils_what_is_measured_beside_it() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[1].requires_grad_(False)
    with watched(model, on_unsupported="skip") as metric:
        sum_loss(model(torch.randn(3, 5))).backward()
        assert not metric.broken
        model.train()
        sum_loss(model(torch.randn(3, 5))).backward()
        assert "module '1' (BatchNorm1d)" in metric.broken
        assert bool(metric.per_sample.isnan().all())
        model.eval()
        sum_loss(model(torch.randn(3, 5))).backward()
        assert not metric.broken
