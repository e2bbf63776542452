"""A request: what was asked, what is known of it so far, what it holds. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


class RequestError(ValueError):
    """A request that cannot be served as asked: says which, what was found, and the limit."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    temperature 0 is greedy (ties: the lowest token). A `seed` fixes the text whatever else is in the batch; None draws
    one. Stop tokens are `stop_token_ids` and, unless `ignore_eos`, the model's end-of-sequence tokens; one that comes
    before `min_tokens` does not end the output. The stop token itself is not part of the output.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature is {self.temperature}; it must be finite and at least 0 (0 is greedy)")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must lie between 0 and max_tokens ({self.max_tokens})"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}; it must fit in 64 bits")


@dataclass(eq=False)
class Request:
    """One sequence on its way. `tokens` are those that the host has seen; a step enqueued but not yet read adds to
    `in_flight` instead. `computed` counts the tokens whose K and V are in the pool or being written."""

    id: int
    prompt: Sequence[int]
    params: SamplingParams
    max_new_tokens: int  # params.max_tokens, or less where max_seq_len ends the sequence first
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    priority: int = 0  # the higher, the earlier
    user: str = ""  # whom the fair policy counts it for
    reuse_prefix: bool = True  # False: every token's logits are wanted
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed
    published: int = 0  # blocks from the first that others may share
    reused: int = 0  # tokens whose K and V it found in the pool
    order: int = 0  # of arrival
    slot: int = -1  # its place in the table of sampled tokens while it runs
    finish_reason: str | None = None  # "stop", "length" or "abort"
    preemptions: int = 0
    arrived: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the sequence, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def pending(self) -> int:
        """Tokens that a step must still take in before the next one can be sampled."""
        return self.length - self.computed

    @property
    def exhausted(self) -> bool:
        """All tokens it may have are sampled, though the last may not have been read yet."""
        return self.length - len(self.prompt) >= self.max_new_tokens

    @property
    def output(self) -> list[int]:
        """The tokens generated so far, without the stop token."""
        out = self.tokens[len(self.prompt) :]
        return out[:-1] if self.finish_reason == "stop" else out

    def accept(self, token: int) -> None:
        """Takes in a token read back and sets `finish_reason` if it ends the output."""
        self.tokens.append(token)
        generated = len(self.tokens) - len(self.prompt)
        if token in self.stop_tokens and generated > self.params.min_tokens:
            self.finish_reason = "stop"
        elif generated >= self.max_new_tokens:
            self.finish_reason = "length"
