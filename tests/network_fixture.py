"""Several hosts on one machine: network namespaces with names and addresses of their own, joined by a bridge.

    with network("driver", "one", "two") as hosts:
        with hosts[1].entered():
            subprocess.Popen(…)     a process of host "one": it can reach the others at 10.77.0.x, and nothing else

A host lives in one process that waits for the end of its input, so all of it is gone with the test run, however that
ends. Bridge and cables lie inside the hosts' namespaces: the machine's own network is neither used nor changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import leftovers
import pytest
from conftest import SparkDaemon

_NAMESPACES = {"net": 0x40000000, "uts": 0x04000000}  # CLONE_NEWNET, CLONE_NEWUTS
_BECOME_HOST = 'echo "$0" > /proc/sys/kernel/hostname && ip link set lo up && echo ready && exec cat'


@dataclass(frozen=True)
class Host:
    """A host name, an address, and the process that keeps both."""

    name: str
    address: str
    pid: int

    @property
    def port(self) -> str:
        """The network interface, on the first host, where this host's cable ends."""
        return f"to-{self.name}"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let the processes and sockets that this thread makes be this host's."""
        with contextlib.ExitStack() as stack:
            for kind in _NAMESPACES:
                home = os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY)
                stack.callback(os.close, home)
                stack.callback(_set_namespace, home, kind)
            for kind in _NAMESPACES:
                there = os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY)
                stack.callback(os.close, there)
                _set_namespace(there, kind)
            yield


def _set_namespace(descriptor: int, kind: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _NAMESPACES[kind]) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def network(*names: str) -> Iterator[tuple[Host, ...]]:
    """Hosts that reach each other; the bridge is part of the first."""
    with contextlib.ExitStack() as stack:
        hosts = tuple(
            stack.enter_context(_host(name, f"10.77.0.{number}")) for number, name in enumerate(names, start=1)
        )
        first = hosts[0]
        _ip(first, "link add switch type bridge")
        _ip(first, f"address add {first.address}/24 dev switch")
        _ip(first, "link set switch up")
        for host in hosts[1:]:
            _ip(first, f"link add {host.port} type veth peer name eth0 netns {host.pid}")
            _ip(first, f"link set {host.port} master switch up")
            _ip(host, f"address add {host.address}/24 dev eth0")
            _ip(host, "link set eth0 up")
        yield hosts


@contextlib.contextmanager
def _host(name: str, address: str) -> Iterator[Host]:
    process = subprocess.Popen(
        ["unshare", "--net", "--uts", "sh", "-c", _BECOME_HOST, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    leftovers.allow_tree(process.pid)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield Host(name, address, process.pid)
    finally:
        process.communicate()  # closes its input
        leftovers.forbid_tree(process.pid)


def _ip(host: Host, arguments: str) -> None:
    with host.entered():
        subprocess.run(["ip", *arguments.split()], check=True)


def why_no_network() -> str:
    """Return what keeps this machine from having such hosts; empty when nothing does."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found (Debian: apt-get install iproute2 util-linux)"
    rest = "ip link add switch type bridge && ip link add end1 type veth peer name end2"
    command = ["unshare", "--net", "--uts", "sh", "-c", f"{_BECOME_HOST.replace('exec cat', rest)}", "trial"]
    tried = subprocess.run(command, capture_output=True, text=True)
    return f"no network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True)
class SparkHosts:
    """A standalone cluster over three hosts: the driver's, where the master runs too, and two workers' of two slots."""

    master_url: str
    driver: Host
    workers: tuple[Host, ...]

    @property
    def conf(self) -> dict[str, str]:
        """Spark settings of a driver on its host."""
        return {
            "spark.driver.host": self.driver.address,
            "spark.driver.bindAddress": self.driver.address,
            "spark.executor.memory": "1g",
        }

    @property
    def environ(self) -> dict[str, str]:
        """What goes into such a driver's environment."""
        return {"SPARK_LOCAL_IP": self.driver.address}


@contextlib.contextmanager
def spark_on_hosts(directories: pytest.TempPathFactory) -> Iterator[SparkHosts]:
    """Start a master and two workers, each on its host."""
    with network("driver", "one", "two") as (driver, *workers), contextlib.ExitStack() as stack:

        def daemon(host: Host, name: str, *arguments: str) -> SparkDaemon:
            with host.entered():
                made = SparkDaemon(name, ["--host", host.address, *arguments], {"SPARK_LOCAL_IP": host.address})
            return stack.enter_context(made)

        url = daemon(driver, "master.Master", "--port", "0").wait_for(r"Starting Spark master at (spark://\S+)")
        for host in workers:
            place = ["--work-dir", str(directories.mktemp(f"spark-work-{host.name}"))]
            worker = daemon(host, "worker.Worker", "--cores", "2", "--memory", "3g", *place, url)
            worker.wait_for(r"Successfully registered with master")
        yield SparkHosts(url, driver, tuple(workers))
