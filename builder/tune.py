"""Tactics: which kernels run each step, per range of rows.

Order of preference: measured on this GPU (--tune, cached), the shipped table (`tactic_table.py`), the plugin's own
model. A tactic that does not compile, or whose wgmma ptxas serialized, is dropped with a warning.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fp8.builder import tactic_table
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

    @cached_property
    def op(self) -> str:
        """The key of the shipped table."""
        return tactic_table.op_name(self.plugin.timed_as, self.types)

    @property
    def timed(self) -> Site:
        """The place, of the same label, whose timings hold for this one."""
        return dataclasses.replace(self, plugin=self.plugin.timed_as)

    @cached_property
    def offered(self) -> tuple[Any, ...]:
        """The plugin's tactics, its favourites first."""
        return tuple(self.plugin.tactics(self.types, self.max_tokens))

    @property
    def label(self) -> str:
        """The key of measured tactics: `gemm|float8_e4m3fn T,4096|...|<=16`."""
        return f"{self.op}|<={self.max_tokens}"

    @property
    def favourites(self) -> tuple[Any, ...]:
        """What an entry of the shipped table must have won against."""
        return self.offered[: tactic_table.FAVOURITES]

    def candidates(self, measured: dict[str, Any] | None = None) -> list[Any]:
        """Best first, each once. Raises PluginError if there is none."""
        known = (self.restored(measured), self.shipped())
        found = list(dict.fromkeys([*(t for t in known if t), *self.offered]))
        if not found:
            raise base.PluginError(
                f"{self.plugin.name}: {self.module}: no kernel takes up to {self.max_tokens} rows of this shape "
                f"({self.op}); build for --target cpu"
            )
        return found

    def shipped(self) -> Any:
        """The tactic that the shipped table has for this place, if it is legal; else None."""
        entry = tactic_table.shipped().nearest(self.op, self.max_tokens)
        return self.restored(entry.tactic) if entry else None

    def restored(self, fields: dict[str, Any] | None) -> Any:
        """The tactic of a table's fields; None if there is none such (any more), or if it is not legal here."""
        try:
            tactic = self.plugin.tactic(fields) if fields else None
        except (KeyError, TypeError):
            return None
        return tactic if tactic and self.plugin.legal(tactic, self.types, self.max_tokens) else None

    def kernels(self, tactic: Any) -> tuple[Kernel, ...]:
        return tuple(self.plugin.kernels(tactic, self.types))


@dataclass(frozen=True)
class Choice:
    tactic: Any
    cubins: tuple[Cubin, ...]


def choose(
    sites: Sequence[Site],
    measured: dict[str, dict[str, Any]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[Site, Choice]:
    """The best tactic of every site that compiles. Raises PluginError where none does."""
    waiting = {site: site.candidates(measured.get(site.label)) for site in dict.fromkeys(sites)}
    chosen: dict[Site, Choice] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC releases the GIL
        compiler = Compiler(pool, progress, warn)
        while waiting:
            for site, candidates in waiting.items():
                if not candidates:
                    raise base.PluginError(
                        f"{site.plugin.name}: {site.module}: no tactic compiles for up to {site.max_tokens} rows; "
                        "the warnings above say why"
                    )
            compiler.submit([k for site, candidates in waiting.items() for k in site.kernels(candidates[0])])
            for site, candidates in list(waiting.items()):
                cubins = compiler.cubins(site.kernels(candidates[0]))
                if cubins is None:
                    warn(f"{site.plugin.name}: {site.module}: dropped {candidates[0]}")
                    candidates.pop(0)
                else:
                    chosen[site] = Choice(candidates[0], cubins)
                    del waiting[site]
    return chosen


class Compiler:
    """Compiles kernels side by side, each once. One that is refused is reported, once, and has no cubin."""

    def __init__(self, pool: Executor, progress: Callable[[int, int], None], warn: Callable[[str], None]) -> None:
        self._pool, self._progress, self._warn = pool, progress, warn
        self._started: dict[Kernel, Future[Cubin | str]] = {}
        self._results: dict[Kernel, Cubin | None] = {}

    def submit(self, kernels: Sequence[Kernel]) -> None:
        """Begins to compile these, in this order."""
        for kernel in kernels:
            if kernel not in self._started:
                self._started[kernel] = self._pool.submit(_compiled, kernel)

    def cubins(self, kernels: Sequence[Kernel]) -> tuple[Cubin, ...] | None:
        """The cubins of all of them; None if one is refused."""
        self.submit(kernels)
        found = [self._result(k) for k in kernels]
        return None if None in found else tuple(c for c in found if c)

    def _result(self, kernel: Kernel) -> Cubin | None:
        if kernel not in self._results:
            result = self._started[kernel].result()
            self._results[kernel] = result if isinstance(result, Cubin) else None
            if isinstance(result, str):
                self._warn(result)
            self._progress(len(self._results), len(self._started))
        return self._results[kernel]


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
