"""How a kernel's time is taken: CUDA graphs of launches over rotating buffers, several contestants in turn, medians."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COLD = 200 << 20  # launches rotate over at least this many bytes, four times the L2 cache
MOST_SETS = 64
GRAPH_SECONDS = 5e-4  # a graph lasts about as long, so that its own launch does not count


@dataclass(frozen=True)
class Pace:
    """How long contestants run: `turns` times `seconds` each, one after the other in a turn. Before these come `before`
    turns that are not counted (by default a quarter as many, at least one)."""

    turns: int
    seconds: float
    before: int | None = None


BRIEF = Pace(4, 0.005)
SUSTAINED = Pace(3, 0.05)  # long enough for the power limit to take hold: it acts within tens of milliseconds


@dataclass(frozen=True)
class Graph:
    """`count` launches, captured. `launches` are kept: what they hold (buffers, loaded kernels) is the graph's too."""

    graph: torch.cuda.CUDAGraph
    launches: Sequence[Callable[[], object]]
    count: int
    seconds: float  # of one launch, estimated: it says how often to replay


def sets_for(size: int, cold: int = COLD) -> int:
    """How many sets of buffers of `size` bytes launches must rotate over, so that they go through `cold` bytes."""
    return min(MOST_SETS, -(-cold // max(size, 1)))


def capture(launches: Sequence[Callable[[], object]], lasting: float = GRAPH_SECONDS) -> Graph:
    """A graph of `launches`, each at least once, in turn, that lasts about so many seconds. Each must be capturable and
    enqueue on torch's stream."""
    import torch

    for launch in launches:
        launch()  # loads kernels, sets attributes, picks algorithms
    seconds = _seconds(launches)
    count = max(len(launches), min(MOST_SETS, int(lasting / max(seconds, 1e-7))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in itertools.islice(itertools.cycle(launches), count):
            launch()
    return Graph(graph, launches, count, seconds)


def captured(launches: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of `launches`, one after the other, on the current stream, which must not be the default
    one. Each is launched once before: that loads its kernels."""
    import torch

    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    for launch in launches:
        launch()
    graph.capture_end()
    return graph


def seconds_of_each(calls: Iterable[Callable[[], object]]) -> list[float]:
    """How long the device takes for what each of `calls` enqueues, one after the other, by events between them. Where
    the host is not ahead of the device, its own time counts."""
    import torch

    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    for call in calls:
        call()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def _seconds(launches: Sequence[Callable[[], object]]) -> float:
    """Seconds of one launch."""
    import torch

    torch.cuda._sleep(1_000_000)  # the host gets ahead
    (seconds,) = seconds_of_each([lambda: [launch() for launch in launches]])
    return seconds / len(launches)


def compare(graphs: Sequence[Graph], pace: Pace) -> list[float]:
    """Microseconds of a launch of each: the median over all replays. They take turns, so that clocks and power are the
    same for all, and each turn begins with another one: under the power limit a place in the turn was worth 3%."""
    taken: list[list[float]] = [[] for _ in graphs]
    before = max(1, pace.turns // 4 if pace.before is None else pace.before)
    for turn in range(before + pace.turns):
        for i in range(turn, turn + len(graphs)):
            found = replays(graphs[i % len(graphs)], pace.seconds)
            taken[i % len(graphs)] += found if turn >= before else []
    return [statistics.median(times) for times in taken]


def in_bursts(graphs: Sequence[Graph], turns: int, seconds: float, pause: float) -> list[float]:
    """Microseconds of a launch of each, in bursts of `seconds` after pauses: at clocks that the power limit, which acts
    some 40 ms later, does not lower. The median over all replays."""
    import torch

    taken: list[list[float]] = [[] for _ in graphs]
    for _ in range(turns):
        for graph, found in zip(graphs, taken, strict=True):
            torch.cuda.synchronize()
            time.sleep(pause)
            found += replays(graph, seconds)
    return [statistics.median(times) for times in taken]


def replays(graph: Graph, seconds: float) -> list[float]:
    """Microseconds of a launch, by replay, of about so many seconds; enqueued together, so that the device never waits
    for the host."""
    count = max(1, min(400, round(seconds / (graph.seconds * graph.count))))
    return [one * 1e6 / graph.count for one in seconds_of_each([graph.graph.replay] * count)]
