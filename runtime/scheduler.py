"""Which tokens run in the next step: in-flight batching over the block pool. Pure Python.

A step is a list of rows, one per sequence: rows of one token first (decode), then chunks of prompts, `max_num_tokens`
tokens at most. The policy says who starts next and how prompts share a step; when the pool runs out, the worst ranked
sequence gives up its blocks and is computed again later, as far as they are gone by then. The scheduler runs one step
ahead of the sampled values: it needs to know that a token comes, not which one, so a step can be enqueued before the
previous one's tokens are read.

The beams of a request are sequences that start, give way and end together. They share the blocks of what they have in
common; one that writes into a block which others hold too gets a copy first. Their next step waits until the candidates
of all of them are read, as it is the host that chooses.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from fp8.runtime.beam_search import BeamSearch, Candidates
from fp8.runtime.kv_cache import BlockPool, blocks_for, extend_keys
from fp8.runtime.policy import Chunks, Policy, Throughput, rank
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
    behind: int = 0  # it takes in a token that nobody has read, of the step so many steps before; 0: a known one


class Scheduler:
    """Owns every request from `add` until its finish, and the blocks in between."""

    def __init__(
        self,
        pool: BlockPool,
        max_batch_size: int,
        max_num_tokens: int,
        policy: Policy | None = None,
        reuse_prefixes: bool = True,
        stages: int = 1,
    ) -> None:
        """With several pipeline `stages` a step takes a part of the sequences, so that every stage has one to work on.
        A sequence then goes on so many steps later, when the last stage has its token; sooner only if no other one
        can."""
        self.pool = pool
        self.stages = stages
        self._chunks = Chunks(stages) if stages > 1 else None
        self.max_num_tokens = max_num_tokens
        self.policy = policy or Throughput()
        self.reuse_prefixes = reuse_prefixes
        self.waiting: list[Request] = []  # the best ranked first
        self.running: list[Request] = []  # the best ranked first
        self.steps = 0
        self.preemptions = 0
        self.reused_tokens = 0
        self._arrivals = 0
        self.most_running = max_batch_size  # sequences at a time; who lowers it does so while none runs
        self._slots = list(range(max_batch_size - 1, -1, -1))
        self._copies: dict[int, int] = {}
        self._searching: dict[Request, None] = {}  # running requests with beams

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def _places(self) -> int:
        """Free places for sequences that may start."""
        return self.most_running - len(self.running)

    def check(self, request: Request) -> None:
        """Raises RequestError if the whole pool could not hold a request."""
        size = self.pool.block_size
        need = self._blocks(request, len(request.prompt), len(request.prompt) + request.max_new_tokens)
        if need > self.pool.num_blocks:
            beams = f" of {len(request.beams)} beams" if request.search else ""
            raise RequestError(
                f"request {request.id}: {len(request.prompt)} prompt and {request.max_new_tokens} output tokens{beams} "
                f"need {need} KV blocks, and the pool has "
                f"{self.pool.num_blocks} ({self.pool.num_blocks * size} tokens); "
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
        for request in list(self._searching):
            self._regrow(request)
        decoding, prompts = self._review()
        self._make_way()
        if self._searching:  # what may give way together must do so before any row is taken
            for request in [r for r in self.running if r.pending]:
                self._make_room(request)
        rows = self._decode_rows(decoding, self.stages)
        prompts = [r for r in prompts if r.slot >= 0]  # some may have given way
        budget = self._room(len(rows), prompts)
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
        rows += sorted(taken, key=lambda row: row.count > 1)  # stable
        if not rows:
            early = [r for r in decoding if r.slot >= 0 and r.in_flight]
            rows = self._decode_rows(early, max((self.steps - r.sampled_in for r in early), default=0))
        self.steps += bool(rows)
        return rows

    def _room(self, singles: int, prompts: Sequence[Request]) -> int:
        """Tokens of prompts that the next step may take. Nobody waits for others where all could start, or where the
        first to start has priority over one that runs."""
        ready, count = sum(r.pending for r in prompts), len(prompts)
        most = self.max_num_tokens - singles
        if self._chunks is not None:
            most = self._chunks.most(singles, ready + sum(r.length for r in self.waiting), self.max_num_tokens)
        if not self.waiting or (self.running and self.waiting[0].priority > self.running[-1].priority):
            return most
        places, free = self._places, self.pool.free_blocks - len(self.running)
        for request in self.waiting:
            places -= len(request.beams)
            free -= blocks_for(request.length + 1, self.pool.block_size)
            if places < 0 or free < 0:
                return self.policy.room(singles, count, ready, most)
            ready += request.length
            count += 1
        return most

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
            if length > computed:  # a beam may have to wait for others
                (decoding if length - computed == 1 else prompts).append(request)
        for request in exhausted:  # its last token is in flight, and later steps run after that one
            self._release(request)
        return decoding, prompts

    def take_copies(self) -> dict[int, int]:
        """{block: block whose contents it gets}, all at once and before the next step."""
        copies, self._copies = self._copies, {}
        return copies

    def update(self, rows: Sequence[Row], tokens: Sequence[int | Candidates]) -> list[Request]:
        """Takes in what `rows` sampled, in order: a token, or a beam's candidates. Returns the requests that made
        progress."""
        got = []
        for row, token in zip((r for r in rows if r.samples), tokens, strict=True):
            request = row.request
            if not isinstance(token, int):
                if not self._take_candidates(request, token):
                    continue
                request = request.owner
            else:
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

    def _decode_rows(self, requests: Sequence[Request], behind: int) -> list[Row]:
        """A row of one token for each request that keeps its place; for one whose token has not been read, only if that
        was sampled at least `behind` steps ago."""
        size, served = self.pool.block_size, self.policy.served
        most = min(self.max_num_tokens, -(-len(self.running) // self.stages))
        rows: list[Row] = []
        for request in requests:
            computed = request.computed
            if request.slot < 0 or len(rows) == most:
                continue
            ago = self.steps - request.sampled_in
            if request.in_flight and ago < behind:
                continue
            if request.search:
                rows.append(self._take(request, 1))
                continue
            if computed >= len(request.blocks) * size and not self._make_room(request):
                continue
            index = computed + 1 - len(request.prompt)
            request.computed = computed + 1
            request.in_flight += 1
            request.sampled_in = self.steps
            served(request, 1)
            rows.append(Row(request, computed, 1, True, index, ago if computed >= len(request.tokens) else 0))
        return rows

    def _take(self, request: Request, count: int) -> Row:
        search = request.search
        samples = count == request.pending and (search is None or search.grown)
        row = Row(request, request.computed, count, samples, request.length - len(request.prompt))
        request.computed += count
        if search is None:
            request.in_flight += samples
            request.sampled_in = self.steps
        else:
            search.unread += samples
        self.policy.served(request, count)
        return row

    def _make_room(self, request: Request) -> bool:
        """Gives a running request blocks for all its tokens, the one to be written next unshared; false if it had to
        give way."""
        while request.slot >= 0:
            begun = request.computed // self.pool.block_size
            copied = begun < len(request.blocks) and self.pool.shared(request.blocks[begun])
            if not copied and blocks_for(request.length, self.pool.block_size) <= len(request.blocks):
                return True
            if not self.pool.free_blocks:
                self._preempt(self.running[-1])
                continue
            (block,) = self.pool.allocate(1)
            if copied:
                self._copies[block] = request.blocks[begun]
                self.pool.release([request.blocks[begun]])
                request.blocks = [*request.blocks[:begun], block]  # a new list: it has been uploaded as it was
            else:
                request.blocks.append(block)
        return False

    def _make_way(self) -> None:
        """Preempts sequences of lower priority than the next request, if that lets it start."""
        if not self.waiting:
            return
        candidate = self.policy.next(self.waiting)
        lower = [r for r in self.running if r.priority < candidate.priority]
        if not lower or self._under_way(candidate) or self._fits(candidate):
            return
        # A block that several hold counts several times here: the candidate may then have to wait all the same.
        free = self.pool.free_blocks + sum(len(r.blocks) for r in lower)
        kept = len(self.running) - len(lower)
        need = self._blocks(candidate, candidate.length, self._longest(candidate) + 1)
        if need + kept > free or len(candidate.beams) > self._places + len(lower):
            return
        while lower and not self._fits(candidate):
            victim = lower.pop()
            if victim.slot >= 0:  # not gone with another beam
                self._preempt(victim)

    def _fits(self, request: Request) -> bool:
        """A waiting request may start if its tokens fit and every running one can still get its next block."""
        if self._places < len(request.beams) or self._under_way(request):
            return False
        found = self._cached(request)
        need = self._blocks(request, request.length, self._longest(request) + 1) - len(found)
        free = self.pool.free_blocks - self.pool.idle(found)
        return need + len(self.running) <= free or (not self.running and need <= free)

    def _blocks(self, request: Request, stem: int, length: int) -> int:
        """Blocks for `length` tokens of a request whose beams, if it has any, share those that `stem` tokens fill."""
        common = stem // self.pool.block_size
        return common + len(request.beams) * (blocks_for(length, self.pool.block_size) - common)

    @staticmethod
    def _longest(request: Request) -> int:
        return len(request.search.paths[0]) if request.search else request.length

    @staticmethod
    def _under_way(request: Request) -> bool:
        return bool(request.in_flight or (request.search and request.search.unread))

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
        if request.search:
            request.search.grown = len(request.search.paths) == 1
            self._searching[request] = None
        for beam in request.beams:
            beam.order = request.order
            beam.slot = self._slots.pop()
            insort(self.running, beam, key=rank)
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
        """Preempts the request, with all its beams if it has any."""
        owner = request.owner
        for beam in request.beams:
            self._release(beam)
        if owner.search:
            self._fold(owner.search)
        owner.preemptions += 1
        self.preemptions += 1
        insort(self.waiting, owner, key=rank)

    def _fold(self, search: BeamSearch) -> None:
        """The first beam is to compute what all have in common, the others nothing."""
        search.grown = False
        search.found.clear()
        for beam in search.beams:
            beam.tokens = []
        search.beams[0].tokens = search.stem
        del search.beams[0].keys[len(search.stem) // self.pool.block_size :]

    def _regrow(self, request: Request) -> None:
        """Once the first beam has computed what all have in common, the others go on from there."""
        search = request.search
        if search and not search.grown and not request.pending:
            search.grown = True
            self._branch(search, [0] * search.width)

    def _branch(self, search: BeamSearch, parents: Sequence[int]) -> None:
        """Lets every beam go on from the one of `parents`: holds its blocks too, and has the tokens of its path."""
        before = [(beam.blocks, beam.computed, beam.keys, beam.published) for beam in search.beams]
        for parent in parents:
            self.pool.share(before[parent][0])
        for blocks, *_ in before:
            self.pool.release(blocks)
        for beam, path, parent in zip(search.beams, search.paths, parents, strict=True):
            blocks, beam.computed, keys, beam.published = before[parent]
            beam.tokens, beam.blocks, beam.keys = path, list(blocks), list(keys)

    def _take_candidates(self, beam: Request, candidates: Candidates) -> bool:
        """Goes on with a search once all its beams are read; false if that is not yet, or too late."""
        search, owner = beam.search, beam.owner
        assert search is not None
        search.unread -= 1
        if owner.finish_reason or not search.grown:  # it ended or gave way while this step was under way
            return False
        search.found[beam] = candidates
        if len(search.found) < len(search.paths):
            return False
        parents = search.advance([search.found[b] for b in search.beams[: len(search.paths)]])
        search.found.clear()
        if parents:
            self._branch(search, parents)
        else:
            owner.finish_reason = "length" if search.finished[0].stop is None else "stop"
        return True

    def _forget(self, request: Request) -> None:
        if request.slot >= 0:
            for beam in request.beams:
                self._release(beam)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        self._publish(request)
        self.pool.release(request.blocks)
        request.blocks = []
        request.computed = 0
        self._slots.append(request.slot)
        request.slot = -1
        self._searching.pop(request, None)
        self.running.remove(request)
