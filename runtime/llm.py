"""LLM: prompts in, texts out."""

from __future__ import annotations

import itertools
import queue
import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fp8.runtime.beam_search import candidates_per_beam
from fp8.runtime.comm import World
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.policy import POLICIES
from fp8.runtime.reference import MakeWeight
from fp8.runtime.request import Request
from fp8.runtime.sampling_params import RequestError, SamplingParams
from fp8.runtime.service import Service, ServiceError
from fp8.runtime.session import Session
from fp8.runtime.text_stream import TextStream
from fp8.runtime.tokenizer import ChatTemplate, load_tokenizer
from fp8.runtime.worker import Worker

Prompt = str | Sequence[int]
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio: its multiples lie far apart


@dataclass(frozen=True)
class Timing:
    """Seconds. `queued`: from arrival to its first step; `first_token`, `total`: from arrival."""

    queued: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Completion:
    """The output of one prompt. `text` is None where the engine has no tokenizer."""

    prompt: Prompt
    prompt_token_ids: list[int] = field(repr=False)
    token_ids: list[int] = field(repr=False)
    text: str | None
    finish_reason: str  # "stop" or "length"
    timing: Timing
    index: int = 0  # which of the prompt's n samples
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    logprobs: list[TokenLogprobs] | None = field(default=None, repr=False)
    prompt_logprobs: list[TokenLogprobs | None] | None = field(default=None, repr=False)  # None before their start
    cumulative_logprob: float | None = None  # of `logprobs`; of a beam what ranked it, its stop token included

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Delta:
    """A piece of a prompt's output: what came since the last one. The `text` of all of them is the completion's; the
    last one, and no other, has a `finish_reason`."""

    token_ids: list[int]
    text: str | None  # None where the engine has no tokenizer
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None = None  # of `token_ids`, if asked for


class DeltaSource:
    """Turns a request as it grows into Deltas."""

    def __init__(self, llm: LLM, request: Request) -> None:
        self.request = request
        params = request.params
        self._text = None if llm.tokenizer is None else TextStream(llm.tokenizer, params.stop, params.min_tokens)
        self._service = llm.service
        self._told = self._taken = 0

    def news(self) -> tuple[list[int], str | None]:
        """Tokens since the last call, and the finish reason; for a listener, at its turn. However slow the reader is,
        what piles up is no more than the output."""
        new = self.request.output_from(self._told)
        self._told += len(new)
        return new, self.request.finish_reason

    def take(self, new: list[int], finish_reason: str | None) -> Delta:
        """Takes what `news` gave, in its order. Raises ServiceError if the request was dropped."""
        if finish_reason == "abort":
            raise ServiceError(f"the request was dropped: {self._service.failure or 'it was cancelled'}")
        begin, self._taken = self._taken, self._taken + len(new)
        wanted = self.request.params.logprobs is not None
        logprobs = self.request.logprobs[begin : self._taken] if wanted else None
        if self._text is None:
            return Delta(new, None, finish_reason, logprobs)
        text = self._text.add(new)
        return Delta(new, text + self._text.finish() if finish_reason else text, finish_reason, logprobs)


class LLM:
    """An engine ready to generate.

    llm = LLM("engine")
    for completion in llm.generate(["def fibonacci(n):"], SamplingParams(max_tokens=64)):
        print(completion.text)
    for delta in llm.stream("def fibonacci(n):", SamplingParams(max_tokens=64)):
        print(delta.text, end="", flush=True)

    `policy` is "throughput" or "fair" (fp8.runtime.policy). Any number of threads may use one LLM.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        device: str = "auto",
        max_kv_blocks: int | None = None,
        kv_cache_free_gpu_memory_fraction: float = 0.9,
        lag: int | None = None,
        policy: str = "throughput",
        reuse_prefixes: bool = True,
        world: World | None = None,
        make_weight: MakeWeight | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise RequestError(f"policy {policy!r} is unknown; known: {', '.join(sorted(POLICIES))}")
        self.engine_dir = Path(engine_dir)
        self.session = Session(engine_dir, device, max_kv_blocks, kv_cache_free_gpu_memory_fraction, world, make_weight)
        self.worker = Worker(self.session, lag, POLICIES[policy](), reuse_prefixes)
        self.service = Service(self.worker)
        self.tokenizer = load_tokenizer(engine_dir)
        self._ids = itertools.count(1)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Callable[[Request], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt (text or token ids) and sample, the n of a prompt side by side, in order; all run
        together, as many at once as fit.

        `progress` is called with a request whenever it got a token. Raises RequestError, before anything runs, for a
        prompt that is empty, too long or holds a token outside the vocabulary.
        """
        if isinstance(prompts, str):
            raise RequestError("generate takes a list of prompts; a single one goes in a list of one")
        chosen = _one_per_prompt(prompts, params or SamplingParams())
        samples = [range(1 if p.beam_width > 1 else p.n) for p in chosen]
        wanted = [(i, prompts[i], p, sample) for i, p in enumerate(chosen) for sample in samples[i]]
        requests = [self.request(prompt, p, i, sample) for i, prompt, p, sample in wanted]
        for request in requests:
            self.worker.scheduler.check(request)
        with self.service.driving() as take_turn:
            try:
                for request in requests:
                    self.service.submit(request, progress or _ignore)
                while any(request.finish_reason is None for request in requests):
                    take_turn()
            finally:
                for request in requests:
                    self.service.cancel(request)  # has an effect only after an interrupt
        if any(request.finish_reason == "abort" for request in requests):
            raise ServiceError(f"the requests were dropped: {self.service.failure}")
        return [
            completion
            for (_, prompt, _, sample), request in zip(wanted, requests, strict=True)
            for completion in self.completions(prompt, request, sample)
        ]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0, user: str = ""
    ) -> Generator[Delta, None, None]:
        """A prompt's output as it comes, while other requests run. Closing the iterator cancels it.

        Raises RequestError, here and not at the first element, for a prompt that cannot be served.
        """
        request = self.request(prompt, params or SamplingParams(), priority=priority, user=user)
        check_stream(request)
        self.worker.scheduler.check(request)
        return self._deltas(request)

    def _deltas(self, request: Request) -> Generator[Delta, None, None]:
        events: queue.SimpleQueue[tuple[list[int], str | None]] = queue.SimpleQueue()
        source = DeltaSource(self, request)
        self.service.start()
        self.service.submit(request, lambda _: events.put(source.news()))
        try:
            finish_reason = None
            while finish_reason is None:
                new, finish_reason = events.get()
                yield source.take(new, finish_reason)
        finally:
            self.service.cancel(request)

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        index: int = 0,
        sample: int = 0,
        priority: int = 0,
        user: str = "",
    ) -> Request:
        """A checked request for one of the prompt's n samples. `index` is the prompt's number, for messages."""
        tokens = self.tokenize(prompt, index)
        check_prompt(tokens, index, self.session.limits.max_seq_len, self.session.model.vocab_size)
        check_tokens(params, index, self.session.model.vocab_size)
        stop = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(self.session.model.eos_token_ids)
        )
        self._check_beams(params, index, len(stop))
        if params.stop and self.tokenizer is None:
            raise RequestError(
                f"prompt {index}: stop strings are looked for in text, and the engine directory holds no tokenizer; "
                f"give stop_token_ids"
            )
        return Request(
            id=next(self._ids),
            prompt=tokens,
            params=params,
            max_new_tokens=min(params.max_tokens, self.session.limits.max_seq_len - len(tokens)),
            seed=secrets.randbits(63) if params.seed is None else sample_seed(params.seed, sample),
            stop_tokens=stop,
            priority=priority,
            user=user,
            text=TextStream(self.tokenizer, params.stop, params.min_tokens) if self.tokenizer and params.stop else None,
            shareable=None if params.prompt_logprobs is None else params.prompt_logprobs_start - 1,
        )

    def _check_beams(self, params: SamplingParams, index: int, stop_tokens: int) -> None:
        most, vocabulary = self.session.limits.max_batch_size, self.session.model.vocab_size
        if params.beam_width > most:
            raise RequestError(
                f"prompt {index}: beam_width is {params.beam_width}, and the engine's max_batch_size is {most}; "
                f"take fewer beams, or build with a larger --max_batch_size"
            )
        need = candidates_per_beam(params.beam_width, stop_tokens)
        if params.beam_width > 1 and need > vocabulary:
            raise RequestError(
                f"prompt {index}: beam_width {params.beam_width} with {stop_tokens} stop tokens compares {need} "
                f"candidates, and the vocabulary has {vocabulary} tokens; take fewer beams or stop tokens"
            )

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Turns messages ({"role": ..., "content": ...}) into tokens. Raises EngineError where there is none."""
        return ChatTemplate(self.engine_dir)

    def close(self, drain_seconds: float = 0.0) -> None:
        """Ends the background thread; open requests have `drain_seconds` to finish. Takes no requests afterwards."""
        self.service.close(drain_seconds)

    def tokenize(self, prompt: Prompt, index: int = 0) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if not prompt:  # a BOS alone is no prompt
            return []
        if self.tokenizer is None:
            raise RequestError(f"prompt {index} is text, and the engine directory holds no tokenizer; give token ids")
        return self.tokenizer.encode(prompt)

    def completions(self, prompt: Prompt, request: Request, sample: int = 0) -> list[Completion]:
        """The completions of a request that has ended: one, or the n best of a beam search."""
        if request.search is None:
            whole = self._completion(prompt, request, request.output, request.stop_reason)
            total = None if whole.logprobs is None else sum(entry.logprob for entry in whole.logprobs)
            return [replace(whole, index=sample, cumulative_logprob=total)]
        out = []
        for i, found in enumerate(request.search.finished[: request.params.n]):
            whole = self._completion(prompt, request, found.tokens[len(request.prompt) :], found.stop)
            reason = "length" if found.stop is None else "stop"
            out.append(replace(whole, index=i, finish_reason=reason, cumulative_logprob=found.logprob))
        return out

    def _completion(
        self, prompt: Prompt, request: Request, output: list[int], stop_reason: int | str | None
    ) -> Completion:
        text = None if self.tokenizer is None else self.tokenizer.decode(output)
        if request.text is not None and request.text.found:
            text = request.text.text
        timing = Timing(
            request.started - request.arrived, request.first_token - request.arrived, request.finished - request.arrived
        )
        assert request.finish_reason is not None
        logprobs = None if request.params.logprobs is None else request.logprobs[: len(output)]
        return Completion(
            prompt, list(request.prompt), output, text, request.finish_reason, timing, stop_reason=stop_reason,
            logprobs=logprobs, prompt_logprobs=request.prompt_logprobs,
        )  # fmt: skip


def _ignore(_: Request) -> None:
    pass


def check_stream(request: Request) -> None:
    """Raises RequestError for a request whose text does not come piece by piece."""
    if request.search:
        raise RequestError(
            f"beam_width is {len(request.beams)}, and which beam wins is known at the end; do not stream it"
        )


def check_prompt(tokens: Sequence[int], index: int, max_seq_len: int, vocab_size: int) -> None:
    """Raises RequestError unless a token can follow the prompt."""
    if not tokens:
        raise RequestError(f"prompt {index} is empty; give at least one token")
    if len(tokens) >= max_seq_len:
        raise RequestError(
            f"prompt {index} has {len(tokens)} tokens, and the engine's max_seq_len is {max_seq_len}, output included; "
            f"shorten it to {max_seq_len - 1} tokens, or build with a larger --max_seq_len"
        )
    for position, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"prompt {index}: token {token} at position {position} is outside the vocabulary "
                f"(0 to {vocab_size - 1}); does the tokenizer belong to this model?"
            )


def check_tokens(params: SamplingParams, index: int, vocab_size: int) -> None:
    """Raises RequestError if a parameter names a token that does not exist."""
    for name in ("stop_token_ids", "logit_bias", "logprob_token_ids"):
        for token in getattr(params, name):
            if token >= vocab_size:
                raise RequestError(
                    f"prompt {index}: {name} holds token {token}, outside the vocabulary (0 to {vocab_size - 1})"
                )


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one of n samples, far from other seeds' samples; the first has the seed itself. A 64-bit integer."""
    return (seed + sample * GOLDEN + 2**63) % 2**64 - 2**63


def _one_per_prompt(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts and {len(params)} sampling parameters; give one, or one per prompt")
    return list(params)
