"""fp8-bench kernel: every plugin's time on a case, by the tactic that an engine would hold, and its peers' in turn."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from fp8.builder.tune import Site
from fp8.plugins import compile
from fp8.plugins.base import Kernel, PluginError, Tensor
from fp8.runtime.request import RequestError
from fp8.scripts.benchmarks import ceilings
from fp8.scripts.benchmarks.case_buffers import CaseBuffers, Functions, all_cases
from fp8.scripts.benchmarks.ceilings import Ceilings
from fp8.scripts.benchmarks.kernel_cases import Timed, timed_cases
from fp8.scripts.benchmarks.peers import Peer, peers_of
from fp8.scripts.benchmarks.timing import BRIEF, SUSTAINED, Graph, capture, compare

MAX_NUM_TOKENS = 8192  # of the engine whose tactics are timed
HEAVY = 5e10  # FLOP from which a case is timed under sustained load
DESCRIPTION = """Times kernels on a Hopper GPU: random data, CUDA graphs over buffers that rotate through more memory
than the L2 cache holds, peers in turn, sustained load where a case is large. Ceilings (copy, FP8 and BF16 products) are
measured first, and "fraction" is of what they allow. Without --own, the cases are those of the record."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plugin", default="", help="only this plugin")
    parser.add_argument("--case", nargs="+", default=[""], help="only cases whose names contain one of these")
    parser.add_argument("--own", action="store_true", help="the cases of every plugin's cases.py instead")
    parser.add_argument("--tactics", type=int, default=1, help="the best of so many tactics (1: what fp8-build takes)")
    parser.add_argument("--no-peers", action="store_true", help="time our own kernels alone")
    parser.add_argument("--max_seconds", type=float, default=600.0, help="start no further case after so many seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per case and the ceilings. Raises RequestError without a Hopper GPU."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise RequestError("fp8-bench kernel times kernels; it needs a Hopper GPU (sm_90)")
    begin = time.monotonic()
    timed = wanted(args)
    found = ceilings.measure()
    _compile(timed, args)
    rows, functions = [], Functions()
    for t in timed:
        if time.monotonic() - begin > args.max_seconds:
            rows.append({"name": t.name, "plugin": t.plugin, "failure": "not measured: out of time"})
            continue
        rows.append(_row(t, found, functions, args))
        torch.cuda.empty_cache()
    return rows, {"ceilings": found.as_dict(), "seconds": time.monotonic() - begin}


def wanted(args: argparse.Namespace) -> list[Timed]:
    cases = timed_cases()
    if args.own:
        cases = [Timed(c.name, name, c) for name, c in all_cases() if not c.plugin.collective]
    return [
        t for t in cases if (not args.plugin or t.plugin == args.plugin) and any(part in t.name for part in args.case)
    ]


def _compile(timed: Sequence[Timed], args: argparse.Namespace) -> None:
    """All kernels on all cores, into the cache; a case that cannot be is left for `_row` to tell."""
    kernels: list[Kernel] = []
    for t in timed:
        with contextlib.suppress(PluginError):
            types = CaseBuffers(t.case, args.seed, "cuda").types
            kernels += [k for several in _tactics(t, types, args.tactics)[1] for k in several]
    compile.compile_all(kernels)


def _row(t: Timed, found: Ceilings, functions: Functions, args: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"name": t.name, "plugin": t.plugin}
    try:
        buffers = CaseBuffers(t.case, args.seed, "cuda")
        ours = [
            (tactic, buffers.captured(tactic, functions.of(kernels)))
            for tactic, kernels in zip(*_tactics(t, buffers.types, args.tactics), strict=True)
        ]
        peers = {} if args.no_peers else _peer_graphs(buffers, row)
        heavy = t.case.flops >= HEAVY
        times = compare([g for _, g in ours] + list(peers.values()), SUSTAINED if heavy else BRIEF)
    except Exception as failed:
        return {**row, "failure": f"{type(failed).__name__}: {str(failed).splitlines()[0][:300]}"}
    us, (tactic, _) = min(zip(times, ours, strict=False), key=lambda pair: pair[0])
    peer_us = dict(zip(peers, times[len(ours) :], strict=True))
    least = found.seconds(t.case.bytes, t.case.flops, _factor_dtype(buffers))
    first = next(iter(peer_us.items()), (None, None))
    return {
        **row, "us": us, "tb_per_second": t.case.bytes / us / 1e6, "tflops": t.case.flops / us / 1e6,
        "fraction": least * 1e6 / us, "peer": first[0], "peer_us": first[1], "ratio": first[1] and first[1] / us,
        "all_peers_us": peer_us, "tactic": dataclasses.asdict(tactic), "sustained": heavy,
    }  # fmt: skip


def _peer_graphs(buffers: CaseBuffers, row: dict[str, Any]) -> dict[str, Graph]:
    graphs = {}
    for name, peer in peers_of(buffers.plugin, buffers.case.step, buffers.inputs).items():
        try:
            graphs[name] = _peer_graph(peer, buffers)
        except Exception as failed:  # a peer that is not there on this machine leaves its place empty, and says why
            row.setdefault("peer_failures", {})[name] = f"{type(failed).__name__}: {str(failed)[:300]}"
    return graphs


def _peer_graph(peer: Peer, buffers: CaseBuffers) -> Graph:
    return capture([peer(tensors) for tensors in buffers.sets])


def _tactics(t: Timed, types: Sequence[Tensor | None], count: int) -> tuple[list[Any], list[Sequence[Any]]]:
    """The tactics to time, and the kernels of each."""
    plugin, step = t.case.plugin, t.case.step
    tokens = step.logits_rows if plugin.attributes().get("rows") == "L" else step.tokens
    if not t.rows:
        chosen = plugin.tactics(types, tokens)[:count]
    else:
        symbolic = tuple(_symbolic(x) if i in t.rows else x for i, x in enumerate(types))
        bucket = next(n for n in [*plugin.buckets(MAX_NUM_TOKENS), tokens] if n >= tokens)
        chosen = Site(plugin, symbolic, bucket).candidates()[:count]
    return chosen, [plugin.kernels(tactic, types) for tactic in chosen]


def _symbolic(x: Tensor | None) -> Tensor | None:
    return x and Tensor(x.dtype, ("T", *x.shape[1:]))


def _factor_dtype(buffers: CaseBuffers) -> str:
    """Of what the tensor cores multiply: a linear's x, attention's keys."""
    factor = buffers.inputs[buffers.places[0] if buffers.places else 0]
    return str(factor.dtype).removeprefix("torch.")
