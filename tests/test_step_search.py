"""The search for a step's tactics: who is found, by how many measurements, and what noise cannot do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from fp8.scripts.step_search import HEATS, LEAST, descend, race, settled


def cost(state: Mapping[str, int]) -> float:
    """Least at a 3, b 1: b's best depends on a."""
    return 10.0 * abs(state["a"] - 3) + 4.0 * abs(state["b"] - (1 if state["a"] == 3 else 2))


def gain(state: Mapping[str, int], place: str, tactic: int) -> float:
    return cost(state) - cost({**state, place: tactic})


def gains(state: Mapping[str, int], place: str, pool: Sequence[int]) -> dict[int, float]:
    return {t: gain(state, place, t) for t in sorted(pool, key=lambda t: -gain(state, place, t))}


OFFERS = {"b": [0, 1, 2], "a": [0, 1, 2, 3]}


def test_the_search_goes_on_until_no_place_gains() -> None:
    assert descend({"a": 0, "b": 0}, OFFERS, gains, lambda: False) == {"a": 3, "b": 1}
    asked = itertools.count()
    assert descend({"a": 0, "b": 0}, OFFERS, gains, lambda: next(asked) >= 1) == {"a": 0, "b": 2}, "time is over"


def test_gains_within_the_noise_change_nothing() -> None:
    assert descend({"a": 0}, {"a": [0, 1]}, lambda *_: {1: LEAST / 2}, lambda: False) == {"a": 0}


def test_what_others_gained_from_is_tried_again() -> None:
    """What a race adds to those offered too."""
    pools: list[Sequence[int]] = []

    def more(state: Mapping[str, int], place: str, pool: Sequence[int]) -> dict[int, float]:
        pools.append(pool)
        return {9: 1.0, **dict.fromkeys(pool, 0.0)} if state["a"] != 9 else dict.fromkeys(pool, 0.0)

    assert descend({"a": 0}, {"a": [0, 1]}, more, lambda: False) == {"a": 9}
    assert [sorted(p) for p in pools] == [[1], [0, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_a_race_finds_the_fastest_of_many_in_noise_and_drift(seed: int) -> None:
    """Times of 1000 to 1030 us with 0.5 us of noise, while the clock falls by 1%."""
    source, count = random.Random(seed), itertools.count()

    def time(contestant: int) -> float:
        return (1000 + abs(contestant - 17)) * (1 + 0.01 * next(count) / 400) + source.gauss(0, 0.5)

    found = race(30, range(30), time)
    best = next(iter(found))
    assert abs(best - 17) <= 1 and found[best] == pytest.approx(13, abs=1.5)
    assert len(found) == 30 and next(count) < 30 * sum(turns for turns, _ in HEATS) / 2, "most are told by few turns"


def test_contestants_like_the_leaders_join() -> None:
    asked: list[list[int]] = []

    def more(leaders: Sequence[int]) -> list[int]:
        asked.append(list(leaders))
        return [leaders[0] - 1, leaders[0], 50]

    found = race(50, [20, 30, 40], float, more=more)
    assert next(iter(found)) == 19 and found[19] == 31.0 and set(found) == {19, 20, 30, 40}
    assert asked == [[20, 30, 40]], "the fastest first, once"


def test_a_race_without_contestants_measures_nothing() -> None:
    assert race(1, [], lambda t: pytest.fail("timed")) == {}


def test_changes_that_are_worth_nothing_go_back_one_by_one() -> None:
    """Either of two changes alone will do: the second is not given up as well."""
    either = lambda state: 10.0 if 1 in (state["a"], state["b"]) else 20.0
    change = lambda state, place, tactic: either(state) - either({**state, place: tactic})
    start = {"a": 0, "b": 0, "c": 0}
    assert settled(start, {"a": 1, "b": 1, "c": 0}, change) == {"b": 10.0}
