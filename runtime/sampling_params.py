"""How the tokens of a request are chosen: checked values, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

SMALLEST, LARGEST = 1e-6, 1e6  # of what logits are divided by: they stay numbers of float32
MAX_LOGPROBS = 20  # alternatives per token: as far as OpenAI's interface goes


class RequestError(ValueError):
    """A request that cannot be served as asked: says which, what was found, and the limit."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    temperature 0 is greedy (ties: the lowest token). A `seed` fixes the text whatever else is in the batch; None draws
    one. Stop tokens are `stop_token_ids` and, unless `ignore_eos`, the model's end-of-sequence tokens; none of them can
    come before `min_tokens`. The stop token itself is not part of the output. The text ends before the first of the
    strings `stop` that begins to appear once `min_tokens` tokens are there.

    The logits change in the order of transformers' processors: + logit_bias; repetition_penalty (> 1: logits of tokens
    in the prompt or output are divided by it where positive, multiplied where negative); - presence_penalty -
    frequency_penalty * count for tokens in the output; / temperature; then what is unlikely is left out: all but the
    top_k likeliest (0: off), but the likeliest that together have probability top_p, what is less likely than min_p
    times the likeliest, and what is less typical than the rest (typical_p). A greedy request leaves nothing out.

    `n` samples are drawn with seeds that follow from `seed`. `logprobs` and `prompt_logprobs`: log-probabilities (the
    model's own, before any of the above) of every output or prompt token and of that many likeliest ones beside it; of
    prompt tokens from number `prompt_logprobs_start` on. `logprob_token_ids`: at every output token, of these too.

    `beam_width` > 1 is beam search as transformers' `generate(num_beams=beam_width, do_sample=False)` has it: the `n`
    best outputs by (sum of log-probabilities) / (number of tokens, the stop token's included, ** length_penalty).
    Bias, penalties and min_tokens act on the log-probabilities. early_stopping: True ends the search once beam_width
    outputs are finished; False, once the best beam would not enter them if it ended now; "never", once it could not
    even at its greatest length.

    Raises RequestError for a value out of its range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    prompt_logprobs_start: int = 1  # the first token has no log-probability
    logprob_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "logprob_token_ids"):
            object.__setattr__(self, name, _listed(name, getattr(self, name)))
        self._check_length()
        self._check_choice()
        self._check_beams()
        self._check_output()

    def _check_length(self) -> None:
        _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must lie between 0 and max_tokens ({self.max_tokens})"
            )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop holds {text!r}; every stop string must be a text of at least one character")

    def _check_choice(self) -> None:
        number = _number
        number("temperature", self.temperature, 0, LARGEST, note=f" (0 is greedy; above it, {SMALLEST} is the least)")
        if 0 < self.temperature < SMALLEST:
            raise RequestError(f"temperature is {self.temperature!r}; it must be 0 (greedy) or at least {SMALLEST}")
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1, note=" (64 bits)")
        _integer("top_k", self.top_k, 0, note=" (0 keeps all tokens)")
        number("top_p", self.top_p, 0, 1, above=True)
        number("min_p", self.min_p, 0, 1)
        number("typical_p", self.typical_p, 0, 1, above=True)
        number("repetition_penalty", self.repetition_penalty, SMALLEST, LARGEST, note=" (1 changes nothing)")
        number("presence_penalty", self.presence_penalty, -2, 2)
        number("frequency_penalty", self.frequency_penalty, -2, 2)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers from -100 to 100")
        for token, bias in self.logit_bias.items():
            _integer("a token id of logit_bias", token, 0)
            number(f"logit_bias of token {token}", bias, -100, 100)

    def _check_beams(self) -> None:
        _integer("beam_width", self.beam_width, 1, note=" (1 is no beam search)")
        _number("length_penalty", self.length_penalty, -10, 10, note=" (1 is the mean of the log-probabilities)")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise RequestError(f'early_stopping is {self.early_stopping!r}; it must be True, False or "never"')
        if self.beam_width == 1:
            return
        neutral = {
            "temperature": 0, "seed": None, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "stop": (),
            "logprobs": None,
        }  # fmt: skip
        for name, value in neutral.items():
            if getattr(self, name) != value:
                raise RequestError(
                    f"{name} is {getattr(self, name)!r} and beam_width {self.beam_width}; beam search draws nothing, "
                    f"knows no stop strings and reports no single tokens: leave {name} out, or beam_width"
                )
        if self.n > self.beam_width:
            raise RequestError(f"n is {self.n} and beam_width {self.beam_width}; so many beams give no more outputs")

    def _check_output(self) -> None:
        _integer("n", self.n, 1)
        if self.n > 1 and self.temperature == 0 and self.beam_width == 1:
            raise RequestError(f"n is {self.n} and temperature 0; greedy samples would all be equal: set a temperature")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        _integer("prompt_logprobs_start", self.prompt_logprobs_start, 1)
        for token in self.logprob_token_ids:
            _integer("a token of logprob_token_ids", token, 0)
        if self.logprob_token_ids and self.logprobs is None:
            raise RequestError("logprob_token_ids are reported with the output's log-probabilities; set logprobs, to 0")

    @cached_property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def truncates(self) -> bool:
        """Some tokens may be left out of the draw."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1)

    @cached_property
    def plain(self) -> bool:
        """The sampling kernel alone does all that is asked, once `min_tokens` are there."""
        asked = self.penalizes or self.truncates or self.logit_bias or self.logprobs is not None
        return not asked and self.beam_width == 1


def _listed(name: str, values: Any) -> tuple:
    if isinstance(values, str) or not isinstance(values, (list, tuple, set, frozenset)):
        raise RequestError(f"{name} is {values!r}; it must be a list")
    return tuple(values)


def _integer(name: str, value: Any, low: int, high: int | None = None, note: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} is {value!r}; it must be an integer, {limit}{note}")


def _number(name: str, value: Any, low: float, high: float, above: bool = False, note: str = "") -> None:
    """low <= value <= high and finite; low itself is out if `above`."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not right or value < low or value > high or (above and value == low):
        floor = f"above {low}" if above else f"at least {low}"
        raise RequestError(f"{name} is {value!r}; it must be {floor} and at most {high:g}{note}")
