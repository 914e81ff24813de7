"""How the training nodes add up their numbers: a ring of TCP connections.

Runs on: executors.

    node 0 ──► node 1 ──► node 2 ──► node 0        each arrow is one connection, used in one direction
      reduce-scatter: n-1 steps, each node ends with the sum of one n-th of the array
      all-gather:     n-1 steps, each node ends with all of it

This moves ``2 (n-1)/n`` of the array per node, the least that any all-reduce can. Each part is summed on one node and
copied to the others, so all nodes end with the same bits. Between two nodes of one host only a note of where the
numbers are goes over the connection, and the neighbour reads them there (neighbours.py).

Why not TensorFlow's own collectives: they must be configured before TensorFlow runs its first operation, but
``ctx.distribute(model)`` comes after the model is made; between two processes on a CPU they took 1.1 ms for one number
and 32 ms for a million where this takes 0.1 and 7 to 9 ms (TensorFlow 2.21); and two nodes that are at different
places of the program wait for each other for ever, where here every message says what it is, so that the difference is
an error that names both places. A peer that dies is noticed when its connection closes, not after ten seconds without
a heartbeat.

The ring listens on the address that the cluster gave this node for TensorFlow, only until its neighbour has connected.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tfos_magic.errors import RendezvousError, StalledError, TfosError
from tfos_magic.training.neighbours import OFFER, PLACE, SHARED_FROM_BYTES, Lender, Window

Array = npt.NDArray[Any]
Fill = Callable[[int, int], None]
"""Puts this node's numbers in their places, from the one up to the other."""

_HEADER = struct.Struct("<QQ8s64s")  # sequence number, elements, dtype, label
_SEGMENT = 1 << 16
"""Elements that are filled in, received, added and divided one after the other, while in the processor's cache."""
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_RANK = struct.Struct("<I")
_GREETING_S = 5.0
"""How long a connection may take to say who it is."""
_RETRY_S = 0.05
_SEEN, _NOT_SEEN = b"\1", b"\0"
"""What a node answers to the previous one: it can see its memory, and has read all that it was shown; or it cannot."""


class PeerLostError(TfosError):
    """Another node went away while this one needed it: the consequence of a failure elsewhere, never the first one.

    Attributes
    ----------
    peer : str
        The neighbour whose connection closed, e.g. ``worker:1``. In a ring of three or more it may itself be a victim.
    """

    def __init__(self, fact: str, *, peer: str, cause: str = "", hint: str = "") -> None:
        super().__init__(fact, cause=cause, hint=hint)
        self.peer = peer


@dataclass(frozen=True)
class RingPlan:
    """Who is in the ring: plain values that each node derives from the cluster's description.

    Attributes
    ----------
    names : tuple of str
        Node names in ring order, e.g. ``("chief:0", "worker:0")``.
    addresses : tuple of str
        ``host:port`` in the same order.
    rank : int
        This node's place.
    secret : bytes
        What a neighbour must know to be let in.
    """

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    rank: int
    secret: bytes = field(default=b"", repr=False)

    @property
    def size(self) -> int:
        """Number of nodes."""
        return len(self.names)

    def neighbour(self, distance: int) -> int:
        """Return the rank of the node `distance` places further on."""
        return (self.rank + distance) % self.size


class Ring:
    """The connections to both neighbours and what is computed over them.

    Not thread-safe: one collective at a time, in the same order on every node.

    Parameters
    ----------
    plan : RingPlan
    to_next, from_previous : socket.socket
        Connected; the ring owns them from now on.
    lender : Lender, optional
        The memory that the next node reads; without, it is sent the bytes.
    window : Window, optional
        On the previous node's memory; without, that node sends the bytes.

    Attributes
    ----------
    bytes_sent : int
        What the next node was given, over the connection or by showing it where it is.
    failure : TfosError or None
        What ended the ring.
    """

    def __init__(
        self,
        plan: RingPlan,
        to_next: socket.socket,
        from_previous: socket.socket,
        lender: Lender | None = None,
        window: Window | None = None,
    ) -> None:
        self.plan = plan
        self.bytes_sent = 0
        self.failure: TfosError | None = None
        self._next = to_next
        self._previous = from_previous
        self._lender = lender
        self._window = window
        self._sequence = 0
        self._label = ""
        self._outgoing: deque[memoryview] = deque()
        self._shows = self._sees = False  # large chunks of the collective that is going on
        self._is_read = False  # by the next node, which has not said yet that it is through
        for link in (to_next, from_previous):
            _tune(link)

    @classmethod
    def connect(cls, plan: RingPlan, *, timeout_s: float = 600.0, shares_memory: bool = True) -> Ring:
        """Meet both neighbours.

        Parameters
        ----------
        plan : RingPlan
        timeout_s : float
            How long to wait for them.
        shares_memory : bool
            Whether the next node may read this one's memory, where both are on one host.

        Raises
        ------
        RendezvousError
            A neighbour did not come, or this node's address cannot be listened on.
        """
        deadline = time.monotonic() + timeout_s
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(_listen(plan))
            # Both at once: whoever dials must answer its neighbour's challenge while it is itself being dialled.
            doorman = undo.enter_context(ThreadPoolExecutor(1, thread_name_prefix="tfos-ring"))
            undo.callback(_wake, listener)
            caller = doorman.submit(_accept, plan, deadline, listener)
            to_next = undo.enter_context(_dial(plan, deadline))
            from_previous = undo.enter_context(caller.result())
            ring = cls(plan, to_next, from_previous, *_share(plan, deadline, to_next, from_previous, shares_memory))
            undo.callback(ring.close)
            ring.all_reduce(np.ones(1, np.int64), "meeting")
            undo.pop_all()
            _wake(listener)
            listener.close()
            doorman.shutdown()
        return ring

    def close(self) -> None:
        """Close both connections; the neighbours then get a :class:`PeerLostError` if they still need this node."""
        for resource in (self._next, self._previous, self._lender, self._window):
            if resource is not None:
                resource.close()

    def empty(self, size: int, dtype: Any) -> Array:
        """Return an array, one-dimensional, of undefined numbers; where the next node can read it, if it is large.

        What is to be averaged or summed may lie anywhere, but from here it need not be copied.

        Raises
        ------
        PeerLostError
            The next node went away while it was reading what the last collective showed it.
        """
        dtype = np.dtype(dtype)
        if self._lender is None or size * dtype.itemsize < SHARED_FROM_BYTES:
            return np.empty(size, dtype)
        with self._failing(self._label):
            self._settle()
        return self._lender.empty(size * dtype.itemsize).view(dtype)

    # --- collectives ------------------------------------------------------------------------------------------

    def all_reduce(self, values: Array, label: str) -> Array:
        """Return the sum of `values` over all nodes; every node gets the same bits.

        Parameters
        ----------
        values : array, one-dimensional
            Same length and dtype on every node. Left as it is.
        label : str, at most 64 bytes of ASCII
            What this is, for the error when nodes disagree.

        Raises
        ------
        PeerLostError
            A neighbour closed its connection.
        StalledError
            A neighbour is at another place of the program.
        """
        total = self._copy(values)
        with self._failing(label):
            self._all_reduce(total, label)
        return total

    def average(
        self,
        values: Array,
        weight: float,
        label: str,
        *,
        averaged: int | None = None,
        wire: Any = None,
        fill: Fill | None = None,
    ) -> float:
        """Put the weighted mean over all nodes into `values`; every node gets the same bits.

        Parameters
        ----------
        values : array of floats, one-dimensional, contiguous
            This node's numbers times its weight.
        weight : float
        label : str, at most 64 bytes of ASCII
        averaged : int, optional
            How many of the first numbers are divided by the sum of weights, where that is not zero; the others are
            summed only. All when left away.
        wire : dtype, optional
            What the numbers are while they travel, say bfloat16. Sums are taken in the array's own dtype, and rounded
            once per hop.
        fill : callable, optional
            Called with begin and end of each part of `values` shortly before it is needed, once, to put this node's
            numbers there. `values` may then be read when this returns, but not be written to before the next
            collective.

        Returns
        -------
        float
            The sum of the weights.

        Raises
        ------
        PeerLostError, StalledError
            As in :meth:`all_reduce`.
        """
        with self._failing(label), np.errstate(invalid="ignore", over="ignore"):
            return self._all_reduce(values, label, weight, values.size if averaged is None else averaged, wire, fill)

    def gather(self, values: Array, label: str) -> Array:
        """Return every node's `values` as rows of one array, in ring order."""
        table = np.zeros((self.plan.size, values.size), values.dtype)
        table[self.plan.rank] = values
        return self.all_reduce(table.reshape(-1), label).reshape(table.shape)

    def concatenate(self, values: Array, label: str) -> Array:
        """Return every node's `values` one after the other, in ring order; their lengths may differ."""
        return self._join(values, label)[0]

    def collect(self, values: Array, label: str) -> list[Array]:
        """Return every node's `values`, in ring order; their lengths may differ."""
        joined, counts = self._join(values, label)
        return np.split(joined, np.cumsum(counts)[:-1])

    def _join(self, values: Array, label: str) -> tuple[Array, Array]:
        """Return every node's `values` one after the other, and how many are whose."""
        counts = self.gather(np.array([len(values)], np.int64), f"{label}: lengths").ravel()
        start = int(counts[: self.plan.rank].sum())
        shape = (int(counts.sum()), *values.shape[1:])
        joined = self.empty(int(np.prod(shape)), values.dtype).reshape(shape)
        joined[...] = 0
        joined[start : start + len(values)] = values
        # Sums with zeros: twice what passing the parts around would move, and one algorithm less.
        with self._failing(label):
            self._all_reduce(joined.reshape(-1), label)
        return joined, counts

    @contextlib.contextmanager
    def _failing(self, label: str) -> Iterator[None]:
        """Remember the first failure, and end the ring with it."""
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except TfosError as error:
            self.failure = error
            self.close()
            raise
        except OSError as error:
            self.failure = self._lost(self.plan.neighbour(-1), label, error)
            self.close()
            raise self.failure from error

    def _all_reduce(
        self,
        total: Array,
        label: str,
        weight: float = 0.0,
        averaged: int = 0,
        wire: np.dtype[Any] | None = None,
        fill: Fill | None = None,
    ) -> float:
        size, rank = self.plan.size, self.plan.rank
        self._settle()
        is_large = total.size // size * (wire or total.dtype).itemsize >= SHARED_FROM_BYTES
        self._shows, self._sees = is_large and self._lender is not None, is_large and self._window is not None
        work = total
        if wire is None and not self._is_showable(total):
            if fill is not None:
                fill(0, total.size)
                fill = None
            work = self._copy(total)
        bounds = [total.size * i // size for i in range(size + 1)]
        chunks = [work[bounds[i] : bounds[i + 1]] for i in range(size)]
        travelling = chunks if wire is None else [self.empty(chunk.size, wire) for chunk in chunks]
        weights = np.full(size, weight, np.float64)  # of those whose numbers are in the chunk
        theirs = np.empty(1, np.float64)
        self._announce(total, label, wire)
        if fill is not None:
            fill(bounds[rank], bounds[rank + 1])
        if wire is not None:
            travelling[rank][...] = chunks[rank]
        own = (rank + 1) % size
        for step in range(size - 1):
            sent, mine = (rank - step) % size, (rank - step - 1) % size
            self._send(weights[sent : sent + 1])
            self._send_chunk(travelling[sent])
            if step == 0:
                self._check_announcement(total, label, wire)
            self._receive(theirs)
            weights[mine] += theirs[0]
            begin = bounds[mine]
            for part in self._add_chunk(chunks[mine], begin, wire, fill):
                if mine == own and weights[own] and begin + part.start < averaged:
                    share = chunks[own][part.start : min(part.stop, averaged - begin)]
                    np.divide(share, share.dtype.type(weights[own]), out=share)
                if wire is not None:
                    travelling[mine][part] = chunks[mine][part]
        self._pass_around(travelling, own)
        if wire is not None:
            for chunk, bits in zip(chunks, travelling, strict=True):
                chunk[...] = bits  # all nodes take what has travelled, also who summed it
        if work is not total:
            total[...] = work
        if fill is None:
            self._settle()  # the caller may write to it at once
        return float(weights[own])

    def _is_showable(self, values: Array) -> bool:
        """Tell whether the next node need not see `values`, or can where they are."""
        return not self._shows or self._lender is None or self._lender.place_of(values) is not None

    def _copy(self, values: Array) -> Array:
        copy = self.empty(values.size, values.dtype)
        copy[...] = values
        return copy

    def _pass_around(self, chunks: list[Array], own: int) -> None:
        """Give the chunk that is summed here to all, and get theirs; the next node may then still be reading them."""
        for step in range(self.plan.size - 1):
            self._send_chunk(chunks[(own - step) % self.plan.size])
            self._receive_chunk(chunks[(own - step - 1) % self.plan.size])
        if self._sees:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who has all it needs may have ended
                self._previous.send(_SEEN)
        self._flush()
        self._is_read = self._shows

    def _settle(self) -> None:
        """Wait until the next node has read what it was shown last."""
        if self._is_read:
            self._receive(np.empty(len(_SEEN), np.uint8), self._next)
        self._is_read = False

    # --- messages ---------------------------------------------------------------------------------------------

    def _announce(self, values: Array, label: str, wire: np.dtype[Any] | None) -> None:
        self._sequence += 1
        self._label = label
        dtype = (wire or values.dtype).str
        header = _HEADER.pack(self._sequence, values.size, dtype.encode(), label.encode("ascii", "replace"))
        self._outgoing.append(memoryview(header))

    def _check_announcement(self, values: Array, label: str, wire: np.dtype[Any] | None) -> None:
        header = np.empty(_HEADER.size, np.uint8)
        self._receive(header)
        sequence, count, dtype, raw_label = _HEADER.unpack(header.tobytes())
        theirs = raw_label.rstrip(b"\0").decode("ascii", "replace")
        expected = (self._sequence, values.size, (wire or values.dtype).str)
        same = (sequence, count, dtype.rstrip(b"\0").decode()) == expected
        if theirs != label or not same:
            raise self._disagree(label, values.size, theirs, count)

    def _disagree(self, label: str, count: int, their_label: str, their_count: int) -> StalledError:
        me, them = self.plan.names[self.plan.rank], self.plan.names[self.plan.neighbour(-1)]
        sizes = (f" with {count} numbers", f" with {their_count}") if label == their_label else ("", "")
        return StalledError(
            f"The nodes are not at the same place: {me} is at '{label}'{sizes[0]} "
            f"while {them} is at '{their_label}'{sizes[1]}.",
            cause="Every node must make the same calls (fit, evaluate, …) with the same number of batches.",
            hint="Use ctx.dataset(…), which gives every node the same number of batches; call evaluate on all nodes, "
            "or on the chief use a copy: keras.models.clone_model(model) with model.get_weights().",
        )

    # A chunk is shown to a neighbour on this host, if it is large, and sent to any other.

    def _send_chunk(self, chunk: Array) -> None:
        place = self._lender.place_of(chunk) if self._shows and self._lender is not None else None
        if place is None:
            self._send(chunk)
        else:
            self._outgoing.append(memoryview(place))
            self.bytes_sent += chunk.nbytes
        self._push()

    def _add_chunk(self, mine: Array, begin: int, wire: np.dtype[Any] | None, fill: Fill | None) -> Iterator[slice]:
        """Add what the previous node has to the chunk that begins at `begin`; yield each part when it is done."""
        dtype = wire or mine.dtype
        seen = self._seen(mine.size * dtype.itemsize).view(dtype) if self._sees else None
        spare = np.empty(0 if self._sees else min(mine.size, _SEGMENT), dtype)
        for start in range(0, mine.size, _SEGMENT):
            where = slice(start, min(start + _SEGMENT, mine.size))
            part = mine[where]
            if fill is not None:
                fill(begin + where.start, begin + where.stop)
            if seen is not None:
                theirs = seen[where]
            else:
                theirs = spare[: part.size]
                self._receive(theirs)
            np.add(part, theirs, out=part)
            yield where

    def _receive_chunk(self, chunk: Array) -> None:
        if self._sees:
            np.copyto(chunk.view(np.uint8), self._seen(chunk.nbytes))
        else:
            self._receive(chunk)

    def _seen(self, count_bytes: int) -> Array:
        """Return the next bytes that the previous node shows."""
        place = np.empty(PLACE.size, np.uint8)
        self._receive(place)
        assert self._window is not None
        return self._window.view(place.tobytes(), count_bytes)

    def _send(self, values: Array) -> None:
        """Put it in the queue; it goes with what comes next."""
        if values.size:
            self._outgoing.append(_bytes_of(values))

    def _push(self) -> None:
        """Send as much as the connection takes now."""
        while self._outgoing:
            try:
                sent = self._next.sendmsg(list(self._outgoing))  # one call for header, weight and numbers
            except BlockingIOError:
                return
            except OSError as error:
                raise self._lost(self.plan.neighbour(1), self._label, error) from error
            self.bytes_sent += sent
            while sent:
                view = self._outgoing.popleft()
                if sent < len(view):
                    self._outgoing.appendleft(view[sent:])
                sent -= min(sent, len(view))

    def _receive(self, values: Array, link: socket.socket | None = None) -> None:
        """Fill `values` from the previous node, or from the next one's answers, sending on meanwhile."""
        link = link or self._previous
        whose = self.plan.neighbour(1 if link is self._next else -1)
        view = _bytes_of(values)
        while len(view):
            self._push()
            try:
                count = link.recv_into(view)
            except BlockingIOError:
                self._wait(link)
                continue
            except OSError as error:
                raise self._lost(whose, self._label, error) from error
            if count == 0:
                raise self._lost(whose, self._label)
            view = view[count:]

    def _flush(self) -> None:
        self._push()
        while self._outgoing:
            self._wait()
            self._push()

    def _wait(self, reading: socket.socket | None = None) -> None:
        """Sleep until there is something to read, or the next node can take more."""
        # The next node's hanging up is no loss by itself: it may have all it needed. If not, sending to it fails.
        poll = select.poll()
        if reading is not None:
            poll.register(reading, select.POLLIN)
        if self._outgoing:
            poll.register(self._next, select.POLLOUT)
        poll.poll()

    def _lost(self, rank: int, label: str, error: OSError | None = None) -> PeerLostError:
        name = self.plan.names[rank]
        return PeerLostError(
            f"{name} went away while {self.plan.names[self.plan.rank]} waited for it at '{label}'"
            + (f" ({error.strerror or error})." if error else "."),
            peer=name,
            cause="That node failed, was stopped, or its function returned before this one was done with it.",
            hint="Look at that node's own error first. If it has none: every node must make the same calls "
            "of fit and evaluate, not only the chief.",
        )


def _bytes_of(values: Array) -> memoryview:
    return memoryview(values.view(np.uint8).data) if values.size else memoryview(b"")


# --- meeting --------------------------------------------------------------------------------------------------


def _tune(link: socket.socket) -> None:
    link.setblocking(False)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A machine that loses its power says nothing: ask it every 5 s, believe its silence after 15 s.
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _share(
    plan: RingPlan, deadline: float, to_next: socket.socket, from_previous: socket.socket, wants: bool
) -> tuple[Lender | None, Window | None]:
    """Offer this node's memory to the next one, and look at what the previous one offers."""
    lender = Lender() if wants else None
    window = None
    try:
        for link in (to_next, from_previous):
            link.settimeout(max(0.01, deadline - time.monotonic()))
        to_next.sendall(OFFER.pack(0, 0, b"") if lender is None else lender.offer)
        offer = _read(from_previous, OFFER.size)
        window = Window.open(offer) if wants else None
        from_previous.sendall(_NOT_SEEN if window is None else _SEEN)
        if _read(to_next, 1) != _SEEN and lender is not None:
            lender.close()
            lender = None
        return lender, window
    except (OSError, EOFError) as error:
        for resource in (lender, window):
            if resource is not None:
                resource.close()
        raise _nobody(plan, plan.neighbour(1), str(error) or "it hung up") from error


def _listen(plan: RingPlan) -> socket.socket:
    """Listen where the others look for this node; the port may be held by somebody who does not listen."""
    host, port = _split(plan.addresses[plan.rank])
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise RendezvousError(
            f"{plan.names[plan.rank]} cannot listen on {host}:{port}: {error.strerror or error}.",
            cause="The address that Spark gives for this executor is not one of its machine's own.",
            hint="Check SPARK_LOCAL_IP and spark.driver.bindAddress on that machine.",
        ) from error
    return listener


def _wake(listener: socket.socket) -> None:
    """End a pending accept."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


def _dial(plan: RingPlan, deadline: float) -> socket.socket:
    """Connect to the next node, which may not have started yet."""
    rank = plan.neighbour(1)
    while True:
        try:
            return _greet(socket.create_connection(_split(plan.addresses[rank]), timeout=_GREETING_S), plan, rank)
        except (OSError, EOFError) as error:
            if time.monotonic() > deadline:
                raise _nobody(plan, rank, str(error) or "it hung up") from error
            # Nothing on this machine can tell when a port opens on another one: ask again.
            time.sleep(_RETRY_S)


def _accept(plan: RingPlan, deadline: float, listener: socket.socket) -> socket.socket:
    """Return the previous node's connection; strangers are turned away."""
    previous = plan.neighbour(-1)
    while True:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            link, _ = listener.accept()
        except OSError as error:  # also a timeout
            raise _nobody(plan, previous, f"no connection came ({error})") from None
        if _admit(link, plan, previous):
            return link
        link.close()


def _proof(plan: RingPlan, rank: int, nonce: bytes) -> bytes:
    """Return what only node `rank` of this ring can answer."""
    key = hashlib.sha256(plan.secret + "|".join(plan.addresses).encode()).digest()
    return hmac.digest(key, _RANK.pack(rank) + nonce, "sha256")


def _admit(link: socket.socket, plan: RingPlan, expected: int) -> bool:
    """Challenge a caller, which must be the previous node, and answer its own challenge."""
    nonce = os.urandom(_NONCE_BYTES)
    link.settimeout(_GREETING_S)
    try:
        link.sendall(nonce)
        answer = _read(link, _PROOF_BYTES + _NONCE_BYTES)
        if not hmac.compare_digest(answer[:_PROOF_BYTES], _proof(plan, expected, nonce)):
            return False
        link.sendall(_proof(plan, plan.rank, answer[_PROOF_BYTES:]))
    except (OSError, EOFError):
        return False
    return True


def _greet(link: socket.socket, plan: RingPlan, rank: int) -> socket.socket:
    """Prove to the next node who this is, and have it prove the same."""
    mine = os.urandom(_NONCE_BYTES)
    try:
        theirs = _read(link, _NONCE_BYTES)
        link.sendall(_proof(plan, plan.rank, theirs) + mine)
        if not hmac.compare_digest(_read(link, _PROOF_BYTES), _proof(plan, rank, mine)):
            raise OSError("it does not belong to this run")
    except BaseException:
        link.close()
        raise
    return link


def _read(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = link.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _nobody(plan: RingPlan, rank: int, why: str) -> RendezvousError:
    return RendezvousError(
        f"{plan.names[plan.rank]} could not meet {plan.names[rank]} at {plan.addresses[rank]}: {why}.",
        cause="That node did not reach ctx.distribute, or a firewall is between the two.",
        hint="Call ctx.distribute(model) on every node, outside any `if ctx.is_chief`.",
    )
