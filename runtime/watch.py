"""Ranks that watch each other: a thread in each reports to rank 0 that it is alive and what it does, and ends the
process when rank 0 says that the job has failed, or is gone.

A rank that died closes its connection; one that was stopped falls silent; one that hangs makes no progress while it
waits for nobody. Whatever the main thread does, no rank outlives the job by more than the limit.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from fp8.runtime.sockets import Gate, connect

PATIENCE = 30  # a start-up (reading weights) may take so many limits between two signs of progress
FAREWELL_SECONDS = 2.0  # a failing rank waits so long for rank 0 to tell the others


@dataclass
class Status:
    """What a rank does. Written by its main thread, one field at a time, read by the watching one."""

    what: str = "start-up"
    steps: int = 0  # grows with every sign of progress
    waits: tuple[int, ...] = ()  # for messages of these ranks
    idle: bool = False  # nothing to do
    patience: int = PATIENCE
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)


@dataclass
class Seen:
    """What rank 0 knows of a rank: its status, when it last spoke, when it last made progress. Seconds of
    time.monotonic."""

    status: Status
    spoke: float
    moved: float


def fault(seen: dict[int, Seen], now: float, limit: float) -> str | None:
    """Which ranks hang, if any do: those silent for `limit` seconds, else those that should work and do not get on."""
    silent = [r for r, s in seen.items() if now - s.spoke > limit]
    if silent:
        return f"{describe(silent, seen)} gave no sign of life for {limit:g} s"
    still = [r for r, s in seen.items() if not s.status.idle and now - s.moved > limit * s.status.patience]
    stuck = [r for r in still if not seen[r].status.waits]
    if stuck:
        seconds = limit * seen[stuck[0]].status.patience
        return f"{describe(stuck, seen)} made no progress for {seconds:g} s; allow more with --rank_timeout"
    working = [r for r, s in seen.items() if not s.status.idle]
    if still and still == working:
        waits = ", ".join(f"rank {r} for {list(seen[r].status.waits)}" for r in still)
        return f"ranks wait for each other: {waits}"
    return None


def describe(ranks: Collection[int], seen: dict[int, Seen]) -> str:
    """ "rank 2 (process 17 on node, at step 5)" of one rank or several."""
    facts = ((r, seen[r].status) for r in sorted(ranks))
    return " and ".join(f"rank {r} (process {s.pid} on {s.host}, at {s.what})" for r, s in facts)


class Watch:
    """One rank's part. `status` belongs to the caller; `limit` is how many seconds a rank may be silent or stand still.

    `exchange` gives every rank's text, in order, on every rank. Raises RankError if a rank cannot be reached.
    """

    def __init__(
        self, rank: int, world: int, exchange: Callable[[str], list[str]], limit: float, program: str = "fp8"
    ) -> None:
        self.rank, self.world, self.limit, self.program = rank, world, limit, program
        self.status = Status()
        self._interval = min(max(limit / 20, 0.05), 1.0)
        self._failure: str | None = None  # of this rank
        self._abandoned: int | None = None
        self._leaving = self._told = False
        self._wake = threading.Event()
        gate = Gate(0) if rank == 0 else None
        invitation = exchange(gate.invitation() if gate else "")[0]
        if gate:
            self._wires = gate.admit(set(range(1, world)), limit)
        else:
            self._wires = {0: connect(invitation, rank, limit)}
        now = time.monotonic()
        self._seen = {r: Seen(Status(), now, now) for r in ([0, *self._wires] if gate else [0])}
        self._thread = threading.Thread(target=self._run, name="fp8-watch", daemon=True)
        self._thread.start()

    def tick(self, *_: object) -> None:
        """A sign of progress."""
        self.status.steps += 1

    def begin(self, what: str) -> None:
        """A new piece of work begins: from now on, no progress for `limit` seconds is a hang."""
        self.status.what, self.status.idle, self.status.patience = what, False, 1
        self.status.steps += 1

    def rest(self) -> None:
        """Nothing to do until further notice."""
        self.status.idle, self.status.waits = True, ()

    def fail(self, why: str) -> NoReturn:
        """Ends the job: rank 0 prints `why` with this rank's number, unless another rank failed before."""
        self._failure = why
        self._wake.set()
        self._thread.join(FAREWELL_SECONDS)
        self._end(f"rank {self.rank}: {why}")

    def abandon(self, status: int) -> None:
        """On rank 0: the others are to exit with that status; nobody looks after them any more."""
        self._abandoned = status
        self._wake.set()
        self._thread.join(self.limit)

    def await_end(self) -> None:
        """On another rank: waits for rank 0 to end the job, this process with it; for `limit` seconds at most."""
        self.rest()
        self._thread.join(self.limit)

    def leave(self) -> None:
        """The job ends well: from now on, a closed connection is no fault."""
        self._leaving = True
        self._wake.set()
        self._thread.join(self.limit)

    def _run(self) -> None:
        look = self._watch_all if self.rank == 0 else self._watch_rank_0
        try:
            while not look():
                self._wake.wait(self._interval)
                if self._wake.is_set():  # soon over
                    time.sleep(0.01)
        except Exception as error:  # unwatched, a rank could outlive the job
            self._end(f"rank {self.rank}: the watch failed ({type(error).__name__}: {error})")

    # --- rank 0 ---

    def _watch_all(self) -> bool:
        """One look at all ranks; true once all have left."""
        now = time.monotonic()
        if now - self._seen[0].spoke > self.limit:
            os._exit(1)  # this process was stopped, and the others have said so
        self._note(0, asdict(self.status), now)
        if self._failure is not None:
            self._end_all(f"rank 0: {self._failure}")
        if self._abandoned is not None:
            self._send_end(self._abandoned)
            return True
        for rank, wire in list(self._wires.items()):
            while message := wire.take():
                self._hear(rank, json.loads(message), now)
            if wire.closed and rank in self._wires:
                what = describe([rank], self._seen)
                self._end_all(f"{what} ended without a word: killed, out of memory, or crashed")
        for wire in self._wires.values():
            wire.put(b'{"alive": true}')
        if hanging := fault(self._seen, now, self.limit):
            self._end_all(hanging)
        return self._leaving and not self._wires

    def _hear(self, rank: int, message: dict[str, Any], now: float) -> None:
        if "failed" in message:
            self._end_all(f"rank {rank}: {message['failed']}")
        elif "left" in message:
            self._wires.pop(rank).close()
            del self._seen[rank]
        else:
            self._note(rank, message, now)

    def _note(self, rank: int, status: dict[str, Any], now: float) -> None:
        seen, new = self._seen[rank], Status(**{**status, "waits": tuple(status["waits"])})
        if new.steps != seen.status.steps or new.idle:
            seen.moved = now
        seen.status, seen.spoke = new, now

    def _end_all(self, why: str) -> NoReturn:
        self._send_end(1)
        self._kill_silent()
        self._end(why)

    def _send_end(self, status: int) -> None:
        for wire in self._wires.values():
            wire.put(json.dumps({"end": status}).encode())

    def _kill_silent(self) -> None:
        """A stopped process of this host does not hear that the job has ended."""
        now = time.monotonic()
        for seen in self._seen.values():
            if now - seen.spoke > self.limit and seen.status.host == socket.gethostname():
                os.kill(seen.status.pid, signal.SIGKILL)

    # --- other ranks ---

    def _watch_rank_0(self) -> bool:
        now, (wire,) = time.monotonic(), self._wires.values()
        if self._failure is not None and not self._told:
            wire.put(json.dumps({"failed": self._failure}).encode())
            self._told = True
        if self._leaving:
            wire.put(b'{"left": true}')
            wire.push()
            return True
        wire.put(json.dumps(asdict(self.status)).encode())
        while message := wire.take():
            self._seen[0].spoke = now
            if (status := json.loads(message).get("end")) is not None:
                os._exit(status)
        if wire.closed:
            self._end_after_0("rank 0 ended without a word: killed, out of memory, or crashed")
        if now - self._seen[0].spoke > self.limit:
            self._end_after_0(f"rank 0 gave no sign of life for {self.limit:g} s")
        return False

    def _end_after_0(self, why: str) -> NoReturn:
        """Ends the job when rank 0 is gone, and nobody knows who noticed first: the lowest rank speaks, the launcher
        ends the others."""
        time.sleep(min(0.3 * (self.rank - 1), 3.0))
        self._end(f"rank {self.rank}: {why}")

    def _end(self, why: str) -> NoReturn:
        os.write(2, f"{self.program}: {why}\n".encode())
        os._exit(1)
