"""Kernels that cannot run here: said when lipcore is imported beside a GPU, at the first use of one, and by doctor."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from devices import EMULATED, set_capability
from emulated_core import emulator

import lipcore
from lipcore import _connect, _core, functional
from lipcore.cli import doctor


def of_the_emulator(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that sets versions and devices."""
    return pytest.mark.gpu(pytest.mark.skipif(not EMULATED, reason="sets what the emulator has")(test))


#: The driver's CUDA, below kernels of CUDA 13.0, and what is said.
TOO_OLD = {
    12040: r"built with CUDA 13\.0, cannot run: the NVIDIA driver takes up to CUDA 12\.4\. Install a driver that takes "
    r"CUDA 13, or rebuild lipcore by a toolkit of CUDA 12 \(LIPCORE_CUDA=ON CUDACXX=/path/to/nvcc\)\. On the CPU",
    11080: r"takes up to CUDA 11\.8\. Install a driver that takes CUDA 13\. On the CPU",
    0: r"built with CUDA 13\.0, cannot run: there is no NVIDIA driver \(libcuda\.so\.1\)\. Install one that takes",
}


def on_the_cpu() -> None:
    assert functional.sample_norms(torch.tensor([[3.0, 4.0]])).tolist() == [5]


@pytest.fixture
def beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch with CUDA, which the emulator's is not, on a machine with a GPU."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(_connect, "_sees_a_gpu", lambda: True)


@of_the_emulator
@pytest.mark.parametrize("driver", TOO_OLD)
def test_an_old_one_is_said_at_import(beside_a_gpu: None, driver: int) -> None:
    emulator.set_versions(13000, driver)
    before = emulator.questions()
    with pytest.warns(RuntimeWarning, match=TOO_OLD[driver]) as warned:
        _connect.connect()
    assert len(warned) == 1
    assert emulator.questions() == before  # a process may fork behind the import
    on_the_cpu()


@of_the_emulator
@pytest.mark.parametrize("driver", TOO_OLD)
def test_an_old_one_is_said_at_the_first_use_of_a_device(driver: int) -> None:
    x, model = torch.ones(2, 3).cuda(), torch.nn.Linear(3, 1).cuda()
    emulator.set_versions(13000, driver)
    with pytest.raises(RuntimeError, match=rf"^sample_norms: failed while .* on cuda:0: .*{TOO_OLD[driver]}"):
        functional.sample_norms(x)
    with pytest.raises(RuntimeError, match=TOO_OLD[driver]):
        lipcore.Trajectory(model)
    on_the_cpu()
    assert lipcore.Trajectory(torch.nn.Linear(3, 1)) is not None


@of_the_emulator
@pytest.mark.parametrize("driver", TOO_OLD)
def test_an_old_one_is_said_by_doctor(driver: int) -> None:
    emulator.set_versions(13000, driver)
    said = doctor._cuda()
    assert re.search(TOO_OLD[driver], said)
    assert said.startswith("built with CUDA 13.0 for 75-real 80-real 90; ")
    assert "0 devices" in said


@of_the_emulator
@pytest.mark.parametrize("driver", [13000, 13010, 14000])
@pytest.mark.parametrize("toolkit", [12000, 13000, 13020])
def test_one_of_the_same_major_version_or_later_runs_the_kernels(beside_a_gpu: None, toolkit: int, driver: int) -> None:
    emulator.set_versions(toolkit, driver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _connect.connect()
    assert functional.sample_norms(torch.tensor([[3.0, 4.0]]).cuda()).tolist() == [5]
    assert "cannot" not in doctor._cuda()


@of_the_emulator
@pytest.mark.parametrize(("number", "name"), [(209, "NoKernelImage"), (98, "InvalidDeviceFunction")])
def test_a_device_that_no_kernel_was_compiled_for_is_said_at_its_first_use(number: int, name: str) -> None:
    x = torch.tensor([[3.0, 4.0]]).cuda()
    emulator.set_oldest(80, number)
    set_capability(75)
    said = (
        r"built with CUDA 13\.0 for the architectures 75-real 80-real 90, cannot run on cuda:0, an sm_75 \(.*\): "
        r"rebuild lipcore with LIPCORE_CUDA=ON LIPCORE_CUDA_ARCHS=75, by a toolkit of a major version that the driver "
        r"takes \(up to CUDA 13\.0\)\. On the CPU"
    )
    with pytest.raises(RuntimeError, match=rf"^sample_norms: failed while taking .*{name}.*{said}"):
        functional.sample_norms(x)
    told = doctor._cuda()
    assert re.search(said, told)
    assert f"{torch.cuda.device_count()} devices" in told
    on_the_cpu()
    set_capability(80)
    assert functional.sample_norms(x).tolist() == [5]
    assert "cannot" not in doctor._cuda()


@of_the_emulator
def test_other_trouble_of_a_device_asks_for_no_other_kernels() -> None:
    """Kernels are loaded at their first use, which takes memory."""
    x = torch.tensor([[3.0, 4.0]]).cuda()
    emulator.set_oldest(80, 2)
    set_capability(75)
    with pytest.raises(RuntimeError, match=r"cudaErrorMemoryAllocation") as raised:
        functional.sample_norms(x)
    told = doctor._cuda()
    assert "cuda:0 cannot be used" in told
    assert "rebuild" not in told + str(raised.value)


@pytest.mark.skipif(_core.cuda_built, reason="of a core without CUDA")
def test_a_core_without_kernels_has_no_trouble() -> None:
    assert (_core.cuda_trouble(), _core.cuda_trouble_on(0), _core.cuda_versions()) == ("", "", "not built")


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_gpus_that_are_hidden_are_not_seen(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setattr(_connect.Path, "glob", lambda folder, pattern: iter([folder / "nvidia0"]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _connect._sees_a_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not _connect._sees_a_gpu()
