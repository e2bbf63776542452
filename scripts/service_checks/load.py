"""Requests that arrive at random, begin alike, are streamed and cancelled.

Each check takes an Engine and returns whether it passed, with the figures; fp8.scripts.gpu_service describes them.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from typing import Any

from fp8.runtime.async_llm import AsyncLLM
from fp8.runtime.llm import LLM
from fp8.runtime.request import Request, SamplingParams
from fp8.scripts.service_checks.engine import Engine, alone, greedy, whole_pool

STEPS_APART = 5  # mean; the pool holds some six requests, and one takes 50 steps


def random_arrivals(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """Random lengths, priorities, users, some beginning alike, some cancelled, on a pool that they overflow."""
    source, count = random.Random(1), engine.requests
    shared = engine.tokens[:90]
    prompts = [engine.prompt(source, 130 if source.random() < 0.2 else 50) for _ in range(count)]
    prompts = [[*shared[: source.randint(1, 90)], *p[:20]] if source.random() < 0.3 else p for p in prompts]
    params = [greedy(source.randint(1, 100)) for _ in range(count)]
    expected = alone(engine.open(), prompts, params)
    llm = engine.open(blocks=16, reuse=True)
    requests = [
        llm.request(p, q, priority=source.randrange(3), user=str(i % 5))
        for i, (p, q) in enumerate(zip(prompts, params, strict=True))
    ]
    leaving = {r: source.randint(1, 20) for r in source.sample(requests, count // 10)}
    ended = arrive(llm, requests, leaving, source)
    texts = engine.texts()
    for request, completion in zip(requests, expected, strict=True):
        texts.add(completion, request.output, whole=request.finish_reason != "abort")
    facts = llm.worker.statistics
    free = whole_pool(llm)
    llm.close()
    figures = {
        **texts.figures, "preemptions": facts.preemptions, "reused_tokens": facts.reused_tokens,
        "cancelled": facts.finished["abort"], "steps": facts.step_count, "all_blocks_free": free,
    }  # fmt: skip
    return ended and free and facts.preemptions > 0 and not texts.without_cause, figures


def arrive(llm: LLM, requests: list[Request], leaving: dict[Request, int], source: random.Random) -> bool:
    """Submits from this thread, a random number of steps apart, so that the load is the same on any device; `leaving`
    are cancelled after so many tokens. True once all ended."""
    left = threading.Semaphore(0)

    def listen(request: Request) -> None:
        if request.finish_reason:
            left.release()
        elif len(request.output) >= leaving.get(request, math.inf):
            llm.service.cancel(request)

    llm.service.start()
    for request in requests:
        llm.service.submit(request, listen)
        until = llm.worker.statistics.step_count + source.expovariate(1 / STEPS_APART)
        while llm.service.open_requests and llm.worker.statistics.step_count < until:
            time.sleep(0.0005)
    return all([left.acquire(timeout=300) for _ in requests])


def prefixes(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """Prompts with a long beginning in common, with and without reuse of its blocks."""
    source = random.Random(3)
    shared = engine.tokens[1000:1300]
    prompts = [[*shared, *engine.prompt(source, 50)] for _ in range(16)]
    params = [greedy(24)] * 16
    expected = alone(engine.open(), prompts, params)
    llm, texts = engine.open(reuse=True), engine.texts()
    for completion, found in zip(expected, alone(llm, prompts, params), strict=True):
        texts.add(completion, found.token_ids)
    for completion, found in zip(expected, llm.generate(prompts, params), strict=True):
        texts.add(completion, found.token_ids)
    reused, free = llm.worker.statistics.reused_tokens, whole_pool(llm)
    figures = {**texts.figures, "reused_tokens": reused, "all_blocks_free": free}
    return free and reused >= 15 * 256 and not texts.without_cause, figures


def streaming(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """Threads, asyncio and an iterator that is closed in the middle, side by side on the thread in the background."""
    source = random.Random(4)
    prompts, params = [engine.prompt(source, 60) for _ in range(16)], [greedy(40)] * 16
    expected = alone(engine.open(), prompts, params)
    llm, found = engine.open(), dict[int, list[int]]()

    def follow(i: int) -> None:
        found[i] = [t for delta in llm.stream(prompts[i], params[i]) for t in delta.token_ids]

    async def collect(i: int) -> None:
        deltas = AsyncLLM(llm).generate(prompts[i], params[i])
        found[i] = [t async for delta in deltas for t in delta.token_ids]

    async def gather() -> None:
        await asyncio.gather(*(collect(i) for i in range(8, 16)))

    threads = [threading.Thread(target=follow, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    doomed = llm.stream(prompts[0], SamplingParams(max_tokens=400, ignore_eos=True))
    next(doomed)
    doomed.close()
    asyncio.run(gather())
    for thread in threads:
        thread.join(60)
    texts = engine.texts()
    for i, completion in enumerate(expected):
        texts.add(completion, found.get(i, []))
    free, cancelled = whole_pool(llm), llm.worker.statistics.finished["abort"]
    llm.close()
    figures = {**texts.figures, "cancelled": cancelled, "all_blocks_free": free}
    return free and cancelled == 1 and not texts.without_cause, figures
