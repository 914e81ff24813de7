"""Which GPUs a node gets; NVML's side is `fake_gpus`, all else is real: processes, names, Spark, TensorFlow."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tfos_magic import arguments, cluster, machine
from tfos_magic.errors import GpuError, UsageError
from tfos_magic.failures import Failure, error_of, root_of
from tfos_magic.machine import GpuDevice, MachineSampler, PyNvml, open_nvml
from tfos_magic.node import gpus as gpus_module
from tfos_magic.node.gpus import NodeGpus, Wish, allowed, choose
from tfos_magic.status import GpuSample

HERE = Path(__file__).parent
Script = Callable[..., "subprocess.CompletedProcess[str]"]


class Host:
    """A host's GPUs, as NVML will tell: here, and to the processes that get `environ`."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "gpus.json"
        self._mark = uuid.uuid4().hex[:8]  # other test runs on this machine hold names of their own
        libraries = directory / "lib"
        libraries.mkdir()
        # Any library will do: that there is one tells of a driver.
        (libraries / "libnvidia-ml.so.1").symlink_to(_a_library())
        self.environ = {
            "FAKE_GPUS": str(self._file),
            "PYTHONPATH": f"{HERE / 'fake_gpus'}{os.pathsep}{HERE}",
            "LD_LIBRARY_PATH": str(libraries),
        }
        self.has(0)

    def has(self, count: int, *, error: str = "", slow_s: float = 0, **changes: dict[str, Any]) -> list[str]:
        """Give the host so many GPUs; ``gpu1={"pids": [7]}`` changes the second. Return their UUIDs."""
        gpus = [{"uuid": f"GPU-{self._mark}-{index}", "load": 10 + index, "used": 2**30} for index in range(count)]
        for name, change in changes.items():
            gpus[int(name.removeprefix("gpu"))].update(change)
        self._file.write_text(json.dumps({"error": error, "slow_s": slow_s, "gpus": gpus}), encoding="utf-8")
        return [str(gpu["uuid"]) for gpu in gpus]

    def held(self) -> list[str]:
        """Return which of them some process holds, in their order."""
        names = re.findall(rf"@tfos_magic-gpu-(\S+-{self._mark}-\S+)$", _open_sockets(), re.MULTILINE)
        return sorted(set(names))

    def slices(self, count: int, **first: Any) -> dict[str, Any]:
        """Return what makes a GPU one in MIG mode; `first` describes its first slice."""
        found = [{"uuid": f"MIG-{self._mark}-{uuid.uuid4()}", "used": 2**28} for _ in range(count)]
        if found:
            found[0].update(first)
        return {"slices": found}


def _open_sockets() -> str:
    return Path("/proc/net/unix").read_text(encoding="utf-8")


def _a_library() -> str:
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return next(path for path in re.findall(r"/\S+\.so\S*$", maps, re.MULTILINE) if "/libc" in path)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    spec = importlib.util.spec_from_file_location("pynvml", HERE / "fake_gpus" / "pynvml.py")
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setenv("FAKE_GPUS", made.environ["FAKE_GPUS"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


@pytest.fixture
def give(host: Host) -> Iterator[Callable[..., NodeGpus]]:
    """Return a function that chooses for one more node; what it gives is given back after the test."""
    given = []

    def one(count: int | None = None, assigned: tuple[str, ...] | None = None) -> NodeGpus:
        given.append(choose(Wish("worker:0", "h", count, assigned), PyNvml()))
        return given[-1]

    yield one
    for gpus in given:
        gpus.close()
    assert not host.held(), "a name is still taken"


# --- free ones --------------------------------------------------------------------------------------------


def test_each_node_gets_one_that_no_other_has(host: Host, give: Callable[..., NodeGpus]) -> None:
    ours = host.has(3)
    nodes = [give() for _ in range(4)]
    assert [node.addresses for node in nodes] == [(ours[0],), (ours[1],), (ours[2],), ()]
    assert [node.visible for node in nodes] == [*ours, ""]
    assert [bool(node.note) for node in nodes] == [False, False, False, True]
    pid = f"another node (its agent is process {os.getpid()})"
    assert nodes[-1].note == (
        f"tfos_magic: worker:0 runs without a GPU. In use: GPU 0 by {pid}; GPU 1 by {pid}; GPU 2 by {pid}."
    )
    assert host.held() == ours
    nodes[1].close()
    assert give().addresses == (ours[1],)


def test_several_for_one_node(host: Host, give: Callable[..., NodeGpus]) -> None:
    ours = host.has(5)
    assert give(2).visible == f"{ours[0]},{ours[1]}"
    assert give(3).addresses == tuple(ours[2:])


def test_one_on_which_a_process_computes_is_not_free(host: Host, give: Callable[..., NodeGpus]) -> None:
    ours = host.has(2, gpu0={"pids": [4711, 4712]})
    assert give().addresses == (ours[1],)


def test_where_the_driver_does_not_tell_who_computes_it_counts_as_free(
    host: Host, give: Callable[..., NodeGpus]
) -> None:
    ours = host.has(1, gpu0={"is_old": True, "pids": [4711]})
    assert give().addresses == (ours[0],)


def test_a_lost_gpu_is_not_given_away(host: Host, give: Callable[..., NodeGpus]) -> None:
    ours = host.has(2, gpu0={"lost": True})
    assert give().addresses == (ours[1],)


def test_too_few_are_an_error_that_says_who_has_the_others_and_none_is_kept(
    host: Host, give: Callable[..., NodeGpus]
) -> None:
    host.has(4, gpu0={"pids": [4711]}, gpu1={"pids": [12, 13]})
    give()
    with pytest.raises(GpuError) as caught:
        give(2)
    error = caught.value
    assert (error.node, error.host) == ("worker:0", "h")
    assert error.fact == "worker:0 on h: 2 GPUs wanted, 1 free of 4."
    assert error.cause == (
        f"In use: GPU 0 by process 4711; GPU 1 by process 12, 13; "
        f"GPU 2 by another node (its agent is process {os.getpid()})."
    )
    assert "--gpus-per-node" in error.hint
    assert give(1).addresses  # the one that was free still is


def test_a_long_list_of_others_is_cut(host: Host, give: Callable[..., NodeGpus]) -> None:
    host.has(11, **{f"gpu{index}": {"pids": [index]} for index in range(11)})
    with pytest.raises(GpuError, match="GPU 7 by process 7; 3 more"):
        give(1)


def test_none_wanted_is_none_seen_and_nvml_is_not_even_asked(host: Host) -> None:
    gpus = choose(Wish("worker:0", "h", 0))
    assert (gpus.visible, gpus.addresses, gpus.nvml) == ("", (), None)


# --- CUDA_VISIBLE_DEVICES of the environment --------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "given"),
    [("2,0", [2, 0]), ("1", [1]), ("0,-1,1", [0]), ("7,0", []), ("", []), ("NoDevFiles", []), ("0, 0,2", [0, 2])],
)
def test_only_what_the_environment_allows_is_given_away_in_its_order(
    host: Host,
    give: Callable[..., NodeGpus],
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    given: list[int],
) -> None:
    ours = host.has(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [give(1).addresses for _ in given] == [(ours[index],) for index in given]
    with pytest.raises(GpuError, match=re.escape(f"free of {len(given)} that CUDA_VISIBLE_DEVICES={visible} allows.")):
        give(1)


def test_where_the_environment_allows_none_nothing_is_changed(
    host: Host, give: Callable[..., NodeGpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    host.has(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpus = give()
    assert (gpus.visible, gpus.addresses, gpus.note) == (None, (), "")


def test_names_may_be_the_beginning_of_a_uuid_or_the_gpu_of_a_slice() -> None:
    devices = [GpuDevice(0, "GPU-aa11"), GpuDevice(1, "MIG-1", "GPU-bb22"), GpuDevice(1, "MIG-2", "GPU-bb22")]
    assert allowed(devices, "GPU-aa") == devices[:1]
    assert allowed(devices, "MIG-2,GPU-aa11") == [devices[2], devices[0]]
    assert allowed(devices, "1") == allowed(devices, "GPU-bb22") == devices[1:]
    assert allowed(devices, None) == devices


# --- MIG --------------------------------------------------------------------------------------------------


def test_of_a_gpu_in_mig_mode_the_slices_are_given_away(host: Host, give: Callable[..., NodeGpus]) -> None:
    mig = host.slices(2)
    ours = host.has(2, gpu0=mig)
    nodes = [give() for _ in range(4)]
    names = [each["uuid"] for each in mig["slices"]]
    assert [node.visible for node in nodes] == [*names, ours[1], ""]
    assert f"{names[0]} of GPU 0 by another node" in nodes[-1].note


def test_a_slice_in_use_is_left_to_its_user_and_a_gpu_without_slices_is_none(
    host: Host, give: Callable[..., NodeGpus]
) -> None:
    mig = host.slices(2, pids=[99])
    host.has(2, gpu0={"slices": []}, gpu1=mig)
    assert give(1).addresses == (mig["slices"][1]["uuid"],)
    with pytest.raises(GpuError, match="0 free of 2"):
        give(1)


def test_several_slices_are_no_use_to_one_process(host: Host, give: Callable[..., NodeGpus]) -> None:
    host.has(2, gpu0=host.slices(3))
    with pytest.raises(GpuError, match="1 free of 4") as caught:
        give(2)
    assert caught.value.cause == "3 of the 4 are MIG slices, of which a process can use only one."


def test_a_slice_is_sampled_with_its_own_memory_and_its_gpus_number(host: Host) -> None:
    mig = host.slices(2)
    host.has(2, gpu1=mig)
    sampler = MachineSampler(os.getpid(), [mig["slices"][1]["uuid"]], PyNvml())
    assert sampler.sample().gpus == (GpuSample(1, "Fake MIG 1g.5gb", None, 2**28, 2**34, None, None),)


def test_a_gpu_that_is_lost_meanwhile_is_no_longer_shown(host: Host) -> None:
    ours = host.has(2)
    sampler = MachineSampler(os.getpid(), ours, PyNvml())
    assert [gpu.utilization_percent for gpu in sampler.sample().gpus] == [10, 11]
    host.has(2, gpu0={"lost": True})
    assert [gpu.utilization_percent for gpu in sampler.sample().gpus] == [11]


# --- Spark's addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "visible"), [(None, "2,0,1"), (3, "2,0,1"), (2, "2,0"), (0, "")])
def test_what_spark_assigned_is_taken_the_first_of_it_if_fewer_are_wanted(
    host: Host, give: Callable[..., NodeGpus], count: int | None, visible: str
) -> None:
    host.has(3, gpu2={"pids": [1]})
    gpus = give(count, ("2", "0", "1"))
    assert gpus.visible == visible
    assert ",".join(gpus.addresses) == visible


def test_more_than_spark_assigned_is_an_error_that_names_its_setting(give: Callable[..., NodeGpus]) -> None:
    with pytest.raises(GpuError, match="worker:0 on h: 2 GPUs wanted, and Spark assigned 1 to the task") as caught:
        give(2, ("0",))
    assert "spark.task.resource.gpu.amount=2" in caught.value.hint


def test_nodes_for_which_spark_does_not_choose_keep_off_what_it_assigned(
    host: Host, give: Callable[..., NodeGpus]
) -> None:
    ours = host.has(3)
    give(None, ("0",))
    give(None, (ours[2],))
    assert give().addresses == (ours[1],)
    assert give(None, ("1",)).visible == "1"  # Spark's word stands
    assert give().visible == ""


def test_sparks_addresses_need_no_nvml(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert choose(Wish("worker:0", "h", None, ("1",))).visible == "1"


def test_a_parameter_server_gets_none_unless_spark_assigned_some() -> None:
    config = {"nodes": ["chief:0", "ps:0", "evaluator:0"], "gpus": None, "gpus_per_node": 2}
    assert [Wish.of({**config, "index": index}).count for index in range(3)] == [2, 0, 2]
    assigned = Wish.of({**config, "index": 1, "gpus": ["3"]})
    assert (assigned.count, assigned.assigned, assigned.host) == (None, ("3",), socket.gethostname())


# --- no driver, no library, no GPU ------------------------------------------------------------------------


def without_driver(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(machine, "_DRIVER_LIBRARY", "libnvidia-ml-missing.so.1")
    return "there is no NVIDIA driver"


def without_binding(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(machine, "_DRIVER_LIBRARY", _a_library())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return "nvidia-ml-py is missing"


def with_broken_driver(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(machine, "_DRIVER_LIBRARY", _a_library())
    Path(os.environ["FAKE_GPUS"]).write_text('{"error": "Driver/library version mismatch"}', encoding="utf-8")
    return "Driver/library version mismatch"


def with_driver_alone(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(machine, "_DRIVER_LIBRARY", _a_library())
    return "0 free of 0"


@pytest.mark.parametrize("hosts", [without_driver, without_binding, with_broken_driver, with_driver_alone])
def test_on_a_host_without_gpus_nothing_is_done_unless_some_were_wanted(
    host: Host, monkeypatch: pytest.MonkeyPatch, hosts: Callable[[pytest.MonkeyPatch], str]
) -> None:
    reason = hosts(monkeypatch)
    gpus = choose(Wish("worker:1", "h"))
    assert (gpus.visible, gpus.addresses) == (None, ())
    gpus.close()
    assert gpus.note == (
        "tfos_magic: nvidia-ml-py is missing, so nodes may use the same GPUs." if hosts is without_binding else ""
    )
    with pytest.raises(GpuError, match=f"worker:1 on h: 2 GPUs wanted.*{reason}") as caught:
        choose(Wish("worker:1", "h", 2))
    assert caught.value.hint


def test_a_host_without_a_driver_is_not_even_made_to_import_the_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    without_driver(monkeypatch)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    with pytest.raises(OSError, match="no NVIDIA driver"):
        open_nvml()
    assert "pynvml" not in sys.modules


# --- real processes ---------------------------------------------------------------------------------------

NODE = """
import json, sys
from tfos_magic.errors import GpuError
from tfos_magic.node.gpus import Wish, choose
print("up", flush=True)
sys.stdin.readline()
try:
    gpus = choose(Wish("worker:0", "h", {count}))
    print(json.dumps(gpus.addresses), flush=True)
except GpuError as error:
    print(json.dumps(error.fact), flush=True)
sys.stdin.read()
"""


class Nodes:
    """Processes that choose GPUs when told to, and keep them until they end."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._environ = {**os.environ, **environ}
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, number: int, count: int) -> list[subprocess.Popen[str]]:
        command = [sys.executable, "-c", NODE.format(count=count)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(command, env=self._environ, **pipes) for _ in range(number)]
        self._processes += started
        assert [node.stdout.readline() for node in started] == ["up\n"] * number
        return started

    @staticmethod
    def choose(nodes: list[subprocess.Popen[str]]) -> list[Any]:
        for node in nodes:
            node.stdin.write("go\n")
            node.stdin.flush()
        return [json.loads(node.stdout.readline()) for node in nodes]

    def close(self) -> None:
        for node in self._processes:
            node.kill()
            node.communicate()


@pytest.fixture
def nodes(host: Host) -> Iterator[Nodes]:
    made = Nodes(host.environ)
    yield made
    made.close()
    assert not host.held(), "a process is gone, and a name still taken"


@pytest.mark.parametrize(("number", "count", "gpus"), [(10, 1, 10), (8, 2, 7), (6, 3, 6)])
def test_nodes_that_choose_at_once_get_different_gpus_and_as_many_nodes_as_can_have_theirs(
    host: Host, nodes: Nodes, number: int, count: int, gpus: int
) -> None:
    ours = host.has(gpus, slow_s=0.02)  # so that they would get in each other's way
    said = nodes.choose(nodes.start(number, count))
    served = [each for each in said if isinstance(each, list)]
    given = [gpu for each in served for gpu in each]
    assert len(served) == min(number, gpus // count), said
    assert len(set(given)) == len(given)
    assert set(given) <= set(ours)
    left = gpus - len(given)
    wanted = f"worker:0 on h: {count} GPUs wanted, {left} free of {gpus}."
    assert [each for each in said if isinstance(each, str)] == [wanted] * (number - len(served))


def test_what_a_killed_process_had_is_free_at_once(host: Host, nodes: Nodes) -> None:
    ours = host.has(2)
    first, second, third = nodes.start(3, 2)
    assert nodes.choose([first]) == [ours]
    assert "0 free of 2" in nodes.choose([second])[0]
    first.kill()
    first.wait()
    assert nodes.choose([third]) == [ours]


def test_who_dies_while_it_chooses_keeps_nobody_waiting(host: Host, nodes: Nodes) -> None:
    ours = host.has(1)
    code = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind('\\0tfos_magic-gpus'); s.listen(); " + (
        "print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stuck:
        assert stuck.stdout.readline() == b"up\n"
        (node,) = nodes.start(1, 1)
        node.stdin.write("go\n")
        node.stdin.flush()
        time.sleep(0.3)  # it waits its turn meanwhile
        assert not host.held()
        stuck.kill()
    assert json.loads(node.stdout.readline()) == ours
    assert host.held() == ours


def test_a_driver_that_never_answers_one_node_is_an_error_to_the_next(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.has(1)
    monkeypatch.setattr(gpus_module, "_TURN_TIMEOUT_S", 0.3)
    with (
        gpus_module._Turn(Wish("worker:1", "h")),
        pytest.raises(GpuError, match=r"worker:0 on h: .* than 0\.3 s") as caught,
    ):
        choose(Wish("worker:0", "h"), PyNvml())
    assert caught.value.cause == f"Process {os.getpid()} waits for the NVIDIA driver."
    choose(Wish("worker:0", "h", 1), PyNvml()).close()


# --- the option -------------------------------------------------------------------------------------------


def test_the_option_of_both_magics() -> None:
    def of(line: str) -> Any:
        return arguments.parse_train(f"-n 2 {line}", {"n": 3}).gpus_per_node

    assert [of(""), of("--gpus-per-node 0"), of("--gpus-per-node 2"), of("--gpus-per-node {n}")] == [None, 0, 2, 3]
    assert "--gpus-per-node" in arguments.option_strings("tfos_infer")
    with pytest.raises(UsageError, match="--gpus-per-node -1: -1 is negative"):
        of("--gpus-per-node -1")
    with pytest.raises(UsageError, match="--gpus-per-node two: a whole number is needed"):
        of("--gpus-per-node two")


def test_the_option_is_checked_without_a_magic_too() -> None:
    assert cluster.RunOptions(num_nodes=1).gpus_per_node is None
    with pytest.raises(UsageError, match="gpus_per_node is -2"):
        cluster.RunOptions(num_nodes=1, gpus_per_node=-2)


class Settings:
    """A session's settings, and of its executors what is asked before anything of GPUs."""

    def __init__(self, amount: str | None) -> None:
        self.amount = amount

    def getConf(self) -> Settings:
        return self

    def get(self, name: str) -> str | None:
        assert name == "spark.task.resource.gpu.amount"
        return self.amount


@pytest.mark.parametrize(
    ("amount", "wanted", "said"),
    [
        (None, None, []),
        (None, 2, ["GPUs: 2 free ones of its host for each node (--gpus-per-node)"]),
        (None, 0, ["GPUs: each node hides its host's GPUs (--gpus-per-node)"]),
        ("2", None, ["GPUs: Spark assigns 2 to each node (spark.task.resource.gpu.amount=2)"]),
        ("0.5", 1, ["GPUs: Spark assigns 1 to each node (spark.task.resource.gpu.amount=0.5); it uses 1"]),
        (
            "1",
            2,
            ["GPUs: Spark assigns 1 to each node (spark.task.resource.gpu.amount=1), too few for --gpus-per-node 2"],
        ),
    ],
)
def test_a_dry_run_tells_of_gpus_where_somebody_named_some(
    amount: str | None, wanted: int | None, said: list[str]
) -> None:
    options = cluster.RunOptions(num_nodes=2, gpus_per_node=wanted)
    assert cluster._plan_of_gpus(Settings(amount), options) == said


def test_a_nodes_error_arrives_as_it_was_whatever_fails_with_it() -> None:
    error = GpuError("worker:0 on h: 2 GPUs wanted.", node="worker:0", host="h", cause="why", hint="do")
    report = Failure.from_report(1, {"type": "failure", "kind": "gpu", "error": error.to_json()})
    failures = [Failure("launch", error=GpuError("Spark ended the tasks")), Failure("lost", node=0), report]
    shown = error_of(root_of(failures), failures, {}, {})
    assert (type(shown), shown.__dict__) == (GpuError, error.__dict__)


# --- Spark ------------------------------------------------------------------------------------------------

BEGIN = """
import json, os, sys, time
from pathlib import Path
from pyspark.sql import SparkSession
from runs import run_cell, start_cell
from tfos_magic.errors import GpuError
from tfos_magic.status import StatusBoard
from tfos_magic.widgets import words
spark = SparkSession.builder.getOrCreate()
host = Path(os.environ["FAKE_GPUS"])
gpus = [gpu["uuid"] for gpu in json.loads(host.read_text())["gpus"]]
BORN_WITH = '''
import os
from pathlib import Path
born_with = dict(pair.partition("=")[::2] for pair in Path("/proc/self/environ").read_text().split("\\\\0"))
'''

def run(nodes, body=BORN_WITH + "born_with.get('CUDA_VISIBLE_DEVICES')", **options):
    return run_cell(spark, body, nodes, **options).values

def held():
    names = Path("/proc/net/unix").read_text()
    return [gpu for gpu in gpus if f"tfos_magic-gpu-{gpu}\\n" in names]

def refused(nodes, **options):
    try:
        run(nodes, **options)
    except GpuError as error:
        return error
    raise AssertionError("it ran")
"""


@pytest.fixture
def script(spark_script: Script, host: Host) -> Script:
    def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
        env = {**host.environ, "CUDA_VISIBLE_DEVICES": None, **options.pop("env", {})}
        return spark_script(BEGIN + textwrap.dedent(code), env=env, **options)

    return run


@pytest.mark.slow
def test_nodes_of_one_host_and_of_two_clusters_have_gpus_of_their_own(script: Script, host: Host) -> None:
    host.has(4, gpu1={"pids": [4711]})
    done = script(
        """
        board, second_board = StatusBoard(), StatusBoard()
        first = start_cell(spark, "import threading; threading.Event().wait()", 2, feeds=(), on_event=board.apply,
                           preload=())
        assert held() == [gpus[0], gpus[2]]
        assert run(1, on_event=second_board.apply) == [gpus[3]]
        error = refused(2, gpus_per_node=1)
        assert error.node in ("chief:0", "worker:0")
        assert ": 1 GPU wanted, 0 free of 4." in error.fact, error.fact
        assert "GPU 0 by another node (its agent is process " in error.cause, error.cause
        assert "GPU 1 by process 4711; " in error.cause, error.cause
        print(error)
        without = StatusBoard()
        assert sorted(run(2, on_event=without.apply)) == ["", gpus[3]]
        (told,) = [line.text if hasattr(line, "text") else line for name in ("chief:0", "worker:0")
                   for line in without.logs(name) if "without a GPU" in str(line)]
        assert "GPU 1 by process 4711" in told, told
        shown = sorted(words.gpu(node.machine.gpus) for node in without.view().nodes)
        assert shown[0].startswith("13 % · 1.0") and shown[1] == "–", shown
        first.close()
        assert held() == []
        assert [[gpu.utilization_percent for gpu in node.machine.gpus] for node in board.view().nodes] in (
            [[10.0], [12.0]], [[12.0], [10.0]])
        assert [gpu.index for node in second_board.view().nodes for gpu in node.machine.gpus] == [3]
        print("all well")
        """
    )
    assert "all well" in done.stdout
    assert re.search(r"(chief|worker):0 on \S+: 1 GPU wanted, 0 free of 4\.\nIn use: GPU 0 by", done.stdout)


@pytest.mark.slow
def test_tensorflow_is_imported_when_the_nodes_gpus_are_settled_and_several_may_be_wanted(
    script: Script, host: Host
) -> None:
    host.has(5)
    done = script(
        """
        body = BORN_WITH + '''
        import sys
        seen = "tensorflow" in sys.modules, born_with["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_VISIBLE_DEVICES"]
        seen
        '''.replace("\\n        ", "\\n")
        values = run(2, body, preload=("tensorflow",), gpus_per_node=2)
        assert sorted(values) == [(True, gpus[0] + "," + gpus[1],) * 1 + (gpus[0] + "," + gpus[1],),
                                  (True, gpus[2] + "," + gpus[3], gpus[2] + "," + gpus[3])], values
        assert held() == []
        error = refused(2, gpus_per_node=3)    # one of them could have its three
        assert "3 GPUs wanted, 2 free of 5." in error.fact, error.fact
        assert held() == []
        assert run(2, gpus_per_node=0) == ["", ""]
        print("all well")
        """
    )
    assert "all well" in done.stdout


@pytest.mark.slow
def test_whatever_is_wrong_with_the_hosts_gpus_a_run_that_wants_none_works(script: Script, host: Host) -> None:
    host.has(1)
    done = script(
        """
        board = StatusBoard()
        host.write_text(json.dumps({"error": "Driver/library version mismatch"}))
        assert run(2, on_event=board.apply) == [None, None]
        assert [words.gpu(node.machine.gpus) for node in board.view().nodes] == ["–", "–"]
        assert "Driver/library version mismatch" in refused(1, gpus_per_node=1).fact
        host.write_text(json.dumps({"gpus": [{"uuid": "GPU-lost", "lost": True}]}))
        assert run(1) == [None]
        # Parameter servers leave the GPUs to those that train.
        host.write_text(json.dumps({"gpus": [{"uuid": gpus[0], "used": 1 << 30}]}))
        body = BORN_WITH + '''
        import time
        Path(args.directory, ctx.job_name + ".new").write_text(born_with.get("CUDA_VISIBLE_DEVICES", "all"))
        Path(args.directory, ctx.job_name + ".new").rename(Path(args.directory, ctx.job_name))
        while not Path(args.directory, "ps").exists():
            time.sleep(0.05)
        '''.replace("\\n        ", "\\n")
        run(2, body, num_ps=1, args={"directory": str(host.parent)})
        assert [(host.parent / role).read_text() for role in ("chief", "ps")] == [gpus[0], ""]
        print("all well")
        """
    )
    assert "all well" in done.stdout


@pytest.mark.slow
def test_what_spark_assigned_is_used_as_far_as_it_is_wanted(script: Script, host: Host, tmp_path: Path) -> None:
    ours = host.has(4)
    discovery = tmp_path / "discovery.sh"
    discovery.write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["0", "1", "2", "3"]}'\n""")
    discovery.chmod(0o755)
    done = script(
        f"""
        from tfos_magic import cluster, session
        deadline = time.monotonic() + 30
        while session.slot_count(spark.sparkContext) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert gpus == {ours!r}
        board = StatusBoard()
        both = run(2, on_event=board.apply)
        assert sorted(both) == ["0,1", "2,3"], both
        assert sorted(gpu.index for node in board.view().nodes for gpu in node.machine.gpus) == [0, 1, 2, 3]
        assert sorted(run(2, gpus_per_node=1)) == ["0", "2"]
        error = refused(2, gpus_per_node=3)
        assert "3 GPUs wanted, and Spark assigned 2 to the task." in error.fact, error.fact
        assert "spark.task.resource.gpu.amount=3" in error.hint, error.hint
        print("\\n".join(cluster.plan(spark, cluster.RunOptions(num_nodes=2, gpus_per_node=1))))
        print("all well")
        """,
        master="local-cluster[1,2,1024]",
        conf={
            "spark.worker.resource.gpu.amount": "4",
            "spark.worker.resource.gpu.discoveryScript": str(discovery),
            "spark.executor.resource.gpu.amount": "4",
            "spark.task.resource.gpu.amount": "2",
        },
    )
    assert "all well" in done.stdout
    assert "GPUs: Spark assigns 2 to each node (spark.task.resource.gpu.amount=2); it uses 1\n" in done.stdout
