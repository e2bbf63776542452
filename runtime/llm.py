"""LLM: prompts in, texts out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.session import Session
from fp8.runtime.tokenizer import load_tokenizer
from fp8.runtime.worker import Worker

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Timing:
    """Seconds. `queued`: from arrival to its first step; `first_token`, `total`: from arrival."""

    queued: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Completion:
    """What came of one prompt. `text` is None where the engine has no tokenizer."""

    prompt: Prompt
    prompt_token_ids: list[int] = field(repr=False)
    token_ids: list[int] = field(repr=False)
    text: str | None
    finish_reason: str  # "stop" or "length"
    timing: Timing

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class LLM:
    """An engine ready to generate.

    llm = LLM("engine")
    for completion in llm.generate(["def fibonacci(n):"], SamplingParams(max_tokens=64)):
        print(completion.text)
    """

    def __init__(
        self,
        engine_dir: str | Path,
        device: str = "auto",
        max_kv_blocks: int | None = None,
        kv_cache_free_gpu_memory_fraction: float = 0.9,
        lag: int | None = None,
    ) -> None:
        self.session = Session(engine_dir, device, max_kv_blocks, kv_cache_free_gpu_memory_fraction)
        self.worker = Worker(self.session, lag)
        self.tokenizer = load_tokenizer(engine_dir)
        self._next_id = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: Callable[[Request], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt (text or token ids), in order; all run together, as many at once as fit.

        `progress` is called with a request whenever it got a token. Raises RequestError, before anything runs, for a
        prompt that is empty, too long or holds a token outside the vocabulary.
        """
        if isinstance(prompts, str):
            raise RequestError("generate takes a list of prompts; a single one goes in a list of one")
        chosen = _one_per_prompt(prompts, params or SamplingParams())
        requests = [self.request(prompt, p, i) for i, (prompt, p) in enumerate(zip(prompts, chosen, strict=True))]
        try:
            for request in requests:
                self.worker.submit(request)
            while self.worker.busy:
                for request in self.worker.step():
                    if progress:
                        progress(request)
        except BaseException:
            self.worker.drop_all()
            raise
        return [self.completion(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]

    def request(self, prompt: Prompt, params: SamplingParams, index: int = 0) -> Request:
        """A checked request. `index` is the prompt's number, for messages."""
        tokens = self.tokenize(prompt, index)
        check_prompt(tokens, index, self.session.limits.max_seq_len, self.session.model.vocab_size)
        stop = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(self.session.model.eos_token_ids)
        )
        self._next_id += 1
        return Request(
            id=self._next_id,
            prompt=tokens,
            params=params,
            max_new_tokens=min(params.max_tokens, self.session.limits.max_seq_len - len(tokens)),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stop_tokens=stop,
        )

    def tokenize(self, prompt: Prompt, index: int = 0) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if not prompt:  # a BOS alone is no prompt
            return []
        if self.tokenizer is None:
            raise RequestError(f"prompt {index} is text, and the engine directory holds no tokenizer; give token ids")
        return self.tokenizer.encode(prompt)

    def completion(self, prompt: Prompt, request: Request) -> Completion:
        text = None if self.tokenizer is None else self.tokenizer.decode(request.output)
        timing = Timing(
            request.started - request.arrived, request.first_token - request.arrived, request.finished - request.arrived
        )
        assert request.finish_reason is not None
        return Completion(prompt, list(request.prompt), request.output, text, request.finish_reason, timing)


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


def _one_per_prompt(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts and {len(params)} sampling parameters; give one, or one per prompt")
    return list(params)
