"""Which tokens run in the next step: in-flight batching over the block pool. Pure Python.

A step is a list of rows, one per sequence: rows of one token first (decode), then chunks of prompts, `max_num_tokens`
tokens at most. The policy says who starts next and how prompts share a step; when the pool runs out, the worst ranked
sequence gives up its blocks and is computed again later, as far as they are gone by then. The scheduler runs one step
ahead of the sampled values: it needs to know that a token comes, not which one, so a step can be enqueued before the
previous one's tokens are read.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from fp8.runtime.kv_cache import BlockPool, blocks_for, extend_keys
from fp8.runtime.policy import Policy, Throughput, rank
from fp8.runtime.request import Request, RequestError


@dataclass(slots=True)
class Row:
    """Tokens `start` to `start + count` of one request, as it stood when the step was scheduled. Nobody changes one; it
    is not frozen because that takes eight times as long, and a step has a thousand."""

    request: Request
    start: int
    count: int
    samples: bool  # its last token's logits give a token
    index: int  # how many tokens the request had generated before: the counter of its random numbers


class Scheduler:
    """Owns every request from `add` until its finish, and the blocks in between."""

    def __init__(
        self,
        pool: BlockPool,
        max_batch_size: int,
        max_num_tokens: int,
        policy: Policy | None = None,
        reuse_prefixes: bool = True,
    ) -> None:
        self.pool = pool
        self.max_num_tokens = max_num_tokens
        self.policy = policy or Throughput()
        self.reuse_prefixes = reuse_prefixes
        self.waiting: list[Request] = []  # the best ranked first
        self.running: list[Request] = []  # the best ranked first
        self.preemptions = 0
        self.reused_tokens = 0
        self._arrivals = 0
        self._slots = list(range(max_batch_size - 1, -1, -1))

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Raises RequestError if the whole pool could not hold a request."""
        size = self.pool.block_size
        need = blocks_for(len(request.prompt) + request.max_new_tokens, size)
        if need > self.pool.num_blocks:
            raise RequestError(
                f"request {request.id}: {len(request.prompt)} prompt and {request.max_new_tokens} output tokens need "
                f"{need} KV blocks, and the pool has {self.pool.num_blocks} ({self.pool.num_blocks * size} tokens); "
                f"ask for fewer tokens, or give the pool more memory"
            )

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError if the whole pool could not hold it."""
        self.check(request)
        request.order = self._arrivals
        self._arrivals += 1
        self.policy.joins(request, chain(self.running, self.waiting))
        insort(self.waiting, request, key=rank)

    def schedule(self) -> list[Row]:
        """The rows of the next step, single tokens first; empty if nothing can run before a token is read."""
        decoding, prompts = self._review()
        self._make_way()
        rows = self._decode_rows(decoding)
        budget = self.max_num_tokens - len(rows)
        prompts = [r for r in prompts if r.slot >= 0]  # some may have given way
        pending = [r.pending for r in prompts]
        while budget and self.waiting:
            candidate = self.policy.next(self.waiting)
            shares = self.policy.shares([*pending, candidate.pending], budget)
            if not shares[-1] or not self._fits(candidate):
                break
            prompts.append(self._admit(candidate))
            pending.append(candidate.pending)
        shares = self.policy.shares(pending, budget)
        taken = [self._take(r, count) for r, count in zip(prompts, shares, strict=True) if count]
        return rows + sorted(taken, key=lambda row: row.count > 1)  # stable

    def _review(self) -> tuple[list[Request], list[Request]]:
        """Retires the running requests that need no further step, publishes what is complete, and returns the others:
        those that want one token computed, and those with more. One pass: with a thousand sequences, time is short."""
        size, exhausted = self.pool.block_size, []
        decoding: list[Request] = []
        prompts: list[Request] = []
        for request in self.running:
            known, computed = len(request.tokens), request.computed
            length = known + request.in_flight
            if length - len(request.prompt) >= request.max_new_tokens:  # all are sampled, if not all read
                exhausted.append(request)
                continue
            if (computed if computed < known else known) >= (request.published + 1) * size:
                self._publish(request)
            (decoding if length - computed == 1 else prompts).append(request)
        for request in exhausted:  # its last token is in flight, and later steps run after that one
            self._release(request)
        return decoding, prompts

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

    def _decode_rows(self, requests: Sequence[Request]) -> list[Row]:
        """A row of one token for each, as far as they keep their place."""
        size, most, served = self.pool.block_size, self.max_num_tokens, self.policy.served
        rows: list[Row] = []
        for request in requests:
            computed = request.computed
            if request.slot < 0 or len(rows) == most:
                continue
            if computed >= len(request.blocks) * size and not self._make_room(request):
                continue
            index = computed + 1 - len(request.prompt)
            request.computed = computed + 1
            request.in_flight += 1
            served(request, 1)
            rows.append(Row(request, computed, 1, True, index))
        return rows

    def _take(self, request: Request, count: int) -> Row:
        row = Row(request, request.computed, count, count == request.pending, request.length - len(request.prompt))
        request.computed += count
        request.in_flight += row.samples
        self.policy.served(request, count)
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

    def _make_way(self) -> None:
        """Preempts sequences of lower priority than who is next, if that lets it start."""
        if not self.waiting:
            return
        candidate = self.policy.next(self.waiting)
        lower = [r for r in self.running if r.priority < candidate.priority]
        if not lower or candidate.in_flight or self._fits(candidate):
            return
        # A block that several hold counts several times here: the candidate may then have to wait all the same.
        free = self.pool.free_blocks + sum(len(r.blocks) for r in lower)
        kept = len(self.running) - len(lower)
        if blocks_for(candidate.length + 1, self.pool.block_size) + kept > free:
            return
        while lower and not self._fits(candidate):
            self._preempt(lower.pop())

    def _fits(self, request: Request) -> bool:
        """A waiting request may start if its tokens fit and every running one can still get its next block."""
        if not self._slots or request.in_flight:
            return False
        found = self._cached(request)
        need = blocks_for(request.length + 1, self.pool.block_size) - len(found)
        free = self.pool.free_blocks - self.pool.idle(found)
        return need + len(self.running) <= free or (not self.running and need <= free)

    def _cached(self, request: Request) -> list[int]:
        """Blocks in the pool that hold its first tokens. Its last token is always computed: that gives the logits."""
        if not self.reuse_prefixes:
            return []
        shareable = request.length if request.shareable is None else request.shareable
        full = min(request.length - 1, shareable) // self.pool.block_size
        extend_keys(request.keys, request.tokens, self.pool.block_size, full)
        return self.pool.find(request.keys[:full])

    def _admit(self, request: Request) -> Request:
        self.waiting.remove(request)
        found = self._cached(request)
        self.pool.share(found)
        request.blocks = found + self.pool.allocate(blocks_for(request.length, self.pool.block_size) - len(found))
        request.published = len(found)
        request.computed = len(found) * self.pool.block_size
        request.reused = max(request.reused, request.computed)
        self.reused_tokens += request.computed
        request.slot = self._slots.pop()
        insort(self.running, request, key=rank)
        return request

    def _publish(self, request: Request) -> None:
        """Lets others share the blocks that are full of tokens known and computed by the steps scheduled so far."""
        full = min(request.computed, len(request.tokens)) // self.pool.block_size
        if full <= request.published or not self.reuse_prefixes:
            return
        extend_keys(request.keys, request.tokens, self.pool.block_size, full)
        for i in range(request.published, full):
            self.pool.publish(request.blocks[i], request.keys[i])
        request.published = full

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, request, key=rank)

    def _forget(self, request: Request) -> None:
        if request.slot >= 0:
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        self._publish(request)
        self.pool.release(request.blocks)
        request.blocks = []
        request.computed = 0
        self._slots.append(request.slot)
        request.slot = -1
        self.running.remove(request)
