"""What errors about names, bounds and rules say to somebody who has only the documentation."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipcore
from lipcore import PerSampleGradDots, PerSampleGradNorms


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh())


def _measured(model: nn.Module, x: Tensor, **arguments: object) -> PerSampleGradNorms:
    with PerSampleGradNorms(model, loss_reduction="sum", **arguments) as metric:
        model(x).square().sum().backward()
    return metric


def test_a_tied_modules_second_name_is_told_its_first() -> None:
    metric = _measured(Tied(), torch.randint(7, (3, 5)))
    with pytest.raises(KeyError, match="no layer 'head' was measured; it is tied, and is found as 'table'"):
        metric.per_layer["head"]
    with pytest.raises(KeyError, match=r"no parameter 'head.weight' .* is found as 'table.weight'"):
        metric.per_parameter["head.weight"]


def test_an_unknown_name_is_told_how_many_there_are_and_the_closest_first() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    metric = _measured(model, torch.randn(2, 3))
    with pytest.raises(KeyError, match=r"there are 8 of 12: '11', '1'"):
        metric.per_layer["111"]
    with pytest.raises(KeyError, match=r"there are 8 of 24: '11\.bias'"):
        metric.per_parameter["11.bia"]
    few = _measured(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3))
    with pytest.raises(KeyError, match=r"there are '0'\""):
        few.per_layer["fc"]


@pytest.mark.parametrize("bound", ["max_replay_bytes", "max_replay_flops"])
def test_bounds_may_be_whole_floats(bound: str) -> None:
    for kind in (lambda **given: PerSampleGradNorms(loss_reduction="sum", **given), _dots):
        kind(**{bound: 1e6})
        for wrong in (1.5, float("inf"), float("nan"), -1.0, True, "1e6"):
            with pytest.raises(ValueError, match=f"{bound}: expected an integer >= 0"):
                kind(**{bound: wrong})


def _dots(**given: object) -> PerSampleGradDots:
    return PerSampleGradDots(reference={"0.weight": torch.zeros(1)}, loss_reduction="sum", **given)


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:lipcore stopped recording")
@pytest.mark.parametrize(
    ("returned", "seen"),
    [
        (((1.5,), None), "float among the tensors"),
        ((1.5, None), "float in the place of the tensors"),
        (1.5, "has returned float;"),
        ((1, 2, 3), "has returned tuple of 3;"),
    ],
)
def test_a_rule_whose_save_returns_no_tensors_is_named(returned: object, seen: str) -> None:
    class Wrong(type(lipcore.layers.registered()[nn.Linear])):  # type: ignore[misc]
        def save(self, *_: object) -> object:
            return returned

    class Layer(Own):
        pass

    lipcore.layers.register(Layer, Wrong())
    model = nn.Sequential(Layer(3, 2))
    with (
        pytest.raises(TypeError, match=f"'0'.*save\\(\\) of its rule Wrong .*{seen}"),
        PerSampleGradNorms(model, loss_reduction="sum"),
    ):
        model(torch.randn(4, 3)).sum().backward()


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(3))])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.parts[0]


def test_a_list_of_parameters_is_told_what_works() -> None:
    with pytest.raises(ValueError, match="is in a ParameterList, which is never called") as caught:
        PerSampleGradNorms(Listed(), loss_reduction="sum", max_replay_bytes=0)
    assert "max_replay_bytes= above 0 measures them" in str(caught.value)
    assert torch.equal(
        _measured(Listed(), torch.ones(2, 3)).per_sample, torch.full((2,), 12.0, dtype=torch.float64).sqrt()
    )


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)

    def forward(self, x: Tensor, n_items: int | None = None) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("terms", ["n_itms", lambda _, keywords: keywords.get("n_itms")], ids=["name", "function"])
def test_terms_that_the_call_does_not_have_are_told_once(terms: object) -> None:
    model = Counting()
    with (
        pytest.warns(UserWarning, match=r"loss_terms.*the keywords of that call were 'n_items'") as told,
        PerSampleGradNorms(model, loss_reduction="mean", loss_terms=terms) as metric,
    ):
        for _ in range(3):
            model(torch.randn(4, 3), n_items=4).sum().backward()
    assert len(told) == 1
    assert "the keywords of that call were 'n_items'" in metric.broken


def test_a_function_of_the_keywords_that_asks_for_another_is_told_which_there_are() -> None:
    model = Counting()
    with (
        pytest.warns(RuntimeWarning, match="stopped recording"),
        pytest.raises(ValueError, match="asks for 'n_itms'; the keywords of that call were 'n_items'"),
        PerSampleGradNorms(model, loss_reduction="mean", loss_terms=lambda _, keywords: keywords["n_itms"]) as metric,
    ):
        model(torch.randn(4, 3), n_items=4).sum().backward()
        _ = metric.per_sample


class Routed(nn.Module):
    """A mixture of experts whose router and experts see batch and sequence in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        flat = h.reshape(-1, 6)
        weight, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(flat[rows]) * weight[rows, None])
        return self.last(h + out.reshape(h.shape))


def test_skip_leaves_out_the_flattened_layers_where_the_graph_may_not_serve() -> None:
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(3, 5, 4)
    whole = _measured(model, x)
    left = _measured(model, x, max_replay_bytes=0, on_unsupported="skip")
    assert torch.equal(left.per_parameter["last.weight"], whole.per_parameter["last.weight"])
    assert torch.equal(left.per_layer["first"], whole.per_layer["first"])
    assert not bool(left.per_sample.isnan().any())
    assert "not covered  router.weight: module 'router' (Linear): expected 3 samples" in str(left.coverage())
    assert "measured     4 of 10 trainable parameters" in str(left.coverage())


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.positions = nn.Linear(4, 6), nn.Parameter(torch.randn(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.positions[: x.shape[1]]


def test_a_table_of_positions_is_summed_without_operations_in_replays() -> None:
    metric = _measured(Table(), torch.randn(3, 5, 4), max_replay_flops=0)
    assert "positions  graph: sums over rows at Add; by no rule" in str(metric.plan())


def test_the_models_own_parameters_have_a_place_beside_a_child_called_model() -> None:
    metric = _measured(Table(), torch.randn(3, 5, 4))
    assert torch.equal(metric.per_layer["(root)"], metric.per_parameter["positions"])
    squares = metric.per_parameter["model.weight"] ** 2 + metric.per_parameter["model.bias"] ** 2
    assert torch.allclose(metric.per_layer["model"], squares.sqrt())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.shift = nn.Linear(4, 6), nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale + self.shift


def test_a_refusal_says_each_reason_once() -> None:
    with pytest.raises(
        ValueError, match=r"2 trainable parameters .*'scale': there is no rule for Two \(so too 'shift'\)"
    ):
        PerSampleGradNorms(Two(), loss_reduction="sum", max_replay_bytes=0)


def test_a_wrong_dimension_of_the_batch_is_said_once_with_the_names() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Flatten(0, 1), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with PerSampleGradNorms(model, loss_reduction="sum", max_replay_bytes=0, on_unsupported="skip") as metric:
        model(torch.randn(7, 2, 4)).sum().backward()
        assert "[14, 5]" in metric.coverage().uncovered["4.weight"]
        with pytest.raises(ValueError, match=r"\(so too '2.bias', '4.weight', '4.bias'\)") as told:
            metric.coverage().check()
        assert str(told.value).count("pass batch_dim= where the batch is not first") == 1


LEFT_OUT = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("kind", ["norms", "dots"])
def test_what_shows_names_the_layers_that_are_measured(kind: str) -> None:
    model = copy.deepcopy(LEFT_OUT)
    options: Any = {"loss_reduction": "sum", "on_unsupported": "skip"}
    if kind == "dots":
        gradient = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        options["reference"] = [gradient, gradient]
    metric: Any = (PerSampleGradNorms if kind == "norms" else PerSampleGradDots)(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.randn(8, 4)).square().sum().backward()
    shown, planned = [line.split() for line in repr(metric).splitlines()], [line.what for line in metric.plan()]
    assert {line[0] for line in shown} >= {"3", "5", "total_of_measured"}
    assert "0" not in {line[0] for line in shown}
    assert "2 layers" in repr(metric)
    assert {"3", "5", "0.weight"} <= set(planned)
    assert "0" not in planned
    metric.close()


@pytest.mark.parametrize("skip", [False, True])
def test_a_later_pass_that_takes_more_than_the_bound_raises_nothing_in_training(skip: bool) -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) @ self.weight.exp()

    torch.manual_seed(0)
    model = Long()
    metric = PerSampleGradNorms(
        model, loss_reduction="sum", max_replay_flops=20_000, on_unsupported="skip" if skip else "error"
    )
    model(torch.randn(3, 5, 4)).square().sum().backward()
    assert not bool(metric.per_sample.isnan().any())
    assert "FLOPs in replays of the first pass" in str(metric.plan())
    longer = torch.randn(3, 50, 4)
    if skip:
        model(longer).square().sum().backward()
        assert "more than max_replay_flops=20,000" in str(metric.coverage())
        assert not bool(metric.per_layer["body"].isnan().any())
    else:
        with pytest.warns(RuntimeWarning, match=r"stopped recording: .*'weight'.*max_replay_flops=20,000"):
            model(longer).square().sum().backward()
        with pytest.raises(ValueError, match=r"'weight'.*max_replay_flops=20,000"):
            _ = metric.per_sample
    metric.close()
