"""--tune: times the candidates of every op with a choice on this machine's GPU, and remembers the winners by content.

Ops with indices among their inputs, and those that communicate with other ranks, are left out.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8.builder.plan import Tactics
from fp8.builder.tactic_cache import Facts, TacticCache
from fp8.builder.tactic_table import digest_of_kernels, digest_of_tactics
from fp8.builder.timer import NothingWorks, Timer, TuneError
from fp8.builder.trial import Candidate, Job, Trial
from fp8.builder.tune import Compiler, Site, tactic_fields
from fp8.plugins.compile import Cubin, cache_dir

__all__ = ["TuneError"]  # used through this module


@dataclass(frozen=True)
class Timed:
    """Seconds of a launch by tactic, of those that work; none if nothing could be timed. `spare`: the first tactic that
    is not known to fail."""

    site: Site
    seconds: dict[Any, float]
    spare: Any

    @property
    def best(self) -> Any:
        return min(self.seconds, key=lambda tactic: self.seconds[tactic])

    @property
    def gain(self) -> tuple[float, float]:
        """Seconds of the favourite (the first that works) and of the best."""
        return next(iter(self.seconds.values())), self.seconds[self.best]

    def __str__(self) -> str:
        favourite, best = self.gain
        return f"{self.site.label}: {self.best} {best * 1e6:.2f} us, the favourite {favourite * 1e6:.2f} us"


def measure(
    tactics: Tactics,
    progress: Callable[[int, int], None],
    remark: Callable[[str], None],
    warn: Callable[[str], None],
    trial: Callable[[], Trial] = Trial,
) -> dict[str, dict[str, Any]]:
    """The fastest tactic of every site with a choice, by `Site.label`. `trial` is called in a process of its own.

    Raises TuneError without a Hopper GPU, and where no tactic of a site works."""
    every = dict.fromkeys(s.timed for several in tactics.sites.values() for s in several)
    entries = {site: _entry(site) for site in every if has_choice(site)}
    cache = TacticCache(cache_dir() / "tactics", machine(), remark)
    unknown = [site for site, entry in entries.items() if cache.get(entry) is None]
    winners: dict[str, dict[str, Any]] = {}
    gains = [(0.0, 0.0)]
    with Timer(trial) as timer, compiling(progress, warn) as compiler:
        if unknown:
            timer.start()
        compiler.submit([k for site in unknown for t in site.candidates() for k in site.kernels(t)])
        for site in unknown:
            with cache.turn():
                if cache.get(entries[site]) is not None:  # another build was faster
                    continue
                timed = time_site(site, site.candidates(), timer, compiler, tactics.limits.max_batch_size, warn)
                if not timed.seconds:
                    winners[site.label] = tactic_fields(timed.spare)
                    continue
                cache.put(entries[site], tactic_fields(timed.best))
            remark(str(timed))
            gains.append(timed.gain)
    if len(gains) > 1:
        favourites, best = map(sum, zip(*gains, strict=True))
        remark(f"{len(gains) - 1} choices timed; the favourites take {favourites / best - 1:.1%} longer in all")
    known = {site.label: found for site, entry in entries.items() if (found := cache.get(entry)) is not None}
    return winners | known


@contextlib.contextmanager
def compiling(progress: Callable[[int, int], None], warn: Callable[[str], None]) -> Iterator[Compiler]:
    """Compiles on all cores; what waits when the body fails is not begun."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC releases the GIL
        try:
            yield Compiler(pool, progress, warn)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def machine() -> Facts:
    """What a time depends on beside the kernels. Raises TuneError without a GPU that can run them."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise TuneError("tactics are timed on an sm_90 GPU, and torch sees none; build without --tune on this machine")
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "fp8-engine": importlib.metadata.version("fp8-engine"),
        "torch": torch.__version__,  # brings cuBLASLt, which is a tactic too
    }


def driver_version() -> str:
    """`580.95.05`; where that is not told, the CUDA version that the driver takes."""
    from cuda.bindings import driver

    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.is_file() else f"CUDA {driver.cuDriverGetVersion()[1]}"


def has_choice(site: Site) -> bool:
    """Whether its tactics can be timed here, on random operands, and are several."""
    indices = any(t and t.dtype.startswith("int") for t in site.types)
    return not indices and not site.plugin.collective and len(site.offered) > 1


def _entry(site: Site) -> str:
    """What its winner depends on: the place, and candidates with the content of their kernels."""
    candidates = site.candidates()
    kernels = digest_of_kernels(k for t in candidates for k in site.kernels(t))
    return f"{site.label}|{digest_of_tactics(candidates)}|{kernels}"


def time_site(
    site: Site, candidates: Sequence[Any], timer: Timer, compiler: Compiler, max_batch: int, warn: Callable[[str], None]
) -> Timed:
    """Compiles and times. What does not work is dropped with a warning each. Raises NothingWorks."""
    where = f"{site.plugin.name}: {site.module}: up to {site.max_tokens} rows"
    compiled = {t: cubins for t in candidates if (cubins := compiler.cubins(site.kernels(t))) is not None}
    job = Job(site.plugin, site.types, site.max_tokens, max_batch, tuple(_candidate(t, c) for t, c in compiled.items()))
    outcome = timer.time(job)
    tactics = list(compiled)
    for index, why in outcome.dropped.items():
        warn(f"{where}: dropped {tactics[index]}: {why}")
    if outcome.skipped:
        warn(f"{where}: not timed: {outcome.skipped}")
    spare = next((t for i, t in enumerate(tactics) if i not in outcome.dropped), None)
    if spare is None:
        raise NothingWorks(f"{where}: no tactic works on this GPU; the warnings above say why")
    return Timed(site, {tactics[i]: took for i, took in sorted(outcome.seconds.items())}, spare)


def _candidate(tactic: Any, cubins: Sequence[Cubin]) -> Candidate:
    return Candidate(tactic, tuple((c.code, c.kernel.entry) for c in cubins))
