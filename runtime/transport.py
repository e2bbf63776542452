"""Messages between ranks: bytes with a tag, in order per sender and tag. Nothing here blocks in C, so that no rank is
stuck in a call that another's death or silence would never end."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from fp8.runtime.launcher import Launch, RankError
from fp8.runtime.polling import poll

if TYPE_CHECKING:
    from mpi4py.MPI import Message, Request


class Transport(Protocol):
    rank: int
    world: int

    def send(self, data: bytes, to: int, tag: int) -> None:
        """Returns before the message has arrived; `progress` and `receive` bring it on its way."""

    def progress(self) -> None:
        """A rank that waits for something else than a message calls this now and then."""

    def delivered(self) -> bool:
        """Whether what was sent will arrive without further `progress`."""

    def receive(self, source: int, tag: int) -> bytes | None:
        """The next message, None while there is none."""

    def close(self) -> None:
        """Ends it, once every rank has come here."""


class MpiTransport:
    """Messages over MPI_COMM_WORLD. Raises RankError if MPI sees other ranks than the launcher announced, or does not
    start within `limit` seconds."""

    def __init__(self, launch: Launch, limit: float) -> None:
        mpi = _import_mpi()
        library = ctypes.CDLL(mpi.__file__)
        with _deadline(limit, f"MPI has not started after {limit:g} s: one of the {launch.world} ranks did not come"):
            # Through ctypes, which lets other threads run meanwhile; mpi4py's own call would stop the deadline's.
            library.MPI_Init_thread(None, None, mpi.THREAD_MULTIPLE, ctypes.byref(ctypes.c_int()))
        self._finalize, self._mpi, self._comm = library.MPI_Finalize, mpi, mpi.COMM_WORLD
        self.rank, self.world = self._comm.rank, self._comm.size
        if (self.rank, self.world) != (launch.rank, launch.world):
            raise RankError(
                f"the launcher started rank {launch.rank} of {launch.world}, and MPI sees rank {self.rank} of "
                f"{self.world}; use the mpirun of the MPI that mpi4py loads "
                f"({mpi.Get_library_version().split(',')[0]}), or srun --mpi=pmix"
            )
        self._sent: deque[tuple[Request, bytes]] = deque()
        self._coming: dict[tuple[int, int], tuple[Request, bytearray]] = {}

    def send(self, data: bytes, to: int, tag: int) -> None:
        self.progress()
        self._sent.append((self._comm.Isend([data, self._mpi.BYTE], to, tag), data))

    def progress(self) -> None:
        while self._sent and self._sent[0][0].Test():
            self._sent.popleft()

    def delivered(self) -> bool:
        self.progress()
        return not self._sent

    def receive(self, source: int, tag: int) -> bytes | None:
        self.progress()
        if (source, tag) not in self._coming:
            status = self._mpi.Status()
            message: Message | None = self._comm.Improbe(source, tag, status)
            if message is None:
                return None
            data = bytearray(status.Get_count(self._mpi.BYTE))
            self._coming[source, tag] = message.Irecv([data, self._mpi.BYTE]), data
        request, data = self._coming[source, tag]
        if not request.Test():
            return None
        del self._coming[source, tag]
        return bytes(data)

    def close(self) -> None:
        poll(lambda: self.delivered() or None)
        barrier = self._comm.Ibarrier()
        poll(lambda: barrier.Test() or None)
        self._finalize()


def _import_mpi() -> Any:
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py's wheel finds no MPI library
        raise RankError(
            f"ranks need mpi4py, which cannot be loaded ({error}); pip install 'fp8-engine[mpi]', or mpi4py "
            f"beside the MPI of your cluster"
        ) from error
    return MPI


@contextmanager
def _deadline(limit: float, message: str) -> Iterator[None]:
    """Ends the process with `message` unless the block ends within `limit` seconds."""

    def end() -> None:
        os.write(2, f"{message}\n".encode())
        os._exit(1)

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
