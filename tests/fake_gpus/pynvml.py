"""NVIDIA's binding on a host whose GPUs are what a JSON file says; on a Python path before the real one.

``FAKE_GPUS`` names the file: ``{"error": "", "gpus": [{"uuid", "load", "used", "pids", "slices": […], "lost"}, …]}``.
Slices are described like GPUs. It is read again at each question, so a test may change it meanwhile. ``slow_s`` is how
long the driver takes to say who computes.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

NVML_TEMPERATURE_GPU = 0


class NVMLError(Exception):
    """What the driver refuses."""


class NVMLLibraryMismatchError(Exception):
    """The binding asks for what the driver is too old to know; no NVMLError, as in the original."""


def _state():
    return json.loads(Path(os.environ["FAKE_GPUS"]).read_text(encoding="utf-8"))


def _gpu(handle):
    """Return the description of a GPU (its index) or of a slice (index, place)."""
    gpu = _state()["gpus"][handle if isinstance(handle, int) else handle[0]]
    if gpu.get("lost"):
        raise NVMLError("GPU is lost")
    return gpu if isinstance(handle, int) else gpu["slices"][handle[1]]


def _whole(handle):
    if not isinstance(handle, int):
        raise NVMLError("Not Supported")
    return _gpu(handle)


def nvmlInit():
    if _state().get("error"):
        raise NVMLError(_state()["error"])


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return len(_state()["gpus"])


def nvmlDeviceGetHandleByIndex(index):
    if index >= nvmlDeviceGetCount():
        raise NVMLError("Invalid Argument")
    _gpu(index)
    return index


def nvmlDeviceGetHandleByUUID(uuid):
    for index, gpu in enumerate(_state()["gpus"]):
        if gpu["uuid"] == uuid.decode():
            _gpu(index)
            return index
        for place, each in enumerate(gpu.get("slices") or ()):
            if each["uuid"] == uuid.decode():
                return (index, place)
    raise NVMLError("Not Found")


def nvmlDeviceGetUUID(handle):
    return _gpu(handle)["uuid"]


def nvmlDeviceGetIndex(handle):
    return handle if isinstance(handle, int) else handle[1]


def nvmlDeviceGetMigMode(handle):
    gpu = _whole(handle)
    if gpu.get("is_old"):
        raise NVMLError("Not Supported")
    return [int("slices" in gpu)] * 2


def nvmlDeviceGetMaxMigDeviceCount(handle):
    return 7 if "slices" in _whole(handle) else 0


def nvmlDeviceGetMigDeviceHandleByIndex(handle, place):
    if place >= len(_whole(handle)["slices"]):
        raise NVMLError("Not Found")
    return (handle, place)


def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle):
    if isinstance(handle, int):
        raise NVMLError("Invalid Argument")
    return handle[0]


def nvmlDeviceGetComputeRunningProcesses(handle):
    gpu = _gpu(handle)
    if gpu.get("is_old"):
        raise NVMLLibraryMismatchError("use a versioned function")
    time.sleep(_state().get("slow_s", 0))
    return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in gpu.get("pids", ())]


def nvmlDeviceGetUtilizationRates(handle):
    return SimpleNamespace(gpu=_whole(handle).get("load", 0), memory=0)


def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(used=_gpu(handle).get("used", 0), total=2**34)


def nvmlDeviceGetPowerUsage(handle):
    _whole(handle)
    raise NVMLError("Insufficient Permissions")


def nvmlDeviceGetTemperature(handle, sensor):
    _whole(handle)
    return 40


def nvmlDeviceGetName(handle):
    _gpu(handle)
    return "Fake" if isinstance(handle, int) else "Fake MIG 1g.5gb"
