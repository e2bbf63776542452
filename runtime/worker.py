"""The loop over scheduler and session: schedule, enqueue, read the step before, update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from fp8.runtime.kv_cache import BlockPool
from fp8.runtime.logprobs import prompt_logprobs
from fp8.runtime.policy import Policy
from fp8.runtime.request import Request, RequestError
from fp8.runtime.scheduler import Row, Scheduler
from fp8.runtime.session import Session, Ticket
from fp8.runtime.statistics import Statistics, StepStatistics


class Worker:
    """Requests of one session. With `lag` 1 a step is enqueued before the tokens of the one before are read, so the
    device never waits for the host; with 0 each step is read at once. An engine of several pipeline stages has a step
    in every one of them and one more enqueued. For one thread at a time."""

    def __init__(
        self, session: Session, lag: int | None = None, policy: Policy | None = None, reuse_prefixes: bool = True
    ) -> None:
        limits = session.limits
        self.session = session
        self.pool = BlockPool(session.num_blocks, limits.block_size)
        stages = session.stages
        self.scheduler = Scheduler(
            self.pool, limits.max_batch_size, limits.max_num_tokens, policy, reuse_prefixes, stages
        )
        ahead = stages if stages > 1 or session.device.type == "cuda" else 0
        self.lag = ahead if lag is None else lag
        if not 0 <= self.lag <= stages:
            raise RequestError(
                f"lag is {lag}; a session of {stages} pipeline stages keeps the tokens of up to {stages} steps unread"
            )
        self.statistics = Statistics()
        self._open: deque[Ticket] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.unfinished or self._open)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises RequestError if it can never run."""
        request.arrived = request.arrived or time.perf_counter()
        self.scheduler.add(request)
        self.statistics.prompt_tokens += len(request.prompt)

    def step(self) -> list[Request]:
        """Starts a step if any row can run, and reads the step `lag` before it; returns the requests that got a
        token."""
        before = self.scheduler.preemptions, self.scheduler.reused_tokens
        times = [time.perf_counter()]
        rows = self.scheduler.schedule()
        times.append(time.perf_counter())
        if rows:
            self._open.append(self.session.enqueue(rows, self.scheduler.take_copies()))
            self._stamp_start(rows, times[1])
            self._score_prompts(rows)
        times.append(time.perf_counter())
        got: list[Request] = []
        if self._open and (len(self._open) > self.lag or not rows):
            got = self._take_in(self._open.popleft())
        times.append(time.perf_counter())
        self._record(rows, len(got), before, times)
        return got

    def cancel(self, request: Request) -> None:
        """Ends a request now; its blocks are free for the next step."""
        if request.finish_reason is None:
            self.scheduler.abort(request)
            self._count_finished(request, time.perf_counter())

    def drop_all(self) -> list[Request]:
        """Ends every request and returns those that it ended; the pool is whole afterwards. Waits for the steps in
        progress. Nothing in the pool is shared any more, as a step that failed may have left anything there."""
        tickets, self._open = list(self._open), deque()
        retired = [row.request.owner for ticket in tickets for row in ticket.rows]
        left = [r.owner for r in (*self.scheduler.running, *self.scheduler.waiting)]
        dropped = [r for r in dict.fromkeys([*left, *retired]) if r.finish_reason is None]
        for request in dropped:
            self.cancel(request)
        self.pool.forget_contents()
        for ticket in tickets:
            self.session.read(ticket)
        return dropped

    def _take_in(self, ticket: Ticket) -> list[Request]:
        got = self.scheduler.update(ticket.rows, self.session.read(ticket))
        self._keep_logprobs(ticket)
        now = time.perf_counter()
        for request in got:
            if not request.first_token:
                request.first_token = now
                self.statistics.first_token_seconds.add(now - request.arrived)
            if request.finish_reason:
                self._count_finished(request, now)
        return got

    def _score_prompts(self, rows: Sequence[Row]) -> None:
        """Log-probabilities of prompts just taken in: their blocks are still held, whatever the next step does."""
        ended = [row.request for row in rows if row.samples and row.request is row.request.owner]
        wanted = [r for r in ended if r.params.prompt_logprobs is not None and r.prompt_logprobs is None]
        if not wanted:
            return
        for request, entries in zip(wanted, prompt_logprobs(self.session, wanted), strict=True):
            request.prompt_logprobs = entries

    def _keep_logprobs(self, ticket: Ticket) -> None:
        """A token that came after its request's end has no place among its output."""
        if not ticket.wants_logprobs:
            return
        rows = [row for row in ticket.rows if row.samples]
        for row, entry in zip(rows, self.session.read_logprobs(ticket), strict=True):
            request = row.request
            if entry is not None and row.index < len(request.tokens) - len(request.prompt):
                request.logprobs.append(entry)

    def _count_finished(self, request: Request, now: float) -> None:
        request.finished = now
        self.statistics.finished[str(request.finish_reason)] += 1
        self.statistics.request_seconds.add(now - request.arrived)

    def _stamp_start(self, rows: list[Row], now: float) -> None:
        for request in (row.request.owner for row in rows):
            if not request.started:
                request.started = now
                self.statistics.queue_seconds.add(now - request.arrived)

    def _record(self, rows: list[Row], sampled: int, before: tuple[int, int], times: list[float]) -> None:
        scheduler, pool = self.scheduler, self.pool
        self.statistics.add(
            StepStatistics(
                rows=len(rows),
                decode_rows=sum(row.count == 1 for row in rows),
                tokens=sum(row.count for row in rows),
                sampled=sampled,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                held_blocks=pool.num_blocks - pool.free_blocks,
                cached_blocks=pool.cached_blocks,
                free_blocks=pool.free_blocks,
                reused_tokens=scheduler.reused_tokens - before[1],
                preemptions=scheduler.preemptions - before[0],
                schedule_seconds=times[1] - times[0],
                enqueue_seconds=times[2] - times[1],
                read_seconds=times[3] - times[2],
            )
        )
