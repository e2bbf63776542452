"""The process of fp8-bench kernel that has the GPU: compiles ahead on all cores, times one case when asked."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

from fp8.builder.tune import Site
from fp8.plugins import compile
from fp8.plugins.base import Kernel, PluginError, Tensor, types_of
from fp8.plugins.timing import GRAPH_SECONDS, Graph, Pace, capture, compare, in_bursts
from fp8.scripts.benchmarks import ceilings
from fp8.scripts.benchmarks.case_buffers import CaseBuffers, Functions, all_cases
from fp8.scripts.benchmarks.ceilings import Ceilings
from fp8.scripts.benchmarks.kernel_cases import Timed, timed_cases
from fp8.scripts.benchmarks.peers import peers_of

MAX_NUM_TOKENS = 8192  # of the engine whose tactics are timed
BRIEF = Pace(4, 0.01)
# Under load contestants alternate faster than the power limit reacts, so that it falls on both alike.
TURNS, TURN, LOADED = 16, 0.01, 0.16  # seconds of a turn, and of all a contestant's turns
# After a rest the SM clock of an H200 is 1.48 to 1.57 GHz for 40 to 100 ms of such load, then steady at 1.25 to 1.34;
# 0.67 s after the begin it falls, to 0.88 at first, for 0.2 s, and so again and again. What counts lies in between.
HEATED, STEADY = 0.1, 0.6  # seconds after the load's begin
# Seconds after a case under load: until a light one, which else is timed at the load's clocks, and until the next load,
# so that it begins again (after 0.05 to 0.3 s one row was the same within 1%).
REST, PAUSED = 0.2, 0.1
LOADED_GRAPH = 4e-3  # seconds: of graphs of 0.5 ms, their own launch would be 1% where a kernel takes as long
BURSTS, BURST, PAUSE = 3, 0.012, 0.02  # 6 to 25 ms after 20 to 200 are the same within 0.5%
# A light case runs in bursts: what streams large weights draws the limit's power, too, and in 60 ms falls to 1.4 GHz.
LIGHT = 4, 0.005, 0.015
HEAVY = 5e10  # FLOP from which a case is timed under load, as is one that the tensor cores bound
KEPT = 24 << 30  # bytes of freed memory that torch may hold for the cases to come
CEILINGS = -1  # asks for them, in place of a case
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Which cases are timed, and how."""

    plugin: str = ""
    parts: Sequence[str] = ("",)
    own: bool = False
    seed: int = 0
    tactics: int = 1
    peers: bool = True

    def cases(self) -> list[Timed]:
        found = timed_cases()
        if self.own:
            found = [Timed(c.name, name, c) for name, c in all_cases() if not c.plugin.collective]
        return [
            t
            for t in found
            if (not self.plugin or t.plugin == self.plugin) and any(part in t.name for part in self.parts)
        ]


def answers(chosen: Chosen, first: int) -> Callable[[int], tuple[Any, bool]]:
    """The answers of this process: the ceilings, or the row of a case by its place, and whether the GPU is still
    usable."""
    timed, measured = chosen.cases(), Measured(chosen)
    measured.compile(timed[first:])

    def answer(place: int) -> tuple[Any, bool]:
        if place == CEILINGS:
            return {"ceilings": measured.ceilings.as_dict(), "under_load": measured.under_load}, True
        row = measured.row(timed[place])
        return row, "failure" not in row or _usable()

    return answer


def _usable() -> bool:
    """False after an illegal access, say: such an error stays with the process."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


class Measured:
    """The GPU's side of it."""

    def __init__(self, chosen: Chosen) -> None:
        self._chosen, self._functions = chosen, Functions()
        self._compiling: dict[Kernel, Future] = {}
        self._made: set[str] = set()
        self._load_ended = 0.0  # when the last load ended

    @cached_property
    def _measured(self) -> tuple[Ceilings, dict[str, str | None]]:
        found = ceilings.measure()
        self._load_ended = time.monotonic()
        return found

    @property
    def ceilings(self) -> Ceilings:
        return self._measured[0]

    @property
    def under_load(self) -> dict[str, str | None]:
        """The card's clocks and power."""
        return self._measured[1]

    def compile(self, timed: Sequence[Timed]) -> None:
        """Begins with all kernels, on all cores but one, in order."""
        pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1))
        for t in timed:
            with contextlib.suppress(Exception):  # `row` meets it again, and reports it
                for k in (k for several in tactics_of(t, self._types(t), self._chosen.tactics)[1] for k in several):
                    if k not in self._compiling:
                        self._compiling[k] = pool.submit(compile.compile_kernel, k)
        pool.shutdown(wait=False)

    def _types(self, t: Timed) -> list[Tensor | None]:
        """The types of a case's inputs. Raises PluginError where values would have to be made for that, but for a
        plugin's first case, whose kernels do for the others."""
        import torch

        try:
            return types_of(t.case.make(torch.Generator().manual_seed(self._chosen.seed), "meta"))
        except NotImplementedError:
            if str(t.case.plugin) in self._made:
                raise PluginError(f"{t.case.plugin}: made already") from None
            self._made.add(str(t.case.plugin))
            return types_of(t.case.make(torch.Generator("cuda").manual_seed(self._chosen.seed), "cuda"))

    def row(self, t: Timed) -> Row:
        row: Row = {"name": t.name, "plugin": t.plugin}
        begin = time.perf_counter()
        try:
            return {**row, **self._times(t, row), "seconds": time.perf_counter() - begin}
        except Exception as failed:
            text = (str(failed).splitlines() or [""])[0]
            return {**row, "failure": f"{type(failed).__name__}: {text[:300]}"}

    def _times(self, t: Timed, row: Row) -> Row:
        import torch

        if torch.cuda.memory_reserved() > KEPT:
            torch.cuda.empty_cache()
        buffers = CaseBuffers(t.case, self._chosen.seed, "cuda")
        tactics, kernels = tactics_of(t, buffers.types, self._chosen.tactics)
        for k in (k for several in kernels for k in several):
            if k in self._compiling:
                self._compiling[k].result()
        dtype = _factor_dtype(buffers)
        written = sum(out.nbytes for out in buffers.sets[0][len(buffers.inputs) :] if out is not None)
        memory = self.ceilings.memory_seconds(t.case.bytes, written)
        cores = self.ceilings.product_seconds(t.case.flops, dtype)
        heavy = t.case.flops >= HEAVY or cores > memory
        lasting = LOADED_GRAPH if heavy else GRAPH_SECONDS
        ours = [buffers.captured(one, self._functions.of(k), lasting) for one, k in zip(tactics, kernels, strict=True)]
        peers = _peer_graphs(buffers, row, lasting) if self._chosen.peers else {}
        write = buffers.captured_write(tactics[0], self._functions.of(kernels[0])) if peers else None
        graphs = [*ours, *peers.values()]
        time.sleep(max(0.0, self._load_ended + (PAUSED if heavy else REST) - time.monotonic()))
        times = compare(graphs, _loaded(graphs)) if heavy else in_bursts(graphs, *LIGHT)
        bursts = in_bursts(graphs, BURSTS, BURST, PAUSE) if t.bursts else []
        if heavy:
            self._load_ended = time.monotonic()
        us, tactic = min(zip(times, tactics, strict=False), key=lambda pair: pair[0])
        peer_us = dict(zip(peers, times[len(ours) :], strict=True))
        peer, best = next(iter(peer_us.items()), (None, None))
        return {
            "us": us, "tb_per_second": t.case.bytes / us / 1e6, "tflops": t.case.flops / us / 1e6,
            "bound_by": "memory" if memory >= cores else "tensor cores",
            "fraction": max(memory, cores) * 1e6 / us, "peer": peer, "peer_us": best, "ratio": best and best / us,
            "all_peers_us": peer_us, "tactic": dataclasses.asdict(tactic), "sustained": heavy,
            **({"write_us": compare([write], BRIEF)[0]} if write else {}),
            **({"burst_us": min(bursts[: len(ours)])} if bursts else {}),
            **({"peer_burst_us": bursts[len(ours)]} if bursts[len(ours) :] else {}),
        }  # fmt: skip


def _loaded(graphs: Sequence[Graph]) -> Pace:
    """Fewer turns where a launch is longer than one, or contestants are many."""
    together = sum(max(TURN, g.seconds * g.count) for g in graphs)
    turns = int(min(LOADED * len(graphs), STEADY - HEATED) / together)
    return Pace(max(3, min(TURNS, turns)), TURN, math.ceil(HEATED / together))


def _peer_graphs(buffers: CaseBuffers, row: Row, lasting: float) -> dict[str, Graph]:
    graphs = {}
    for name, peer in peers_of(buffers.plugin, buffers.case.step, buffers.inputs).items():
        try:
            graphs[name] = capture([peer(tensors) for tensors in buffers.sets], lasting)
        except Exception as failed:  # a peer that is not there on this machine leaves its place empty, and says why
            row.setdefault("peer_failures", {})[name] = f"{type(failed).__name__}: {str(failed)[:300]}"
    return graphs


def tactics_of(t: Timed, found: Sequence[Tensor | None], count: int) -> tuple[list[Any], list[Sequence[Kernel]]]:
    """The tactics to time, and the kernels of each."""
    plugin, step = t.case.plugin, t.case.step
    tokens = step.logits_rows if plugin.attributes().get("rows") == "L" else step.tokens
    if not t.rows:
        chosen = plugin.tactics(found, tokens)[:count]
    else:
        symbolic = tuple(_symbolic(x) if i in t.rows else x for i, x in enumerate(found))
        bucket = next(n for n in [*plugin.buckets(MAX_NUM_TOKENS), tokens] if n >= tokens)
        chosen = Site(plugin, symbolic, bucket).candidates()[:count]
    return chosen, [plugin.kernels(tactic, found) for tactic in chosen]


def _symbolic(x: Tensor | None) -> Tensor | None:
    return x and Tensor(x.dtype, ("T", *x.shape[1:]))


def _factor_dtype(buffers: CaseBuffers) -> str:
    """The dtype of what the tensor cores multiply: a linear's x, attention's keys."""
    factor = buffers.inputs[buffers.places[0][0] if buffers.places else 0]
    assert factor is not None
    return str(factor.dtype).removeprefix("torch.")
