"""The agent: owns a node's child, speaks for it to the driver, and guarantees that nothing of it survives.

Runs on: executor, in a process and session of its own.

                      ┌───────────── agent: one asyncio loop ──────────────┐
    driver ◄──TCP────►│ rendezvous     hello, beats, logs, result │ start, │
                      │                publish, feed end, stop             │
    feed tasks ──TCP─►│ receiver ─► spool, which tasks on this host write │
    child ◄─channel──►│ states, metrics, result │ start, chunks, exit      │
    child ──stdout───►│ log lines, bounded                                 │
    Spark ──lifeline──│ end-of-file: the task was killed                   │
    JVM ────pidfd─────│ readable: the executor died                        │
                      └────────────────────────────────────────────────────┘

Whatever ends first, the end is the same: the child gets SIGTERM, then SIGKILL, then every descendant that is left
(the agent is their sub-reaper, so none can hide by double forking) is killed and reaped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tfos_magic.node import channel
from tfos_magic.node.output import OutputLines, OutputPipe, bytes_per_beat
from tfos_magic.node.processes import become_subreaper, kill_descendants
from tfos_magic.status import beat_interval_s

if TYPE_CHECKING:
    import asyncio

    from tfos_magic.feed.receiver import FeedReceiver
    from tfos_magic.feed.staging import FeedNotice
    from tfos_magic.machine import MachineSampler
    from tfos_magic.node.gpus import NodeGpus
    from tfos_magic.node.tensorboard import TensorBoard
    from tfos_magic.rendezvous import Connection, Message

READY = b"ready\n"
_TERM_GRACE_S = 0.5
_EXIT_GRACE_S = 1.5
_BOOT = "import sys; sys.path[0] = '/proc/self/fd/{archive}'; from tfos_magic.node.child import main; main({fds})"


def main(archive_fd: int, config_fd: int, payload_fd: int, lifeline_fd: int) -> None:
    """Run the node until it is over, and exit."""
    become_subreaper()
    config = json.loads(channel.read_all(config_fd))
    from tfos_magic.rendezvous import Connection

    connection = Connection.take_over(config["connection"])
    gpus = _gpus_or_exit(config, connection)
    config.update(gpus=gpus.addresses, gpu_note=gpus.note)
    agent = None
    # AutoGraph and others leave files there when their process is killed.
    scratch = tempfile.mkdtemp(prefix="tfos_magic-", dir=scratch_directory())
    try:
        descriptors = (archive_fd, config_fd, payload_fd)
        child = Child(descriptors, scratch, gpus.visible)  # first of all: TensorFlow's import takes the time
        try:
            agent = Agent(config, connection, child)
            _tell_task_ready()
            agent.run(lifeline_fd)
        finally:
            child.kill()
    finally:
        kill_descendants()
        shutil.rmtree(scratch, ignore_errors=True)
        if agent is not None:
            agent.close()
        gpus.close()  # the child is gone: they are free
        os._exit(0)


def _gpus_or_exit(config: dict[str, Any], connection: Connection) -> NodeGpus:
    """Return what the node may use; where it cannot have what it should, tell the driver why, and end the node."""
    from tfos_magic.errors import GpuError
    from tfos_magic.node.gpus import Wish, choose

    try:
        return choose(Wish.of(config))
    except GpuError as error:
        _tell_task_ready()  # a task that fails is tried again, and that would not help
        with contextlib.suppress(OSError):
            connection.send({"type": "failure", "kind": "gpu", "error": error.to_json()})
        os._exit(0)


def _tell_task_ready() -> None:
    with contextlib.suppress(BrokenPipeError):  # the task may have been killed meanwhile
        os.write(1, READY)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.close(devnull)


class Child:
    """The user's process as its agent sees it: started here, watched here, killed here.

    Parameters
    ----------
    files : tuple of int
        Descriptors of the package, the configuration and the packed function.
    scratch : str
        Its directory for temporary files.
    visible_gpus : str, optional
        ``CUDA_VISIBLE_DEVICES``; None leaves it as it is here.
    """

    def __init__(self, files: tuple[int, int, int], scratch: str, visible_gpus: str | None) -> None:
        self.channel, theirs = channel.pair()
        descriptors = [*files, theirs.fileno()]
        boot = _BOOT.format(archive=files[0], fds=", ".join(map(str, [*descriptors[1:], os.getpid()])))
        # From birth: whatever the child imports ahead may look at the GPUs, and then has looked for good.
        visible = {} if visible_gpus is None else {"CUDA_VISIBLE_DEVICES": visible_gpus}
        output, theirs_output = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", boot],
                stdin=subprocess.DEVNULL,
                stdout=theirs_output,
                stderr=theirs_output,
                pass_fds=descriptors,
                env={**os.environ, "TMPDIR": scratch, **visible},
            )
        finally:
            theirs.close()
            os.close(theirs_output)
        self.output = output
        self.scratch = scratch
        self.started_at = time.time()

    def kill(self) -> None:
        """End the process whatever it does, and reap it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Agent:
    """The loop between driver, child, feed and Spark's task.

    Parameters
    ----------
    config : dict
        What the cluster and the task wrote down.
    connection : Connection
        To the driver, from Spark's task.
    child : Child
        Already started.
    """

    def __init__(self, config: dict[str, Any], connection: Connection, child: Child) -> None:
        self._config = config
        self._connection = connection
        self._child = child
        self._output = OutputPipe(child.output)
        self._lines = OutputLines(bytes_per_beat(config["num_nodes"]))
        self._outbox: deque[tuple[Mapping[str, Any], int | None]] = deque()
        self._counters: dict[str, Any] = {}
        self._has_answered = False  # the child sent its result or its failure
        self._is_stopping = False
        self._receiver: FeedReceiver | None = None
        self._queue_feeds: dict[str, list[str]] = {}
        self._sampler: MachineSampler | None = None
        self._tensorboard: TensorBoard | None = None
        self._beat_interval_s = beat_interval_s(config["num_nodes"])
        self._host: str = connection.socket.getsockname()[0]
        # Held with SO_REUSEPORT and never listened on: TensorFlow binds the same port, and nobody else gets it.
        self._port = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._port.bind((self._host, 0))
        self._loop: asyncio.AbstractEventLoop

    def run(self, lifeline_fd: int) -> None:
        """Say hello and serve until the driver, Spark or the executor ends the node."""
        import asyncio

        self._loop = loop = asyncio.new_event_loop()
        self._child.channel.setblocking(False)  # nothing that this loop does may wait: it must always hear "stop"
        self._hello()
        loop.add_reader(self._connection.socket, self._guarded, self._from_driver)
        loop.add_reader(self._child.channel, self._guarded, self._from_child)
        self._listen_to_output()
        loop.add_reader(lifeline_fd, self._from_lifeline, lifeline_fd)
        for pid, action in ((self._child.process.pid, self._child_exited), (self._config["executor_jvm"], loop.stop)):
            descriptor = os.pidfd_open(pid)
            loop.add_reader(descriptor, self._once, descriptor, action)
        loop.call_soon(self._beat)
        loop.run_forever()

    def close(self) -> None:
        """Give back port, feed server and sampler; the child must be gone.

        The connection stays open until the kernel closes it with the process: to the driver a closed connection means
        that nothing of this node is left, so nothing may be.
        """
        for resource in (self._receiver, self._sampler, self._tensorboard, self._port):
            if resource is not None:
                with contextlib.suppress(OSError):
                    resource.close()

    # --- what arrives -------------------------------------------------------------------------------------

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run a handler; the driver being gone ends the node, a fault of ours is reported, then ends it too."""
        try:
            action()
        except (EOFError, OSError):
            self._loop.stop()
        except Exception as error:  # a bug here must be an error there, never a silent node
            from tfos_magic.errors import RemoteException

            with contextlib.suppress(OSError):
                self._send("failure", kind="agent", exception=RemoteException.from_exception(error).to_json())
            self._loop.stop()

    def _once(self, descriptor: int, action: Callable[[], None]) -> None:
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        self._guarded(action)

    def _from_driver(self) -> None:
        for message in self._connection.read_available():
            handler: Callable[[Message], None] | None = getattr(self, f"_on_{message.type}", None)
            if handler is not None:
                handler(message)

    def _from_child(self) -> None:
        try:
            note = channel.receive(self._child.channel)
        except EOFError:
            self._loop.remove_reader(self._child.channel)
            return
        blob = b""
        if note.descriptor is not None:
            blob = channel.read_all(note.descriptor)
            os.close(note.descriptor)
        if note.type == "counters":
            self._counters = dict(note.header)
        elif note.type in ("released", "results"):
            self._for_receiver(note.header, blob)
        elif note.type == "failure":
            self._has_answered = True
            self._flush_output()
            self._send_beat()
            self._send("failure", **{**json.loads(blob), "tail": list(self._lines.tail)})
        else:
            if note.type == "result":  # the last counts and lines go first: the run may end with this message
                self._has_answered = True
                self._flush_output()
                self._send_beat()
            if note.type == "drained" and self._receiver is not None:
                self._receiver.drop(note.header["feed"])
            self._connection.send(note.header, blob)

    def _for_receiver(self, header: Mapping[str, Any], blob: bytes) -> None:
        if self._receiver is None:
            return
        if header["type"] == "released":
            self._receiver.release(header["feed"], *header["chunk"])
        else:
            self._receiver.answer(header["session"], blob, header["rows"])

    def _listen_to_output(self) -> None:
        self._loop.add_reader(self._child.output, self._guarded, self._from_output)

    def _from_output(self) -> None:
        data = self._output.read()
        if data is not None:  # else another handler of the same round has emptied the pipe
            self._lines.feed(data)
        self._loop.remove_reader(self._child.output)
        if data != b"":
            self._loop.call_later(self._output.pause_s, self._listen_to_output)

    def _from_lifeline(self, descriptor: int) -> None:
        # One byte or more: the task ended as agreed. Nothing: its Python worker was killed.
        self._loop.remove_reader(descriptor)
        if not os.read(descriptor, 16):
            self._loop.stop()

    def _child_exited(self) -> None:
        code = self._child.process.wait()
        self._flush_output()
        self._send("exited", code=code, answered=self._has_answered, tail=list(self._lines.tail))
        if self._is_stopping:
            self._loop.stop()

    def _flush_output(self) -> None:
        """Take what the child has written so far; its last words are in the pipe, not yet in the log."""
        for data in self._output.drain():
            self._lines.feed(data)
        self._lines.feed(b"")
        self._send_lines()

    def _from_tensorboard(self) -> None:
        board = self._tensorboard
        if board is None:
            return
        knew_it = board.url is not None
        if not board.read():
            self._loop.remove_reader(board.output)
            if not knew_it:
                self._send("tensorboard", url=None, reason=board.why_not())
        elif board.url is not None and not knew_it:
            self._send("tensorboard", url=board.url, reason="")

    # --- what the driver says -----------------------------------------------------------------------------

    def _on_start(self, message: Message) -> None:
        self._to_child(message.header)
        directory = message.header["tensorboard"]
        if directory is not None:
            from tfos_magic.node.tensorboard import TensorBoard

            self._tensorboard = TensorBoard(directory, self._host, self._child.scratch)
            self._loop.add_reader(self._tensorboard.output, self._guarded, self._from_tensorboard)

    def _on_open_feed(self, message: Message) -> None:
        if self._receiver is None:
            from tfos_magic.feed.receiver import FeedReceiver

            self._receiver = FeedReceiver(
                self._host,
                bytes.fromhex(self._config["feed_secret"]),
                scratch_directory(),
                self._notice_from_thread,
            )
        feed, queue = message.header["feed"], message.header.get("queue")
        if queue is not None:
            self._receiver.add_queue(feed, message.header["limit_bytes"])
            self._queue_feeds.setdefault(queue, []).append(feed)
            self._to_child({"type": "feed_announced", "feed": feed, "queue": queue})
        self._send("feed_port", feed=feed, port=self._receiver.port)

    def _on_publish(self, message: Message) -> None:
        if self._receiver is not None:
            header = message.header
            place = header["feed"], header["partition"], header["attempt"]
            self._receiver.publish(*place, header["rows"], is_last=header["is_last"])

    def _on_discard(self, message: Message) -> None:
        if self._receiver is not None:
            header = message.header
            self._receiver.discard(header["feed"], header["partition"], header["attempt"])

    def _on_feed_end(self, message: Message) -> None:
        if self._receiver is not None:
            header = message.header
            self._receiver.end(header["feed"], list(header["rows_per_node"]), header["fingerprint"])

    def _on_feed_fail(self, message: Message) -> None:
        if self._receiver is not None:
            self._receiver.fail(message.header["feed"], message.header["message"])

    def _on_queue_finish(self, message: Message) -> None:
        self._to_child(message.header)

    def _on_queue_stop(self, message: Message) -> None:
        for feed in self._queue_feeds.get(message.header["queue"], ()):
            if self._receiver is not None:
                self._receiver.stop(feed, message.header["reason"])
        self._to_child(message.header)

    def _on_training_over(self, message: Message) -> None:
        self._to_child(message.header)

    def _on_where(self, message: Message) -> None:
        self._to_child(message.header)

    def _on_stop(self, message: Message) -> None:
        """End the child: kindly when it has answered, else by SIGTERM; by force after the grace."""
        if self._is_stopping:
            return
        self._is_stopping = True
        if self._child.process.poll() is not None:
            self._loop.stop()
            return
        if self._has_answered:
            self._to_child({"type": "exit"})
        else:
            self._child.process.terminate()
        self._loop.call_later(_EXIT_GRACE_S if self._has_answered else _TERM_GRACE_S, self._loop.stop)

    # --- what the node says -------------------------------------------------------------------------------

    def _send(self, message_type: str, /, **fields: Any) -> None:
        self._connection.send({"type": message_type, **fields})

    def _to_child(self, header: Mapping[str, Any], descriptor: int | None = None) -> None:
        """Queue a message: a child that does not read must not keep this loop from hearing ``stop``."""
        self._outbox.append((header, descriptor))
        self._drain_outbox()

    def _drain_outbox(self) -> None:
        while self._outbox:
            try:
                channel.send(self._child.channel, *self._outbox[0])
            except BlockingIOError:
                self._loop.add_writer(self._child.channel, self._drain_outbox)
                return
            except OSError:  # a child that is gone is reported by its pidfd
                self._outbox.clear()
                break
            self._outbox.popleft()
        self._loop.remove_writer(self._child.channel)

    def _hello(self) -> None:
        self._send(
            "hello",
            index=self._config["index"],
            host=socket.gethostname(),
            address=self._host,
            port=self._port.getsockname()[1],
            pid=os.getpid(),
            child_pid=self._child.process.pid,
            python=list(sys.version_info[:3]),
            executable=sys.executable,
            gpus=self._config["gpus"],
            child_started_at=self._child.started_at,
        )
        if self._config["gpu_note"]:
            self._lines.feed(f"{self._config['gpu_note']}\n".encode())

    def _beat(self) -> None:
        self._guarded(self._send_beat)
        self._loop.call_later(self._beat_interval_s, self._beat)

    def _send_beat(self) -> None:
        from dataclasses import asdict

        if self._sampler is None:
            from tfos_magic.machine import MachineSampler

            self._sampler = MachineSampler(self._child.process.pid, self._config["gpus"])
        counters = {name: value for name, value in self._counters.items() if name != "type"}
        received = 0
        if self._receiver is not None:
            received = self._receiver.rows_received
            staged_chunks, staged_bytes = self._receiver.staged
            counters["queued_chunks"] = counters.get("queued_chunks", 0) + staged_chunks
            counters["queued_bytes"] = counters.get("queued_bytes", 0) + staged_bytes
            counters["feed_wait_s"] = self._receiver.wait_s
        self._send("beat", **counters, rows_received=received, machine=asdict(self._sampler.sample()))
        self._send_lines()

    def _send_lines(self) -> None:
        taken = self._lines.take()
        if taken.first:
            self._send("log", lines=taken.first, dropped=0)
        if taken.last or taken.dropped:
            self._send("log", lines=taken.last, dropped=taken.dropped)

    def _notice_from_thread(self, notice: FeedNotice) -> None:
        self._loop.call_soon_threadsafe(self._guarded, lambda: self._feed_notice(notice))

    def _feed_notice(self, notice: FeedNotice) -> None:
        from tfos_magic.feed import staging

        feed = notice.name
        if isinstance(notice, staging.FeedOpened):
            schema = notice.schema_ipc.hex()
            self._to_child({"type": "feed_opened", "feed": feed, "schema": schema}, notice.fd)
        elif isinstance(notice, staging.ChunkReady):
            chunk = [notice.offset, notice.length_bytes, notice.row_count]
            about = {"session": notice.session, "partition": notice.partition}
            self._to_child({"type": "chunk", "feed": feed, "chunk": chunk, **about})
        elif isinstance(notice, staging.PartitionEnded):
            self._to_child({"type": "partition_ended", "feed": feed, "session": notice.session})
        elif isinstance(notice, staging.SessionLost):
            self._to_child({"type": "session_lost", "feed": feed, "session": notice.session})
        elif isinstance(notice, staging.FeedEnded):
            ended = {"rows_per_node": notice.rows_per_node, "fingerprint": notice.fingerprint}
            self._to_child({"type": "feed_ended", "feed": feed, **ended})
        elif isinstance(notice, staging.FeedFailed):
            self._to_child({"type": "feed_failed", "feed": feed, "message": notice.message})


def scratch_directory() -> str:
    """Return where Spark keeps this executor's scratch data, else the system's temporary directory."""
    for name in ("SPARK_EXECUTOR_DIRS", "LOCAL_DIRS", "SPARK_LOCAL_DIRS"):
        for path in os.environ.get(name, "").split(os.pathsep if name == "SPARK_EXECUTOR_DIRS" else ","):
            if path and os.access(path, os.W_OK):
                return path
    return tempfile.gettempdir()
