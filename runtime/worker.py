"""The loop over scheduler and session: schedule, enqueue, read the step before, update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from fp8.runtime.kv_cache import BlockPool
from fp8.runtime.logprobs import prompt_logprobs
from fp8.runtime.request import Request
from fp8.runtime.scheduler import Row, Scheduler
from fp8.runtime.session import Session, Ticket


class Worker:
    """Requests of one session. With `lag` 1 a step is enqueued before the tokens of the one before are read, so the
    device never waits for the host; with 0 each step is read at once."""

    def __init__(self, session: Session, lag: int | None = None) -> None:
        limits = session.limits
        self.session = session
        self.pool = BlockPool(session.num_blocks, limits.block_size)
        self.scheduler = Scheduler(self.pool, limits.max_batch_size, limits.max_num_tokens)
        self.lag = (1 if session.device.type == "cuda" else 0) if lag is None else lag
        self._open: deque[Ticket] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.unfinished or self._open)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises RequestError if it can never run."""
        request.arrived = time.perf_counter()
        self.scheduler.add(request)

    def step(self) -> list[Request]:
        """Starts a step if any row can run and takes in the step `lag` before; returns who got a token."""
        rows = self.scheduler.schedule()
        if rows:
            self._open.append(self.session.enqueue(rows))
            self._stamp_start(rows)
            self._score_prompts(rows)
        if self._open and (len(self._open) > self.lag or not rows):
            return self._take_in(self._open.popleft())
        return []

    def drop_all(self) -> None:
        """Ends every request, and waits for the steps under way; the pool is whole afterwards."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.abort(request)
        while self._open:
            self._take_in(self._open.popleft())

    def _take_in(self, ticket: Ticket) -> list[Request]:
        got = self.scheduler.update(ticket.rows, self.session.read(ticket))
        self._keep_logprobs(ticket)
        now = time.perf_counter()
        for request in got:
            request.first_token = request.first_token or now
            if request.finish_reason:
                request.finished = now
        return got

    def _score_prompts(self, rows: Sequence[Row]) -> None:
        """Log-probabilities of prompts just taken in: their blocks are still held, whatever the next step does."""
        for row in rows:
            request = row.request
            if row.samples and request.params.prompt_logprobs is not None and request.prompt_logprobs is None:
                request.prompt_logprobs = prompt_logprobs(self.session, request)

    def _keep_logprobs(self, ticket: Ticket) -> None:
        """A token that came after its request's end has no place among its output."""
        rows = [row for row in ticket.rows if row.samples]
        for row, entry in zip(rows, self.session.read_logprobs(ticket), strict=True):
            request = row.request
            if entry is not None and row.index < len(request.tokens) - len(request.prompt):
                request.logprobs.append(entry)

    @staticmethod
    def _stamp_start(rows: list) -> None:
        now = time.perf_counter()
        for row in rows:
            if not row.request.started:
                row.request.started = now
