"""Which layer and which output the numbers are of, and what is refused by name."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Graph, batches, mlp, observe, reference, relative_error, seeded, train, two_headed, with_batchnorm
from torch import Tensor, nn
from windows import window_of

from lipcore import Lipschitz, Monitor, local_lipschitz

# ---- BatchNorm


def test_batchnorm_in_train_mode_warns_once_and_labels_heuristic() -> None:
    model = seeded(with_batchnorm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, optimizer, metrics=[Lipschitz()], window_steps=2) as monitor:
            train(model, batches(6, 4), optimizer)
    assert [str(w.message).startswith("BatchNorm in train mode") for w in caught] == [True]
    for window in monitor.history:
        result = window["lipschitz"]
        for quantity in ("normalized_gradient_norm", "local_lipschitz", "sandwich", "steadiness"):
            for value in result[quantity]["model:Linear"].values():
                assert value.label == "heuristic"
                assert "BatchNorm" in value.note or not value.valid


def test_batchnorm_in_eval_mode_is_exact_again_in_the_next_window() -> None:
    model = seeded(with_batchnorm)
    with Monitor(model, metrics=[Lipschitz()]) as monitor, pytest.warns(UserWarning, match="mixes samples"):
        model(torch.randn(4, 5)).sum().backward()
        monitor.step()
        assert monitor.close_window()["lipschitz"].normalized_gradient_norm["model:Linear"].mean.label == "heuristic"
        model.eval()
        model(torch.randn(4, 5)).sum().backward()
        monitor.step()
        assert monitor.close_window()["lipschitz"].normalized_gradient_norm["model:Linear"].mean.label == "exact"


def test_batchnorm_without_running_statistics_mixes_samples_in_eval_mode_too() -> None:
    model = seeded(lambda: with_batchnorm(track_running_stats=False)).eval()
    with Monitor(model, metrics=[Lipschitz()]) as monitor, pytest.warns(UserWarning, match="mixes samples"):
        model(torch.randn(4, 5)).sum().backward()
        monitor.step()
        assert monitor.close_window()["lipschitz"].normalized_gradient_norm["model:Linear"].mean.label == "heuristic"
    with pytest.raises(ValueError, match="mixes samples"):
        local_lipschitz(model, torch.randn(4, 5))


# ---- outputs with several values


def test_vector_output_is_refused_with_its_shape_and_the_choices() -> None:
    model = seeded(lambda: mlp(5, 7, 3))
    with (
        pytest.warns(RuntimeWarning, match="stopped recording"),
        pytest.raises(ValueError, match=r"shape \[4, 3\].*output='<module>'.*quantity='residual'"),
        Monitor(model, metrics=[Lipschitz(quantity="scalar")]),
    ):
        model(torch.randn(4, 5)).sum().backward()


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "sum"])
def test_residual_is_a_one_sided_bound(loss: str) -> None:
    model = seeded(lambda: mlp(5, 4, 8, 3, activation=nn.Tanh), dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    labels, targets = torch.randint(0, 3, (6,)), torch.randn(6, 3, dtype=torch.float64)
    functions = {
        "cross_entropy": lambda z: nn.functional.cross_entropy(z, labels),
        "mse": lambda z: nn.functional.mse_loss(z, targets),
        "sum": lambda z: z.sum(),
    }
    spectral = [float(torch.linalg.svdvals(torch.func.jacrev(model)(row).detach())[0]) for row in x]
    z = model(x).detach().requires_grad_()
    (upstream,) = torch.autograd.grad(functions[loss](z), z)
    exact = [
        float((torch.func.jacrev(model)(row).detach().T @ g).norm() / g.norm())
        for row, g in zip(x, upstream, strict=True)
    ]
    metric = Lipschitz(quantity="residual")
    with Monitor(model, metrics=[metric]) as monitor:
        functions[loss](model(x)).backward()
        q = metric.per_sample.local_lipschitz
        monitor.step()
        result = monitor.compute()["lipschitz"]
    assert all(float(value) <= bound * (1 + 1e-12) for value, bound in zip(q, spectral, strict=True))
    assert q.tolist() == pytest.approx(exact, rel=1e-11)
    assert result.details["quantity"] == "residual"
    for quantity in ("normalized_gradient_norm", "local_lipschitz", "steadiness"):
        assert all(value.label == "one-sided" for value in result[quantity]["model:Linear"].values())
    assert "sandwich" not in result


def test_residual_of_a_scalar_output_is_the_scalar_quantity() -> None:
    model = seeded(lambda: mlp(5, 7, 1), dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    for found, expected in zip(observe(model, x, quantity="residual"), reference(model, x), strict=True):
        assert relative_error(found, expected) <= 1e-12


# ---- which layer, which output


def test_named_output_and_named_input() -> None:
    model = seeded(two_headed, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    both = lambda out: out["value"].square().sum() + 0.0 * out["policy"].sum()  # noqa: E731
    expected = reference(model, x, first="stem", head="value")
    for found, wanted in zip(observe(model, x, both, output="value"), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12
    stem = copy.deepcopy(model.stem)
    rest = Graph(
        lambda m, h: m.value(m.body(h).relu()), body=copy.deepcopy(model.body), value=copy.deepcopy(model.value)
    )
    expected = reference(rest, stem(x).detach(), first="body")
    for found, wanted in zip(observe(model, x, both, input="body", output="value"), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12


def test_the_output_stands_in_the_keys_because_it_changes_the_answer() -> None:
    model = seeded(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1), nn.Sigmoid()), dtype=torch.float64
    )
    x = torch.randn(4, 5, dtype=torch.float64)
    probabilities = window_of(model, x)
    logits = window_of(model, x, output="2")
    assert list(probabilities.normalized_gradient_norm) == ["model:Sigmoid"]
    assert list(logits.normalized_gradient_norm) == ["2:Linear"]
    p = model(x).detach().reshape(-1)
    r_logit, _ = reference(model, x, head="2")
    mean = probabilities.normalized_gradient_norm["model:Sigmoid"].mean.value
    assert mean == pytest.approx(float((r_logit * p * (1 - p)).mean()), rel=1e-12)
    assert logits.normalized_gradient_norm["2:Linear"].mean.value == pytest.approx(float(r_logit.mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("build", "place"),
    [
        (lambda: Graph(lambda m, x: m.b(m.a(x)), a=nn.Linear(5, 7), b=nn.Linear(7, 1)), "model"),
        (lambda: Graph(lambda m, x: m.b(m.a(x)).sigmoid(), a=nn.Linear(5, 7), b=nn.Linear(7, 1)), "model:Sigmoid"),
        (lambda: Graph(lambda m, x: m.a(x).squeeze(1), a=nn.Linear(5, 1)), "model"),
    ],
    ids=["custom", "functional_sigmoid", "squeezed"],
)
def test_places_of_custom_models(build: Callable[[], nn.Module], place: str) -> None:
    assert list(window_of(seeded(build), torch.randn(4, 5)).normalized_gradient_norm) == [place]


def test_the_first_layer_is_the_one_that_runs_first() -> None:
    def build() -> nn.Module:
        return Graph(
            lambda m, x: m.last(m.middle(m.early(x)).relu()),
            last=nn.Linear(7, 1),
            unused=nn.Linear(5, 5),
            middle=nn.Linear(6, 7),
            early=nn.Linear(5, 6),
        )

    model = seeded(build, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = reference(model, x, first="early")
    for found, wanted in zip(observe(model, x), expected, strict=True):
        assert relative_error(found, wanted) <= 1e-12
    assert window_of(model, x).details["first_layer"] == "early"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input": "1"}, "input: module '1' is a ReLU; the first layer must be a Linear"),
        ({"input": "o"}, r"input: the model has no module named 'o'.*'0'"),
        ({"output": "head"}, r"output: the model has no module named 'head'.*'0', '1', '2'"),
        ({"input": "nope.2"}, r"input: the model has no module named 'nope\.2'; did you mean '2'\?"),
    ],
    ids=["wrong_kind", "unknown_input", "unknown_output", "did_you_mean"],
)
def test_wrong_names_are_refused_at_once(settings: dict[str, str], message: str) -> None:
    model = seeded(lambda: mlp(5, 7, 1))
    with pytest.raises(ValueError, match=message):
        Monitor(model, metrics=[Lipschitz(**settings)])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(module._forward_hooks for module in model)


def test_a_name_that_is_neither_a_module_nor_an_output_is_answered_with_those_that_are() -> None:
    model = seeded(two_headed)
    with (
        pytest.warns(RuntimeWarning, match="stopped recording"),
        pytest.raises(ValueError, match=r"output: there is no 'valeu' in what the model returns, .* 'value', 'policy'"),
        Monitor(model, metrics=[Lipschitz(output="valeu")]),
    ):
        model(torch.randn(4, 5))["value"].sum().backward()


def test_quantity_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="quantity: expected 'auto', 'scalar' or 'residual', got 'jacobian'"):
        Lipschitz(quantity="jacobian")


REFUSED_AT_THE_FIRST_PASS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, dict[str, Any]]] = {
    "returns_a_dict": (
        two_headed,
        (4, 5),
        r"output: model returns a dict, not a tensor.*of 'value', 'policy'.*output='<module>'",
        {},
    ),
    "returns_a_tuple": (
        lambda: Graph(lambda m, x: (m.a(x), x), a=nn.Linear(5, 1)),
        (4, 5),
        r"output: model returns a tuple, not a tensor",
        {},
    ),
    "flattened_batch": (
        lambda: Graph(lambda m, x: m.b(m.a(x.flatten(0, 1)).reshape(4, -1)), a=nn.Linear(5, 2), b=nn.Linear(6, 1)),
        (4, 3, 5),
        r"input: first layer 'a' has 12 rows, model has 4; .*first dimension",
        {"input": "a"},
    ),
    "batch_not_first": (
        lambda: Graph(lambda m, x: m.b(m.a(x).mean(0)), a=nn.Linear(5, 2), b=nn.Linear(2, 1)),
        (3, 4, 5),
        r"input: first layer 'a' has 3 rows, model has 4",
        {},
    ),
    "called_twice": (
        lambda: Graph(lambda m, x: m.b(m.a(m.a(x))), a=nn.Linear(5, 5), b=nn.Linear(5, 1)),
        (4, 5),
        r"module 'a' is called twice in one forward pass",
        {"input": "a"},
    ),
    "tokens_out": (
        lambda: Graph(lambda m, x: m.a(x), a=nn.Linear(5, 1)),
        (4, 3, 5),
        r"output: model has shape \[4, 3, 1\]",
        {"quantity": "scalar"},
    ),
}


@pytest.mark.parametrize("name", REFUSED_AT_THE_FIRST_PASS)
def test_what_cannot_be_measured_is_refused_by_name(name: str) -> None:
    build, shape, message, settings = REFUSED_AT_THE_FIRST_PASS[name]
    model = seeded(build)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        out = model(torch.linspace(-1, 1, math.prod(shape)).reshape(shape))
        total = (
            out if isinstance(out, Tensor) else sum(t.sum() for t in (out.values() if isinstance(out, dict) else out))
        )
        total.sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters()}

    undisturbed = run()
    with pytest.warns(RuntimeWarning, match="stopped recording"), pytest.raises(ValueError, match=message):
        with Monitor(model, metrics=[Lipschitz(**settings)]):
            watched = run()
    assert all(torch.equal(undisturbed[key], watched[key]) for key in undisturbed)


@pytest.mark.parametrize("name", ["flattened_batch", "called_twice"])
def test_without_r_there_is_lambda(name: str) -> None:
    build, shape, message, _ = REFUSED_AT_THE_FIRST_PASS[name]
    model, metric = seeded(build, dtype=torch.float64), Lipschitz(lambda_every=1)
    x = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)
    expected = local_lipschitz(model, x)
    with pytest.warns(
        UserWarning, match=f"normalized_gradient_norm off: .*{message.removeprefix('input: ')}"
    ) as caught:
        with Monitor(model, metrics=[metric]) as monitor:
            for _ in range(2):
                model(x).sum().backward()
                monitor.step()
            result = monitor.compute()["lipschitz"]
    assert len(caught) == 1
    assert relative_error(metric.per_sample.local_lipschitz, expected) <= 1e-12
    assert result.local_lipschitz["model"].mean.count == 8
    assert not result.normalized_gradient_norm["model"].mean.valid
    assert "normalized_gradient_norm" in repr(result)
    assert (result.skipped["model"].sum.value, result.skipped["model"].sum.count) == (0, 8)


def test_a_squeezed_output_of_a_last_batch_of_one_is_still_one_value_per_sample() -> None:
    model = seeded(lambda: Graph(lambda m, x: m.b(m.a(x).relu()).squeeze(), a=nn.Linear(5, 7), b=nn.Linear(7, 1)))
    with Monitor(model, metrics=[Lipschitz()]) as monitor:
        for size in (4, 1):
            model(torch.randn(size, 5)).sum().backward()
            monitor.step()
        assert monitor.compute()["lipschitz"].normalized_gradient_norm["model"].mean.count == 5


# ---- what the notes and the plan say


def notes_of(model: nn.Module, x: Tensor, **settings: Any) -> set[str]:
    with warnings.catch_warnings(), Monitor(model, metrics=[Lipschitz(lambda_every=1, **settings)]) as monitor:
        warnings.simplefilter("ignore")
        model(x).square().sum().backward()
        monitor.step()
        result = monitor.compute()["lipschitz"]
    quantities = ("normalized_gradient_norm", "local_lipschitz", "steadiness")
    return {value.note for quantity in quantities for place in result[quantity].values() for value in place.values()}


BOUND = "at most the spectral norm of the Jacobian"


def test_a_number_of_several_outputs_says_what_it_is() -> None:
    assert notes_of(mlp(5, 7, 3), torch.randn(4, 5)) == {f"residual: {BOUND}"}
    assert notes_of(mlp(5, 7, 1), torch.randn(4, 5)) == {""}


def test_a_number_of_a_sequence_says_that_it_is_of_all_its_positions() -> None:
    whole = "one number per sample, over all positions and values of its output"
    assert notes_of(mlp(5, 7, 3), torch.randn(4, 6, 5)) == {f"residual: {whole}; {BOUND}"}


def test_a_heuristic_number_of_several_outputs_says_both() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    said = f"BatchNorm in train mode mixes samples; residual: {BOUND} where nothing mixes"
    assert notes_of(model, torch.randn(4, 5)) == {said}


@pytest.mark.parametrize(
    ("width", "settings", "said"),
    [
        (16, {}, "lambda every micro-batch"),
        (600, {}, "lambda every 32 micro-batches, since it takes 1,440,000 multiplications"),
        (600, {"lambda_every": 3}, "lambda every 3 micro-batches"),
    ],
)
def test_the_plan_says_how_often_lambda_is_taken_once_sizes_are_known(
    width: int, settings: dict[str, Any], said: str
) -> None:
    model = mlp(width, width, 1)
    with Monitor(model, metrics=[Lipschitz(**settings)]) as monitor:
        first = monitor.metrics["lipschitz"].plan()[0].rule
        assert settings or "or every 32nd if the first one shows that it takes over 1,048,576" in first
        model(torch.randn(4, width)).square().sum().backward()
        monitor.step()
        assert monitor.metrics["lipschitz"].plan()[0].rule == f"'0' (Linear), {said}"
