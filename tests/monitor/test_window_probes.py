"""A probe that cannot be measured any more: the others, the metrics and the training go on."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from models import batches, sgd
from torch import Tensor, nn

from lipcore import Monitor


class Fragile(nn.Module):
    """Refuses rows of four, once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 1)
        self.refuses = False

    def forward(self, x: Tensor) -> Tensor:
        if self.refuses and len(x) == 4:
            raise RuntimeError("no four rows any more")
        return self.last(torch.relu(self.first(x)))


def run(filters: str) -> tuple[Fragile, Monitor]:
    """Three windows of two steps; from the second on one of two probes fails."""
    model = Fragile()
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer, window_steps=2)
    monitor.probe(torch.randn(4, 5), "four", regions=True)
    monitor.probe(torch.randn(3, 5), "three", regions=True)
    with warnings.catch_warnings():
        warnings.simplefilter(filters)  # type: ignore[arg-type]
        for step, (x, _) in enumerate(batches(6, 8)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            model.refuses = step >= 1
    return model, monitor


def test_its_numbers_are_not_valid_and_say_why() -> None:
    with pytest.warns(RuntimeWarning, match="could not measure the probe 'four': no four rows any more"):
        _, monitor = run("always")
    first, *later = monitor.history
    assert first["probes"].local_lipschitz["four"].mean.valid
    assert len(later) == 2
    for window in later:
        probes = window["probes"]
        assert probes.details["points"] == {"four": 4, "three": 3}
        for value in (
            *probes.local_lipschitz["four"].values(),
            probes.regions["four"].last,
            probes.region_churn["four"].last,
        ):
            assert math.isnan(value.value)
            assert (value.valid, value.note) == (False, "not measured: no four rows any more")
        assert probes.local_lipschitz["three"].mean.count == 3
        assert probes.regions["three"].last.valid
        assert window["trajectory"].path_length["total"].sum.count == 2
    monitor.close()


def test_it_is_measured_again_as_soon_as_it_can_be() -> None:
    model, monitor = run("ignore")
    model.refuses = False
    monitor.step()
    assert monitor.close_window()["probes"].local_lipschitz["four"].mean.valid
    monitor.close()


def test_the_warning_is_kept_where_it_is_to_be_an_error() -> None:
    _, monitor = run("error")
    assert len(monitor.history) == 3
    with pytest.raises(RuntimeWarning, match="the probe 'four'"):
        monitor.close()
