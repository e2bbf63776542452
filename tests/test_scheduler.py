"""The scheduler on random traffic, without a model: limits kept, order kept, every request served, no block leaked."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.runtime.beam_search import BeamSearch, Hypothesis
from fp8.runtime.kv_cache import BlockPool, blocks_for
from fp8.runtime.policy import PATIENCE, POLICIES, Fair, Throughput
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scheduler import Row, Scheduler

BLOCK = 4
STOP = 999


def make(
    number: int, prompt: int, new: int, priority: int = 0, user: str = "", text: int | None = None, beams: int = 1
) -> Request:
    tokens, params = [number if text is None else text] * prompt, SamplingParams(max_tokens=new, beam_width=beams)
    return Request(number, tokens, params, new, stop_tokens=frozenset({STOP}), priority=priority, user=user)


@dataclass(frozen=True)
class Wanted:
    """A request of a trace. Requests of one `text` begin alike, and the model continues them alike."""

    text: int
    prompt: int
    new: int
    stop: int  # the output token that is a stop token
    priority: int
    user: str
    arrives: int  # steps after the request before
    cancelled: int | None  # steps after its arrival
    beams: int = 1


def candidates(request: Request, tokens: list[int]) -> list[tuple[int, float]]:
    """What a model without a memory offers a beam behind `tokens`; now and then the stop token is among it."""
    assert request.search
    source = random.Random(hash((*request.prompt, *tokens)))
    offered = [*source.sample(range(1000, 1020), request.search.candidates - 1), STOP]
    return sorted(((t, -source.random()) for t in offered), key=lambda pair: -pair[1])


def searched(request: Request) -> list[Hypothesis]:
    """What the search of a request finds without a scheduler."""
    search = BeamSearch(request.params, request.prompt, request.max_new_tokens, request.stop_tokens)
    while search.advance([candidates(request, path) for path in search.paths]):
        pass
    return search.finished


plain = st.builds(
    Wanted, st.integers(0, 2), st.integers(1, 30), st.integers(1, 20), st.integers(0, 25), st.integers(0, 2),
    st.sampled_from("abc"), st.integers(0, 5), st.none() | st.integers(0, 20),
)  # fmt: skip
mixed = st.builds(replace, plain, beams=st.sampled_from([1, 2, 3]))


class Machine:
    """Stands in for worker and session: runs the steps on a memory that holds, for each place of the KV pool, the
    tokens up to the one computed there; checks what each row reads."""

    def __init__(self, scheduler: Scheduler, max_batch: int, lag: int) -> None:
        self.scheduler, self.max_batch, self.lag = scheduler, max_batch, lag
        self.memory: dict[tuple[int, int], list[int]] = {}
        self.truth: dict[Request, list[int]] = {}
        self.open: deque[list[Row]] = deque()
        self.steps = 0
        self.sampled_in: dict[Request, int] = {}  # its last token

    def add(self, request: Request, stop: int) -> None:
        output = [STOP if i == stop else i for i in range(request.max_new_tokens)]
        self.truth[request] = [*request.prompt, *output]
        self.scheduler.add(request)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.unfinished or self.open)

    def step(self) -> list[Request]:
        rows = self.scheduler.schedule()
        if rows:
            self.copy_blocks()
        self.check(rows)
        if rows:
            self.open.append(rows)
        if self.open and (len(self.open) > self.lag or not rows):
            done = self.open.popleft()
            return self.scheduler.update(done, [self.sampled(r) for r in done if r.samples])
        return []

    def sampled(self, row: Row) -> int | list[tuple[int, float]]:
        if row.request.search:
            return candidates(row.request, self.tokens(row.request))
        return self.truth[row.request][len(row.request.prompt) + row.index]

    def tokens(self, request: Request) -> list[int]:
        """What it computes; a beam has others after every decision."""
        return list(request.tokens) if request.search else self.truth[request]

    def copy_blocks(self) -> None:
        before = dict(self.memory)
        for block, source in self.scheduler.take_copies().items():
            for i in range(BLOCK):
                self.memory[block, i] = before.get((source, i), [])

    def check(self, rows: list[Row]) -> None:
        requests = [row.request for row in rows]
        assert len(set(requests)) == len(requests) <= self.max_batch
        assert sum(row.count for row in rows) <= self.scheduler.max_num_tokens
        assert all(row.count > 0 for row in rows)
        if self.scheduler.stages > 1:
            early = [row.behind for row in rows if 0 < row.behind < self.scheduler.stages]
            assert not early or (early == [row.behind for row in rows] and len(set(early)) == 1), "a stage would wait"
        counts = [row.count > 1 for row in rows]
        assert counts == sorted(counts), "single tokens come first"
        slots = [row.request.slot for row in rows]
        assert len(set(slots)) == len(slots) and all(0 <= s < self.max_batch for s in slots)
        for row in rows:
            known = row.start < len(row.request.tokens)
            assert row.behind == (0 if known else self.steps - self.sampled_in[row.request])
            self.check_contents(row.request, row.start)
        self.sampled_in.update((row.request, self.steps) for row in rows if row.samples)
        self.steps += bool(rows)
        for row in rows:
            for i in range(row.start, row.start + row.count):
                self.memory[row.request.blocks[i // BLOCK], i % BLOCK] = self.tokens(row.request)[: i + 1]
        for row in rows:
            self.check_contents(row.request, row.start + row.count)
        self.check_ownership()

    def check_contents(self, request: Request, tokens: int) -> None:
        for i in range(tokens):
            found = self.memory[request.blocks[i // BLOCK], i % BLOCK]
            assert found == self.tokens(request)[: i + 1], f"request {request.id} reads another's K and V at {i}"

    def check_ownership(self) -> None:
        running = self.scheduler.running
        assert all(len(set(r.blocks)) == len(r.blocks) for r in running)
        assert all(not r.blocks for r in self.scheduler.waiting)
        held = {b for r in running for b in r.blocks}
        assert len(held) + self.scheduler.pool.free_blocks == self.scheduler.pool.num_blocks


def blocks_wanted(w: Wanted) -> int:
    common = w.prompt // BLOCK
    return common + w.beams * (blocks_for(w.prompt + w.new, BLOCK) - common)


limits: dict[str, st.SearchStrategy] = {
    "max_batch": st.integers(1, 6), "max_tokens": st.integers(1, 40), "spare": st.integers(0, 10),
    "lag": st.integers(0, 2), "policy": st.sampled_from(sorted(POLICIES)), "reuse": st.booleans(),
    "stages": st.sampled_from((1, 1, 2, 4)),
}  # fmt: skip


@settings(max_examples=10_000, deadline=None)
@given(trace=st.lists(plain, min_size=1, max_size=10), **limits)
def test_every_request_is_served_whatever_the_traffic(**given: Any) -> None:
    serve(**given)


@settings(max_examples=500, deadline=None)
@given(trace=st.lists(mixed, min_size=1, max_size=10), **limits)
def test_every_request_is_served_whatever_the_traffic_with_beams(**given: Any) -> None:
    serve(**given)


def serve(
    trace: list[Wanted], max_batch: int, max_tokens: int, spare: int, lag: int, policy: str, reuse: bool, stages: int
) -> None:
    trace = [replace(w, beams=min(w.beams, max_batch)) for w in trace]
    pool = BlockPool(max(blocks_wanted(w) for w in trace) + spare, BLOCK)
    scheduler = Scheduler(pool, max_batch, max_tokens, POLICIES[policy](), reuse, stages)
    lag = stages - lag % 2 if stages > 1 else lag
    machine, step, requests = Machine(scheduler, max_batch, lag), 0, []
    arrivals = deque(zip(accumulate(w.arrives for w in trace), trace, strict=True))
    cancels: list[tuple[int, Request]] = []
    while arrivals or machine.busy:
        while arrivals and arrivals[0][0] <= step:
            _, w = arrivals.popleft()
            requests.append(make(len(requests), w.prompt, w.new, w.priority, w.user, w.text, w.beams))
            machine.add(requests[-1], w.stop)
            if w.cancelled is not None:
                cancels.append((step + w.cancelled, requests[-1]))
        for _, request in [c for c in cancels if c[0] == step]:
            scheduler.abort(request)
        machine.step()
        step += 1
        assert step < 20000, "no progress"
    for w, request in zip(trace, requests, strict=True):
        expected = list(range(min(w.new, w.stop)))
        if request.search:
            if request.finish_reason == "abort":
                assert w.cancelled is not None
            else:
                assert request.search.finished == searched(request)
        elif request.finish_reason == "abort":
            assert request.output == expected[: len(request.output)] and w.cancelled is not None
        else:
            assert request.output == expected, "each token once, in order"
            assert request.finish_reason == ("stop" if w.stop < w.new else "length")
    assert pool.free_blocks == pool.num_blocks
    assert sorted(scheduler._slots) == list(range(max_batch))


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


def test_fewer_sequences_run_at_a_time_where_that_is_asked_for() -> None:
    scheduler = Scheduler(BlockPool(50, BLOCK), 4, 64)
    scheduler.most_running = 2
    for i in range(5):
        scheduler.add(make(i, 9, 5))
    rows = scheduler.schedule()
    assert [row.request.id for row in rows] == [0, 1]
    scheduler.update(rows, [0, 0])
    assert len(run_to_the_end(scheduler)) == 5


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


def test_a_prompt_that_was_seen_before_is_computed_from_its_first_new_block_on() -> None:
    scheduler = Scheduler(BlockPool(20, BLOCK), 2, 64)
    scheduler.add(make(7, 11, 3))
    run_to_the_end(scheduler)
    scheduler.add(make(1, 11, 3, text=7))
    rows = scheduler.schedule()
    assert [(row.start, row.count, row.samples) for row in rows] == [(8, 3, True)]
    assert rows[0].request.reused == scheduler.reused_tokens == 8


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    scheduler = Scheduler(BlockPool(20, BLOCK), 2, 64)
    for number in range(2):
        scheduler.add(make(number, 12, 1, text=7))
        (row,) = scheduler.schedule()
        scheduler.update([row], [0])
    assert (row.start, row.count, row.samples) == (8, 4, True)


def test_two_that_run_together_share_blocks_and_the_last_one_frees_them() -> None:
    scheduler = Scheduler(BlockPool(20, BLOCK), 2, 64)
    first, second = make(0, 9, 8, text=7), make(1, 9, 8, text=7)
    scheduler.add(first)
    scheduler.update(scheduler.schedule(), [0])
    scheduler.add(second)
    scheduler.schedule()
    assert first.blocks[:2] == second.blocks[:2] and first.blocks[2] != second.blocks[2]
    assert scheduler.pool.free_blocks == 20 - 4
    scheduler.abort(first)
    assert scheduler.pool.free_blocks == 20 - 3
    scheduler.abort(second)
    assert scheduler.pool.free_blocks == 20


def test_a_request_that_wants_all_logits_reuses_nothing() -> None:
    scheduler = Scheduler(BlockPool(20, BLOCK), 2, 64)
    for number in range(2):
        request = make(number, 12, 1, text=7)
        request.shareable = 0
        scheduler.add(request)
        (row,) = scheduler.schedule()
        scheduler.update([row], [0])
    assert (row.start, row.count) == (0, 12)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_urgent_start_first_and_take_the_place_of_others(policy: str) -> None:
    scheduler = Scheduler(BlockPool(6, BLOCK), 1, 64, POLICIES[policy]())
    slow, normal, urgent = make(0, 8, 12), make(1, 8, 2), make(2, 8, 2, priority=1)
    scheduler.add(slow)
    scheduler.update(scheduler.schedule(), [0])
    scheduler.add(normal)
    scheduler.add(urgent)
    assert run_to_the_end(scheduler) == [urgent, slow, normal]
    assert slow.preemptions == 1 and slow.reused == 8


def test_urgent_requests_that_would_not_fit_anyway_drive_nobody_out() -> None:
    scheduler = Scheduler(BlockPool(8, BLOCK), 3, 64)
    first, second, third = make(0, 16, 8, priority=1), make(1, 4, 8), make(2, 16, 4, priority=1)
    for request in (first, second, third):
        scheduler.add(request)
        scheduler.update(rows := scheduler.schedule(), [0] * sum(r.samples for r in rows))
    assert second.preemptions == 0 and second in scheduler.running and third in scheduler.waiting


def test_a_user_with_many_requests_does_not_hold_up_another_under_the_fair_policy() -> None:
    finished = {}
    for policy in POLICIES:
        scheduler = Scheduler(BlockPool(50, BLOCK), 1, 64, POLICIES[policy](), reuse_prefixes=False)
        for i in range(6):
            scheduler.add(make(i, 8, 4, user="many"))
        scheduler.add(make(6, 8, 4, user="one"))
        finished[policy] = [r.id for r in run_to_the_end(scheduler)]
    assert finished == {"throughput": [0, 1, 2, 3, 4, 5, 6], "fair": [0, 6, 1, 2, 3, 4, 5]}


def test_idleness_earns_no_credit_under_the_fair_policy() -> None:
    policy = Fair()
    busy, back = make(0, 1, 1, user="busy"), make(1, 1, 1, user="back")
    policy.joins(busy, [])
    policy.served(busy, 100)
    policy.joins(back, [busy])
    assert policy.service["back"] == 100
    policy.served(back, 1)
    policy.joins(make(2, 1, 1, user="third"), [busy])
    assert policy.service == {"busy": 100, "back": 101, "third": 100}


def test_a_long_prompt_leaves_room_for_a_short_one_under_the_fair_policy() -> None:
    counts = {}
    for policy in POLICIES:
        scheduler = Scheduler(BlockPool(50, BLOCK), 4, 20, POLICIES[policy]())
        scheduler.add(make(0, 100, 1))
        scheduler.add(make(1, 6, 1))
        counts[policy] = [(row.request.id, row.count) for row in scheduler.schedule()]
    assert counts == {"throughput": [(0, 20)], "fair": [(0, 14), (1, 6)]}


def saturated(policy: str, waiting: int, prompt: int = 100, priority: int = 0) -> tuple[Scheduler, list[Row]]:
    """300 sequences that decode, beside whom 20 more fit, a number of requests that wait, and the next step."""
    scheduler = Scheduler(BlockPool(30000, BLOCK), 320, 4096, POLICIES[policy](), reuse_prefixes=False)
    for i in range(300):
        scheduler.add(make(i, 1, 100))
    rows = scheduler.schedule()
    scheduler.update(rows, [0] * 300)
    for i in range(waiting):
        scheduler.add(make(300 + i, prompt, 100, priority))
    return scheduler, scheduler.schedule()


def test_prompts_fill_whole_waves_while_more_wait_than_fit() -> None:
    scheduler, rows = saturated("throughput", 40)
    assert sum(row.count for row in rows) == 2048 and len(scheduler.running) == 318
    scheduler.update(rows, [0] * sum(row.samples for row in rows))
    for _ in range(PATIENCE):  # 252 tokens are left: too few for another wave, until they have waited long enough
        rows = scheduler.schedule()
        assert sum(row.count for row in rows) == len(rows) == 317
        scheduler.update(rows, [0] * len(rows))
    rows = scheduler.schedule()
    assert sum(row.count for row in rows) == 317 + 252 and len(scheduler.running) == 320


@pytest.mark.parametrize(
    ("policy", "waiting", "prompt", "priority"),
    [("throughput", 20, 7, 0), ("throughput", 40, 7, 1), ("fair", 40, 7, 0)],
    ids=["all that wait fit", "the first has priority", "another policy"],
)
def test_nobody_waits_for_a_whole_wave_where(policy: str, waiting: int, prompt: int, priority: int) -> None:
    _, rows = saturated(policy, waiting, prompt, priority)
    assert sum(row.count for row in rows) == 300 + 20 * 7


@pytest.mark.parametrize(
    ("every", "tokens", "singles", "most"),
    [(22, 20000, 88, 1024), (3, 5000, 330, 2048), (1, 1024, 1016, 2048), (40, 20000, 0, 1024)],
    ids=["seldom", "more often", "every step", "beside nothing"],
)
def test_prompts_are_spread_over_the_steps_until_the_next_may_start(
    every: int, tokens: int, singles: int, most: int
) -> None:
    """Prompts of so many tokens, one every so many steps, while more wait: no step is larger than it takes to keep up,
    and none waits longer than the policy has patience for."""
    policy, ready, steps = Throughput(), 0, []
    for step in range(12 * every + 60):
        if step % every == 0:
            assert ready <= PATIENCE * tokens / every
            ready += tokens
        steps.append(min(policy.room(singles, -(-ready // tokens), ready, 8192 - singles), ready))
        ready -= steps[-1]
    settled = [singles + taken for taken in steps[8 * every + 40 :]]
    assert max(settled) == most and all(total % 1024 in (0, singles) or total < 1024 for total in settled)


def test_many_prompts_beside_few_that_decode_are_not_spread() -> None:
    assert Throughput().room(88, 5, 20000, 8104) == 7 * 1024 + 936
    assert Throughput().room(88, 4, 20000, 8104) == 936
    assert Throughput().room(0, 1, 20000, 8192) == 1024


def test_a_wave_that_no_step_can_hold_is_not_waited_for() -> None:
    policy = Throughput()
    assert [policy.room(300, 1, 50, most) for most in (400, 723)] == [400, 723]
    assert [policy.room(900, 99, ready, 4000) for ready in (0, 124 + 4, 4000, 5000)] == [4000, 0, 3196, 3196]


def test_pipeline_stages_share_the_sequences() -> None:
    """With four stages and eight sequences, four steps are under way at once, of two sequences each; then the first two
    go on, as the last stage hands their tokens to the first without the host."""
    scheduler = Scheduler(BlockPool(64, BLOCK), 8, 100, stages=4)
    for i in range(8):
        scheduler.add(make(i, 1, 20))
    first = scheduler.schedule()
    scheduler.update(first, [0] * len(first))
    steps = [scheduler.schedule() for _ in range(5)]
    assert [len(rows) for rows in steps] == [2, 2, 2, 2, 2]
    assert len({row.request for rows in steps[:4] for row in rows}) == 8
    assert {row.request for row in steps[4]} == {row.request for row in steps[0]}


def test_a_sequence_that_has_a_pipeline_to_itself_goes_on_at_once() -> None:
    """From one unread token to the next; beside another it leaves a stage to each."""
    scheduler = Scheduler(BlockPool(64, BLOCK), 8, 100, stages=2)
    scheduler.add(make(0, 1, 20))
    assert [[row.behind for row in scheduler.schedule()] for _ in range(3)] == [[0], [1], [1]]
    scheduler.add(make(1, 1, 20))
    steps = [scheduler.schedule() for _ in range(4)]
    assert [[(row.request.id, row.behind) for row in rows] for rows in steps] == [
        [(1, 0)],
        [(0, 2)],
        [(1, 2)],
        [(0, 2)],
    ]
