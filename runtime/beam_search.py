"""Beam search: which continuations of a request's beams live on, and which are done. Pure Python.

The rules are those of transformers' `generate(num_beams=K, do_sample=False)`. Where its sequences and their K and V lie
is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fp8.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fp8.runtime.request import Request

Candidates = Sequence[tuple[int, float]]  # a beam's likeliest next tokens and their log-probabilities, best first


class Hypothesis(NamedTuple):
    """A finished output. `score` is `logprob`, the sum over its tokens, / (their number ** length_penalty)."""

    score: float
    logprob: float
    tokens: list[int]  # the prompt's and the output's, without the stop token
    stop: int | None  # the stop token that ended it, None where it ran out of tokens


@dataclass(eq=False)
class BeamSearch:
    """The state of one request's search.

    `paths` are the tokens of its beams, best first: the prompt alone before the first decision, then `beam_width`.
    `beams` are the sequences that compute them, the request itself first. While they run, either they hold the paths'
    tokens (`grown`), or the first computes what all paths have in common and the others wait for it.
    """

    params: SamplingParams
    prompt: Sequence[int]
    max_new_tokens: int
    stop_tokens: frozenset[int]
    beams: list[Request] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=lambda: [0.0])
    finished: list[Hypothesis] = field(default_factory=list)  # the best beam_width ones, best first
    grown: bool = False
    unread: int = 0  # rows under way whose candidates the host has not seen
    found: dict[Request, Candidates] = field(default_factory=dict)  # of the beams that have been read

    def __post_init__(self) -> None:
        self.paths = [list(self.prompt)]

    @property
    def width(self) -> int:
        return self.params.beam_width

    @property
    def candidates(self) -> int:
        """How many each beam has to offer, so that beam_width are left if all stop tokens are among the best."""
        return candidates_per_beam(self.width, len(self.stop_tokens))

    @property
    def stem(self) -> list[int]:
        """What all paths begin with."""
        first, last = min(self.paths), max(self.paths)  # what these share, all share
        parts = (i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b)
        return first[: next(parts, len(first))]

    def advance(self, candidates: Sequence[Candidates]) -> list[int]:
        """Takes the step that `candidates` of every path allow; returns which path each of the new ones continues,
        none at the search's end."""
        ranked = sorted(
            ((self.scores[i] + value, i, token) for i, found in enumerate(candidates) for token, value in found),
            key=lambda candidate: -candidate[0],
        )
        length = len(self.paths[0]) + 1 - len(self.prompt)
        alive: list[tuple[float, int, int]] = []
        for place, (score, parent, token) in enumerate(ranked[: self.candidates]):
            if token not in self.stop_tokens and length < self.max_new_tokens:
                alive.append((score, parent, token))
            elif place < self.width:  # the rest are there in case all of those before them stop
                self._finish(score, self.paths[parent], token, length)
        alive = alive[: self.width]
        if not alive or self._settled(alive[0][0], length):
            return []
        self.paths = [[*self.paths[parent], token] for _, parent, token in alive]
        self.scores = [score for score, _, _ in alive]
        return [parent for _, parent, _ in alive]

    def _finish(self, logprob: float, path: list[int], token: int, length: int) -> None:
        stop = token if token in self.stop_tokens else None
        score = logprob / length**self.params.length_penalty
        self.finished.append(Hypothesis(score, logprob, [*path] if stop is not None else [*path, token], stop))
        self.finished.sort(key=lambda h: -h.score)  # stable: of equals the earlier
        del self.finished[self.width :]

    def _settled(self, best: float, length: int) -> bool:
        """Nothing that is still to come is taken for better than what is finished."""
        early, penalty = self.params.early_stopping, self.params.length_penalty
        if len(self.finished) < self.width:
            return False
        longest = self.max_new_tokens if early == "never" and penalty > 0 else length
        return early is True or best / longest**penalty <= self.finished[-1].score


def candidates_per_beam(width: int, stop_tokens: int) -> int:
    return max(2, 1 + stop_tokens) * width
