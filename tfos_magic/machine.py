"""CPU, memory and GPUs of one node.

Runs on: executors, in a node's agent (never in the child: what the user's function does cannot stop the sampling).

    agent ── MachineSampler(pid of the child, its GPUs).sample() ──► MachineSample ──heartbeat──► driver's board

Nothing here is needed for a run: a missing library, driver or permission leaves fields empty and is no error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

from tfos_magic.status import GpuSample, MachineSample

_DRIVER_LIBRARY = "libnvidia-ml.so.1"
_MIG_ENABLED = 1  # NVML_DEVICE_MIG_ENABLE
_SLICE = "MIG-"
_END_OF_LIST = ("", "-1", "NoDevFiles")


@dataclass(frozen=True)
class GpuDevice:
    """A GPU that one process can have for itself, or a MIG slice of one.

    Attributes
    ----------
    index : int
        NVML's; of a slice that of its GPU.
    uuid : str
        ``GPU-…`` or ``MIG-…``; the index as text where the driver does not tell.
    parent : str
        UUID of the GPU of which this is a slice; empty for a whole GPU.
    """

    index: int
    uuid: str
    parent: str = ""

    @property
    def label(self) -> str:
        """``GPU 0``, or ``MIG-… of GPU 0``."""
        return f"{self.uuid} of GPU {self.index}" if self.parent else f"GPU {self.index}"


class Nvml(Protocol):
    """What is asked of NVIDIA's management library."""

    def count(self) -> int:
        """Return how many GPUs the host has."""

    def devices(self) -> tuple[GpuDevice, ...]:
        """Return what processes can be given: GPUs, or the slices of those in MIG mode."""

    def find(self, gpu: str) -> GpuDevice | None:
        """Return the GPU or slice with this index or UUID, None if there is none."""

    def pids_on(self, gpu: str) -> tuple[int, ...]:
        """Return the processes that compute there; empty also where the driver does not tell."""

    def sample(self, gpu: str) -> GpuSample | None:
        """Return the state of the GPU with this index (``"0"``) or UUID (``"GPU-…"``, ``"MIG-…"``), None if unknown."""

    def close(self) -> None:
        """Let go of the library."""


class PyNvml:
    """:class:`Nvml` by ``nvidia-ml-py``.

    Indices are NVML's (PCI bus order). CUDA counts the same way only under ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.

    Raises
    ------
    ImportError
        ``nvidia-ml-py`` is not installed.
    OSError
        There is no driver, or it cannot be used.
    """

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise OSError(f"NVML cannot be used: {error}") from error

    def count(self) -> int:
        """Return how many GPUs the host has."""
        return int(self._ask("nvmlDeviceGetCount") or 0)

    def devices(self) -> tuple[GpuDevice, ...]:
        """Return what processes can be given; a GPU in MIG mode is its slices only, as CUDA has it."""
        return tuple(device for index in range(self.count()) for device in self._devices_at(index))

    def find(self, gpu: str) -> GpuDevice | None:
        """Return the GPU or slice with this index or UUID, None if there is none."""
        handle = self._handle(gpu)
        if handle is None:
            return None
        index, uuid = self._index(gpu, handle), self._uuid(handle, gpu)
        parent = self._parent(handle) if uuid.startswith(_SLICE) else None
        return GpuDevice(index, uuid, "" if parent is None else self._uuid(parent, str(index)))

    def pids_on(self, gpu: str) -> tuple[int, ...]:
        """Return the processes that compute there; empty also where the driver does not tell."""
        handle = self._handle(gpu)
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses", handle) if handle is not None else None
        return tuple(int(process.pid) for process in processes or ())

    def sample(self, gpu: str) -> GpuSample | None:
        """Return the state of one GPU; what the driver does not tell is None."""
        handle = self._handle(gpu)
        if handle is None:
            return None
        load = self._ask("nvmlDeviceGetUtilizationRates", handle)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        milliwatts = self._ask("nvmlDeviceGetPowerUsage", handle)
        celsius = self._ask("nvmlDeviceGetTemperature", handle, self._nvml.NVML_TEMPERATURE_GPU)
        return GpuSample(
            index=self._index(gpu, handle),
            name=_as_text(self._ask("nvmlDeviceGetName", handle)),
            utilization_percent=None if load is None else float(load.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=None if celsius is None else float(celsius),
        )

    def close(self) -> None:
        """Let go of the library."""
        self._ask("nvmlShutdown")

    def _devices_at(self, index: int) -> list[GpuDevice]:
        handle = self._ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:  # lost, or another container's
            return []
        uuid = self._uuid(handle, str(index))
        mode = self._ask("nvmlDeviceGetMigMode", handle)
        if not mode or mode[0] != _MIG_ENABLED:
            return [GpuDevice(index, uuid)]
        places = range(int(self._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0))
        found = (self._ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, place) for place in places)
        slices = (self._uuid(each, "") for each in found if each is not None)
        return [GpuDevice(index, each, uuid) for each in slices if each]

    def _handle(self, gpu: str) -> Any:
        if gpu.isdecimal():
            return self._ask("nvmlDeviceGetHandleByIndex", int(gpu))
        return self._ask("nvmlDeviceGetHandleByUUID", gpu.encode())

    def _uuid(self, handle: Any, otherwise: str) -> str:
        return _as_text(self._ask("nvmlDeviceGetUUID", handle)) or otherwise

    def _parent(self, handle: Any) -> Any:
        return self._ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle)

    def _index(self, gpu: str, handle: Any) -> int:
        if gpu.isdecimal():
            return int(gpu)
        # A MIG slice has a place within its GPU, which NVML calls its index too.
        gpu_handle = self._parent(handle) if gpu.startswith(_SLICE) else handle
        index = None if gpu_handle is None else self._ask("nvmlDeviceGetIndex", gpu_handle)
        return -1 if index is None else int(index)

    def _ask(self, question: str, *args: Any) -> Any:
        """Return the answer, None where there is none: not supported, no permission, GPU lost, driver too old."""
        nvml = self._nvml
        refusals = (nvml.NVMLError, getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError))
        try:
            return getattr(nvml, question)(*args)
        except (*refusals, AttributeError, UnicodeDecodeError):
            return None


def _as_text(name: str | bytes | None) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name or ""


def open_nvml() -> Nvml:
    """Return the host's NVML, at next to no cost on a host without a driver.

    Raises
    ------
    ImportError
        There is a driver, but no ``nvidia-ml-py``.
    OSError
        There is no driver, or it cannot be used.
    """
    try:
        ctypes.CDLL(_DRIVER_LIBRARY)  # 0.1 ms, where nvidia-ml-py takes 90 to be imported in vain
    except OSError:
        raise OSError(f"there is no NVIDIA driver ({_DRIVER_LIBRARY})") from None
    return PyNvml()


def _open_if_there() -> Nvml | None:
    try:
        return open_nvml()
    except (ImportError, OSError):
        return None


def visible_gpus(nvml: Nvml | None = None) -> tuple[GpuSample, ...]:
    """Return the GPUs that a process started here would see: those of ``CUDA_VISIBLE_DEVICES``, else all.

    Parameters
    ----------
    nvml : Nvml, optional
        Where to ask; by default NVML is opened and closed again.

    Returns
    -------
    tuple of GpuSample
        Empty without a GPU, a driver or ``nvidia-ml-py``.
    """
    source = nvml or _open_if_there()
    if source is None:
        return ()
    try:
        return _samples(source, None)
    finally:
        if nvml is None:
            source.close()


def _samples(nvml: Nvml, wanted: Sequence[str] | None) -> tuple[GpuSample, ...]:
    found = (nvml.sample(gpu) for gpu in (_visible_names(nvml) if wanted is None else wanted))
    return tuple(sample for sample in found if sample is not None)


def _visible_names(nvml: Nvml) -> list[str]:
    names = names_in(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [str(index) for index in range(nvml.count())] if names is None else names


def names_in(visible: str | None) -> list[str] | None:
    """Return the indices and UUIDs in a ``CUDA_VISIBLE_DEVICES`` as far as CUDA reads it; None for all GPUs."""
    if visible is None:
        return None
    return list(takewhile(lambda name: name not in _END_OF_LIST, (name.strip() for name in visible.split(","))))


class MachineSampler:
    """Samples the process tree under one process, and the node's GPUs.

    Parameters
    ----------
    pid : int
        Root of the tree; may be gone already.
    gpu_indices : sequence of str or None
        The GPUs given to this node, by index or UUID; empty for none, None for those that a process here would see.
    nvml : Nvml, optional
        Where to ask for GPUs; by default the host's NVML if there is one. Closed by :meth:`close`.
    """

    def __init__(self, pid: int, gpu_indices: Sequence[str] | None, nvml: Nvml | None = None) -> None:
        self._pid = pid
        self._gpus = None if gpu_indices is None else tuple(map(str, gpu_indices))
        # () asks nothing of NVML, so the library is not even loaded.
        self._nvml = nvml if nvml is not None or self._gpus == () else _open_if_there()
        self._cpu_s: dict[tuple[int, float], float] = {}
        self._sampled_at: float | None = None

    def sample(self) -> MachineSample:
        """Return the present figures; CPU is the mean since the last call, None at the first one."""
        cpu_percent, memory_bytes = self._sample_processes()
        gpus = _samples(self._nvml, self._gpus) if self._nvml is not None else ()
        return MachineSample(cpu_percent, memory_bytes, gpus)

    def close(self) -> None:
        """Let go of NVML."""
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None

    def _sample_processes(self) -> tuple[float | None, int | None]:
        now = time.monotonic()
        processes = {key: (cpu_s, rss) for key, cpu_s, rss in _tree(self._pid)}
        if not processes:
            return None, None
        # Of a process that is new its whole time counts: it began after the last sample.
        used_s = sum(max(0.0, cpu_s - self._cpu_s.get(key, 0.0)) for key, (cpu_s, _) in processes.items())
        elapsed_s = None if self._sampled_at is None else now - self._sampled_at
        self._cpu_s = {key: cpu_s for key, (cpu_s, _) in processes.items()}
        self._sampled_at = now
        percent = 100.0 * used_s / elapsed_s if elapsed_s else None
        return percent, sum(rss for _, rss in processes.values())


def _family(pid: int) -> list[int]:
    """Return `pid` and all below it; psutil would look at every process of the machine, twice a second."""
    found = [pid]
    for parent in found:  # grows on the way
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", "rb") as children:
                    found += map(int, children.read().split())
    return found


def _tree(pid: int) -> Iterator[tuple[tuple[int, float], float, int]]:
    """Yield ((pid, creation time), CPU seconds, resident bytes) of `pid` and all below it that can be read."""
    try:
        import psutil
    except ImportError:
        return
    for each in _family(pid):
        with contextlib.suppress(psutil.Error), (process := psutil.Process(each)).oneshot():
            times = process.cpu_times()
            yield (process.pid, process.create_time()), times.user + times.system, process.memory_info().rss
