"""TensorStats against the specification, on what a loop sees: steps, micro-batches, checkpoints, compiled models,
scalers, windows, states."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp, seeded
from states import opened
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lipcore
from lipcore import Monitor, PerSampleGradNorms, TensorStats, reference
from lipcore.metric import MetricResult

STATISTICS = ("mean", "sd", "min", "max", "kurtosis", "zeros", "nonfinite")


def truth_of(tensors: list[Tensor]) -> dict[str, float]:
    row = reference.tensor_stats([torch.cat([tensor.detach().double().flatten() for tensor in tensors])])[0][0]
    n, mean, m2, _, m4, low, high, zeros, nonfinite = row.tolist()
    kurtosis = n * m4 / m2**2 if m2 else math.nan
    numbers = (mean, math.sqrt(m2 / n), low, high, kurtosis, zeros / (n + nonfinite), nonfinite)
    return dict(zip(STATISTICS, numbers, strict=True)) | {"count": n}


def assert_place(result: MetricResult, quantity: str, place: str, tensors: list[Tensor]) -> None:
    truth, found = truth_of(tensors), result[quantity][place]
    for name in STATISTICS:
        assert found[name].value == pytest.approx(truth[name], rel=1e-9, abs=1e-15, nan_ok=True), (place, name)
    assert found["mean"].count == truth["count"]


class Loop:
    """A model in training, with what a metric has to say of each step."""

    def __init__(self, model: nn.Module, metric: TensorStats, **settings: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.monitor = Monitor(model, self.optimizer, metrics=[metric], **{"window_steps": None} | settings)
        self.seen: dict[tuple[str, str], list[Tensor]] = {}

    def note(self, quantity: str, place: str, tensor: Tensor) -> None:
        self.seen.setdefault((quantity, place), []).append(tensor.detach().clone())

    def step(self, noted: bool = True, batches: int = 1) -> None:
        handles = []
        if noted:
            for name, module in self.model.named_modules():
                hook = lambda m, a, out, name=name: self.note("output", name or "(model)", out)  # noqa: E731
                handles.append(module.register_forward_hook(hook))
        self.optimizer.zero_grad()
        outputs = [self.model(torch.randn(7, 5)) for _ in range(batches)]
        for handle in handles:
            handle.remove()
        for output in outputs:
            output.square().mean().backward()
        if noted:
            for name, parameter in self.model.named_parameters():
                self.note("gradient", name, parameter.grad)
        self.optimizer.step()
        if noted:
            for name, parameter in self.model.named_parameters():
                self.note("parameter", name, parameter)

    def check(self, result: MetricResult, quantities: tuple[str, ...] = ("parameter", "gradient", "output")) -> None:
        for quantity in quantities:
            places = {place for kind, place in self.seen if kind == quantity}
            assert places
            for place in places - {"total"}:
                assert_place(result, quantity, place, self.seen[quantity, place])
            everything = [t for (kind, _), tensors in self.seen.items() if kind == quantity for t in tensors]
            if quantity != "output":
                assert_place(result, quantity, "total", everything)


def make() -> nn.Module:
    return seeded(lambda: nn.ModuleDict({"inside": mlp(5, 9, 3)})["inside"])


class Net(nn.Module):
    """With a layer that is used twice, and one in a checkpoint."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x)).relu()
        x = checkpoint(self.twice, x, use_reentrant=self.reentrant)
        return self.last(x)


# ---- what is measured


@pytest.mark.parametrize("kind", [make, Net, lambda: Net(reentrant=True)], ids=["chain", "checkpoint", "reentrant"])
def test_every_number_of_every_place(kind: Callable[[], nn.Module]) -> None:
    """What a checkpoint runs again does not come twice, what a shared layer returns does."""
    loop = Loop(seeded(kind), TensorStats(every_steps=2, outputs=["*"]))
    for step in range(4):
        loop.step(noted=step % 2 == 1)
    result = loop.monitor.compute()["tensor_stats"]
    loop.check(result)
    assert result.details["sampled_steps"] == result.details["forward_passes"] == 2
    group = [
        t
        for (kind, place), ts in loop.seen.items()
        if kind == "parameter" and place[:6] in ("first.", "0.weig", "0.bias")
        for t in ts
    ]
    assert_place(result, "parameter", "first" if "first" in result.parameter else "0", group)


def test_of_several_backward_passes_the_last_gradient_counts() -> None:
    loop = Loop(make(), TensorStats(every_steps=1))
    loop.step(batches=3)
    result = loop.monitor.compute()["tensor_stats"]
    loop.check(result, ("gradient", "parameter"))
    assert result.output["0"].mean.count == 3 * 7 * 9


def test_windows_slide_and_start_anew() -> None:
    loop = Loop(make(), TensorStats(every_steps=1), window_steps=2, window_blocks=2)
    for _ in range(3):
        loop.step()
    for key in loop.seen:
        loop.seen[key] = loop.seen[key][-2:]
    assert len(loop.monitor.history) == 3
    loop.check(loop.monitor.history[-1]["tensor_stats"])
    loop = Loop(make(), TensorStats(every_steps=1), window_steps=1)
    for _ in range(2):
        loop.seen.clear()
        loop.step()
    loop.check(loop.monitor.history[-1]["tensor_stats"])


def test_a_window_without_a_sampled_step_has_no_numbers() -> None:
    loop = Loop(make(), TensorStats(every_steps=3), window_steps=2)
    for _ in range(2):
        loop.step()
    window = loop.monitor.pop_window()
    assert not window["tensor_stats"]
    assert window["tensor_stats"].details["sampled_steps"] == 0
    assert not window.flat()


def test_quantiles_and_histogram() -> None:
    model = nn.Linear(100, 100, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(100, 100) * 10.0 ** torch.randint(-3, 3, (100, 100)))
        model.weight[0] = 0.0
    stats = TensorStats(model, every_steps=1)
    stats.update()
    found = stats.compute().parameter["weight"]
    size = model.weight.detach().abs().flatten().double()
    for name, q in (("abs_p50", 0.5), ("abs_p99", 0.99)):
        assert found[name].value == pytest.approx(size.sort().values[round(q * 9999)].item(), rel=1 / 16)
    histogram = stats.histogram("parameter", "weight")
    edges = torch.tensor(histogram["edges"])
    assert sum(histogram["counts"]) == 10_000
    assert histogram["counts"][0] == 100
    counts = torch.histogram(size[size > 0].float(), edges[1:].float()).hist
    assert counts.tolist() == histogram["counts"][1:]
    assert stats.histogram("output", "(model)") == {"edges": [], "counts": []}
    with pytest.raises(KeyError, match="parameter has no place 'bias'; it has 'weight'"):
        stats.histogram("parameter", "bias")
    stats.close()


def test_what_is_not_finite_and_what_does_not_vary() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias[0] = math.nan
    with TensorStats(model, every_steps=1) as stats:
        model(torch.full((4, 3), math.inf)).sum().backward()
        stats.update()
    result = stats.compute()
    assert result.parameter["weight"].kurtosis.note == "all elements are the same"
    assert not result.parameter["weight"].kurtosis.valid
    assert result.parameter["weight"].sd.value == 0
    assert result.parameter["bias"].nonfinite.value == 1
    assert result.output["(model)"].nonfinite.value == 8
    assert math.isnan(result.output["(model)"].mean.value)
    assert result.output["(model)"].mean.note == "no element is finite"


def test_names_and_patterns() -> None:
    def places(**wishes: Any) -> dict[str, list[str]]:
        loop = Loop(make(), TensorStats(every_steps=1, **wishes))
        loop.step()
        result = loop.monitor.compute()["tensor_stats"]
        return {q: [p for p in result[q] if result[q].level(p) != "total"] for q in result}

    assert places(outputs="0", gradients=False, parameters="*.weight") == {
        "parameter": ["0.weight", "2.weight", "0", "2"],
        "output": ["0"],
    }
    assert places(exclude=["0*", "1"], parameters=False) == {
        "gradient": ["2.weight", "2.bias", "2"],
        "output": ["(model)", "2"],
    }
    assert places(parameters="0.weight", gradients=False, outputs=False, groups=lambda name: "all")["parameter"] == [
        "0.weight",
        "all",
    ]
    for argument in ("parameters", "gradients", "outputs"):
        with pytest.raises(ValueError, match=f"{argument}: nothing in the model is called 'none.*'"):
            places(**{argument: "none.*"})


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"outputs": 3}, "outputs: expected True, False, a pattern of names or a list of them, got 3"),
        ({"parameters": [1]}, r"parameters: expected True, False, a pattern"),
        ({"exclude": True}, "exclude: expected a pattern of names"),
        ({"every_steps": 0}, "every_steps: expected an integer >= 1"),
        ({"groups": 3}, "groups: expected a callable or a dict"),
    ],
)
def test_what_is_refused(wishes: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        TensorStats(**wishes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model = make().to(dtype)
    seen: list[Tensor] = []
    with TensorStats(model, every_steps=1) as stats:
        handle = model[0].register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
            model(torch.randn(7, 5, dtype=dtype)).float().square().sum().backward()
        stats.update()
        handle.remove()
    assert_place(stats.compute(), "output", "0", seen)
    assert_place(stats.compute(), "parameter", "0.weight", [model[0].weight])


def test_several_tensors_and_none() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.count = nn.LSTM(5, 3, batch_first=True), nn.Flatten()

        def forward(self, x: Tensor) -> dict[str, Any]:
            out, state = self.rnn(x)
            self.count(torch.ones(2, 2, dtype=torch.int64))
            return {"loss": out.sum(), "logits": out, "state": state, "none": None}

    model, seen = Several(), []
    with TensorStats(model, every_steps=1) as stats:
        out = model(torch.randn(2, 4, 5))
        seen.append(out["logits"])
        out["loss"].backward()
        stats.update()
    assert_place(stats.compute(), "output", "(model)", seen)
    assert_place(stats.compute(), "output", "rnn", seen)
    assert "count" not in stats.compute().output
    assert list(stats.compute().details["not_read"]) == ["output count"]


def test_a_tensor_that_kernels_cannot_read_is_named() -> None:
    """The others are measured."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tanh = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.tanh)(x)

    model = nn.Sequential(nn.Linear(5, 5), Odd())
    model[0].complex = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model[0].sparse = nn.Embedding(4, 2, sparse=True)
    with TensorStats(model, every_steps=1) as stats:
        (model(torch.randn(3, 5)).sum() + model[0].sparse(torch.tensor([1])).sum()).backward()
        stats.update()
    result = stats.compute()
    assert list(result.details["not_read"]) == ["output 1.tanh", "parameter 0.complex"]
    assert list(result.output) == ["(model)", "0", "1", "total"]
    assert result.gradient["0.sparse.weight"].zeros.value == 0.75


# ---- passes that are not the training's, and loops


def test_other_passes_leave_nothing() -> None:
    loop = Loop(make(), TensorStats(every_steps=1))
    with torch.no_grad():
        loop.model(torch.randn(50, 5))
    torch.func.functional_call(loop.model, dict(loop.model.named_parameters()), torch.randn(3, 5)).detach()
    loop.monitor.rebind()
    loop.step()
    result = loop.monitor.compute()["tensor_stats"]
    loop.check(result)
    assert not loop.model[0]._forward_hooks


def test_a_forward_pass_that_raises() -> None:
    loop = Loop(make(), TensorStats(every_steps=1))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            loop.model(torch.randn(3, 4))
    assert not loop.model[0]._forward_hooks
    loop.step()
    loop.check(loop.monitor.compute()["tensor_stats"], ("parameter", "gradient"))


def test_a_pass_that_is_interrupted_and_passes_of_other_threads() -> None:
    """Of neither do hooks stay; another thread's pass is not this one's."""
    loop = Loop(make(), TensorStats(every_steps=1, outputs=["0"]))

    def interrupt(module: nn.Module, arguments: Any) -> None:
        raise KeyboardInterrupt

    handle = loop.model[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.model(torch.randn(3, 5))
    handle.remove()
    loop.monitor.rebind()
    assert not loop.model[0]._forward_hooks

    def beside(module: nn.Module, arguments: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=loop.model, args=(torch.randn(50, 5),))
            thread.start()
            thread.join()

    handle = loop.model[0].register_forward_pre_hook(beside)
    loop.step()
    handle.remove()
    loop.seen["output", "0"] = [tensor for tensor in loop.seen["output", "0"] if len(tensor) == 7]
    assert_place(loop.monitor.compute()["tensor_stats"], "output", "0", loop.seen["output", "0"])


@pytest.mark.parametrize("skip", [False, True])
def test_a_scaler(skip: bool) -> None:
    """Its scale is taken out of gradients, and a step that it skips does not count."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    monitor = Monitor(model, optimizer, metrics=[TensorStats(every_steps=1)], window_steps=None, scaler=scaler)
    x = torch.randn(7, 5)
    if skip:
        scaler.scale(model(x * math.inf).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    exact = model[0].weight.grad.clone() / scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    result = monitor.compute()["tensor_stats"]
    assert_place(result, "gradient", "0.weight", [exact])
    assert result.output["total"].nonfinite.value == 0
    assert result.details.get("skipped_steps", 0) == int(skip)


@pytest.mark.ci
def test_a_compiled_model_and_a_compiled_part(fresh_dynamo: Any) -> None:
    """What no hook sees is named; parameters and gradients are measured, and no graph breaks."""
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(compiled, optimizer, metrics=[TensorStats(every_steps=1)], window_steps=None) as monitor:
        out = compiled(torch.randn(7, 5))
        out.sum().backward()
        optimizer.step()
        assert "outputs     not seen: '0', '1', '2': is inside a compiled module" in repr(monitor.plan())
        result = monitor.compute()["tensor_stats"]
    assert_place(result, "output", "(model)", [out])
    assert_place(result, "parameter", "2.bias", [model[2].bias])
    assert list(result.details["outputs_unseen"]) == ["0", "1", "2"]
    mixed = nn.Sequential(nn.Linear(5, 5), torch.compile(nn.Sequential(nn.Linear(5, 5)), backend="eager"))
    with TensorStats(mixed, every_steps=1, outputs=["*"]) as stats:
        out = mixed(torch.randn(3, 5))
        out.sum().backward()
        stats.update()
    assert_place(stats.compute(), "output", "1", [out])
    assert list(stats.compute().details["outputs_unseen"]) == ["1.0"]


@pytest.mark.parametrize("every_steps", [1, 2])
def test_training_stays_bit_for_bit_the_same(every_steps: int) -> None:
    def trained(metric: bool) -> list[Tensor]:
        model = seeded(Net)
        optimizer = torch.optim.Adam(model.parameters())
        names = list(vars(model))
        metrics = [TensorStats(every_steps=every_steps, logits=True)] if metric else []
        with Monitor(model, optimizer, metrics=metrics) as monitor:
            torch.manual_seed(1)
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(7, 5)).square().mean().backward()
                optimizer.step()
            monitor.compute()
        assert list(vars(model)) == names
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, trained(True), trained(False)))


def test_a_loop_whose_passes_are_not_seen_is_told() -> None:
    loop = Loop(make(), TensorStats(every_steps=1))
    nn.Sequential(*loop.model)(torch.randn(3, 5)).sum().backward()
    loop.optimizer.step()
    result = loop.monitor.compute()["tensor_stats"]
    assert "no forward pass came" in result.details["output_off"]
    assert "parameter" in result
    with Monitor({"a": nn.Linear(2, 2)}, metrics=[TensorStats()]) as monitor:
        assert "has no forward pass of its own" in repr(monitor.plan())


# ---- states and copies


def test_a_state_goes_on_bit_for_bit() -> None:
    one = Loop(make(), TensorStats(every_steps=2))
    for _ in range(3):
        one.step()
    state = one.monitor.state_dict()
    other = Loop(make(), TensorStats(every_steps=2))
    other.model.load_state_dict(one.model.state_dict())
    other.monitor.load_state_dict(copy.deepcopy(state))
    for loop in (one, other):
        torch.manual_seed(3)
        loop.step()
    assert one.monitor.compute()["tensor_stats"].to_dict() == other.monitor.compute()["tensor_stats"].to_dict()
    metric = TensorStats(every_steps=3)
    Monitor(make(), metrics=[metric])
    with pytest.raises(ValueError, match="every_steps: the state has 2, this metric has 3"):
        metric.load_state_dict(opened(state)["metrics"]["tensor_stats"])


def test_merging_is_observing_everything() -> None:
    loops = [Loop(make(), TensorStats(every_steps=1)) for _ in range(2)]
    for seed, loop in enumerate(loops):
        torch.manual_seed(seed)
        loop.step()
    first, second = (loop.monitor.metrics["tensor_stats"] for loop in loops)
    first.merge(second)
    for key, tensors in loops[1].seen.items():
        loops[0].seen[key] += tensors
    loops[0].check(first.compute())


def test_a_copy_holds_numbers() -> None:
    loop = Loop(make(), TensorStats(every_steps=1))
    loop.step()
    metric = loop.monitor.metrics["tensor_stats"]
    for copied in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert copied.compute().to_dict() == metric.compute().to_dict()
        assert "holds numbers" in repr(copied.plan())
        with pytest.raises(RuntimeError, match="is a copy"):
            copied.reset()
    assert copy.deepcopy(TensorStats(every_steps=3)).every_steps == 3


def test_it_is_recorded(tmp_path: Any) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lipcore.watch(model, optimizer, metrics=[TensorStats(every_steps=1)], run=tmp_path / "a", window_steps=1) as m:
        for _ in range(2):
            model(torch.randn(7, 5)).sum().backward()
            optimizer.step()
        expected = [window["tensor_stats"].output["0"].kurtosis.value for window in m.history]
    with lipcore.open_run(tmp_path / "a") as run:
        assert [w["tensor_stats"].output["0"].kurtosis.value for w in run.windows] == expected


# ---- on a device


@pytest.mark.gpu
def test_on_a_device() -> None:
    """The CPU's numbers, and no step waits for the device."""

    def trained(device: str) -> MetricResult:
        model = make().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wishes = {"attention": None, "logits": True, "router": {"2": 1}}
        with Monitor(model, optimizer, metrics=[TensorStats(every_steps=2, **wishes)], window_steps=None) as monitor:
            generator = torch.Generator().manual_seed(0)
            inputs = [torch.randn(7, 5, generator=generator).to(device) for _ in range(4)]
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            for x in inputs:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            return monitor.compute()["tensor_stats"]

    there, here = trained("cuda"), trained("cpu")
    assert list(there) == list(here)
    for quantity in here:
        for place in here[quantity]:
            for reducer, value in here[quantity][place].items():
                found = there[quantity][place][reducer]
                assert found.value == pytest.approx(value.value, rel=1e-4, abs=1e-6, nan_ok=True), (
                    quantity,
                    place,
                    reducer,
                )
                assert found.count == value.count


@pytest.mark.parametrize("first", [True, False])
def test_the_model_runs_again_for_another_metric_within_its_pass(first: bool) -> None:
    """A proof of per-sample norms, whose passes are no part of the training's."""
    model = seeded(lambda: mlp(5, 7, 3))
    stats, norms = TensorStats(every_steps=1), PerSampleGradNorms(loss_reduction="sum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, [stats, norms] if first else [norms, stats], window_steps=None):
        seen: dict[str, list[Tensor]] = {}
        for _ in range(2):
            output = model(torch.randn(4, 5))
            seen.setdefault("(model)", []).append(output)
            output.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not norms.unproved
        assert_place(stats.compute(), "output", "(model)", seen["(model)"])
        assert stats.compute().output["0"]["mean"].count == 2 * 4 * 7
