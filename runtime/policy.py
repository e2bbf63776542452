"""Who runs next where not all can: the two choices that the scheduler leaves open. Pure Python.

Priorities come before either policy: nobody starts while one of higher priority waits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from fp8.runtime.request import Request


class Policy(Protocol):
    def joins(self, request: Request, others: Iterable[Request]) -> None:
        """A request arrives beside `others`, which are unfinished."""

    def next(self, waiting: Sequence[Request]) -> Request:
        """Who of `waiting` (at least one, the best ranked first) starts next."""

    def shares(self, pending: Sequence[int], budget: int) -> list[int]:
        """How `budget` tokens of a step go to prompts of which `pending` tokens are to be computed, in order."""

    def room(self, singles: int, prompts: int, ready: int, most: int) -> int:
        """While more requests wait than fit: how many tokens of prompts, `most` at most, a step takes beside `singles`
        rows of one token. `ready`: tokens of the `prompts` that could run in it."""

    def served(self, request: Request, tokens: int) -> None:
        """Called when `tokens` of a request have been computed."""


# Linear layers compute tiles of 128 tokens, as many at once as the card has multiprocessors; in the usual widths 1024
# tokens keep all of these busy to the end. A few more begin a wave that is mostly empty: one prompt beside 1023 decode
# rows of Llama-3.1-8B's shape made a step of 37.6 ms one of 43.1, eight prompts one of 51.4.
WAVE = 1024
MANY = 256  # single tokens from which on prompts wait for others to fill up a wave
LITTLE = 128  # tokens of prompts that are not worth the kernels of a mixed step
WAITING = 20  # sequences that decode, for each prompt that may be spread over several steps; one always may
PATIENCE = 16  # steps that prompts wait for others, or are spread over, at most


STEP_COSTS = 64  # tokens of prompts that could be computed in the time that a step takes beside its tokens
CHUNK = 512  # tokens; half a wave


class Chunks:
    """How large the steps with prompts are in a pipeline of `stages`, two at least.

    Until the last step has gone through all stages, some stand idle, as long as the largest takes in one stage. So n
    tokens in steps of c take (n / c + stages - 1) (c + STEP_COSTS) times a token's time, which is least for
    c = sqrt(n STEP_COSTS / (stages - 1)). Smaller steps at the end would gain nothing.
    """

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._chunk = 0

    def most(self, singles: int, pending: int, limit: int) -> int:
        """The tokens of prompts that a step takes beside `singles` rows of one token, of `pending` that are to be
        computed; `limit` is the most of both."""
        wanted = math.sqrt(pending * STEP_COSTS / (self._stages - 1))
        chunk = -(-math.ceil(wanted) // CHUNK) * CHUNK
        self._chunk = max(self._chunk, chunk) if pending else 0
        least = -(-(singles + LITTLE) // CHUNK) * CHUNK
        return min(limit, max(self._chunk, least)) - singles


class Throughput:
    """First come, first served, one prompt after the other: the fewest prompts are half done at any time. While more
    wait than fit, prompts are spread over the steps, in whole waves, as far as few sequences wait for that; beside many
    single tokens they are gathered until there is a wave.

    A step of single tokens has memory to wait for and little to multiply, a step of prompts the reverse, up to the
    card's power limit; and who decodes beside a long prompt waits for all that a step takes of it.
    """

    def __init__(self) -> None:
        self._held = 0  # steps
        self._pace = 0.0  # tokens of prompts a step, in the mean of the last steps

    def room(self, singles: int, prompts: int, ready: int, most: int) -> int:
        few = prompts == 1 or prompts * WAITING <= singles
        taken = self._waves(singles, ready, most, max(self._pace, ready / PATIENCE) if few else ready)
        self._pace += (min(taken, ready) - self._pace) / PATIENCE
        return taken

    def _waves(self, singles: int, ready: int, most: int, wanted: float) -> int:
        """The tokens nearest to `wanted` that fill whole waves, if that many are ready."""
        least = -(-(singles + LITTLE) // WAVE) * WAVE - singles
        whole, top = ((singles + tokens) // WAVE * WAVE - singles for tokens in (min(ready, most), most))
        if not ready or top < LITTLE:
            return most
        held, self._held = self._held, 0
        if whole >= LITTLE:
            return min(whole, max(least, round((singles + wanted) / WAVE) * WAVE - singles))
        if singles < MANY or held == PATIENCE:
            return most
        self._held = held + 1
        return 0

    def joins(self, request: Request, others: Iterable[Request]) -> None:
        pass

    def next(self, waiting: Sequence[Request]) -> Request:
        return waiting[0]

    def shares(self, pending: Sequence[int], budget: int) -> list[int]:
        given = []
        for tokens in pending:
            given.append(min(tokens, budget))
            budget -= given[-1]
        return given

    def served(self, request: Request, tokens: int) -> None:
        pass


class Fair:
    """Users in turn by the tokens computed for them, and prompts side by side: many requests or long ones of one user
    do not hold up the others.

    A newcomer starts at the least served of the active ones, so idleness earns no credit (virtual token counters,
    Sheng et al., "Fairness in Serving Large Language Models", 2024).
    """

    def __init__(self) -> None:
        self.service: Counter[str] = Counter()

    def joins(self, request: Request, others: Iterable[Request]) -> None:
        active = {other.user for other in others}
        if request.user not in active:
            least = min((self.service[user] for user in active), default=0)
            # Whoever was served less than every active user would be lifted to `least` at the return: no need to know.
            self.service = Counter({u: s for u, s in self.service.items() if s > least or u in active})
            self.service[request.user] = max(self.service[request.user], least)

    def room(self, singles: int, prompts: int, ready: int, most: int) -> int:
        return most

    def next(self, waiting: Sequence[Request]) -> Request:
        firsts: dict[str, Request] = {}  # of the highest priority, the earliest of every user
        for request in waiting:
            if request.priority < waiting[0].priority:
                break
            firsts.setdefault(request.user, request)
        return min(firsts.values(), key=lambda r: (self.service[r.user], r.order))

    def shares(self, pending: Sequence[int], budget: int) -> list[int]:
        """Equal shares; what a short prompt leaves of its own goes to the longer ones."""
        given = [0] * len(pending)
        by_length = sorted(range(len(pending)), key=lambda i: pending[i])
        for place, i in enumerate(by_length):
            given[i] = min(pending[i], budget // (len(by_length) - place))
            budget -= given[i]
        return given

    def served(self, request: Request, tokens: int) -> None:
        self.service[request.user] += tokens


POLICIES: dict[str, type[Policy]] = {"throughput": Throughput, "fair": Fair}


def rank(request: Request) -> tuple[int, int]:
    """Less is better: higher priority, then earlier arrival. The worst ranked gives way when blocks run out."""
    return (-request.priority, request.order)
