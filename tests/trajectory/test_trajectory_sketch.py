"""Sketch mode beside exact mode on the same training: every number within its standard error, or refused."""

from __future__ import annotations

import io
import math

import pytest
import torch
from one_rank import one_rank
from torch import nn

import lipcore
from lipcore import Trajectory

QUANTITIES = ("update_norm", "path_length", "distance", "variance")


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 5))


def train(model, observe, steps, seed=1, make_optimizer=torch.optim.AdamW):
    optimizer = make_optimizer(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 20, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
        observe()


def pair(model, **settings):
    exact, sketch = Trajectory(model), Trajectory(model, mode="sketch", **settings)
    return exact, sketch, lambda: (exact.update(), sketch.update())


@pytest.mark.parametrize("steps", [40, 700], ids=["one block", "two blocks"])
@pytest.mark.parametrize("seed", [0, 1])
def test_estimates_lie_within_their_standard_errors(steps, seed):
    model = make()
    exact, sketch, observe = pair(model, seed=seed)
    train(model, observe, steps)
    truth, found = exact.compute(), sketch.compute()
    for quantity in QUANTITIES:
        assert set(found[quantity]) == {"0", "2", "4", "total"}
        for place, reduced in found[quantity].items():
            for reducer, value in reduced.items():
                expected = truth[quantity][place][reducer].value
                assert value.label == "estimate"
                assert 0 < value.error < 0.3 * value.value
                # Eight parts give the error itself to a quarter; five of them leave room for every row and seed.
                assert abs(value.value - expected) < 5 * value.error + 0.01 * expected, f"{quantity}.{reducer} {place}"
    for place, reduced in found.weight_norm.items():
        assert reduced.last.value == pytest.approx(truth.weight_norm[place].last.value, rel=1e-12)
    assert "max_abs_update" not in found


def test_cosine_of_successive_updates():
    model = make()
    points = [torch.cat([p.detach().double().flatten() for p in model.parameters()])]
    sketch = Trajectory(model, mode="sketch", buckets=65536)

    def observe():
        sketch.update()
        points.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))

    train(model, observe, 30)
    updates = torch.stack(points).diff(dim=0)
    cosines = torch.cosine_similarity(updates[1:], updates[:-1])
    found = sketch.compute().update_cosine["total"]
    assert found.last.value == pytest.approx(float(cosines[-1]), abs=4 * found.last.error + 0.005)
    assert found.mean.value == pytest.approx(float(cosines.mean()), abs=4 * found.mean.error + 0.005)
    assert found.mean.count == 29


def test_kept_sketches_give_distances_angles_and_components():
    model = make()
    sketch = Trajectory(model, mode="sketch", buckets=16384, keep_every=10, keep_limit=4)
    points = {0: [p.detach().clone() for p in model.parameters()]}
    step = 0

    def observe():
        nonlocal step
        step += 1
        sketch.update()
        points[step] = [p.detach().clone() for p in model.parameters()]

    train(model, observe, 45)
    kept = sketch.sketches
    assert kept.steps.tolist() == [10, 20, 30, 40]  # the oldest went
    flat = {k: torch.cat([p.double().flatten() for p in ps]) for k, ps in points.items()}
    true = torch.stack([flat[k] for k in kept.steps.tolist()])
    matrix = kept.distance_matrix()
    assert matrix.shape == (4, 4)
    assert torch.allclose(matrix, torch.cdist(true, true), rtol=0.05)
    value = kept.distance(10, 40)
    assert abs(value.value - float((flat[10] - flat[40]).norm())) < 5 * value.error
    cosine = kept.cosine((10, 20), (20, 40))
    a, b = flat[20] - flat[10], flat[40] - flat[20]
    assert abs(cosine.value - float(a @ b / a.norm() / b.norm())) < 5 * cosine.error
    coordinates, shares = kept.pca(2)
    centred = true - true.mean(dim=0)
    singular = torch.linalg.svdvals(centred).square()
    assert coordinates.shape == (4, 2)
    assert torch.allclose(shares, (singular / singular.sum())[:2], atol=0.05)
    with pytest.raises(KeyError, match="step 15 was not kept"):
        kept.distance(10, 15)
    with pytest.raises(ValueError, match="components: expected 1 to 3"):
        kept.pca(4)


def test_a_reference_elsewhere():
    model, other = make(), make(seed=5)
    exact, sketch, observe = pair(model, buckets=65536)
    train(model, observe, 20)
    for reference in (other, other.state_dict(), None):
        exact.set_reference(reference)
        sketch.set_reference(reference)
        before = exact.compute().variance["total"].last.value
        assert sketch.compute().variance["total"].last.value == pytest.approx(before, rel=0.05)
        train(model, observe, 5, seed=3)
        truth, found = exact.compute().distance["total"].last, sketch.compute().distance["total"].last
        assert abs(found.value - truth.value) < 5 * found.error + 0.01 * truth.value


def test_a_group_with_non_finite_values_is_left_out():
    model = make()
    exact, sketch, observe = pair(model)
    train(model, observe, 5)
    saved = model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight[3, 4] = math.nan
    observe()
    with torch.no_grad():
        model[2].weight.copy_(saved)
    train(model, observe, 5, seed=9)
    found = sketch.compute()
    assert found.nonfinite_steps["2"].sum.value == 1
    assert found.nonfinite_steps["0"].sum.value == 0
    assert found.nonfinite_elements["2"].sum.value == 1
    for place in ("0", "2", "total"):
        value = found.path_length[place].sum
        assert value.value == pytest.approx(exact.compute().path_length[place].sum.value, rel=0.05)


def test_save_and_restart_continue_bit_for_bit():
    def build(model):
        return Trajectory(model, mode="sketch", buckets=512, keep_every=7)

    model = make()
    sketch = build(model)
    train(model, sketch.update, 20)
    file = io.BytesIO()
    torch.save(sketch.state_dict(), file)
    file.seek(0)
    twin = make()
    twin.load_state_dict(model.state_dict())
    restarted = build(twin)
    restarted.load_state_dict(torch.load(file, weights_only=True))
    for one, trajectory in ((model, sketch), (twin, restarted)):
        train(one, trajectory.update, 600, seed=4)
        assert trajectory.compute().to_dict() == sketch.compute().to_dict()
    assert torch.equal(restarted.sketches.matrix, sketch.sketches.matrix)
    state = sketch.state_dict()
    state["trackers"]["sketch"]["kept"]["matrix"] = torch.zeros(3)
    before = restarted.compute().to_dict()
    with pytest.raises(ValueError, match="kept"):
        restarted.load_state_dict(state)
    with pytest.raises(ValueError, match="sketch: the state has"):
        Trajectory(make(), mode="sketch", buckets=1024, keep_every=7).load_state_dict(sketch.state_dict())
    assert restarted.compute().to_dict() == before


def test_intervals_merge():
    model = make()
    settings = {"mode": "sketch", "buckets": 1024}
    whole, first = Trajectory(model, **settings), Trajectory(model, **settings)
    train(model, lambda: (whole.update(), first.update()), 30)
    second = Trajectory(model, **settings)
    second.load_state_dict(first.state_dict())
    second.reset()
    train(model, lambda: (whole.update(), second.update()), 25, seed=2)
    first.merge(second)
    expected = whole.compute()
    for quantity, places in first.compute().items():
        for place, reduced in places.items():
            for reducer, value in reduced.items():
                assert value.value == pytest.approx(expected[quantity][place][reducer].value, rel=1e-9, abs=1e-12)


def test_sliding_windows():
    model = make()
    metrics = [Trajectory(mode="sketch", buckets=65536)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = lipcore.Monitor(model, optimizer, metrics, window_steps=12, window_blocks=3)
    exact = lipcore.Monitor(model, optimizer, [Trajectory()], window_steps=12, window_blocks=3)
    for _ in range(24):
        x = torch.randn(16, 20)
        optimizer.zero_grad()
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
    for a, b in zip(monitor.history, exact.history, strict=True):
        assert (a.first_step, a.last_step) == (b.first_step, b.last_step)
        for quantity in ("path_length", "variance", "update_norm"):
            for reducer, value in a["trajectory"][quantity]["total"].items():
                truth = b["trajectory"][quantity]["total"][reducer].value
                assert value.value == pytest.approx(truth, rel=0.06), f"{quantity}.{reducer}"


def test_budget_chooses_and_says_so():
    model = make()
    exact = sum(line.bytes for line in Trajectory(model).plan() if not {"recent", "gradient"} & set(line.what.split()))
    assert "exact copies" in Trajectory(model, mode="auto", memory_budget=exact).plan()[0].rule
    line = Trajectory(model, mode="auto", memory_budget=exact - 1).plan()[0].rule
    assert "sketch of" in line
    assert f"{exact:,}" in line
    with pytest.raises(ValueError, match="memory_budget: 100 bytes are too few: exact copies need"):
        Trajectory(model, mode="auto", memory_budget=100)
    for settings, words in (
        ({"mode": "auto"}, "memory_budget: mode 'auto' needs one"),
        ({"memory_budget": 5}, "memory_budget: is for mode 'auto' only"),
        ({"mode": "sketch", "buckets": 1000}, "buckets: expected a power of two"),
        ({"mode": "sketch", "seed": -1}, "seed: expected"),
        ({"mode": "sketchy"}, "mode: expected 'exact', "),
        ({"mode": "sketch", "stats": ["max_abs_update"]}, "stats: 'max_abs_update' is not known in mode 'sketch'"),
    ):
        with pytest.raises(ValueError, match=words):
            Trajectory(model, **settings)
    with pytest.raises(RuntimeError, match="sketches: kept only with"):
        _ = Trajectory(model).sketches


def test_updates_from_the_optimizer_beside_a_sketch():
    """Exact norms per parameter from the optimizer, the rest from the sketch."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    both = lipcore.Monitor(model, optimizer, [Trajectory(mode="sketch", source="optimizer")])
    exact = Trajectory(model)
    for _ in range(10):
        x = torch.randn(16, 20)
        optimizer.zero_grad()
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
        exact.update()
    found, truth = both.compute()["trajectory"], exact.compute()
    for place, reduced in truth.path_length.items():
        assert found.path_length[place].sum.value == pytest.approx(reduced.sum.value, rel=1e-5)
        assert found.path_length[place].sum.label == "exact"
    assert found.distance["total"].last.label == "estimate"
    assert found.distance["total"].last.value == pytest.approx(truth.distance["total"].last.value, rel=0.1)


def test_rebind_and_loads():
    model = make()
    exact, sketch, observe = pair(model)
    train(model, observe, 5)
    for trajectory in (exact, sketch):
        trajectory.rebind()
    train(model, observe, 5, seed=7)
    truth, found = exact.compute(), sketch.compute()
    for quantity in ("path_length", "distance"):
        for reducer, value in found[quantity]["total"].items():
            assert value.value == pytest.approx(truth[quantity]["total"][reducer].value, rel=0.06)
    model.load_state_dict(make(seed=3).state_dict())
    for trajectory in (exact, sketch):
        trajectory.rebase()
    train(model, observe, 1, seed=8)
    last = sketch.compute().update_norm["total"].last.value
    assert last == pytest.approx(exact.compute().update_norm["total"].last.value, rel=0.06)


@pytest.mark.ci
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_rebind_after_ranks_hold_other_parts():
    """Where some parameters of a group are shards from now on, sketches are of others, and distances begin anew."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with one_rank():
        model = make()
        sketch = Trajectory(model, mode="sketch", groups=lambda name: "all", buckets=4096, keep_every=1, keep_limit=6)
        train(model, sketch.update, 10)
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
        sketch.rebind()
        exact = Trajectory(model)
        train(model, lambda: (exact.update(), sketch.update()), 10, seed=7)
        truth, found = exact.compute(), sketch.compute()
        expected = truth.distance["total"].last.value
        assert found.distance["total"].last.value == pytest.approx(expected, rel=0.1)
        kept = sum(row.nbytes for _, row in sketch.sketches.rows())
        assert next(line.bytes for line in sketch.plan() if "kept, at most" in line.what) == kept
