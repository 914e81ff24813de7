"""Which GPUs a node gets, and that no other node on its host gets the same.

Runs on: executor, in the agent, before the child is started: TensorFlow sees what it saw when it was imported.

    Spark assigned some ────────► those, the first N of them
    else NVML's, as far as CUDA_VISIBLE_DEVICES allows
         less those on which a process computes
         less those that another node holds ────► N of them; 1 if nobody said how many

A node holds a GPU by a name that only one process of the host can have, an abstract UNIX socket: no file is left
over, and whatever ends the agent gives the GPU back. Nodes choose one after another, since two that want two GPUs each
could otherwise take one each and both go without. Containers with a network of their own have names of their own;
there it is NVML that tells which GPUs are in use.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tfos_magic.errors import GpuError
from tfos_magic.machine import GpuDevice, Nvml, names_in, open_nvml

_DEFAULT_COUNT = 1  # TensorFlowOnSpark's num_gpus
_HELD = "\0tfos_magic-gpu-"
_TURN = "\0tfos_magic-gpus"
_TURN_TIMEOUT_S = 60.0  # a driver that has to be woken for each process takes seconds
_DEVICES_TOLD = 8
_ADVICE = "Lower --gpus-per-node, or leave it out: then each node has one GPU where one is free."


@dataclass
class NodeGpus:
    """What a node may use, and holds until it is closed or its process ends.

    Attributes
    ----------
    addresses : tuple of str
        Indices or UUIDs, for the sampler; empty for none.
    visible : str or None
        ``CUDA_VISIBLE_DEVICES`` for the child; None leaves it as it is.
    note : str
        What the user should know about it; mostly empty.
    nvml : Nvml, optional
        Open for as long as this is: to open it again may take seconds.
    holds : list of socket
        One for each GPU.
    """

    addresses: tuple[str, ...] = ()
    visible: str | None = None
    note: str = ""
    nvml: Nvml | None = None
    holds: list[socket.socket] = field(default_factory=list)

    def close(self) -> None:
        """Give the GPUs back, and let go of NVML."""
        for hold in self.holds:
            hold.close()
        self.holds.clear()
        if self.nvml is not None:
            self.nvml.close()
            self.nvml = None


@dataclass(frozen=True)
class Wish:
    """What a node should have.

    Attributes
    ----------
    node, host : str
        Who asks, for messages.
    count : int or None
        GPUs; None where nobody said.
    assigned : tuple of str or None
        The addresses that Spark gave to the node's task; None where Spark gives no GPUs away.
    """

    node: str
    host: str
    count: int | None = None
    assigned: tuple[str, ...] | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Wish:
        """Read a node's configuration. A parameter server computes nothing: it gets only what Spark gave it."""
        node = config["nodes"][config["index"]]
        assigned = None if config["gpus"] is None else tuple(config["gpus"])
        count = config["gpus_per_node"]
        if node.startswith("ps:"):
            count = 0 if assigned is None else None
        return cls(node, socket.gethostname(), count, assigned)

    def refuse(self, fact: str, *, cause: str = "", hint: str = _ADVICE) -> GpuError:
        """Return the error that this node cannot have what it should."""
        return GpuError(f"{self.node} on {self.host}: {fact}", node=self.node, host=self.host, cause=cause, hint=hint)


def choose(wish: Wish, nvml: Nvml | None = None) -> NodeGpus:
    """Return the GPUs that a node gets; they are its own until it gives them back.

    Parameters
    ----------
    wish : Wish
    nvml : Nvml, optional
        Where to ask; by default the host's, if there is one. Closed with the result.

    Raises
    ------
    GpuError
        A number was asked for that is not to be had.
    """
    if wish.assigned is not None:
        return _take_assigned(wish, wish.assigned, nvml)
    if wish.count == 0:
        return NodeGpus(visible="")
    try:
        nvml = nvml or open_nvml()
    except ImportError:
        reason = "nvidia-ml-py is missing, so nodes may use the same GPUs"
        return _do_without(wish, reason, "Install nvidia-ml-py beside the notebook.", note=f"tfos_magic: {reason}.")
    except OSError as error:
        return _do_without(wish, str(error), _ADVICE)
    gpus = NodeGpus(nvml=nvml)
    try:
        with _Turn(wish):
            _take_free(wish, nvml, gpus)
    except BaseException:
        gpus.close()
        raise
    return gpus


def _do_without(wish: Wish, reason: str, hint: str, note: str = "") -> NodeGpus:
    """Leave everything as it is, where nobody asked for GPUs: most executors have none."""
    if wish.count:
        raise wish.refuse(f"{_gpus(wish.count)} wanted, and none can be found: {reason}.", hint=hint)
    return NodeGpus(note=note)


def _take_assigned(wish: Wish, assigned: tuple[str, ...], nvml: Nvml | None) -> NodeGpus:
    count = len(assigned) if wish.count is None else wish.count
    if count > len(assigned):
        raise wish.refuse(
            f"{_gpus(count)} wanted, and Spark assigned {len(assigned)} to the task.",
            cause="Where Spark assigns GPUs, a node uses none but its task's.",
            hint=f"Set spark.task.resource.gpu.amount={count} before the session is made, or lower --gpus-per-node.",
        )
    taken = assigned[:count]
    gpus = NodeGpus(taken, ",".join(taken))
    if taken:
        _hold_assigned(gpus, nvml)
    return gpus


def _hold_assigned(gpus: NodeGpus, nvml: Nvml | None) -> None:
    """Keep nodes of sessions without GPU settings off these; Spark's word stands whoever holds them already."""
    try:
        gpus.nvml = nvml or open_nvml()
    except (ImportError, OSError):
        return
    for device in filter(None, map(gpus.nvml.find, gpus.addresses)):
        hold = _bind(_HELD + device.uuid)
        gpus.holds += [hold] if hold is not None else []


def _take_free(wish: Wish, nvml: Nvml, gpus: NodeGpus) -> None:
    devices = allowed(nvml.devices(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not devices and not wish.count:
        return
    count = _DEFAULT_COUNT if wish.count is None else wish.count
    # CUDA gives a process one slice only, however many it may see.
    fitting = [device for device in devices if count == 1 or not device.parent]
    users: dict[GpuDevice, str] = {}
    taken: list[GpuDevice] = []
    for device in fitting:
        if len(taken) == count:
            break
        hold, user = _try_to_hold(device, nvml)
        if hold is None:
            users[device] = user
        else:
            gpus.holds.append(hold)
            taken.append(device)
    if len(taken) < count and wish.count is not None:
        gpus.close()  # now, not after the next node's turn: for that one they may be enough
        raise _too_few(wish, count, len(taken), devices, users)
    gpus.addresses = tuple(device.uuid for device in taken)
    gpus.visible = ",".join(gpus.addresses)
    if not taken:
        gpus.note = f"tfos_magic: {wish.node} runs without a GPU. In use: {_told(users)}."


def _try_to_hold(device: GpuDevice, nvml: Nvml) -> tuple[socket.socket | None, str]:
    """Return the hold on a GPU, or who else uses it."""
    hold = _bind(_HELD + device.uuid)
    if hold is None:
        pid = _pid_behind(_HELD + device.uuid)
        return None, f"another node (its agent is process {pid})" if pid else "another node"
    pids = nvml.pids_on(device.uuid)
    if not pids:
        return hold, ""
    hold.close()
    return None, f"process {', '.join(map(str, pids))}"


def _too_few(wish: Wish, count: int, free: int, devices: Sequence[GpuDevice], users: dict[GpuDevice, str]) -> GpuError:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f" that CUDA_VISIBLE_DEVICES={visible} allows"
    slices = [device for device in devices if device.parent and device not in users]
    parts = [f"In use: {_told(users)}."] if users else []
    if count > 1 and slices:
        parts.append(f"{len(slices)} of the {len(devices)} are MIG slices, of which a process can use only one.")
    return wish.refuse(f"{_gpus(count)} wanted, {free} free of {len(devices)}{limit}.", cause=" ".join(parts))


def _told(users: Mapping[GpuDevice, str]) -> str:
    told = [f"{device.label} by {user}" for device, user in users.items()]
    more = [f"{len(told) - _DEVICES_TOLD} more"] if len(told) > _DEVICES_TOLD else []
    return "; ".join(told[:_DEVICES_TOLD] + more)


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count != 1 else ''}"


def allowed(devices: Sequence[GpuDevice], visible: str | None) -> list[GpuDevice]:
    """Return those devices that a ``CUDA_VISIBLE_DEVICES`` names, in its order; all for None.

    As CUDA reads it: by index or by the beginning of a UUID, and what names nothing ends the list. The GPU of a slice
    stands for all its slices.
    """
    names = names_in(visible)
    if names is None:
        return list(devices)
    found: dict[GpuDevice, None] = {}
    for name in names:
        matches = [device for device in devices if _is_named(device, name)]
        if not matches:
            break
        found.update(dict.fromkeys(matches))
    return list(found)


def _is_named(device: GpuDevice, name: str) -> bool:
    if name.isdecimal():
        return device.index == int(name)
    return device.uuid.startswith(name) or (bool(device.parent) and device.parent.startswith(name))


# --- names that one process of the host can have ----------------------------------------------------------


def _bind(name: str) -> socket.socket | None:
    """Return a socket that has the name for as long as it is open; None when another has it."""
    hold = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        hold.bind(name)
        hold.listen()
    except OSError:
        hold.close()
        return None
    return hold


def _pid_behind(name: str) -> int:
    """Return the process that has a name; 0 when it has gone meanwhile, or lives in another container."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.connect(name)
            found = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return 0
    return int(struct.unpack("3i", found)[0])


class _Turn:
    """One node of the host at a time.

    Who comes later connects to who is first, and hears of its end when the connection breaks: nothing is polled, and
    one that dies at it lets the next one in.
    """

    def __init__(self, wish: Wish) -> None:
        self._wish = wish
        self._hold: socket.socket | None = None

    def __enter__(self) -> None:
        deadline = time.monotonic() + _TURN_TIMEOUT_S
        while (hold := _bind(_TURN)) is None:
            if time.monotonic() > deadline:
                raise self._wish.refuse(
                    f"another node has been choosing its GPUs for more than {_TURN_TIMEOUT_S:g} s.",
                    cause=f"Process {_pid_behind(_TURN)} waits for the NVIDIA driver.",
                    hint="See whether nvidia-smi answers on that host.",
                )
            _wait_for_end_of(_TURN, deadline - time.monotonic())
        self._hold = hold

    def __exit__(self, *exc_info: object) -> None:
        if self._hold is not None:
            self._hold.close()


def _wait_for_end_of(name: str, timeout_s: float) -> None:
    """Return when the socket with this name has been closed, or after `timeout_s`; at once where there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
        waiting.settimeout(max(timeout_s, 0.001))
        try:
            waiting.connect(name)
            waiting.recv(1)
        except OSError:  # refused or reset: it has just gone; or the time is up, which the caller sees
            return
