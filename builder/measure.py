"""--tune: times the candidates of every linear on the GPU that is there, and remembers the winners by content.

A candidate runs in a CUDA graph over several copies of its operands, more than the L2 cache holds, so that weights come
from memory as they do in a model. Only ops with a choice and without indices among their inputs are timed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fp8.builder.plan import Tactics
from fp8.builder.tune import Site, tactic_fields
from fp8.plugins.base import StepShape, Tensor
from fp8.plugins.compile import CompileError, cache_dir, compile_kernel, key

if TYPE_CHECKING:
    import torch

COLD_BYTES = 256 << 20  # copies of the operands: several times the 50 MB L2 of an H100 or H200
LAUNCHES = 64


class TuneError(RuntimeError):
    """--tune without a GPU that can run the kernels."""


def measure(tactics: Tactics, remark: Callable[[str], None], warn: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The fastest tactic of every site with a choice, by `Site.label`. Raises TuneError without a Hopper GPU."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise TuneError("--tune times kernels on an sm_90 GPU, and torch sees none; build without it on this machine")
    path, known = _cache(remark)
    winners = {}
    for site in dict.fromkeys(s for sites in tactics.sites.values() for s in sites):
        candidates = site.candidates()
        if len(candidates) < 2 or any(t and t.dtype.startswith("int") for t in site.types):
            continue
        kernels = "|".join(key(k) for t in candidates for k in site.kernels(t))
        entry = f"{site.label}|{hashlib.sha256(kernels.encode()).hexdigest()[:16]}"
        if entry not in known:
            known[entry] = _fastest(site, candidates, tactics.limits.max_batch_size, remark, warn)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(known, sort_keys=True))
            os.replace(partial, path)
        winners[site.label] = known[entry]
    return winners


def _cache(remark: Callable[[str], None]) -> tuple[Any, dict[str, Any]]:
    """The file of winners for this GPU and driver, and what it holds."""
    import torch
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    name = f"{torch.cuda.get_device_name()} driver {version}".replace("/", "_").replace(" ", "_")
    folder = cache_dir() / "tactics"
    path = folder / f"{name}.json"
    others = sorted(p.stem for p in folder.glob("*.json") if p != path)
    if others and not path.exists():
        remark(f"tuned tactics of {', '.join(others)} are ignored: this is {name}")
    return path, json.loads(path.read_text()) if path.exists() else {}


def _fastest(
    site: Site, candidates: list[Any], max_batch: int, remark: Callable[[str], None], warn: Callable[[str], None]
) -> dict[str, Any]:
    best: tuple[float, Any] = (float("inf"), candidates[0])
    for tactic in candidates:
        try:
            took = _time(site, tactic, max_batch)
        except CompileError as error:
            warn(f"{site.plugin.name}: dropped tactic {tactic}: {error}")
            continue
        best = min(best, (took, tactic), key=lambda pair: pair[0])
    remark(f"{site.label}: {best[1]} {best[0] * 1e6:.1f} us")
    return tactic_fields(best[1])


def _time(site: Site, tactic: Any, max_batch: int) -> float:
    """Seconds of one launch with cold weights."""
    import torch

    from fp8.plugins.cuda import Module

    functions = [Module(compile_kernel(k).code).function(k.entry) for k in site.kernels(tactic)]
    size = site.plugin.workspace(tactic, site.types, site.max_tokens, max_batch)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda") if size else None
    types = [*site.types, *site.plugin.infer(site.types)]
    copies = max(2, COLD_BYTES // max(1, sum(_bytes(t, site.max_tokens) for t in types if t)))
    sets = [[_random(t, site.max_tokens) for t in types] for _ in range(min(copies, LAUNCHES))]
    launchers = [site.plugin.bind(tactic, functions, tensors, workspace) for tensors in sets]
    rows = site.max_tokens
    step = StepShape(rows, 1, 0, rows, rows, rows)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launchers:
            launch(step)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(LAUNCHES):
                launchers[i % len(launchers)](step)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(5):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return min(times)


def _shape(type_: Tensor, rows: int) -> list[int]:
    return [rows if isinstance(d, str) else d for d in type_.shape]


def _bytes(type_: Tensor, rows: int) -> int:
    import torch

    return math.prod(_shape(type_, rows)) * getattr(torch, type_.dtype).itemsize


def _random(type_: Tensor | None, rows: int) -> torch.Tensor | None:
    """Values of unit variance: power, and so the clock, depends on the data."""
    import torch

    if type_ is None:
        return None
    return torch.randn(_shape(type_, rows), device="cuda").to(getattr(torch, type_.dtype))
