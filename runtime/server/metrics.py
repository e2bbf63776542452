"""/metrics: the loop's statistics in Prometheus' text format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import accumulate

from fp8.runtime.statistics import BUCKETS, Histogram
from fp8.runtime.worker import Worker


def exposition(worker: Worker, refused: int) -> str:
    """All metrics; `refused` counts the requests answered with 429."""
    return "".join(f"{line}\n" for line in _lines(worker, refused))


def _lines(worker: Worker, refused: int) -> Iterator[str]:
    s, pool, scheduler = worker.statistics, worker.pool, worker.scheduler
    yield from _metric("requests_running", "gauge", "Sequences in the batch.", len(scheduler.running))
    yield from _metric("requests_waiting", "gauge", "Requests that have no blocks yet.", len(scheduler.waiting))
    yield from _metric("kv_blocks", "gauge", "Blocks of the KV pool.", pool.num_blocks)
    yield from _metric("kv_blocks_free", "gauge", "Blocks that nobody holds.", pool.free_blocks)
    yield from _metric("kv_blocks_cached", "gauge", "Free blocks whose contents are kept.", pool.cached_blocks)
    yield from _metric("steps_total", "counter", "Turns of the loop.", s.step_count)
    yield from _metric("prompt_tokens_total", "counter", "Tokens of prompts taken in.", s.prompt_tokens)
    yield from _metric("reused_tokens_total", "counter", "Prompt tokens found in the KV pool.", s.reused_tokens)
    yield from _metric("computed_tokens_total", "counter", "Tokens that steps computed.", s.computed_tokens)
    yield from _metric("generated_tokens_total", "counter", "Tokens handed to requests.", s.generated_tokens)
    yield from _metric("preemptions_total", "counter", "Sequences that gave up their blocks.", s.preemptions)
    yield from _metric("requests_refused_total", "counter", "Requests answered with 429.", refused)
    yield from _head("requests_finished_total", "counter", "Requests by how they ended.")
    for reason in ("stop", "length", "abort"):
        yield f'fp8_requests_finished_total{{reason="{reason}"}} {s.finished[reason]}'
    yield from _histogram("queue_seconds", "From arrival to the first step.", s.queue_seconds)
    yield from _histogram("first_token_seconds", "From arrival to the first token.", s.first_token_seconds)
    yield from _histogram("request_seconds", "From arrival to the end.", s.request_seconds)
    yield from _process()


def _process() -> Iterator[str]:
    """Memory and files, under the names that Prometheus' own clients use."""
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    values = {"resident_memory_bytes": resident, "open_fds": len(os.listdir("/proc/self/fd"))}
    for name, value in values.items():
        yield f"# TYPE process_{name} gauge"
        yield f"process_{name} {value}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP fp8_{name} {text}"
    yield f"# TYPE fp8_{name} {kind}"


def _metric(name: str, kind: str, text: str, value: float) -> Iterator[str]:
    yield from _head(name, kind, text)
    yield f"fp8_{name} {value}"


def _histogram(name: str, text: str, histogram: Histogram) -> Iterator[str]:
    yield from _head(name, "histogram", text)
    counts = list(accumulate(histogram.counts))
    for end, count in zip([*map(str, BUCKETS), "+Inf"], counts, strict=True):
        yield f'fp8_{name}_bucket{{le="{end}"}} {count}'
    yield f"fp8_{name}_sum {histogram.sum}"
    yield f"fp8_{name}_count {counts[-1]}"
