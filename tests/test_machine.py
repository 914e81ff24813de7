from __future__ import annotations

import builtins
import os
import subprocess
import sys
import time

import psutil
import pytest

from tfos_magic import machine
from tfos_magic.machine import GpuDevice, MachineSampler, PyNvml, visible_gpus
from tfos_magic.status import GpuSample, MachineSample

BUSY = "import sys; print('up', flush=True)\nwhile True: pass"
HOLD = "import sys; block = bytearray(b'x') * (64 << 20); print('up', flush=True); sys.stdin.read()"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {BUSY!r}], stdout=subprocess.PIPE)
child.stdout.readline(); print("up", flush=True); sys.stdin.read(); child.kill(); child.wait()
"""


class FakeNvml:
    """A host with GPUs, behind the interface of the real one."""

    def __init__(self, gpus=2):
        self.gpus = {str(i): GpuSample(i, "Fake", 50.0 + i, 2**30, 2**34, 100.0, 40.0) for i in range(gpus)}
        self.gpus |= {f"GPU-{i}": sample for i, sample in enumerate(list(self.gpus.values()))}
        self.is_closed = False
        self._count = gpus

    def count(self):
        return self._count

    def sample(self, gpu):
        return self.gpus.get(gpu)

    def close(self):
        self.is_closed = True


@pytest.fixture
def start():
    processes = []

    def start_python(code):
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    yield start_python
    for process in processes:
        process.stdin.close()
        if process.args[-1] != PARENT:
            process.kill()
        process.wait(10)
        process.stdout.close()


def sample_for(sampler, seconds):
    sampler.sample()
    time.sleep(seconds)
    return sampler.sample()


def sample_and_truth(root, busy):
    """Return the sampler's figure for `root`, and what the kernel counted for the one process that is busy."""
    sampler = MachineSampler(root.pid, ())
    used, began = sum(busy.cpu_times()[:2]), time.monotonic()
    sample = sample_for(sampler, 0.6)
    return sample, 100 * (sum(busy.cpu_times()[:2]) - used) / (time.monotonic() - began)


def test_a_busy_child_is_seen_to_be_busy(start):
    busy = psutil.Process(start(BUSY).pid)
    sample, true_percent = sample_and_truth(busy, busy)
    assert sample.cpu_percent == pytest.approx(true_percent, abs=10)
    assert sample.cpu_percent > 3  # however many others use this machine


def test_an_idle_child_is_seen_to_be_idle_and_its_memory_counted(start):
    sample = sample_for(MachineSampler(start(HOLD).pid, ()), 0.3)
    assert sample.cpu_percent < 20
    assert 64 << 20 < sample.memory_bytes < 200 << 20


def test_what_a_child_starts_counts_too(start):
    parent = psutil.Process(start(PARENT).pid)
    sample, true_percent = sample_and_truth(parent, *parent.children())
    assert sample.cpu_percent == pytest.approx(true_percent, abs=10)
    assert sample.cpu_percent > 3


def test_the_first_sample_knows_no_cpu_yet(start):
    sample = MachineSampler(start(HOLD).pid, ()).sample()
    assert sample.cpu_percent is None
    assert sample.memory_bytes


def test_a_process_that_goes_away_is_no_error(start):
    process = start(HOLD)
    sampler = MachineSampler(process.pid, ())
    sampler.sample()
    process.kill()
    process.wait()
    assert sampler.sample() == MachineSample()


def test_processes_may_come_and_go_while_they_are_read(start):
    spawn = "import subprocess, sys\nprint('up', flush=True)\nwhile True: subprocess.run(['true'])"
    sampler = MachineSampler(start(spawn).pid, ())
    for _ in range(50):
        sample = sampler.sample()
        assert sample.memory_bytes is None or sample.memory_bytes >= 0


def test_without_psutil_there_are_no_figures(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert MachineSampler(os.getpid(), ()).sample() == MachineSample()


# --- GPUs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "seen"), [(["0"], [0]), (["1", "0"], [1, 0]), (["GPU-1"], [1]), (["7"], []), ([], [])]
)
def test_only_the_gpus_of_the_node_are_sampled(given, seen):
    sampler = MachineSampler(os.getpid(), given, FakeNvml())
    assert [gpu.index for gpu in sampler.sample().gpus] == seen


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, [0, 1]), ("1", [1]), ("", []), ("-1", []), ("GPU-0, 1", [0, 1]), ("1,-1,0", [1])]
)
def test_unless_told_otherwise_the_gpus_are_those_that_cuda_would_see(monkeypatch, visible, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml()
    assert [gpu.index for gpu in MachineSampler(os.getpid(), None, nvml).sample().gpus] == seen
    assert [gpu.index for gpu in visible_gpus(nvml)] == seen
    assert not nvml.is_closed


def test_close_lets_go_of_nvml_once():
    nvml = FakeNvml()
    sampler = MachineSampler(os.getpid(), None, nvml)
    sampler.close()
    sampler.close()
    assert nvml.is_closed
    assert sampler.sample().gpus == ()


def test_without_the_library_there_are_no_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert visible_gpus() == ()
    assert MachineSampler(os.getpid(), None).sample().gpus == ()


def test_a_node_without_gpus_does_not_even_load_the_library(monkeypatch):
    real = builtins.__import__

    def no_pynvml(name, *args):
        assert name != "pynvml"
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", no_pynvml)
    assert MachineSampler(os.getpid(), ()).sample().gpus == ()


class FakeLibrary:
    """pynvml itself, on a host where some questions are not answered."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    class NVMLLibraryMismatchError(Exception):
        pass

    def __init__(self, refuses=(), mig=False, refusal=NVMLError):
        self.refuses = refuses
        self.mig = mig
        self.refusal = refusal

    def __getattr__(self, name):
        def answer(*args):
            if name in self.refuses:
                raise self.refusal(name)
            return getattr(self, "_" + name)(*args)

        return answer

    def _nvmlInit(self):
        pass

    def _nvmlShutdown(self):
        pass

    def _nvmlDeviceGetCount(self):
        return 1

    def _nvmlDeviceGetHandleByIndex(self, index):
        if index:
            raise self.NVMLError("no such GPU")
        return "handle"

    def _nvmlDeviceGetHandleByUUID(self, uuid):
        assert isinstance(uuid, bytes)
        return "mig" if self.mig else "handle"

    def _nvmlDeviceGetIndex(self, handle):
        return 1 if handle == "mig" else 3  # of a slice: its place within its GPU

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle):
        return "handle"

    def _nvmlDeviceGetUtilizationRates(self, handle):
        return type("Rates", (), {"gpu": 87, "memory": 12})

    def _nvmlDeviceGetMemoryInfo(self, handle):
        return type("Memory", (), {"used": 2**30, "total": 2**34})

    def _nvmlDeviceGetPowerUsage(self, handle):
        return 123_000

    def _nvmlDeviceGetTemperature(self, handle, sensor):
        return 61

    def _nvmlDeviceGetName(self, handle):
        return b"NVIDIA Fake"


def test_all_that_the_driver_tells(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeLibrary())
    assert PyNvml().sample("0") == GpuSample(0, "NVIDIA Fake", 87.0, 2**30, 2**34, 123.0, 61.0)


def test_what_the_driver_refuses_is_left_empty(monkeypatch):
    refused = ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature")
    monkeypatch.setitem(sys.modules, "pynvml", FakeLibrary(refused))
    assert PyNvml().sample("0") == GpuSample(0, "NVIDIA Fake", None, 2**30, 2**34, None, None)


@pytest.mark.parametrize("refusal", [FakeLibrary.NVMLLibraryMismatchError, AttributeError])
def test_what_a_driver_or_a_binding_is_too_old_to_know_is_left_empty(monkeypatch, refusal):
    old = FakeLibrary(("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetPowerUsage"), refusal=refusal)
    monkeypatch.setitem(sys.modules, "pynvml", old)
    assert PyNvml().sample("0") == GpuSample(0, "NVIDIA Fake", 87.0, None, None, None, 61.0)


def test_a_gpu_that_tells_nothing_is_still_there(monkeypatch):
    questions = ("UtilizationRates", "MemoryInfo", "PowerUsage", "Temperature", "Name", "UUID", "MigMode")
    monkeypatch.setitem(sys.modules, "pynvml", FakeLibrary([f"nvmlDeviceGet{question}" for question in questions]))
    nvml = PyNvml()
    assert nvml.sample("0") == GpuSample(0)
    assert nvml.devices() == (GpuDevice(0, "0"),)
    assert nvml.find("0") == GpuDevice(0, "0")
    assert nvml.find("5") is None


def test_a_mig_slice_is_told_by_its_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeLibrary(("nvmlDeviceGetUtilizationRates",), mig=True))
    sample = PyNvml().sample("MIG-1234")
    assert (sample.index, sample.utilization_percent, sample.memory_used_bytes) == (3, None, 2**30)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeLibrary())
    assert PyNvml().sample("5") is None


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeLibrary(("nvmlInit",)))
    with pytest.raises(OSError, match="NVML"):
        PyNvml()
    assert machine.visible_gpus() == ()


def test_on_this_host_whatever_it_has_nothing_raises():
    sampler = MachineSampler(os.getpid(), None)
    sampler.sample()
    sample = sampler.sample()
    sampler.close()
    assert sample.memory_bytes > 0
    assert len(sample.gpus) == len(visible_gpus())
