"""CPU, memory and GPUs of one node.

Runs on: executors, in a node's agent (never in the child: what the user's function does cannot stop the sampling).

    agent ── MachineSampler(pid of the child).sample() ──► MachineSample ──heartbeat──► driver's board

Nothing here is needed for a run: a missing library, driver or permission leaves fields empty and is no error.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from tfos_magic.status import GpuSample, MachineSample

_T = TypeVar("_T")


class Nvml(Protocol):
    """What the sampler asks of NVIDIA's management library."""

    def count(self) -> int:
        """Return how many GPUs the host has."""

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
        return int(self._ask(self._nvml.nvmlDeviceGetCount) or 0)

    def sample(self, gpu: str) -> GpuSample | None:
        """Return the state of one GPU; what the driver does not tell is None."""
        nvml = self._nvml
        handle = self._handle(gpu)
        if handle is None:
            return None
        load = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        celsius = self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        return GpuSample(
            index=self._index(gpu, handle),
            name=_as_text(self._ask(nvml.nvmlDeviceGetName, handle)),
            utilization_percent=None if load is None else float(load.gpu),
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_watts=None if milliwatts is None else milliwatts / 1000,
            temperature_celsius=None if celsius is None else float(celsius),
        )

    def close(self) -> None:
        """Let go of the library."""
        self._ask(self._nvml.nvmlShutdown)

    def _handle(self, gpu: str) -> Any:
        if gpu.isdecimal():
            return self._ask(self._nvml.nvmlDeviceGetHandleByIndex, int(gpu))
        return self._ask(self._nvml.nvmlDeviceGetHandleByUUID, gpu.encode())

    def _index(self, gpu: str, handle: Any) -> int:
        if gpu.isdecimal():
            return int(gpu)
        index = self._ask(self._nvml.nvmlDeviceGetIndex, handle)
        if index is None:  # a MIG slice has no index of its own: its GPU's
            parent = self._ask(self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle)
            index = None if parent is None else self._ask(self._nvml.nvmlDeviceGetIndex, parent)
        return -1 if index is None else int(index)

    def _ask(self, question: Callable[..., _T], *args: Any) -> _T | None:
        """Return the answer, None where the driver has none (not supported, no permission, GPU lost)."""
        try:
            return question(*args)
        except (self._nvml.NVMLError, UnicodeDecodeError):
            return None


def _as_text(name: str | bytes | None) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name or ""


def _open_nvml() -> Nvml | None:
    try:
        return PyNvml()
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
    source = nvml or _open_nvml()
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
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(nvml.count())]
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]


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
        # () asks nothing of NVML, so the library is not even loaded: most executors have no GPU.
        self._nvml = nvml if nvml is not None or self._gpus == () else _open_nvml()
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


def _tree(pid: int) -> Iterator[tuple[tuple[int, float], float, int]]:
    """Yield ((pid, creation time), CPU seconds, resident bytes) of `pid` and all below it that can be read."""
    try:
        import psutil
    except ImportError:
        return
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return
    for process in processes:
        with contextlib.suppress(psutil.Error), process.oneshot():
            times = process.cpu_times()
            yield (process.pid, process.create_time()), times.user + times.system, process.memory_info().rss
