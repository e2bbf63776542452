"""TCP between ranks: framed messages that are never waited for, and the transport of ranks that torchrun started."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import time
from collections import defaultdict, deque
from datetime import timedelta

from fp8.runtime.launcher import Launch, RankError
from fp8.runtime.polling import poll

HEADER = struct.Struct("<Qi")  # bytes that follow, tag
CHUNK = 1 << 20


class Wire:
    """A connected socket. Once `closed`, the other side sends no more; what it sent before is in `found`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.found: dict[int, deque[bytes]] = defaultdict(deque)  # whole messages by tag
        self.closed = False
        self._out: deque[memoryview] = deque()
        self._in = bytearray()

    @property
    def unsent(self) -> bool:
        return bool(self._out) and not self.closed

    def put(self, data: bytes, tag: int = 0) -> None:
        """Sends what the system takes at once, the rest with the next `push`."""
        self._out += [memoryview(HEADER.pack(len(data), tag)), memoryview(data)]
        self.push()

    def push(self) -> None:
        while self._out and not self.closed:
            if not self._out[0]:
                self._out.popleft()
                continue
            try:
                self._out[0] = self._out[0][self.connection.send(self._out[0]) :]
            except BlockingIOError:
                return
            except OSError:
                self.closed = True

    def pull(self) -> None:
        """Takes what has arrived."""
        try:
            while chunk := self.connection.recv(CHUNK):
                self._in += chunk
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        self._split()

    def take(self, tag: int = 0) -> bytes | None:
        """The next message with that tag, None while there is none."""
        if not self.found[tag]:
            self.pull()
        return self.found[tag].popleft() if self.found[tag] else None

    def close(self) -> None:
        self.connection.close()

    def _split(self) -> None:
        at = 0
        while len(self._in) - at >= HEADER.size:
            size, tag = HEADER.unpack_from(self._in, at)
            end = at + HEADER.size + size
            if len(self._in) < end:
                break
            self.found[tag].append(bytes(memoryview(self._in)[at + HEADER.size : end]))
            at = end
        if at:
            del self._in[:at]


class Gate:
    """Where other ranks connect to. Who does not know the token of the invitation is turned away."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._token = secrets.token_hex(16)
        self._listener = socket.create_server(("", 0), backlog=1024)

    def invitation(self) -> str:
        port = self._listener.getsockname()[1]
        return json.dumps([self.rank, socket.gethostname(), port, self._token, *_addresses()])

    def admit(self, ranks: set[int], limit: float) -> dict[int, Wire]:
        """Connections of `ranks`; closes the gate. Raises RankError if one does not come within `limit` seconds."""
        wires: dict[int, Wire] = {}
        strangers: list[Wire] = []
        self._listener.setblocking(False)
        deadline = time.monotonic() + limit
        while missing := ranks - wires.keys():
            if time.monotonic() > deadline:
                raise RankError(f"rank {self.rank}: {_names(missing)} did not connect within {limit:g} s")
            try:
                strangers.append(Wire(self._listener.accept()[0]))
            except BlockingIOError:
                time.sleep(1e-3)
            for wire in list(strangers):
                if hello := wire.take():
                    strangers.remove(wire)
                    who = self._recognize(hello)
                    if who in missing:
                        wires[who] = wire
                    else:
                        wire.close()
        self._listener.close()
        return wires

    def _recognize(self, hello: bytes) -> int:
        try:
            token, rank = json.loads(hello)
        except ValueError:
            return -1
        return rank if isinstance(token, str) and hmac.compare_digest(token, self._token) else -1


def connect(invitation: str, rank: int, limit: float) -> Wire:
    """A connection to whoever wrote the invitation. Raises RankError if none of its addresses can be reached."""
    host, hostname, port, token, *found = json.loads(invitation)
    failures = []
    for address in ["127.0.0.1"] if hostname == socket.gethostname() else found:
        try:
            wire = Wire(socket.create_connection((address, port), limit))
        except OSError as error:
            failures.append(f"{address}: {error}")
            continue
        wire.put(json.dumps([token, rank]).encode())
        return wire
    raise RankError(f"rank {rank} cannot connect to rank {host} on {hostname}, port {port} ({'; '.join(failures)})")


class SocketTransport:
    """A connection between every two ranks, which find each other through the store that torchrun keeps.

    Raises RankError if a rank does not come within `limit` seconds.
    """

    def __init__(self, launch: Launch, limit: float) -> None:
        from torch.distributed import DistError, rendezvous

        self.rank, self.world = launch.rank, launch.world
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=limit)))
        gate = Gate(self.rank)
        store.set(f"fp8/{self.rank}", gate.invitation())
        self._wires: dict[int, Wire] = {}
        for peer in range(self.rank):
            try:
                invitation = store.get(f"fp8/{peer}").decode()
            except DistError as error:
                raise RankError(f"rank {self.rank}: rank {peer} has not started after {limit:g} s") from error
            self._wires[peer] = connect(invitation, self.rank, limit)
        self._wires |= gate.admit(set(range(self.rank + 1, self.world)), limit)

    def send(self, data: bytes, to: int, tag: int) -> None:
        self._wires[to].put(data, tag)

    def progress(self) -> None:
        for wire in self._wires.values():
            wire.push()

    def delivered(self) -> bool:
        self.progress()
        return not any(wire.unsent for wire in self._wires.values())

    def receive(self, source: int, tag: int) -> bytes | None:
        self.progress()
        wire = self._wires[source]
        found = wire.take(tag)
        if found is None and wire.closed:
            raise RankError(f"rank {self.rank}: rank {source} has closed its connection")
        return found

    def close(self) -> None:
        poll(lambda: self.delivered() or None)
        for wire in self._wires.values():
            wire.close()


def _addresses() -> list[str]:
    """Where other hosts may reach this one, the likeliest first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing: asks the routing table
            found.append(probe.getsockname()[0])
        except OSError:
            pass
    return [*found, socket.gethostname()]


def _names(ranks: set[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))
