"""Updates from the optimizer's state against float64 twins: before every step the model, its gradients and the
optimizer's state are copied in float64, the copy makes the same step, and what it moved is the truth."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings

import pytest
import torch
from few import spread
from models import Graph, batches, mlp, mse, seeded
from oracle import DTYPES, same_bits
from torch import nn
from torch.optim import SGD, Adam, AdamW
from ways import assert_same_in_all_ways

from lipcore import Monitor, Trajectory
from lipcore.functional import reference
from lipcore.functional.update_rules import GIVEN
from lipcore.functional.update_sums import MOMENTUM, NORMALIZED, RATIO, SECOND_MOMENT
from lipcore.trajectory.closed_forms import supported
from lipcore.trajectory.sources import GivenSource, OptimizerSource, SnapshotSource

OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd_wd": (SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "sgd_maximize_wd": (SGD, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "momentum_wd_dampening": (SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "dampening": 0.3}),
    "momentum_maximize": (SGD, {"lr": 0.001, "momentum": 0.9, "maximize": True}),
    "nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "nesterov_wd": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "nesterov_maximize": (SGD, {"lr": 0.001, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "nesterov_maximize_wd": (
        SGD,
        {"lr": 0.001, "momentum": 0.9, "nesterov": True, "maximize": True, "weight_decay": 0.1},
    ),
    "sgd_tensors": (SGD, {"lr": torch.tensor(0.1), "weight_decay": 0.01, "momentum": 0.5}),
    "adam": (Adam, {"lr": 0.01}),
    "adam_l2": (Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    "adam_amsgrad": (Adam, {"lr": 0.01, "amsgrad": True}),
    "adam_maximize": (Adam, {"lr": 0.001, "maximize": True, "weight_decay": 0.1}),
    "adam_decoupled": (Adam, {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 1.0}),
    "adam_large_eps": (Adam, {"lr": 0.01, "eps": 0.1}),
    "adamw": (AdamW, {"lr": 0.01}),
    "adamw_wd": (AdamW, {"lr": 0.01, "weight_decay": 5.0}),
    "adamw_amsgrad_maximize": (AdamW, {"lr": 0.001, "amsgrad": True, "maximize": True, "weight_decay": 0.5}),
    "adamw_no_wd": (AdamW, {"lr": 0.01, "weight_decay": 0.0}),
    "adam_tensor_lr": (Adam, {"lr": torch.tensor(0.01)}),
    "adam_tensor_betas": (Adam, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}),
}
IMPLEMENTATIONS = {
    "default": {},
    "for_loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "differentiable": {"differentiable": True},
}
# What float32 arithmetic leaves; bfloat16 and float16 state has two to three digits itself.
TOLERANCE = {"f64": 1e-12, "f32": 1e-5, "bf16": 2e-2, "f16": 1e-2}


def build(optimizer, implementation, dtype="f32", model=None):
    """(model, optimizer) of the table."""
    kind, settings = OPTIMIZERS[optimizer]
    settings = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    model = model or seeded(lambda: mlp(5, 17, 3, 1, activation=nn.Tanh), dtype=DTYPES[dtype])
    return model, kind(model.parameters(), **settings, **IMPLEMENTATIONS[implementation])


def listed(model):
    """(name, owner, key) of every parameter, each tensor once."""
    found, seen = [], set()
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{prefix}.{key}" if prefix else key, module._parameters, key))
    return found


class Twin:
    """The same step in float64, from the state just before it."""

    def __init__(self, optimizer):
        originals = [p for group in optimizer.param_groups for p in group["params"]]
        copies = {id(p): p.detach().double().clone() for p in originals}
        self.before = {key: copy.clone() for key, copy in copies.items()}
        for p in originals:
            copies[id(p)].grad = None if p.grad is None else p.grad.detach().double().clone()
        groups = [{"params": [copies[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
        self.optimizer = type(optimizer)(groups, lr=0.1)
        self.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in self.optimizer.param_groups:
            if group["fused"]:  # whose arithmetic with scalars is float64
                group.update({k: float(group[k]) for k in ("lr", "weight_decay")})
                if "betas" in group:
                    group["betas"] = tuple(map(float, group["betas"]))
            group["foreach"] = group["fused"] = False
        self.copies = copies

    def step(self):
        with torch.no_grad():
            self.optimizer.step()
        return {key: copy - self.before[key] for key, copy in self.copies.items()}

    def mean_square(self, key, group):
        """Of w_prev (1 - lr wd) - w over lr: the normalised update."""
        decay = group["weight_decay"] if group.get("decoupled_weight_decay") else 0
        left = self.before[key] * (1 - float(group["lr"]) * decay)
        return float(((left - self.copies[key]) / float(group["lr"])).square().mean())


class Watch:
    """Compares every step of the optimizers with their twins, in the hooks in which the source is meant to be used."""

    def __init__(self, model, optimizer, tolerance, source=None):
        self.parts = listed(model)
        self.optimizer, self.tolerance = optimizer, tolerance
        self.source = source or OptimizerSource([optimizer], self.parts)
        self.steps = 0
        self.moved = []
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, *_):
        self.twin = Twin(self.optimizer)

    def after(self, *_):
        rows, squares = (t.clone() for t in self.source.sums())
        normalized = squares[NORMALIZED]
        truth = self.twin.step()
        places = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for i, (name, owner, key) in enumerate(self.parts):
            w, dw = owner[key].detach(), truth[id(owner[key])]
            assert rows[i, 4] == 0
            assert rows[i, 1] == 0
            norm, largest = float(rows[i, 0]) ** 0.5, float(rows[i, 2])
            where = f"step {self.steps}, {name}"
            group = places[id(owner[key])]
            # Decay may cancel what the moments add, and torch's fused kernels round those. Then what the parameter's
            # own rounding makes of the decay, and in float64 of the truth, which is a difference.
            decay = float(group["lr"]) * float(group["weight_decay"])
            weight = float(w.double().norm())
            slack = self.tolerance * (float(dw.norm()) + decay * weight)
            slack += torch.finfo(w.dtype).eps * weight * (2 if w.dtype == torch.float64 else 4 * decay)
            if w.dtype.itemsize == 2:  # single elements cancel; together they must be right
                slack = self.tolerance * sum(float(d.square().sum()) for d in truth.values()) ** 0.5
            assert abs(norm - float(dw.norm())) <= slack, where
            assert abs(largest - float(dw.abs().max())) <= slack, where
            assert float(rows[i, 3]) == pytest.approx(float(w.double().square().sum()), rel=1e-13)
            # What the parameter really did is that, rounded to its dtype.
            real = w.double() - self.twin.before[id(owner[key])]
            rounding = torch.finfo(w.dtype).eps * float(w.double().norm() + dw.norm())
            assert abs(norm - float(real.norm())) <= slack + 2 * rounding, where
            if type(self.optimizer) is SGD or not norm:
                assert normalized[i].isnan(), where
            elif w.dtype.itemsize > 2:
                expected = self.twin.mean_square(id(owner[key]), group)
                assert float(normalized[i]) == pytest.approx(expected, rel=max(4 * self.tolerance, 1e-6)), where
        self.moved.append(rows[:, 0].clone())
        self.steps += 1


def schedule(optimizer, step):
    """Another learning rate and weight decay for the next step: what counts is what the step was made with."""
    for group in optimizer.param_groups:
        factor = (0.7, 1.1, 1.4)[step % 3]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].mul_(factor)
        else:
            group["lr"] *= factor
        group["weight_decay"] *= (1.2, 0.9)[step % 2]


def train(model, optimizer, data, loss=mse):
    dtype = next(model.parameters()).dtype
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        loss(model(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()
        schedule(optimizer, step)


def possible(optimizer, implementation, dtype):
    if implementation == "differentiable":
        return False  # needs parameters that are no leaves: a test of its own
    if implementation == "foreach" and optimizer in ("adam_tensor_lr", "adam_tensor_betas"):
        return False  # torch refuses it without capturable
    if implementation == "for_loop" and dtype != "f32":
        return False  # the default on the CPU
    if dtype in ("bf16", "f16"):
        if implementation == "fused" and OPTIMIZERS[optimizer][0] is SGD:
            return False  # refused
        # torch's own Adam divides by 0 when the second moment or eps underflows in float16
        return not (dtype == "f16" and optimizer.startswith("adam"))
    return True


POSSIBLE = [case for case in itertools.product(OPTIMIZERS, IMPLEMENTATIONS, DTYPES) if possible(*case)]
CASES = spread([pytest.param(*case, id="-".join(case)) for case in POSSIBLE], 4)


@pytest.mark.parametrize(("optimizer", "implementation", "dtype"), CASES)
def test_every_step(optimizer, implementation, dtype):
    model, made = build(optimizer, implementation, dtype)
    watch = Watch(model, made, TOLERANCE[dtype])
    train(model, made, batches(20, 8))
    assert watch.steps == 20
    assert (torch.stack(watch.moved) > 0).all()


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if "tensor" not in name])
def test_differentiable(optimizer, dtype):
    """With parameters that carry no graph; bias corrections are float32 there."""
    kind, settings = OPTIMIZERS[optimizer]
    model = seeded(lambda: mlp(5, 17, 1), dtype=DTYPES[dtype]).requires_grad_(False)
    made = kind(model.parameters(), **settings, differentiable=True)
    watch = Watch(model, made, {"f32": 1e-5, "f64": 1e-6}[dtype])
    generator = torch.Generator().manual_seed(2)
    for step in range(20):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        made.step()
        schedule(made, step)
    assert watch.steps == 20


def test_the_bits_are_those_of_any_instruction_set_and_number_of_threads():
    def compute():
        sizes = (1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 129, 70_001, 300_003)
        generator = torch.Generator().manual_seed(0)
        model = nn.ParameterList(torch.randn(n, generator=generator) for n in sizes)
        results = []
        for kind, settings in ((AdamW, {}), (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1})):
            made = kind(model.parameters(), lr=0.01, **settings, fused=False)
            for p in model:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            # torch's own step must not differ: one thread and no fused operation
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            made.step()
            torch.set_num_threads(threads)
            results += [t.clone() for t in OptimizerSource([made], listed(model)).sums()]
        return results

    assert_same_in_all_ways(compute)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "implementation", [*(name for name in IMPLEMENTATIONS if name != "differentiable"), "capturable"]
)
@pytest.mark.parametrize("optimizer", ["sgd_wd", "nesterov", "nesterov_wd", "adamw_wd", "adam_amsgrad"])
def test_every_step_on_cuda(optimizer, implementation):
    """By the kernels, and the host waits for nothing."""
    kind, settings = OPTIMIZERS[optimizer]
    if implementation == "capturable" and kind is SGD:
        pytest.skip("SGD has no such setting")
    model = seeded(lambda: mlp(5, 17, 3, 1, activation=nn.Tanh)).cuda()
    made = kind(model.parameters(), **settings, **IMPLEMENTATIONS.get(implementation, {"capturable": True}))
    source = OptimizerSource([made], listed(model))
    waiting = source.sums

    def sums():
        torch.cuda.set_sync_debug_mode("error")
        try:
            return waiting()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    source.sums = sums
    Watch(model, made, 3e-5, source)
    train(model, made, [(x.cuda(), y.cuda()) for x, y in batches(20, 8)])


@pytest.mark.gpu
def test_a_skipped_step_that_only_the_device_knows_of() -> None:
    """A GradScaler tells two fused optimizers in a tensor; the parameters of the one that skips have not moved."""
    models = [seeded(lambda: mlp(5, 17, 1)).cuda() for _ in range(2)]
    made = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in models]
    for model, optimizer in zip(models, made, strict=True):
        train(model, optimizer, [(x.cuda(), y.cuda()) for x, y in batches(2, 8)])
    every = [(f"{i}.{name}", *where) for i, model in enumerate(models) for name, *where in listed(model)]
    source, count = OptimizerSource(made, every), len(listed(models[0]))
    expected = [tensor.cpu().clone() for tensor in source.sums()]
    for optimizer in made:
        optimizer.found_inf = torch.zeros((), device="cuda")
    for only in (None, made[0]):
        source.sums(only=only)  # which parameters that are is copied to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        made[0].found_inf.fill_(1.0)
        rows, squares = source.sums()
        both = rows.clone(), squares.clone()
        made[0].found_inf.zero_()
        rows, squares = source.sums(only=made[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same_bits(rows.cpu(), expected[0])
    assert same_bits(squares.cpu(), expected[1])
    assert not both[0][:count, [0, 2]].any()
    assert both[1][:, :count].isnan().all()
    assert same_bits(both[0].cpu()[:, [3, 4]], expected[0][:, [3, 4]])
    assert same_bits(both[0].cpu()[count:], expected[0][count:])
    assert same_bits(both[1].cpu()[count:], expected[1][count:])


# ---- parameters that are stepped now and then, or never


@pytest.mark.parametrize("implementation", ["for_loop", "foreach", "fused"])
@pytest.mark.parametrize("optimizer", ["sgd_wd", "adamw", "adam_amsgrad"])
def test_parameters_without_a_gradient_do_not_move(optimizer, implementation):
    """A frozen one, and one that the loss does not reach in every second step."""
    parts = {"a": nn.Linear(5, 4), "sometimes": nn.Linear(4, 4), "frozen": nn.Linear(4, 1)}
    use = [True]
    model = Graph(lambda m, x: m.frozen(m.sometimes(m.a(x)) if use[0] else m.a(x)), **parts)
    model.frozen.weight.requires_grad_(False)
    model, made = build(optimizer, implementation, model=model)
    watch = Watch(model, made, 1e-5)
    for step, (x, y) in enumerate(batches(20, 8)):
        use[0] = step % 2 == 1
        train(model, made, [(x, y)])
    names = [name for name, _, _ in watch.parts]
    moved = torch.stack(watch.moved)
    assert (moved[:, names.index("frozen.weight")] == 0).all()
    assert (moved[0::2, names.index("sometimes.weight")] == 0).all()
    assert (moved[1::2, names.index("sometimes.weight")] > 0).all()
    assert (moved[:, names.index("a.weight")] > 0).all()


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_tied_parameters_move_once(optimizer):
    model = Graph(lambda m, x: m.out(m.two(m.one(x))), one=nn.Linear(5, 5), two=nn.Linear(5, 5), out=nn.Linear(5, 1))
    model.two.weight = model.one.weight
    model, made = build(optimizer, "default", model=model)
    watch = Watch(model, made, 1e-5)
    assert len(watch.parts) == 5
    train(model, made, batches(20, 8))
    twice = [*watch.parts, ("two.weight", model.two._parameters, "weight")]
    with pytest.raises(ValueError, match=r"'one.weight' and 'two.weight' are one tensor"):
        OptimizerSource([made], twice)
    with pytest.raises(ValueError, match=r"'one.weight' and 'two.weight' are one tensor"):
        SnapshotSource(twice)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_groups_with_their_own_settings(optimizer):
    kind, settings = OPTIMIZERS[optimizer]
    model = seeded(lambda: mlp(5, 7, 1))
    first = {"params": model[0].parameters(), **settings, "lr": 0.3}
    made = kind([first, {"params": model[2].parameters()}], lr=0.001)
    Watch(model, made, 1e-5)
    train(model, made, batches(20, 8))


def test_channels_last_weights_and_a_gradient_in_another_layout():
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    made = SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    Watch(model, made, 1e-5)
    for _ in range(3):
        model.weight.grad, model.bias.grad = torch.randn(6, 4, 3, 3), torch.randn(12)[::2]
        made.step()


def test_mixed_dtypes_of_parameter_and_state():
    """float32 momentum of a parameter that was made bfloat16: torch steps it, with the buffer as it is."""
    model = nn.Linear(5, 7, bias=False)
    made = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.weight.grad = torch.randn(7, 5)
    made.step()
    model.bfloat16()
    model.weight.grad = torch.randn(7, 5).bfloat16()
    made.step()
    buffer = made.state[model.weight]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    rows, _ = OptimizerSource([made], listed(model)).sums()
    assert float(rows[0, 0]) == pytest.approx(0.01 * float(buffer.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("implementation", ["default", "fused"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_norms_of_what_the_optimizer_keeps(optimizer, implementation):
    """As torch's own state says them, and RMS_t by its definition; NaN where there is no such thing."""
    model, made = build(optimizer, implementation)
    source = OptimizerSource([made], listed(model), ratios=True)
    for x, y in batches(3, 8):
        made.zero_grad()
        mse(model(x), y).backward()
        gradients = [p.grad.double().clone() for p in model.parameters()]
        made.step()
        squares = source.sums()[1]
        group = made.param_groups[0]
        for i, (p, g) in enumerate(zip(model.parameters(), gradients, strict=True)):
            state = made.state[p]
            if type(made) is SGD:
                assert squares[[RATIO, SECOND_MOMENT], i].isnan().all()
                buffer = state.get("momentum_buffer")
                # Nesterov's foreach implementation leaves its sum with the buffer in .grad, and reads nothing else.
                if buffer is None or squares[MOMENTUM, i].isnan():
                    assert buffer is None or (group["nesterov"] and group["weight_decay"] == 0)
                    assert squares[MOMENTUM, i].isnan()
                else:
                    assert float(squares[MOMENTUM, i]) == pytest.approx(float(buffer.double().square().sum()), rel=1e-6)
                continue
            second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
            v = second / (1 - float(group["betas"][1]) ** float(state["step"]))
            expected = {
                MOMENTUM: state["exp_avg"].double().square().sum(),
                SECOND_MOMENT: second.square().sum(),
                RATIO: (g.square() / v.clamp(min=float(group["eps"]) ** 2)).mean(),
            }
            for row, truth in expected.items():
                assert float(squares[row, i]) == pytest.approx(float(truth), rel=2e-5)


def test_float64_state_of_a_float32_parameter_is_read_in_float64():
    w = torch.randn(100)
    made = Adam([w], lr=1e-3)
    w.grad = torch.randn(100)
    made.step()
    state = made.state[w]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].double(), state["exp_avg_sq"].double()
    rows, squares = OptimizerSource([made], [("w", {"w": w}, "w")]).sums()
    u = state["exp_avg"] / 0.1 / ((state["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8)
    assert float(squares[NORMALIZED, 0]) == pytest.approx(float(u.square().mean()), rel=1e-12)
    assert float(rows[0, 0]) == pytest.approx(1e-6 * float(u.square().sum()), rel=1e-12)


# ---- steps that go wrong, or are not made


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
def test_a_bad_gradient_concerns_its_tensor_alone(optimizer):
    model, made = build(optimizer, "default")
    source = OptimizerSource([made], listed(model))
    train(model, made, batches(3, 8))
    made.zero_grad()  # a copied parameter has no gradient
    twin = copy.deepcopy((model, made))
    for m in (model, twin[0]):
        mse(m(torch.ones(4, 5)), torch.ones(4, 1)).backward()
    model[2].weight.grad[0, 3] = torch.nan
    made.step()
    rows, squares = (t.clone() for t in source.sums())
    twin[1].step()
    good, _ = OptimizerSource([twin[1]], listed(twin[0])).sums()
    at = [name for name, _, _ in listed(model)].index("2.weight")
    assert rows[at, :4].isnan().all()
    assert rows[at, 4] == 1
    assert squares[:, at].isnan().all()
    others = [i for i in range(len(rows)) if i != at]
    assert same_bits(rows[others], good[others])


@pytest.mark.parametrize("implementation", ["for_loop", "foreach", "fused"])
@pytest.mark.parametrize("optimizer", ["sgd_wd", "momentum", "nesterov", "adamw", "adam_amsgrad"])
def test_steps_with_a_gradient_scaler(optimizer, implementation):
    """The fused implementation makes a step that changes nothing when a gradient overflowed, and tells no one but the
    optimizer's found_inf; the others are not called then."""
    model, made = build(optimizer, implementation)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    source = OptimizerSource([made], listed(model))
    seen = []

    def before(*_):
        seen.append([p.detach().double().clone() for p in model.parameters()])

    def after(*_):
        rows, _ = source.sums()
        moved = [float((p.detach().double() - q).norm()) for p, q in zip(model.parameters(), seen[-1], strict=True)]
        for norm, expected in zip(rows[:, 0].sqrt().tolist(), moved, strict=True):
            assert norm == pytest.approx(expected, rel=1e-4, abs=1e-7)
        seen[-1] = rows[:, 0].clone()

    made.register_step_pre_hook(before)
    made.register_step_post_hook(after)
    for step, (x, y) in enumerate(batches(20, 8)):
        made.zero_grad()
        scaler.scale(mse(model(x), y)).backward()
        if step in (1, 7, 8):
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(made)
        scaler.update()
    assert len(seen) == (20 if implementation == "fused" else 17)
    still = [i for i, moved in enumerate(seen) if (moved == 0).all()]
    assert still == ([1, 7, 8] if implementation == "fused" else [])


def test_a_scaler_that_skips_the_very_first_step():
    model, made = build("adamw", "fused")
    source = OptimizerSource([made], listed(model))
    rows = []
    made.register_step_post_hook(lambda *_: rows.append(source.sums()[0].clone()))
    made.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 5)).sum()).backward()
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(made)
    assert (rows[0][:, :3] == 0).all()
    assert (rows[0][:, 4] == 0).all()
    assert (source.sums()[0][:, 0] == 0).all()  # the state is there, its step count is 0


def test_before_the_first_step_nothing_has_moved():
    for optimizer in ("momentum", "adamw"):
        model, made = build(optimizer, "default")
        model(torch.ones(2, 5)).sum().backward()
        rows, _ = OptimizerSource([made], listed(model)).sums()
        assert (rows[:, [0, 2, 4]] == 0).all()
        assert (rows[:, 3] > 0).all()


# ---- changes in mid-run


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adamw"])
def test_load_state_dict_in_mid_run(optimizer, implementation):
    model, made = build(optimizer, implementation)
    watch = Watch(model, made, 1e-5)
    train(model, made, batches(5, 8))
    saved = copy.deepcopy((model.state_dict(), made.state_dict()))
    train(model, made, batches(5, 8, seed=2))
    model.load_state_dict(saved[0])
    made.load_state_dict(saved[1])
    train(model, made, batches(10, 8, seed=3))
    assert watch.steps == 20


def test_a_group_added_later_and_parameters_assigned_anew():
    model = seeded(lambda: mlp(5, 7, 1))
    made = AdamW(model.parameters(), lr=0.01)
    source = OptimizerSource(made, listed(model))
    train(model, made, batches(2, 8))
    extra = nn.Parameter(torch.zeros(3))
    made.add_param_group({"params": [extra]})
    source.sums()
    model[0].weight = nn.Parameter(torch.zeros(7, 5))
    with pytest.raises(ValueError, match=r"parameter '0.weight' of the model is not the optimizer's any more"):
        source.sums()
    model.load_state_dict(seeded(lambda: mlp(5, 7, 1)).state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"'0.weight'.* is not the optimizer's any more"):
        source.sums()
    model[0]._parameters["weight"] = None
    with pytest.raises(ValueError, match=r"'0.weight' was removed from its module"):
        source.sums()


def test_two_optimizers_each_in_its_own_hook():
    """At the first one's hook the second has not stepped yet: only= reads each when its state is that of its step."""
    model = seeded(lambda: mlp(5, 7, 1))
    one = SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    two = AdamW(model[2].parameters(), lr=0.01)
    source = OptimizerSource([one, two], listed(model))
    assert source.describe() == ["SGD, closed form"] * 2 + ["AdamW, closed form"] * 2
    for optimizer in (one, two):
        optimizer.register_step_post_hook(lambda optimizer, *_: source.sums(only=optimizer))
    for x, y in batches(20, 8):
        before = [p.detach().double().clone() for p in model.parameters()]
        for optimizer in (one, two):
            optimizer.zero_grad()
        mse(model(x), y).backward()
        one.step()
        two.step()
        model.zero_grad()  # the last call of only= has it all
        rows, _ = source.sums(only=SGD([torch.zeros(1)], lr=0.1))
        for row, p, q in zip(rows, model.parameters(), before, strict=True):
            assert float(row[0]) ** 0.5 == pytest.approx(float((p.detach().double() - q).norm()), rel=1e-4)


def test_nothing_is_kept_per_element():
    """After a step the source holds 80 bytes per tensor."""
    model = nn.Linear(500, 500)
    made = AdamW(model.parameters(), lr=0.01)
    source = OptimizerSource([made], listed(model))
    snapshots = SnapshotSource(listed(model))
    gc.collect()
    known = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    for _ in range(3):
        snapshots.before()
        model.zero_grad()
        model(torch.ones(2, 500)).sum().backward()
        made.step()
        source.sums()
        snapshots.sums()
    gc.collect()
    mine = {*made.state[model.weight].values(), *made.state[model.bias].values(), model.weight.grad, model.bias.grad}
    new = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in known]
    assert sum(x.numel() for x in new if not any(x is y for y in mine)) == 0
    assert sum(t.numel() for t in vars(source).values() if isinstance(t, torch.Tensor)) == 2 * 10
    assert snapshots.peak_bytes == 4 * (500 * 500 + 500)


# ---- refusals


class OwnStep(AdamW):
    def step(self, closure=None):
        return super().step(closure)


class SameStep(SGD):
    pass


def test_what_has_no_closed_form():
    w = [nn.Parameter(torch.zeros(2, 2))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = [
            torch.optim.RMSprop(w),
            torch.optim.LBFGS(w),
            torch.optim.Adafactor(w),
            torch.optim.Muon(w),
            torch.optim.NAdam(w),
            torch.optim.ASGD(w),
        ]
    for optimizer in others:
        reason = supported(optimizer)
        assert type(optimizer).__name__ in reason
        assert "no closed form" in reason
        with pytest.raises(ValueError, match=r"^optimizers\[0\]: .*no closed form.*snapshots"):
            OptimizerSource([optimizer], [("w", {"w": w[0]}, "w")])
    assert "subclass of AdamW" in supported(OwnStep(w))
    assert "subclass of SGD" in supported(SameStep(w, lr=0.1))
    assert "not a torch.optim.Optimizer" in supported(object())
    assert "requires gradients" in supported(SGD(w, lr=0.1, weight_decay=torch.tensor(0.1, requires_grad=True)))
    half = [nn.Parameter(torch.zeros(2, dtype=torch.float16))]
    assert "parameter group 0: torch's fused SGD does not step torch.float16" in supported(SGD(half, lr=1, fused=True))
    assert "second moments before they are rounded" in supported(Adam(half, fused=True))
    assert supported(SGD(half, lr=0.1)) is None
    for kind in (SGD, Adam, AdamW):
        made = kind(w, lr=0.1)
        assert supported(made) is None
        torch.optim.lr_scheduler.StepLR(made, 1)  # wraps the instance's step
        assert supported(made) is None


def test_parameters_that_do_not_belong():
    model = seeded(lambda: mlp(5, 7, 1))
    first = SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"2 of 4 parameters are in none of them \('2.weight', '2.bias'\)"):
        OptimizerSource([first], listed(model))
    with pytest.raises(ValueError, match=r"'0.weight' is in two of them"):
        OptimizerSource([first, SGD(model.parameters(), lr=0.1)], listed(model))
    w = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"^w: .*view_as_real"):
        OptimizerSource([SGD([w], lr=0.1)], [("w", {"w": w}, "w")])


def test_a_step_that_cannot_be_read():
    w = nn.Parameter(torch.ones(3))
    made = AdamW([w], lr=1.0, weight_decay=1.0)
    source = OptimizerSource([made], [("w", {"w": w}, "w")])
    w.grad = torch.ones(3)
    made.step()
    with pytest.raises(ValueError, match=r"^trajectory: parameter 'w': learning rate times weight decay is 1:"):
        source.sums()
    embedding = nn.Embedding(5, 3, sparse=True)
    made = SGD(embedding.parameters(), lr=0.1)
    source = OptimizerSource([made], listed(embedding))
    embedding(torch.tensor([1, 2])).sum().backward()
    made.step()
    with pytest.raises(ValueError, match=r"^trajectory: parameter 'weight': its gradient is sparse"):
        source.sums()


def test_state_that_does_not_fit_is_named():
    w = nn.Parameter(torch.ones(3))
    made = SGD([w], lr=0.1, momentum=0.9)
    source = OptimizerSource([made], [("layer.w", {"w": w}, "w")])
    w.grad = torch.ones(3)
    made.step()
    made.state[w]["momentum_buffer"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"^trajectory: parameter 'layer.w': its gradient, momentum .*\[3\].*\[4\]"):
        source.sums()


# ---- differences to a copy, and updates that are given


@pytest.mark.parametrize("dtype", DTYPES)
def test_snapshots(dtype, isa):
    """The difference of the parameters themselves, whatever the optimizer."""
    model = seeded(lambda: mlp(5, 17, 1), dtype=DTYPES[dtype])
    made = torch.optim.RMSprop(model.parameters(), lr=1e-2, eps=1e-2)
    source = SnapshotSource(listed(model))
    made.register_step_pre_hook(lambda *_: source.before())
    for x, y in batches(3, 8):
        before = [p.detach().clone() for p in model.parameters()]
        made.zero_grad()
        mse(model(x.to(DTYPES[dtype])), y.to(DTYPES[dtype])).backward()
        made.step()
        rows, squares = source.sums()
        assert squares.isnan().all()
        for row, p, q in zip(rows, model.parameters(), before, strict=True):
            dw = p.detach().double() - q.double()
            rounding = 1e-6 if dtype != "f64" else 1e-12
            assert float(row[0]) == pytest.approx(float(dw.square().sum()), rel=rounding)
            assert float(row[2]) == pytest.approx(float(dw.abs().max()), rel=rounding)
        with pytest.raises(RuntimeError, match="before"):
            source.sums()


def test_snapshots_notice_replaced_parameters():
    model = nn.Linear(2, 2)
    source = SnapshotSource(listed(model))
    source.before()
    model.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="'weight' was replaced during the step"):
        source.sums()
    assert source._before is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_updates(dtype):
    model = nn.Linear(3, 2).to(DTYPES[dtype])
    source = GivenSource(listed(model))
    dw = torch.randn(3, 2).t().to(DTYPES[dtype])
    rows, squares = source.sums({"weight": dw, "bias": None})
    assert float(rows[0, 0]) == pytest.approx(float(dw.double().square().sum()), rel=1e-12)
    assert rows[1, 0] == 0
    assert squares.isnan().all()
    expected = reference.update_sums([model.weight], [dw], [None], [GIVEN])[0]
    assert float(rows[0, 3]) == pytest.approx(float(expected[0, 3]), rel=1e-13)
    with pytest.raises(ValueError, match=r"^updates: lacks 'bias'"):
        source.sums({"weight": dw})
    with pytest.raises(ValueError, match=r"^updates: has no parameter 'scale'"):
        source.sums({"weight": dw, "bias": None, "scale": dw})
    with pytest.raises(TypeError, match=r"^updates: expected a mapping"):
        source.sums([dw, None])
    with pytest.raises(ValueError, match=r"parameter 'weight': its gradient, momentum or update expected shape"):
        source.sums({"weight": torch.zeros(3), "bias": None})
    with pytest.raises(TypeError, match=r"parameter 'weight'.* numpy array"):
        source.sums({"weight": dw.float().numpy(), "bias": None})


@pytest.mark.parametrize("behind", [True, False])
def test_a_hook_that_runs_before_lipcores_is_refused(behind: bool) -> None:
    """It may take the gradient away by which SGD's step is known; behind lipcore's it may."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def clear(done: torch.optim.Optimizer, *_: object) -> None:
        done.zero_grad()

    if not behind:
        optimizer.register_step_post_hook(clear)
        with pytest.raises(ValueError, match="has a step hook that is not lipcore's and is called before it"):
            Monitor(model, optimizer, metrics=[Trajectory(source="optimizer")])
        return
    with Monitor(model, optimizer, metrics=[Trajectory(source="optimizer")], window_steps=None) as monitor:
        optimizer.register_step_post_hook(clear)
        before = torch.cat([p.detach().flatten().double() for p in model.parameters()])
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        moved = torch.cat([p.detach().flatten().double() for p in model.parameters()]) - before
        found = monitor.compute()["trajectory"].update_norm["total"]["last"].value
    assert found == pytest.approx(float(moved.norm()), rel=1e-5)
