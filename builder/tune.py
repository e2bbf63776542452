"""Tactics: which kernels run each step, per range of rows.

Order of preference: measured on this GPU (--tune, cached), the shipped table `plugins/<name>/tactics.json`, the
plugin's own model. A tactic that does not compile, or whose wgmma ptxas serialized, is dropped with a warning.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8.plugins import base
from fp8.plugins.base import Kernel, Plugin, Tensor
from fp8.plugins.compile import CompileError, Cubin, compile_kernel

Types = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Site:
    """A place that wants a tactic; layers of one shape share it."""

    plugin: Plugin
    types: Types
    max_tokens: int
    module: str = dataclasses.field(default="", compare=False)  # the first of those that share it, for messages

    @property
    def label(self) -> str:
        """What the tactic tables are keyed by: `gemm(...)|float8_e4m3fn T,4096|...|<=16`."""
        types = "|".join(f"{t.dtype} {','.join(map(str, t.shape))}" if t else "-" for t in self.types)
        return f"{self.plugin}|{types}|<={self.max_tokens}"

    def candidates(self, measured: dict[str, Any] | None = None) -> list[Any]:
        """Best first, each once."""
        own = self.plugin.tactics(self.types, self.max_tokens)
        fields = [f for f in (measured, shipped(self.plugin.name).get(self.label)) if f]
        legal = [t for t in (self.plugin.tactic(f) for f in fields) if t in own]
        return list(dict.fromkeys([*legal, *own]))

    def kernels(self, tactic: Any) -> tuple[Kernel, ...]:
        return tuple(self.plugin.kernels(tactic, self.types))


@dataclass(frozen=True)
class Choice:
    tactic: Any
    cubins: tuple[Cubin, ...]


@functools.cache
def shipped(plugin: str) -> dict[str, dict[str, Any]]:
    """The table of tactics that were measured on an H200, by `Site.label`."""
    path = Path(base.__file__).parent / plugin / "tactics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def choose(
    sites: Sequence[Site],
    measured: dict[str, dict[str, Any]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[Site, Choice]:
    """The best tactic of every site that compiles. Raises PluginError where none does."""
    waiting = {site: site.candidates(measured.get(site.label)) for site in dict.fromkeys(sites)}
    chosen: dict[Site, Choice] = {}
    compiler = Compiler(progress, warn)
    while waiting:
        for site, candidates in waiting.items():
            if not candidates:
                raise base.PluginError(
                    f"{site.plugin.name}: {site.module}: no tactic compiles for up to {site.max_tokens} rows; "
                    "the warnings above tell why"
                )
        compiler.compile([k for site, candidates in waiting.items() for k in site.kernels(candidates[0])])
        for site, candidates in list(waiting.items()):
            cubins = [compiler.done.get(k) for k in site.kernels(candidates[0])]
            if None in cubins:
                warn(f"{site.plugin.name}: {site.module}: dropped {candidates[0]}")
                candidates.pop(0)
            else:
                chosen[site] = Choice(candidates[0], tuple(c for c in cubins if c))
                del waiting[site]
    return chosen


class Compiler:
    """Compiles kernels on all cores, each once; a refused one is reported and has no cubin."""

    def __init__(self, progress: Callable[[int, int], None], warn: Callable[[str], None]) -> None:
        self.done: dict[Kernel, Cubin] = {}
        self._refused: set[Kernel] = set()
        self._progress, self._warn = progress, warn

    def compile(self, kernels: Sequence[Kernel]) -> None:
        from concurrent.futures import ThreadPoolExecutor
        from os import cpu_count

        new = [k for k in dict.fromkeys(kernels) if k not in self.done and k not in self._refused]
        with ThreadPoolExecutor(cpu_count()) as pool:  # NVRTC releases the GIL
            for count, (kernel, result) in enumerate(zip(new, pool.map(_compiled, new), strict=True), 1):
                if isinstance(result, Cubin):
                    self.done[kernel] = result
                else:
                    self._refused.add(kernel)
                    self._warn(result)
                self._progress(count, len(new))


def _compiled(kernel: Kernel) -> Cubin | str:
    """The cubin, or why there is none."""
    where = f"{kernel.plugin}/{kernel.source} {dict(kernel.constants)}"
    try:
        cubin = compile_kernel(kernel)
    except CompileError as error:
        return f"{where} does not compile: {error}"
    return f"{where}: ptxas serialized its wgmma instructions" if cubin.serialized else cubin


def kernel_facts(cubin: Cubin) -> dict[str, Any]:
    """What the plan says of a kernel."""
    k = cubin.kernel
    return {
        "plugin": k.plugin, "source": k.source, "entry": k.entry, "constants": dict(k.constants),
        "registers": cubin.registers, "spill_bytes": cubin.spill_bytes,
    }  # fmt: skip


def tactic_fields(tactic: Any) -> dict[str, Any]:
    return dataclasses.asdict(tactic)
