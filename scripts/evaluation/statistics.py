"""Intervals and tests of figures from a sample. Every test is one-sided: whether the engine is worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # two-sided 95% of a normal
RESAMPLES = 10_000


def ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) and its standard error (linearized ratio estimator); None for a single sample."""
    y, n = np.array(sums, np.float64), np.array(counts, np.float64)
    mean = math.fsum(sums) / n.sum()
    if len(y) < 2:
        return mean, None
    return mean, float(np.sqrt(((y - mean * n) ** 2).sum() * len(y) / (len(y) - 1)) / n.sum())


def mean_interval(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """The mean and its normal 95% interval; None for a single value."""
    mean, error = ratio(values, [1] * len(values))
    return mean, None if error is None else [mean - Z95 * error, mean + Z95 * error]


def wilson(successes: int, trials: int) -> list[float]:
    """The 95% interval of a proportion (Wilson 1927): good at 0 and 1 and for few trials, too."""
    share, z = successes / trials, Z95**2 / trials
    half = Z95 * math.sqrt(share * (1 - share) / trials + z / (4 * trials))
    return [max((share + z / 2 - half) / (1 + z), 0.0), min((share + z / 2 + half) / (1 + z), 1.0)]


def tails(trials: int, p: float) -> np.ndarray:
    """P(X >= k) for k = 0 .. trials, float64 [trials + 1], of a binomial X with 0 < p < 1."""
    k = np.arange(trials + 1)
    factorial = np.concatenate([[0.0], np.log(np.arange(1, trials + 1)).cumsum()])
    mass = np.exp(factorial[-1] - factorial - factorial[::-1] + k * math.log(p) + (trials - k) * math.log1p(-p))
    return np.minimum(mass[::-1].cumsum()[::-1], 1.0)


def chance_limit(trials: int, p: float) -> float:
    """The upper end of chance: guessing (right with probability p) exceeds this share in at most 2.5% of the cases."""
    return float(int((tails(trials, p) > 0.025).sum()) - 1) / trials


def sign_test(worse: int, better: int) -> float:
    """P of at least so many pairs that are worse among those that differ, if both directions were as likely: McNemar's
    exact test for pairs of right and wrong answers. 1 where nothing differs."""
    return float(tails(worse + better, 0.5)[worse])


def paired_answers(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """What differs between the engine and the reference, given whether each was right."""
    worse, better = pairs.count((False, True)), pairs.count((True, False))
    return {
        "difference": (better - worse) / len(pairs), "only_reference_right": worse, "only_engine_right": better,
        "p_value": sign_test(worse, better),
    }  # fmt: skip


def paired_bootstrap(losses: Sequence[float], seed: int = 0) -> float | None:
    """P that the engine is not worse: the share of 10,000 resamples of the pairs in which sum(losses) is not above 0,
    `losses` being the engine's less the reference's (Koehn 2004). 1 where nothing differs; None for a single pair."""
    y = np.array(losses, np.float64)
    if len(y) < 2:
        return None
    if not y.any():
        return 1.0
    source, not_worse, chunk = np.random.default_rng(seed), 0, max(1, min(RESAMPLES, 4_000_000 // len(y)))
    for begin in range(0, RESAMPLES, chunk):
        index = source.integers(0, len(y), (min(chunk, RESAMPLES - begin), len(y)))
        not_worse += int((y[index].sum(1) <= 0).sum())
    return (not_worse + 1) / (RESAMPLES + 1)
