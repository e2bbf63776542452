"""An engine under test on one device, and texts held against those of the same requests alone."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8.runtime.llm import LLM, Completion
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.request import SamplingParams

# How far a text's logits may be off in a batch of another size, and two tokens' margin with them. A code of e4m3 that
# turns changes its activation by up to 1/8, and in the KV cache it stays.
NOISE = {"bf16": 0.05, "fp8": 0.2}
MARGIN = {"bf16": 0.05, "fp8": 0.4}


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
