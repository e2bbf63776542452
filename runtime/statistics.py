"""What the loop did: one record per step, and sums since the start. Pure Python."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

# Upper ends of the histograms' buckets, in seconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class StepStatistics:
    """One turn of the loop. `reused_tokens` and `preemptions` are those of this turn; seconds are of the host."""

    rows: int
    decode_rows: int
    tokens: int
    sampled: int
    running: int
    waiting: int
    held_blocks: int
    cached_blocks: int  # free, but their contents can still be shared
    free_blocks: int  # those included
    reused_tokens: int
    preemptions: int
    schedule_seconds: float
    enqueue_seconds: float  # on a CPU this is the step itself
    read_seconds: float  # waiting for the tokens of the step `lag` before


class Histogram:
    """Counts per bucket (not cumulated), the last one without an end, and the sum."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[sum(seconds > end for end in BUCKETS)] += 1
        self.sum += seconds


@dataclass
class Statistics:
    """`steps` are the last ones; everything else counts from the start."""

    steps: deque[StepStatistics] = field(default_factory=lambda: deque(maxlen=1024))
    step_count: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: Counter[str] = field(default_factory=Counter)  # by finish reason
    queue_seconds: Histogram = field(default_factory=Histogram)
    first_token_seconds: Histogram = field(default_factory=Histogram)
    request_seconds: Histogram = field(default_factory=Histogram)

    def add(self, step: StepStatistics) -> None:
        self.steps.append(step)
        self.step_count += 1
        self.computed_tokens += step.tokens
        self.generated_tokens += step.sampled
        self.reused_tokens += step.reused_tokens
        self.preemptions += step.preemptions
