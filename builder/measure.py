"""--tune: times the candidates of every linear on the GPU that is there, and remembers the winners by content.

A candidate runs in a CUDA graph over several copies of its operands, more than the L2 cache holds, so that weights come
from memory as they do in a model. Only ops with a choice and without indices among their inputs are timed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import write_atomically
from fp8.builder.plan import Tactics
from fp8.builder.tune import Compiler, Site, tactic_fields
from fp8.plugins.base import StepShape, Tensor
from fp8.plugins.compile import Cubin, cache_dir

if TYPE_CHECKING:
    import torch

COLD_BYTES = 256 << 20  # copies of the operands: several times the 50 MB L2 of an H100 or H200
LAUNCHES = 64


class TuneError(RuntimeError):
    """--tune without a GPU that can run the kernels."""


def measure(
    tactics: Tactics,
    progress: Callable[[int, int], None],
    remark: Callable[[str], None],
    warn: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The fastest tactic of every site with a choice, by `Site.label`. Raises TuneError without a Hopper GPU."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise TuneError("--tune times kernels on an sm_90 GPU, and torch sees none; build without it on this machine")
    sites = list(dict.fromkeys(s for several in tactics.sites.values() for s in several))
    sites = [s for s in sites if not any(t and t.dtype.startswith("int") for t in s.types) and len(s.candidates()) > 1]
    path, known = _cache(remark)
    compiler = Compiler(progress, warn)
    compiler.compile([k for site in sites for t in site.candidates() for k in site.kernels(t)])
    winners = {}
    for site in sites:
        compiled = {t: [compiler.done.get(k) for k in site.kernels(t)] for t in site.candidates()}
        candidates = {t: [c for c in cubins if c] for t, cubins in compiled.items() if None not in cubins}
        digest = hashlib.sha256("|".join(c.key for cubins in candidates.values() for c in cubins).encode())
        entry = f"{site.label}|{digest.hexdigest()[:16]}"
        if entry not in known and candidates:
            known[entry] = _fastest(site, candidates, tactics.limits.max_batch_size, remark)
            _write(path, known)
        if entry in known:
            winners[site.label] = known[entry]
    return winners


def _write(path: Path, known: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [json.dumps(known, sort_keys=True).encode()])


def _cache(remark: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The file of winners for this GPU and driver, and what it holds."""
    name = _machine()
    folder = cache_dir() / "tactics"
    path = folder / f"{name}.json"
    others = sorted(p.stem for p in folder.glob("*.json") if p != path)
    if others and not path.exists():
        remark(f"tuned tactics of {', '.join(others)} are ignored: this is {name}")
    try:
        return path, json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        remark(f"{path} is damaged and ignored")
        return path, {}


def _machine() -> str:
    """The GPU and the CUDA version of its driver, as a file name."""
    import torch
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    return f"{torch.cuda.get_device_name()} driver {version}".replace("/", "_").replace(" ", "_")


def _fastest(
    site: Site, candidates: dict[Any, list[Cubin]], max_batch: int, remark: Callable[[str], None]
) -> dict[str, Any]:
    took = {tactic: _time(site, tactic, cubins, max_batch) for tactic, cubins in candidates.items()}
    best = min(took, key=lambda tactic: took[tactic])
    remark(f"{site.label}: {best} {took[best] * 1e6:.1f} us, the favourite {next(iter(took.values())) * 1e6:.1f} us")
    return tactic_fields(best)


def _time(site: Site, tactic: Any, cubins: list[Cubin], max_batch: int) -> float:
    """Seconds of one launch with cold weights."""
    import torch

    from fp8.plugins.cuda import Module

    functions = [Module(c.code).function(c.kernel.entry) for c in cubins]
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
