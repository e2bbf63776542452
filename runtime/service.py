"""The loop in the background: any thread submits and cancels, one thread at a time takes turns at the worker."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fp8.runtime.request import Request
from fp8.runtime.worker import Worker

LOG = logging.getLogger(__name__)
Listener = Callable[[Request], None]  # called with a request whenever it got tokens or ended, by the thread at the turn


class ServiceError(RuntimeError):
    """A request that was accepted cannot be finished, or the service takes no more: says why."""


class Service:
    """Requests of all threads on one worker.

    `submit` and `cancel` return at once. `start` makes a thread that takes turns while there is anything to do;
    without it the caller takes them, inside `driving`.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.failure: str | None = None  # of the last step that failed
        self.open_requests = 0  # submitted and not ended
        self._inbox: deque[tuple[Request, Listener | None]] = deque()  # a listener: submitted; None: cancelled
        self._listeners: dict[Request, Listener] = {}
        self._turn = threading.Lock()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def closing(self) -> bool:
        return self._closing

    def submit(self, request: Request, listener: Listener) -> None:
        """Queues a request. Raises RequestError if the pool could never hold it, ServiceError once it is closing."""
        if self._closing:
            raise ServiceError("the engine is shutting down and takes no more requests")
        self.worker.scheduler.check(request)
        request.arrived = time.perf_counter()
        self._put(request, listener)

    def cancel(self, request: Request) -> None:
        """Ends a request at the next turn, if it has not ended; its listener learns of it as of any other end."""
        self._put(request, None)

    def start(self) -> None:
        """Starts the thread, if it is not there."""
        with self._wake:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="fp8-service", daemon=True)
                self._thread.start()

    def close(self, drain_seconds: float = 0.0) -> None:
        """Takes no more requests, gives the others `drain_seconds` to finish, ends what is left, and the thread."""
        self._closing = True
        deadline = time.perf_counter() + drain_seconds
        while self._thread is not None and self.open_requests and time.perf_counter() < deadline:
            time.sleep(0.02)
        with self._wake:
            thread, self._thread = self._thread, None
            self._wake.notify_all()
        if thread is not None:
            thread.join()
        with self._turn:
            self._empty_inbox()
            self._drop_all("the engine is shutting down")

    @contextmanager
    def driving(self) -> Iterator[Callable[[], None]]:
        """Gives the caller the turns: the function it yields takes one. Requests of other threads go on with them."""
        with self._turn:
            yield self._take_turn

    def _put(self, request: Request, listener: Listener | None) -> None:
        with self._wake:
            self.open_requests += listener is not None
            self._inbox.append((request, listener))
            self._wake.notify_all()

    def _run(self) -> None:
        self.worker.session.use_in_this_thread()
        while True:
            with self._wake:
                while self._thread is not None and not self._inbox and not self.worker.busy:
                    self._wake.wait()
                if self._thread is None:
                    return
            with self._turn:
                try:
                    self._take_turn()
                except Exception:  # every request knows; the next one shows whether the engine still works
                    LOG.exception("a step of the engine failed")

    def _take_turn(self) -> None:
        """Takes in what was submitted and cancelled, then one step. Whatever it raises, every request has ended."""
        try:
            self._empty_inbox()
            for request in self.worker.step():
                self._tell(request)
        except BaseException as error:
            self._drop_all(f"a step of the engine failed ({type(error).__name__}: {error})")
            raise

    def _empty_inbox(self) -> None:
        while self._inbox:
            request, listener = self._inbox.popleft()
            if listener is not None:
                self._listeners[request] = listener
                self.worker.submit(request)
            elif request in self._listeners:
                self.worker.cancel(request)
                self._tell(request)

    def _tell(self, request: Request) -> None:
        if not request.finish_reason:
            self._listeners[request](request)
            return
        with self._wake:
            self.open_requests -= 1
        self._listeners.pop(request)(request)

    def _drop_all(self, why: str) -> None:
        self.failure = why
        try:
            self.worker.drop_all()
        finally:
            for request in list(self._listeners):
                self.worker.cancel(request)
                self._tell(request)
