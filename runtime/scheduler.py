"""Which tokens run in the next step: in-flight batching over the block pool. Pure Python.

A step is a list of rows, one per sequence: rows of one token first (decode), then chunks of prompts, `max_num_tokens`
tokens at most. First come, first served; when the pool runs out, the youngest sequence gives up its blocks and is
computed again later. The scheduler runs one step ahead of the sampled values: it needs to know that a token comes, not
which one, so a step can be enqueued before the previous one's tokens are read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fp8.runtime.kv_cache import BlockPool, blocks_for
from fp8.runtime.request import Request, RequestError


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens `start` to `start + count` of one request, as it stood when the step was scheduled."""

    request: Request
    start: int
    count: int
    samples: bool  # its last token's logits give a token
    index: int  # how many tokens the request had generated before: the counter of its random numbers


class Scheduler:
    """Owns every request from `add` until its finish, and the blocks in between."""

    def __init__(self, pool: BlockPool, max_batch_size: int, max_num_tokens: int) -> None:
        self.pool = pool
        self.max_num_tokens = max_num_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self._slots = list(range(max_batch_size - 1, -1, -1))

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError if the whole pool could not hold it."""
        size = self.pool.block_size
        need = blocks_for(len(request.prompt) + request.max_new_tokens, size)
        if need > self.pool.num_blocks:
            raise RequestError(
                f"request {request.id}: {len(request.prompt)} prompt and {request.max_new_tokens} output tokens need "
                f"{need} KV blocks, and the pool has {self.pool.num_blocks} ({self.pool.num_blocks * size} tokens); "
                f"ask for fewer tokens, or give the pool more memory"
            )
        self.waiting.append(request)

    def schedule(self) -> list[Row]:
        """The rows of the next step, single tokens first; empty if nothing can run before a token is read."""
        self._retire_exhausted()
        budget = self.max_num_tokens
        rows: list[Row] = []
        for request in [r for r in self.running if r.pending == 1]:
            if budget and request.slot >= 0 and self._make_room(request):  # a slot < 0: preempted just now
                rows.append(self._take(request, 1))
                budget -= 1
        for request in [r for r in self.running if r.pending > 1]:
            if budget:
                rows.append(self._take(request, min(request.pending, budget)))
                budget -= rows[-1].count
        while budget and self._can_admit():
            request = self._admit()
            rows.append(self._take(request, min(request.pending, budget)))
            budget -= rows[-1].count
        return sorted(rows, key=lambda row: row.count > 1)  # stable

    def update(self, rows: Sequence[Row], tokens: Sequence[int]) -> list[Request]:
        """Takes in the tokens that `rows` sampled, in order; returns the requests that got one."""
        got = []
        for row, token in zip((r for r in rows if r.samples), tokens, strict=True):
            request = row.request
            request.in_flight -= 1
            if request.finish_reason:  # it ended while this step was under way: the token is surplus
                continue
            request.accept(token)
            got.append(request)
            if request.finish_reason:
                self._forget(request)
        return got

    def abort(self, request: Request) -> None:
        """Ends a request now; what it holds is free for the next step (steps run in order)."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
            self._forget(request)

    def _take(self, request: Request, count: int) -> Row:
        row = Row(request, request.computed, count, count == request.pending, request.length - len(request.prompt))
        request.computed += count
        request.in_flight += row.samples
        return row

    def _make_room(self, request: Request) -> bool:
        """Blocks for all tokens of a running request; false if the request itself had to give way."""
        while blocks_for(request.length, self.pool.block_size) > len(request.blocks):
            if self.pool.free_blocks:
                request.blocks += self.pool.allocate(1)
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _can_admit(self) -> bool:
        """A waiting request may start if its tokens fit and every running one can still get its next block."""
        if not (self.waiting and self._slots) or self.waiting[0].in_flight:
            return False
        need = blocks_for(self.waiting[0].length + 1, self.pool.block_size)
        return need + len(self.running) <= self.pool.free_blocks or (not self.running and self.pool.free_blocks >= need)

    def _admit(self) -> Request:
        request = self.waiting.popleft()
        request.blocks = self.pool.allocate(blocks_for(request.length, self.pool.block_size))
        request.slot = self._slots.pop()
        self.running.append(request)
        return request

    def _preempt(self, request: Request) -> None:
        self._release(request)
        self.running.remove(request)
        request.computed = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _retire_exhausted(self) -> None:
        """A sequence whose last token is in flight needs its blocks no more: later steps run after that one."""
        for request in [r for r in self.running if r.exhausted]:
            self._release(request)
            self.running.remove(request)

    def _forget(self, request: Request) -> None:
        if request.slot >= 0:
            self._release(request)
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        self._slots.append(request.slot)
        request.slot = -1
