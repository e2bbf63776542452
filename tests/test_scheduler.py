"""The scheduler on random traffic, without a model: limits kept, order kept, every request served, no block leaked."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.runtime.kv_cache import BlockPool, blocks_for
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scheduler import Row, Scheduler

BLOCK = 4
STOP = 999


def make(number: int, prompt: int, new: int) -> Request:
    return Request(number, [number] * prompt, SamplingParams(max_tokens=new), new, stop_tokens=frozenset({STOP}))


class Machine:
    """Stands in for the session: checks each step, and remembers how far each sequence has been computed."""

    def __init__(self, scheduler: Scheduler, max_batch: int) -> None:
        self.scheduler, self.max_batch = scheduler, max_batch
        self.computed: dict[Request, int] = {}

    def check(self, rows: list[Row]) -> None:
        requests = [row.request for row in rows]
        assert len(set(requests)) == len(requests) <= self.max_batch
        assert sum(row.count for row in rows) <= self.scheduler.max_num_tokens
        counts = [row.count > 1 for row in rows]
        assert counts == sorted(counts), "single tokens come first"
        slots = [row.request.slot for row in rows]
        assert len(set(slots)) == len(slots) and all(0 <= s < self.max_batch for s in slots)
        for row in rows:
            if row.start == 0:
                self.computed[row.request] = 0
            assert self.computed[row.request] == row.start, "K and V are computed without a gap"
            self.computed[row.request] = row.start + row.count
            assert len(row.request.blocks) * BLOCK >= row.start + row.count
        owned = [b for r in self.scheduler.running for b in r.blocks]
        assert len(set(owned)) == len(owned)
        assert len(owned) + self.scheduler.pool.free_blocks == self.scheduler.pool.num_blocks


requests = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 25)), min_size=1, max_size=12)


@settings(max_examples=400, deadline=None)
@given(requests, st.integers(1, 6), st.integers(1, 40), st.integers(0, 10), st.integers(0, 2))
def test_every_request_is_served_whatever_the_limits(
    wanted: list[tuple[int, int, int]], max_batch: int, max_tokens: int, spare: int, lag: int
) -> None:
    largest = max(blocks_for(p + n, BLOCK) for p, n, _ in wanted)
    scheduler = Scheduler(BlockPool(largest + spare, BLOCK), max_batch, max_tokens)
    all_requests = [make(i, p, n) for i, (p, n, _) in enumerate(wanted)]
    stop_at = {r: s for r, (_, _, s) in zip(all_requests, wanted, strict=True)}
    for request in all_requests:
        scheduler.add(request)
    machine, pending, steps = Machine(scheduler, max_batch), deque(), 0
    while scheduler.unfinished or pending:
        rows = scheduler.schedule()
        machine.check(rows)
        if rows:
            pending.append(rows)
        if pending and (len(pending) > lag or not rows):
            done = pending.popleft()
            scheduler.update(done, [STOP if r.index == stop_at[r.request] else r.index for r in done if r.samples])
        steps += 1
        assert steps < 20000, "no progress"
    for request in all_requests:
        expected = min(request.max_new_tokens, stop_at[request])
        assert request.output == list(range(expected)), "each token once, in order"
        assert request.finish_reason == ("stop" if stop_at[request] < request.max_new_tokens else "length")
    assert scheduler.pool.free_blocks == scheduler.pool.num_blocks


def run_to_the_end(scheduler: Scheduler) -> list[Request]:
    finished = []
    while scheduler.unfinished:
        rows = scheduler.schedule()
        got = scheduler.update(rows, [0] * sum(r.samples for r in rows))
        finished += [r for r in got if r.finish_reason]
    return finished


def test_equal_requests_finish_in_the_order_of_arrival() -> None:
    scheduler = Scheduler(BlockPool(7, BLOCK), 3, 8)
    arrived = [make(i, 9, 5) for i in range(6)]
    for request in arrived:
        scheduler.add(request)
    assert run_to_the_end(scheduler) == arrived


def test_a_long_prompt_is_cut_into_chunks_beside_decode_rows() -> None:
    scheduler = Scheduler(BlockPool(50, BLOCK), 4, 10)
    scheduler.add(make(0, 3, 20))
    scheduler.update(scheduler.schedule(), [0])
    scheduler.add(make(1, 25, 2))
    chunks = []
    for _ in range(3):
        rows = scheduler.schedule()
        assert rows[0].request.id == 0 and rows[0].count == 1
        chunks.append((rows[1].count, rows[1].samples))
        scheduler.update(rows, [0] * sum(r.samples for r in rows))
    assert chunks == [(9, False), (9, False), (7, True)]


def test_the_youngest_gives_way_when_blocks_run_out() -> None:
    scheduler = Scheduler(BlockPool(5, BLOCK), 2, 64)
    old, young = make(0, 4, 12), make(1, 4, 12)
    scheduler.add(old)
    scheduler.add(young)
    run_to_the_end(scheduler)
    assert (old.preemptions, young.preemptions > 0) == (0, True)
    assert len(young.output) == 12


def test_a_request_larger_than_the_pool_is_refused_with_both_sizes() -> None:
    scheduler = Scheduler(BlockPool(3, BLOCK), 2, 64)
    with pytest.raises(RequestError, match="need 4 KV blocks, and the pool has 3"):
        scheduler.add(make(0, 10, 4))
    assert not scheduler.unfinished


def test_abort_frees_everything_at_any_moment() -> None:
    scheduler = Scheduler(BlockPool(8, BLOCK), 2, 6)
    requests = [make(i, 8, 4) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    rows = scheduler.schedule()
    for request in requests:
        scheduler.abort(request)
    scheduler.update(rows, [0] * sum(r.samples for r in rows))
    assert not scheduler.unfinished and scheduler.pool.free_blocks == 8
    assert [r.finish_reason for r in requests] == ["abort"] * 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"min_tokens": 17}, "min_tokens is 17"),
        ({"seed": 2**63}, "64 bits"),
    ],
)
def test_invalid_sampling_values_are_refused_by_name(wrong: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**wrong)
