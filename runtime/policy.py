"""Who runs next where not all can: the two choices that the scheduler leaves open. Pure Python.

Priorities come before either policy: nobody starts while one of higher priority waits.
"""

from __future__ import annotations

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

    def served(self, request: Request, tokens: int) -> None:
        """`tokens` of a request are computed."""


class Throughput:
    """First come, first served, one prompt after the other: the fewest prompts are half done at any time."""

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

    Who comes anew starts at the least served of the active ones, so idleness earns no credit (virtual token counters,
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
