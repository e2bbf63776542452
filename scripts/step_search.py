"""The search for what a step is fastest with: contestants for one place take turns, the best stays, place by place."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

AGAIN = 8  # contestants that are tried again when other places have changed
LEAST = 0.5  # microseconds of a step: a smaller gain is noise
# Turns that all contestants take, and how many of them go on: few turns tell most of them from the best.
HEATS = ((2, 10), (3, 4), (9, 1))
SURE = ((17, 1),)  # of a pair
Place = TypeVar("Place")
Tactic = TypeVar("Tactic")


def race(
    now: Tactic,
    contestants: Sequence[Tactic],
    time: Callable[[Tactic], float],
    heats: Sequence[tuple[int, int]] = HEATS,
    more: Callable[[Sequence[Tactic]], Sequence[Tactic]] = lambda leaders: (),
) -> dict[Tactic, float]:
    """What each takes less than `now`, the median over turns, best first: who came further goes before. `more` gives
    contestants like the leaders of the first heat. In a turn each is timed once, and each turn begins with another
    one, so that clocks are the same for all."""
    gains: dict[Tactic, float] = {}
    running, behind = list(contestants), list[Tactic]()
    for heat, (turns, most) in enumerate(heats):
        found = _gains(now, running, time, turns)
        if heat == 0 and (new := [t for t in more(_sorted(found)) if t not in found and t != now]):
            found |= _gains(now, new, time, turns)
        gains |= found
        order = _sorted(found)
        running = [t for t in order[:most] if found[t] > 0]
        behind = [*(t for t in order if t not in running), *behind]
    return {t: gains[t] for t in (*running, *behind)}


def _gains(
    now: Tactic, contestants: Sequence[Tactic], time: Callable[[Tactic], float], turns: int
) -> dict[Tactic, float]:
    every = [now, *contestants] if contestants else []
    taken: dict[Tactic, list[float]] = {t: [] for t in every}
    for turn in range(turns):
        first = turn * len(every) // turns
        for contestant in (*every[first:], *every[:first]):
            taken[contestant].append(time(contestant))
    return {t: statistics.median(a - b for a, b in zip(taken[now], taken[t], strict=True)) for t in contestants}


def _sorted(gains: Mapping[Tactic, float]) -> list[Tactic]:
    return sorted(gains, key=lambda t: -gains[t])


def descend(
    state: Mapping[Place, Tactic],
    offers: Mapping[Place, Sequence[Tactic]],
    gains: Callable[[Mapping[Place, Tactic], Place, Sequence[Tactic]], Mapping[Tactic, float]],
    over: Callable[[], bool],
) -> dict[Place, Tactic]:
    """Gives place after place the tactic that is best in its race (`gains`) with what is there, if it gains LEAST,
    until a round over all places changes nothing, or time is over. Rounds but the first try what did best in the last
    one."""
    state, known = dict(state), {place: list(every) for place, every in offers.items()}
    for turn in itertools.count():
        before = dict(state)
        for place in offers:
            if over():
                break
            pool = [t for t in known[place] if t != state[place]]
            found = gains(state, place, pool[:AGAIN] if turn else pool)
            best = next(iter(found), state[place])
            known[place] = [state[place], *found] if turn else [*found, state[place]]
            state[place] = best if found.get(best, 0.0) >= LEAST else state[place]
        if state == before or over():
            return state
    raise AssertionError


def settled(
    start: Mapping[Place, Tactic],
    state: Mapping[Place, Tactic],
    gain: Callable[[Mapping[Place, Tactic], Place, Tactic], float],
) -> dict[Place, float]:
    """What each change from `start` is worth in `state`, of those worth LEAST: the best of many contestants may owe it
    to noise. A change that is not goes back before the next one is judged."""
    state, worth = dict(state), dict[Place, float]()
    for place in [p for p in state if state[p] != start[p]]:
        loss = -gain(state, place, start[place])
        if loss >= LEAST:
            worth[place] = loss
        else:
            state[place] = start[place]
    return worth
