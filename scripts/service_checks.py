"""What the runtime must keep true under load, checked on one engine on one device; fp8.scripts.gpu_service tells of it.

Each check takes an Engine and returns whether it passed, with the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fp8.runtime.async_llm import AsyncLLM
from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.llm import LLM, Completion, sample_seed
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.record import Dump
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.sampling_options import History, OptionSampler, options_of
from fp8.runtime.scheduler import Row
from fp8.scripts import compare

STEPS_APART = 5  # mean; the pool holds some six requests, and one takes 50 steps
DRAWS = 256  # noisy draws before a sampled text counts as parted without cause
# How far a text's logits may be off in a batch of another size, and two tokens' margin with them. A code of e4m3 that
# turns changes its activation by up to 1/8, and in the KV cache it stays.
NOISE = {"bf16": 0.05, "fp8": 0.2}
MARGIN = {"bf16": 0.05, "fp8": 0.4}
COMPARE_DB = {"bf16": 25.0, "fp8": 10.0}  # of any tensor, against transformers in float32
OPTIONS: list[dict[str, Any]] = [
    {}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.7}, {"repetition_penalty": 1.2},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3}, {"logit_bias": {5: 2.0, 7: -100.0}}, {"logprobs": 3},
    {"stop": ("return", "\n\n")}, {"min_tokens": 8, "stop_token_ids": (12,), "ignore_eos": False},
    {"prompt_logprobs": 1},
    {
        "top_k": 100, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.1, "logprobs": 1,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {9: 1.0}, "stop": ("import",), "min_tokens": 4,
    },
]  # fmt: skip


@dataclass
class Texts:
    """Texts held against those of the same requests alone; they may part where the top-2 margin is below `allowed`."""

    allowed: float
    compared: int = 0
    parted: list[float] = field(default_factory=list)  # top-2 margins where greedy texts part
    without_cause: int = 0

    def add(self, alone: Completion, found: Sequence[int], whole: bool = True) -> None:
        """A greedy text; `whole`: it ended by itself. `alone` has two log-probabilities per token."""
        assert alone.logprobs is not None
        self.compared += 1
        at = first_difference(alone.token_ids, found)
        if at is not None:
            margin = math.inf if at >= len(alone.logprobs) else top_margin(alone.logprobs[at])
            self.parted.append(margin)
            self.without_cause += margin >= self.allowed
        elif whole and len(found) != len(alone.token_ids):
            self.without_cause += 1

    @property
    def figures(self) -> dict[str, Any]:
        margins = sorted(round(m, 4) for m in self.parted)
        equal = self.compared - len(margins)
        return {"texts": self.compared, "equal": equal, "margins_where_parted": margins, "allowed": self.allowed}


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """None if one begins with the other."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)


def top_margin(entry: TokenLogprobs) -> float:
    return entry.top[0][1] - entry.top[1][1]


@dataclass
class Engine:
    """An engine under test, and a text as tokens, of which prompts are cut."""

    name: str  # "bf16" or "fp8": how far its logits may be from others'
    directory: Path
    device: str
    requests: int
    tokens: list[int]
    model_dir: Path  # of Hugging Face
    tapped: dict[str, Path]  # the same with debug tensors: "stored" disable no fusion, others may
    dumps: Path

    def open(self, blocks: int | None = 256, reuse: bool = False, directory: Path | None = None) -> LLM:
        return LLM(directory or self.directory, self.device, blocks, lag=1, reuse_prefixes=reuse)

    def texts(self) -> Texts:
        return Texts(MARGIN[self.name])

    def prompt(self, source: random.Random, longest: int) -> list[int]:
        start = source.randrange(len(self.tokens) - longest)
        return self.tokens[start : start + source.randint(1, longest)]


def greedy(length: int) -> SamplingParams:
    return SamplingParams(max_tokens=length, ignore_eos=True, logprobs=2)


def alone(llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Completion]:
    return [llm.generate([p], q)[0] for p, q in zip(prompts, params, strict=True)]


def whole_pool(llm: LLM, seconds: float = 1.0) -> bool:
    """Whether every block is free within so many seconds."""
    deadline = time.monotonic() + seconds
    while llm.service.open_requests or llm.worker.busy:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return llm.worker.pool.free_blocks == llm.worker.pool.num_blocks


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


def sampling(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """16 prompts of two samples each, all options among them: twice together, and each alone."""
    source, llm = random.Random(2), engine.open()
    prompts = [engine.prompt(source, 60) for _ in range(16)]
    params = [
        SamplingParams(**{"max_tokens": 16 + i, "temperature": 0.9, "seed": i, "n": 2, "ignore_eos": True,
                          **OPTIONS[i % len(OPTIONS)]}) for i in range(16)
    ]  # fmt: skip
    together, again = (llm.generate(prompts, params) for _ in range(2))
    parted = unexplained = 0
    for i, found in enumerate(together):
        single = replace(params[i // 2], n=1, seed=sample_seed(i // 2, found.index))
        (expected,) = llm.generate([prompts[i // 2]], single)
        if expected.token_ids != found.token_ids:
            parted += 1
            unexplained += not by_noise(llm, expected, found, single, NOISE[engine.name])
    repeated = [c.token_ids for c in together] == [c.token_ids for c in again]
    free = whole_pool(llm)
    figures = {"texts": len(together), "equal": len(together) - parted, "parted_without_cause": unexplained,
               "the_same_batch_twice_equal": repeated, "all_blocks_free": free}  # fmt: skip
    return repeated and free and not unexplained, figures


def by_noise(llm: LLM, a: Completion, b: Completion, params: SamplingParams, most: float) -> bool:
    """Whether noise of at most `most` on the logits where two texts part makes a draw give b's token, and a's."""
    import torch

    from fp8.plugins.sampling.reference import sample

    at = first_difference(a.token_ids, b.token_ids)
    at = min(len(a.token_ids), len(b.token_ids)) if at is None else at  # one ended: by a token that is not shown
    plain = replace(params, prompt_logprobs=None, logprobs=None)
    request = llm.request([*a.prompt_token_ids, *a.token_ids[:at]], plain)
    request.slot, request.blocks = 0, list(range(blocks_for(request.length, llm.session.limits.block_size)))
    logits, (wanted_a, wanted_b) = next_logits(llm, request), (next(iter(c.token_ids[at:]), None) for c in (a, b))
    request.prompt = a.prompt_token_ids  # of which penalties make a difference
    row = Row(request, request.length - 1, 1, True, at)
    fields = (torch.tensor([params.temperature]), torch.tensor([request.seed]), torch.tensor([at], dtype=torch.int32))
    generator, drawn = torch.Generator().manual_seed(at), set()
    for _ in range(DRAWS):
        noisy = logits + most * (2 * torch.rand(logits.shape, generator=generator) - 1)
        if options := options_of([row], History()):
            OptionSampler(llm.session.limits, noisy.device).sample(options, noisy, lambda x: x.argmax(1).int())
        drawn.add(int(sample(noisy, *fields)))
    ends = drawn - {wanted_a, wanted_b}
    return all(w in drawn if w is not None else bool(ends) for w in (wanted_a, wanted_b))


def next_logits(llm: LLM, request: Request) -> Any:
    """Logits f32 [1, V] after the tokens of a request, computed alone, on the CPU."""
    rows = llm.session.max_logits_rows
    for start in range(0, request.length, rows):
        row = Row(request, start, min(rows, request.length - start), False, 0)
        logits = llm.session.token_logits([row])[-1:].float().cpu().clone()
    return logits


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


def debug_outputs(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """Tapped engines, quiet and dumping, against the one without taps; what the dumps hold."""
    from safetensors.torch import load_file

    source = random.Random(5)
    prompts, params = [engine.prompt(source, 60) for _ in range(8)], [greedy(16)] * 8
    expected, figures, sound = engine.open().generate(prompts, params), dict[str, Any](), True
    shutil.rmtree(engine.dumps, ignore_errors=True)
    for kind, directory in engine.tapped.items():
        llm = engine.open(directory=directory)
        quiet = llm.generate(prompts, params)
        dump = Dump(llm.session.plan, llm.session.executor.weight, engine.dumps / kind)
        llm.session.recorder = dump
        dumping, texts = llm.generate(prompts, params), engine.texts()
        for plain, *others in zip(expected, quiet, dumping, strict=True):
            for other in others:
                texts.add(plain, other.token_ids)
        same = [c.token_ids for c in expected] == [c.token_ids for c in quiet]
        files = [load_file(f) for f in sorted(dump.directory.glob("step_*.safetensors"))]
        wrong = sum(inconsistent(tensors, tap.name) for tensors in files for tap in llm.session.plan.taps)
        figures[kind] = {**texts.figures, "taps": len(llm.session.plan.taps), "dumps": len(files),
                         "inconsistent_tensors": wrong, "quiet_texts_all_equal": same}  # fmt: skip
        sound = sound and not wrong and len(files) == dump.steps > 0 and not texts.without_cause
        sound = sound and (same or kind != "stored")  # the same kernels in the same graph: equal to the bit
    return sound, figures


def inconsistent(tensors: dict[str, Any], name: str) -> bool:
    """Whether a dump's raw values times their scale are not what it says they are."""
    raw, value, scale = tensors[name].float(), tensors[f"{name}.dequantized"], tensors.get(f"{name}.scale")
    known = raw if scale is None else raw * scale.reshape(-1, 1)
    return not (known.equal(value) and bool(value.isfinite().all()) and bool(value.any()))


def against_hugging_face(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """`fp8-inspect compare ENGINE HF_DIR` on the device."""
    printed, needed = io.StringIO(), COMPARE_DB[engine.name]
    text = ["--input_text", "def main():\n    parser = argparse.ArgumentParser(description=__doc__)\n"]
    flags = ["--device", engine.device, "--threshold", str(needed), "--json", *text]
    with contextlib.redirect_stdout(printed):
        status = compare.main([str(engine.directory), str(engine.model_dir), *flags])
    facts = json.loads(printed.getvalue() or "{}")
    tensors = facts.get("tensors", [])
    lowest = min((t["sqnr"] for t in tensors if t["sqnr"] is not None), default=None)
    figures = {
        "status": status, "tensors": len(tensors), "lowest_sqnr_db": lowest, "needed_db": needed,
        "first_under": facts.get("first_under"), "logits_db": tensors[-1]["sqnr"] if tensors else None,
    }  # fmt: skip
    return status == 0 and len(tensors) > 20 and facts["first_under"] is None, figures


CHECKS: list[Callable[[Engine], tuple[bool, dict[str, Any]]]] = [
    random_arrivals, sampling, prefixes, streaming, debug_outputs, against_hugging_face
]  # fmt: skip
