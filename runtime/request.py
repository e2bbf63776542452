"""A request: what was asked, what is known of it so far, what it holds. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fp8.runtime.beam_search import BeamSearch
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.sampling_params import RequestError, SamplingParams
from fp8.runtime.text_stream import TextStream

__all__ = ["Request", "RequestError", "SamplingParams"]


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
    shareable: int | None = None  # of its first tokens, those whose K and V others may have computed; None: all
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: int = 0
    sampled_in: int = 0  # the step whose last token is in flight
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were needed
    published: int = 0  # blocks from the first that others may share
    reused: int = 0  # tokens whose K and V it found in the pool
    order: int = 0  # of arrival
    slot: int = -1  # its place in the table of sampled tokens while it runs
    finish_reason: str | None = None  # "stop", "length" or "abort"
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    text: TextStream | None = None  # where stop strings are to be looked for
    search: BeamSearch | None = None  # that it is a beam of
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens accepted, if asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # None: not asked for, or not yet known
    preemptions: int = 0
    arrived: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        if self.params.beam_width > 1 and self.search is None:
            self.search = BeamSearch(self.params, self.prompt, self.max_new_tokens, self.stop_tokens)
            others = [replace(self, search=self.search, blocks=[], keys=[]) for _ in range(1, self.params.beam_width)]
            for beam in others:
                beam.tokens = []
            self.search.beams = [self, *others]

    @property
    def beams(self) -> list[Request]:
        """The sequences that compute it: itself, and the other beams."""
        return self.search.beams if self.search else [self]

    @property
    def owner(self) -> Request:
        """The request that was asked for: of beams the first."""
        return self.beams[0]

    @property
    def length(self) -> int:
        """Tokens of the sequence, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def pending(self) -> int:
        """Tokens that a step must still take in before the next one can be sampled."""
        return self.length - self.computed

    @property
    def output(self) -> list[int]:
        """The tokens generated so far, without the stop token; those of a stop string belong to them."""
        return self.output_from(0)

    def output_from(self, start: int) -> list[int]:
        """`output` without its first `start` tokens."""
        end = len(self.tokens) - isinstance(self.stop_reason, int)
        return self.tokens[len(self.prompt) + start : end]

    def accept(self, token: int) -> None:
        """Takes in a token read back and sets `finish_reason` if it ends the output."""
        self.tokens.append(token)
        generated = len(self.tokens) - len(self.prompt)
        enough = generated > self.params.min_tokens
        if token in self.stop_tokens and enough:
            self.finish_reason, self.stop_reason = "stop", token
            return
        if self.text is not None:
            self.text.add([token])
        if self.text is not None and self.text.found:
            self.finish_reason, self.stop_reason = "stop", self.text.found
        elif generated >= self.max_new_tokens:
            self.finish_reason = "length"
