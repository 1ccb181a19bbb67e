"""Code that is legal without lipcore stays so: what torch lets change in place between the passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from few import spread
from models import Graph
from per_sample_models import made
from per_sample_oracle import check
from rule_cases import CASES
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lipcore import PerSampleGradNorms, layers
from lipcore.layers import Batch, Rule

_SIZE = 4
MODES = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


def first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def changed(value: Tensor) -> None:
    with torch.no_grad():  # indices and masks to what they are
        value.add_(1) if value.is_floating_point() else value.copy_(value.clone())


def rule_of(module: nn.Module) -> Rule:
    rule = layers.rule_for(module)
    assert rule is not None
    return rule


class Trial:
    """One layer as a model, and what may be changed: its arguments, buffers and parameters."""

    def __init__(self, name: str, mode: str, needs_x: bool) -> None:
        dtype, self.autocast = MODES[mode]
        case = CASES[name]
        self.batch_dim = case.batch_dim
        torch.manual_seed(0)
        layer = case.make()
        self.model = Graph(lambda m, *a, **k: first(m.layer(*a, **k)), layer=layer).to(dtype)

        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype).requires_grad_(needs_x) if floating else value

        self.arguments = [cast(value) for value in case.inputs(_SIZE)]
        self.keywords = {key: cast(value) for key, value in case.keywords(_SIZE).items()}
        named = {str(i): value for i, value in enumerate(self.arguments)} | self.keywords
        named |= dict(self.model.named_buffers()) | dict(self.model.named_parameters())
        self.values = {key: value for key, value in named.items() if isinstance(value, Tensor)}

    def backward(self, change: str | None) -> bool:
        """Whether torch, which is to find no fault with the change, has found none."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.model(*self.arguments, **self.keywords).float().square().sum()
        if change is not None:
            changed(self.values[change])
        try:
            loss.backward()
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            return False
        return True

    def norms(self, change: str | None) -> Tensor:
        with PerSampleGradNorms(self.model, loss_reduction="sum", batch_dim=self.batch_dim, prove=False) as metric:
            assert self.backward(change), f"{change} may be changed"
            return metric.per_sample


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", spread([name for name in CASES if name != "layer_norm_plain"], 2))
def test_what_torch_does_not_keep_may_change(name: str, mode: str) -> None:
    for needs_x in (False, True):
        expected = Trial(name, mode, needs_x).norms(None)
        for change in Trial(name, mode, needs_x).values:
            if Trial(name, mode, needs_x).backward(change):
                assert torch.equal(Trial(name, mode, needs_x).norms(change), expected)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm", "bilinear", "linear", "conv2d", "prelu"])
def test_copies_under_the_autocast_of_another_device(name: str) -> None:
    """Fake tensors stand for it, which have no graph: there it runs normalising layers in float32."""
    case, dtypes = CASES[name], (torch.bfloat16, torch.float32)
    enabled = torch.is_autocast_enabled("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        with FakeTensorMode(), torch.no_grad():
            module = case.make()
            for dtype in dtypes:
                inputs = [torch.empty(x.shape, dtype=dtype, device="cuda") for x in case.inputs(_SIZE)]
                saved, _ = rule_of(module).save(module, tuple(inputs), {}, Batch(_SIZE))
                lower = torch.get_autocast_dtype("cuda") if name in ("linear", "conv2d", "prelu") else torch.float32
                for x, kept in zip(inputs, saved, strict=True):
                    assert (kept is x) == (dtype == lower)
    finally:
        torch.set_autocast_enabled("cuda", enabled)


def residuals(m: Any, x: Tensor) -> Tensor:
    x = m.first(x)
    x += m.circular(x)
    h = m.norm(x.flatten(2).transpose(1, 2)).float()
    h += m.attention(h, h, h, need_weights=False)[0]
    h += m.linear(h)
    return h


def test_residuals_that_are_added_in_place_under_autocast_and_compiled() -> None:
    model = made(
        lambda: Graph(
            residuals,
            first=nn.Conv2d(1, 4, 1),
            circular=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            norm=nn.LayerNorm(4),
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
            linear=nn.Linear(4, 4),
        )
    )
    x, found = torch.randn(3, 1, 4, 4), []
    for called in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        with PerSampleGradNorms(called, loss_reduction="sum") as metric:
            with torch.autocast("cpu", torch.bfloat16):
                y = called(x)
            y.square().sum().backward()
            found.append(metric.per_sample)
    gradient = torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum()
    assert torch.allclose(found[1], found[0], rtol=2e-2)
    assert 0 < gradient.sqrt() < found[0].sum()


class OwnLinear(nn.Linear):
    """A layer of the user's own, with the rule of Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("act", ["residual", "activation"])
def test_an_output_of_a_layer_of_ones_own_that_is_changed_in_place(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lipcore.layers import registry

    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    layers.register(OwnLinear, layers.registered()[nn.Linear])

    def rule(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.b(m.a(x))
        out = out.add_(x) if act == "residual" else out.relu_()
        y: Tensor = m.c(out)
        return y

    model = made(lambda: Graph(rule, a=nn.Linear(4, 4), b=OwnLinear(4, 4), c=nn.Linear(4, 2)))
    metric = check(model, (torch.randn(5, 4),))
    assert metric.plan()[2].rule.startswith("OwnLinear: weight, bias")
