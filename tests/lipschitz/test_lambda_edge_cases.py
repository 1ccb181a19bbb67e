"""lambda where inputs, outputs or loops are unusual: right, or off by name; training notices nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from any_models import Normalize, Recurrent, before, constants
from models import Graph, Wrapper, mlp, relative_error, seeded
from oracle import same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipcore import Lipschitz, Monitor, PerSampleGradNorms
from lipcore.capture.taps.cost_share import CostShare
from lipcore.metric.results import MetricResult


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def normalized() -> nn.Module:
    return before(Normalize())


def double(build: Callable[[], nn.Module]) -> nn.Module:
    return seeded(build, dtype=torch.float64)


def observed(
    model: nn.Module, call: Callable[[nn.Module], Tensor], passes: int = 2, **settings: Any
) -> tuple[Tensor | None, MetricResult, list[str]]:
    """lambda of the last pass (None: not recorded), the window, and what was warned of."""
    metric = Lipschitz(**({"lambda_every": 1} | settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, metrics=[metric]) as monitor:
            for _ in range(passes):
                model.zero_grad()
                call(model).backward()
                monitor.step()
            result = monitor.compute()["lipschitz"]
            lambdas = metric.per_sample.local_lipschitz
    return lambdas, result, [str(warning.message) for warning in caught]


def off(result: MetricResult) -> str:
    (values,) = result.local_lipschitz.values()
    assert all(not value.valid and value.value != value.value for value in values.values())
    assert {value.note for value in values.values()} == {result.details["local_lipschitz_off"]}
    return str(result.details["local_lipschitz_off"])


def gradients(model: nn.Module, call: Callable[[nn.Module], Tensor], watched: bool) -> list[Tensor | None]:
    monitor = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if watched:
            monitor = Monitor(model, metrics=[Lipschitz()])
        for _ in range(3):
            call(model).backward()
            if monitor is not None:
                monitor.step()
    if monitor is not None:
        monitor.close()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_unnoticed(build: Callable[[], nn.Module], call: Callable[[nn.Module], Tensor]) -> None:
    plain, watched = (gradients(double(build), call, yes) for yes in (False, True))
    for mine, theirs in zip(watched, plain, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or same_bits(mine, theirs)


# ---- the user's tensor


def test_in_place_work_on_the_input_arrives_in_the_users_memory() -> None:
    model = double(lambda: Graph(lambda m, x: m.rest(x.mul_(2)), rest=mlp(5, 7, 1)))
    x = data(4, 5)
    given, version = x.clone(), 0
    with Monitor(model, metrics=[Lipschitz()]):
        version = given._version
        model(given).sum().backward()
    assert torch.equal(given, 2 * x)
    assert given._version > version
    assert not given.requires_grad


def test_a_generator_before_the_model_keeps_its_gradient() -> None:
    noise, expected = data(4, 3), []
    for watched in (False, True):
        generator, model = double(lambda: mlp(3, 6, 5)), double(normalized)
        monitor = Monitor(model, metrics=[Lipschitz(lambda_every=1)]) if watched else None
        for _ in range(2):
            model(generator(noise)).square().sum().backward()
        expected.append([p.grad.clone() for p in (*generator.parameters(), *model.parameters())])
        if monitor is not None:
            monitor.step()
            (values,) = monitor.compute()["lipschitz"].local_lipschitz.values()
            found = values["mean"].value
            monitor.close()
    assert all(same_bits(a, b) for a, b in zip(*expected, strict=True))
    points = double(lambda: mlp(3, 6, 5))(noise).detach()
    assert found == pytest.approx(float(constants(double(normalized), points).mean()), rel=1e-11)


def test_an_input_that_requires_a_gradient_gets_it() -> None:
    model, x = double(normalized), data(4, 5).requires_grad_()
    model(x).sum().backward()
    expected = x.grad
    x.grad = None
    with Monitor(model, metrics=[Lipschitz()]):
        model(x).sum().backward()
    assert same_bits(x.grad, expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("build", [normalized, lambda: mlp(5, 7, 1)], ids=["gradient", "product"])
def test_any_layout_of_the_input(build: Callable[[], nn.Module], layout: str) -> None:
    x = {"transposed": data(5, 4).T, "sliced": data(8, 10)[::2, ::2], "expanded": data(1, 5).expand(4, 5)}[layout]
    lambdas, _, warned = observed(double(build), lambda m: m(x).square().sum())
    assert relative_error(lambdas, constants(double(build), x)) <= 1e-11
    assert not warned


def test_attributes_on_the_input_tensor_are_there_for_the_model() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        return m.rest(x * x.weight_of_mine)

    x = data(4, 5)
    x.weight_of_mine = 3.0
    model = double(lambda: Graph(rule, rest=mlp(5, 7, 1)))
    with Monitor(model, metrics=[Lipschitz()]):
        model(x).sum().backward()


# ---- models that cannot be differentiated by their input


def test_numpy_inside_turns_lambda_off_and_nothing_else() -> None:
    build = lambda: Graph(lambda m, x: m.rest(x - float(x.numpy().mean())), rest=mlp(5, 7, 1))  # noqa: E731
    x = data(4, 5)
    _, result, warned = observed(double(build), lambda m: m(x).sum())
    assert "Can't call numpy() on Tensor that requires grad" in off(result)
    assert [("turned local_lipschitz off" in message) for message in warned] == [True]
    assert result.normalized_gradient_norm["model"].mean.count == 8
    assert_unnoticed(build, lambda m: m(x).sum())


def test_a_reentrant_checkpoint_turns_lambda_off_and_leaves_its_layer_without_gradient() -> None:
    build = lambda: Graph(  # noqa: E731
        lambda m, x: m.rest(checkpoint(m.first, x, use_reentrant=True)), first=nn.Linear(5, 4), rest=mlp(4, 7, 1)
    )
    x = data(4, 5)
    _, result, _ = observed(double(build), lambda m: m(x).sum())
    assert "use_reentrant=False" in off(result)
    assert_unnoticed(build, lambda m: m(x).sum())


def test_a_part_without_gradient_turns_lambda_off_and_names_the_way_out() -> None:
    def rule(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = m.backbone(x).relu()
        return m.head(m.hidden(features).tanh())

    build = lambda: Graph(rule, backbone=nn.Linear(5, 6), hidden=nn.Linear(6, 7), head=nn.Linear(7, 1))  # noqa: E731
    x = data(4, 5)
    _, result, _ = observed(double(build), lambda m: m(x).sum())
    assert "input='<module>'" in off(result)
    model = double(build)
    expected = constants(nn.Sequential(model.hidden, nn.Tanh(), model.head), model.backbone(x).relu().detach())
    lambdas, _, warned = observed(double(build), lambda m: m(x).sum(), input="hidden")
    assert relative_error(lambdas, expected) <= 1e-11
    assert not warned


class Stateful(nn.Module):
    """Carries numbers, lists and tensors from pass to pass, and none of them is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.rest, self.calls, self.memory, self.average = mlp(5, 7, 1), 0, [], torch.zeros(5)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.average.lerp_(x.detach().mean(0), 0.1)
        self.memory.append(x.detach().mean())
        self.hidden = x.detach() if self.hidden is None else self.hidden + x.detach()
        return self.rest(x * self.calls + self.average + self.hidden * len(self.memory))


def test_a_model_with_a_state_of_its_own_does_not_notice() -> None:
    x = data(4, 5).float()
    found = []
    for watched in (False, True):
        model = seeded(Stateful)
        found.append([*gradients(model, lambda m: m(x).sum(), watched), model.average, torch.stack(model.memory)])
        assert (model.calls, len(model.memory)) == (3, 3)
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_random_numbers_are_the_same_with_and_without() -> None:
    build = lambda: nn.Sequential(Normalize(), nn.Dropout(0.4), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))  # noqa: E731
    x = data(4, 5)
    assert_unnoticed(build, lambda m: (torch.manual_seed(len(m)), m(x).sum())[1])


# ---- several inputs, packed inputs


@dataclass
class Batch:
    image: Tensor
    when: Tensor


def conditional() -> Graph:
    return Graph(lambda m, x, t=None: m.rest(2 * x * t.cos()[:, None]), rest=mlp(5, 7, 1, activation=nn.Tanh))


def packed(kind: str) -> Graph:
    def rule(m: Any, batch: Any) -> Tensor:
        x, t = (batch["image"], batch["when"]) if kind == "dict" else (batch.image, batch.when)
        if kind == "dict":
            batch["note"] = x.detach().sum()
        return m.rest(2 * x * t.cos()[:, None])

    return Graph(rule, rest=mlp(5, 7, 1, activation=nn.Tanh))


X, T = data(4, 5), data(4, 1)[:, 0]


def by_x() -> Tensor:
    model = double(conditional)
    return torch.stack([constants(lambda_x(model, T[i : i + 1]), X[i : i + 1])[0] for i in range(4)])


def lambda_x(model: nn.Module, t: Tensor) -> nn.Module:
    return Graph(lambda m, x: m.inner(x, t), inner=model)


def by_t() -> Tensor:
    model = double(conditional)
    parts = [Graph(lambda m, t, i=i: m.inner(X[i : i + 1], t), inner=model) for i in range(4)]
    return torch.stack([constants(part, T[i : i + 1])[0] for i, part in enumerate(parts)])


PACKED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], Any, Callable[[], Tensor]]] = {
    "the first by default": (conditional, lambda m: m(X, T), None, by_x),
    "a keyword": (conditional, lambda m: m(X, t=T), "t", by_t),
    "a function": (conditional, lambda m: m(X, T), lambda arguments, keywords: arguments[1], by_t),
    "an entry of a dict": (lambda: packed("dict"), lambda m: m({"image": X, "when": T}), "image", by_x),
    "another entry": (lambda: packed("dict"), lambda m: m({"image": X, "when": T}), "when", by_t),
    "a field of a dataclass": (lambda: packed("dataclass"), lambda m: m(Batch(X, T)), "image", by_x),
    "a function of a dataclass": (lambda: packed("dataclass"), lambda m: m(Batch(X, T)), lambda a, k: a[0].when, by_t),
}


@pytest.mark.parametrize("name", PACKED)
def test_which_input_is_meant(name: str) -> None:
    build, call, choice, expected = PACKED[name]
    lambdas, _, warned = observed(double(build), lambda m: call(m).square().sum(), input=choice)
    assert relative_error(lambdas, expected()) <= 1e-11
    assert not warned
    assert_unnoticed(build, lambda m: call(m).square().sum())


def test_a_dict_goes_back_to_the_user_as_the_model_left_it() -> None:
    model, batch = double(lambda: packed("dict")), {"image": X, "when": T}
    with Monitor(model, metrics=[Lipschitz(input="image")]):
        model(batch).sum().backward()
    assert batch["image"] is X
    assert set(batch) == {"image", "when", "note"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (None, "called with 2 floating tensors; name the one to differentiate by"),
        ("picture", "neither a module nor an argument 'picture'"),
        (lambda a, k: a[0]["image"] * 1, "must return one of the tensors"),
    ],
    ids=["several", "unknown", "not_one_of_them"],
)
def test_inputs_that_cannot_be_told_are_named(choice: Any, message: str) -> None:
    call = lambda m: m({"image": X, "when": T}).sum()  # noqa: E731
    _, result, warned = observed(double(lambda: packed("dict")), call, input=choice)
    assert message in off(result)
    assert len(warned) == 1


# ---- integers


def test_behind_an_embedding_it_is_the_constant_at_its_output() -> None:
    model = double(lambda: nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), mlp(12, 7, 1, activation=nn.Tanh)))
    x = torch.tensor([[1, 2, 3], [4, 4, 4], [0, 10, 0]])
    expected = constants(model[1:], model[0](x).detach())
    lambdas, result, warned = observed(model, lambda m: m(x).square().sum())
    assert relative_error(lambdas, expected) <= 1e-11
    (values,) = result.local_lipschitz.values()
    assert values["mean"].valid
    assert values["mean"].label == "exact"
    assert "at the output of Embedding '0'" in values["mean"].note
    assert not warned


def test_one_norm_of_an_embedding_is_r_and_lambda_without_a_copy() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 1))
    with Lipschitz(model) as lipschitz:
        for x in torch.tensor([[[1, 2, 3], [4, 4, 4]], [[0, 10, 0], [5, 1, 5]]]):
            model(x).square().sum().backward()
            assert lipschitz._record is not None
            numerators = lipschitz._record[0]
            assert numerators.shape == (3, 2)
            assert numerators.untyped_storage().nbytes() == 2 * 8
            values = lipschitz.per_sample
            assert same_bits(values.normalized_gradient_norm, values.local_lipschitz)
            lipschitz.update()


def test_integers_without_an_embedding_turn_lambda_off() -> None:
    model = double(lambda: nn.Sequential(nn.EmbeddingBag(11, 4), mlp(4, 7, 1)))
    _, result, _ = observed(model, lambda m: m(torch.tensor([[1, 2, 3], [4, 4, 4]])).sum())
    assert "holds integers" in off(result)


# ---- outputs


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


def packing(kind: str) -> Graph:
    def rule(m: Any, x: Tensor) -> Any:
        hidden = m.first(2 * x).tanh()
        logits = m.head(hidden)
        if kind == "dict":
            return {"logits": logits, "hidden": hidden}
        return Output(logits, hidden) if kind == "dataclass" else (logits, hidden)

    return Graph(rule, first=nn.Linear(5, 4), head=nn.Linear(4, 1))


def logits_of(out: Any) -> Tensor:
    return out["logits"] if isinstance(out, dict) else out.logits if isinstance(out, Output) else out[0]


@pytest.mark.parametrize(
    ("kind", "choice", "place"),
    [("dict", "logits", "logits"), ("dataclass", "logits", "logits"), ("tuple", lambda out: out[0], "model")],
    ids=["dict", "dataclass", "function"],
)
def test_which_output_is_meant(kind: str, choice: Any, place: str) -> None:
    build = lambda: packing(kind)  # noqa: E731
    lambdas, result, warned = observed(double(build), lambda m: logits_of(m(X)).square().sum(), output=choice)
    assert relative_error(lambdas, constants(double(build), X, logits_of)) <= 1e-11
    assert list(result.local_lipschitz) == [place]
    assert not warned


def test_a_key_that_is_not_there_is_named_with_those_that_are() -> None:
    with (
        pytest.warns(RuntimeWarning, match="stopped recording"),
        pytest.raises(ValueError, match=r"output: there is no 'logit' in .* 'logits', 'hidden'"),
        Monitor(double(lambda: packing("dict")), metrics=[Lipschitz(output="logit")]) as monitor,
    ):
        monitor.model(X)["logits"].sum().backward()


def test_a_loss_that_reaches_the_input_past_the_output_turns_lambda_off_while_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CostShare, "is_due", True)  # every window is checked
    model = double(lambda: packing("dict"))
    metric = Lipschitz(output="logits", lambda_every=1)
    expected = constants(double(lambda: packing("dict")), X, logits_of)
    with Monitor(model, metrics=[metric], window_steps=1) as monitor, pytest.warns(UserWarning, match="past logits"):
        for penalty in (0.0, 1.0, 1.0, 0.0, 0.0):
            out = model(X)
            (out["logits"].square().sum() + penalty * out["hidden"].square().sum()).backward()
            monitor.step()
    windows = [window["lipschitz"].local_lipschitz["logits"].mean for window in monitor.history]
    assert [window.valid for window in windows] == [True, False, False, True, True]
    assert windows[4].value == pytest.approx(float(expected.mean()), rel=1e-11)


def test_samples_that_mix_are_labelled_and_said() -> None:
    build = lambda: Graph(lambda m, x: m.rest(2 * x - x.mean(0)), rest=mlp(5, 7, 1))  # noqa: E731
    _, result, warned = observed(double(build), lambda m: m(X).square().sum())
    (values,) = result.local_lipschitz.values()
    assert values["mean"].label == "heuristic"
    assert "mixes samples" in values["mean"].note
    assert ["monitor.probe" in message for message in warned] == [True]


# ---- loops


def test_batches_of_one_and_accumulation_and_evaluation_in_between() -> None:
    model, expected = double(normalized), constants(double(normalized), X)
    metric = Lipschitz(lambda_every=1)
    with Monitor(model, metrics=[metric]) as monitor:
        for i in range(4):
            model(X[i : i + 1]).sum().backward()
            model.eval()
            with torch.no_grad():
                model(X)
            with torch.inference_mode():
                model(X)
            model(X)  # in grad mode, and never differentiated
            model.train()
        monitor.step()
        (values,) = monitor.compute()["lipschitz"].local_lipschitz.values()
    assert values["mean"].count == 4
    assert values["mean"].value == pytest.approx(float(expected.mean()), rel=1e-11)
    assert values["max"].value == pytest.approx(float(expected.max()), rel=1e-11)


@pytest.mark.parametrize("build", [normalized, lambda: mlp(5, 7, 1)], ids=["gradient", "product"])
def test_autocast_is_right_to_its_own_precision(build: Callable[[], nn.Module]) -> None:
    model, x = seeded(build), data(6, 5).float()
    expected = constants(seeded(build), x)

    def call(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float().square().sum()

    lambdas, _, warned = observed(model, call)
    assert relative_error(lambdas, expected) <= 0.1
    assert not warned


@pytest.mark.parametrize(
    "wrap", [Wrapper, lambda m: nn.DataParallel(m, device_ids=[])], ids=["wrapper", "data_parallel"]
)
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for build in (normalized, lambda: mlp(5, 7, 1), lambda: before(nn.LayerNorm(5))):
        lambdas, _, warned = observed(wrap(double(build)), lambda m: m(X).square().sum())
        assert relative_error(lambdas, constants(double(build), X)) <= 1e-11
        assert not warned


@pytest.mark.parametrize("build", [normalized, lambda: mlp(5, 7, 1)], ids=["gradient", "product"])
def test_beside_per_sample_norms_each_has_its_numbers(build: Callable[[], nn.Module]) -> None:
    found = []
    for metrics in ([Lipschitz(lambda_every=1)], []):
        norms = PerSampleGradNorms(loss_reduction="sum")
        model = double(build)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Monitor(model, metrics=[*metrics, norms]) as monitor:
                for _ in range(3):
                    model(X).square().sum().backward()
                    monitor.step()
                window = monitor.compute()
        found.append(window["per_sample_grad_norm"].to_dict())
        if metrics:
            (values,) = window["lipschitz"].local_lipschitz.values()
            assert values["mean"].value == pytest.approx(float(constants(double(build), X).mean()), rel=1e-11)
    assert found[0] == found[1]


def test_a_layer_inside_the_model_by_name() -> None:
    build = lambda: Graph(lambda m, x: m.rest(m.lstm(x)), lstm=Recurrent(nn.LSTM), rest=mlp(1, 7, 1))  # noqa: E731
    x = data(4, 3, 3)
    model = double(build)
    expected = constants(model.rest, model.lstm(x).detach())
    lambdas, result, _ = observed(double(build), lambda m: m(x).square().sum(), input="rest.0")
    assert relative_error(lambdas, expected) <= 1e-11
    assert result.details["first_layer"] == "rest.0"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_whose_input_is_differentiated_now_and_then(backend: str, fresh_dynamo: Any) -> None:
    inner = double(normalized)
    expected = constants(double(normalized), X)
    model = torch.compile(inner, fullgraph=True, backend=backend)
    with (
        pytest.warns(UserWarning, match="normalized_gradient_norm off: the first layer of a compiled model"),
        Monitor(model, metrics=[Lipschitz(lambda_every=2)]) as monitor,
    ):
        for _ in range(6):
            model(X).square().sum().backward()
            monitor.step()
        (values,) = monitor.compute()["lipschitz"].local_lipschitz.values()
    assert values["mean"].count == 12
    assert values["mean"].value == pytest.approx(float(expected.mean()), rel=1e-11)
    assert sum(fresh_dynamo["graph_break"].values()) == 0
    assert fresh_dynamo["stats"]["unique_graphs"] <= 2  # with the gradient at the input, and without


def test_a_compiled_model_with_its_first_layer_on_the_input_takes_the_product(fresh_dynamo: Any) -> None:
    inner = double(lambda: mlp(5, 7, 1))
    model = torch.compile(inner, fullgraph=True, backend="aot_eager")
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        for _ in range(3):
            model(X).square().sum().backward()
            monitor.step()
        (values,) = monitor.compute()["lipschitz"].local_lipschitz.values()
    assert values["mean"].count == 12
    assert values["mean"].value == pytest.approx(float(constants(inner, X).mean()), rel=1e-11)
    assert fresh_dynamo["stats"]["unique_graphs"] == 1
