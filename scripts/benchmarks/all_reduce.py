"""fp8-bench all_reduce: what ranks exchange over NVLink, by every tactic: right, never stuck, how fast beside NCCL.

Started by mpirun, with a GPU for each rank. All ranks make the same calls in the same order.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fp8.builder.verify import sqnr
from fp8.plugins.all_gather.plugin import AllGather
from fp8.plugins.all_reduce.plugin import AllReduce
from fp8.plugins.base import types_of
from fp8.plugins.compile import compile_all
from fp8.plugins.hand_on.launch import LARGEST
from fp8.plugins.timing import captured, seconds_of_each
from fp8.runtime.launcher import RankError
from fp8.scripts.benchmarks import one_gpu, shared_layers
from fp8.scripts.benchmarks.exchanges import (
    FEW_ROWS,
    FP8_FROM,
    HANDED,
    HIDDEN,
    LOGITS_ROWS,
    SEED,
    SENT_FEW,
    Ranks,
    Work,
    handed,
    label,
    logits,
    makers,
    norms,
    open_ranks,
    sent,
    sums,
)

DESCRIPTION = """Checks and times the all-reduce over several GPUs of one host: mpirun -n 2 fp8-bench all_reduce. Random
data; every tactic against the reference, in and out of CUDA graphs, then in turn at varied sizes, then its time.
Without mpirun, the kernels' results alone, for 2, 4 and 8 ranks that share one GPU."""
PARTS = ("check", "stress", "time")
SIZES = (8, 32, 128, 512, 2048, 4096, 8192, 16384, 32768, 65536)  # KiB
TIMED = 32768  # KiB at most
MESSAGES = (8, 8192)  # KiB
LAUNCHES, REPLAYS = 20, 20
STRESSED = 1  # of the layers: launches that follow each other are of one size (sums.cuh)


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    p.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, metavar="KIB", help="sizes of the sums, in KiB of bfloat16"
    )
    p.add_argument("--stress", type=int, default=10_000, metavar="N", help="launches at varied sizes")
    p.add_argument("--tactics", default="", metavar="TEXT", help="only tactics whose names contain this, and NCCL's")
    p.add_argument(
        "--again", action="store_true", help="after a run that crashed: go on without the tactic that --output blames"
    )
    p.add_argument("--rank_timeout", type=float, default=120.0, help=argparse.SUPPRESS)


def every(ranks: Ranks, sizes: Sequence[int]) -> list[Callable[[], Work]]:
    return [*makers(ranks, sizes), *shared_layers.makers(ranks)]


def checks(
    ranks: Ranks, sizes: Sequence[int], begin: Callable[[str, dict[str, Any]], None], before: dict[str, Any]
) -> dict[str, Any]:
    """Every tactic, in and out of graphs: how many were held against the reference, and what was wrong, added to what
    was found `before`. What fails is dropped for all that follows. `begin` is called with each before it runs."""
    found = {"checked": 0, "failures": list(before["failures"])}
    for make in every(ranks, sizes):
        work = make()
        for tactic in work.tactics():
            begin(label(tactic), found)
            found["checked"] += 1
            wrong = _wrong(work, tactic)
            found["failures"] += [f"{work.name}, {tactic}: {text}" for text in wrong]
            ranks.drop([label(tactic)] if wrong else ())
    return found


def _wrong(work: Work, tactic: Any) -> list[str]:
    try:
        return [text for text in (check(work, tactic), check_graph(work, tactic)) if text]
    except (RuntimeError, ValueError) as error:  # torch's, the driver's, NCCL's
        return [f"{type(error).__name__}: {error}"]


def expected_bits(work: Work, tactic: Any) -> bool:
    """Whether a tactic gives the reference's bits: NCCL adds in an order of its own among more than two ranks."""
    if isinstance(work.plugin, AllGather) or work.ranks.world.world == 2:
        return True
    return not label(tactic).startswith("nccl")


def check(work: Work, tactic: Any) -> str:
    import torch

    launch = work.launcher(tactic)
    work.poison()
    launch(work.step)
    torch.cuda.synchronize()
    return work.wrong() if expected_bits(work, tactic) else ""


def check_graph(work: Work, tactic: Any) -> str:
    """Several launches captured, replayed several times, on values that change in between."""
    import torch

    if not expected_bits(work, tactic):
        return ""
    graph = captured([partial(work.launcher(tactic), work.step)] * 3)
    for i in range(3):
        x = work.inputs[0]
        x.copy_(torch.roll(x, 1 + i, -1))
        work.__dict__.pop("expected", None)
        work.poison()
        graph.replay()
        torch.cuda.synchronize()
        if wrong := work.wrong():
            return f"replayed {i}: {wrong}"
    return ""


def stress(ranks: Ranks, count: int, sizes: Sequence[int]) -> dict[str, Any]:
    """`count` launches of all tactics at varied sizes in one random order, each rank late now and then at random; every
    result is compared on the GPU."""
    import torch

    works = [sums(ranks, kib) for kib in sizes if kib <= 8192]
    works += [sums(ranks, kib, fp8=True) for kib in sizes if FP8_FROM <= kib <= 8192]
    works += [norms(ranks, rows) for rows in FEW_ROWS] + [sent(ranks, rows) for rows in SENT_FEW]
    works += [logits(ranks, rows) for rows in LOGITS_ROWS] + [handed(ranks, size) for size in HANDED]
    works.append(shared_layers.settled(shared_layers.makers(ranks)[STRESSED]()))
    launches = [(w, w.launcher(t)) for w in works for t in w.tactics() if label(t) != "nccl" and expected_bits(w, t)]
    order, late = random.Random(SEED), random.Random(1000 + ranks.world.rank)
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(count):
        work, launch = order.choice(launches)
        if late.random() < 0.02:
            torch.cuda._sleep(late.randrange(100_000))
        launch(work.step)
        if i % 4 == 0:
            bad += (work.outputs[-1].view(torch.uint8) != work.expected[-1].view(torch.uint8)).any()
            work.outputs[-1].view(torch.uint8).fill_(255)
    torch.cuda.synchronize()
    return {"launches": count, "wrong": int(bad)}


def timed(ranks: Ranks, launches: Sequence[Callable[[], object]]) -> float:
    """Microseconds of a launch: the median over replays of a graph, of the slowest rank."""
    graph = captured([launches[i % len(launches)] for i in range(LAUNCHES)])
    ranks.same(True)
    taken = seconds_of_each([graph.replay] * REPLAYS)[2:]
    return ranks.slowest(statistics.median(taken) * 1e6 / LAUNCHES)


def times(ranks: Ranks, make: Callable[[int], Work]) -> dict[str, float]:
    """Microseconds of each tactic, over two sets of buffers in turn."""
    works = [make(SEED), make(SEED + 1)]
    return {
        label(tactic): timed(ranks, [partial(w.launcher(tactic), w.step) for w in works])
        for tactic in works[0].tactics()
    }


def timing(ranks: Ranks, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row per size and op."""
    times(ranks, lambda seed: sums(ranks, sizes[-1], seed=seed))  # clocks rise under load
    for kib in sizes:
        found = times(ranks, lambda seed, kib=kib: sums(ranks, kib, seed=seed))
        yield _row("all_reduce", kib, found)
        if kib >= FP8_FROM:
            found = times(ranks, lambda seed, kib=kib: sums(ranks, kib, fp8=True, seed=seed))
            yield _row("all_reduce fp8", kib, found) | {"sqnr_db": _sqnr(ranks, kib)}
        if kib * 1024 <= 256 * HIDDEN * 2:
            found = times(ranks, lambda seed, kib=kib: norms(ranks, kib * 1024 // (HIDDEN * 2)))
            yield _row("all_reduce fused", kib, found)
    for rows in LOGITS_ROWS:
        found = times(ranks, lambda seed, rows=rows: logits(ranks, rows, seed=seed))
        yield _row("all_gather", rows * 32000 * 4 // 1024, found)


def messages(ranks: Ranks) -> list[dict[str, Any]]:
    """{"name", "us"}: every rank sends to the next and receives from the one before, as pipeline stages do: through
    peer memory what fits there."""
    import torch

    found, group = [], ranks.group
    for kib in MESSAGES:
        x, y = (torch.zeros(kib * 1024, dtype=torch.uint8, device="cuda") for _ in range(2))
        send: Callable[[], object]
        if kib * 1024 <= LARGEST:
            work = handed(ranks, kib * 1024)
            send = partial(work.launcher(work.tactics()[0]), work.step)
        else:
            send = partial(group.exchange, x, (group.rank + 1) % group.world, y, (group.rank - 1) % group.world)
        found.append({"name": f"send {_size(kib)}", "us": timed(ranks, [send])})
    return found


def _size(kib: int) -> str:
    return f"{kib} KB" if kib < 1024 else f"{kib // 1024} MB"


def _row(op: str, kib: int, found: dict[str, float]) -> dict[str, Any]:
    nccl = next((us for name, us in found.items() if name.startswith("nccl")), None)
    own = {name: us for name, us in found.items() if not name.startswith("nccl")}
    best = min(own, key=lambda name: own[name], default="")
    return {"name": op, "kib": kib, "nccl_us": nccl, "best_us": own.get(best), "tactic": best, "all": found}


def _sqnr(ranks: Ranks, kib: int) -> float:
    """dB of the sum that travels in e4m3 against the sum of the same parts as they are."""
    work = sums(ranks, kib, fp8=True)
    plain = AllReduce("sum", ranks.world.world).reference(*work.inputs, step=work.step, comm=ranks.group)
    return sqnr(work.expected[0], plain[0])


def flat(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """{"name", "us"}: the fastest own tactic, and NCCL's (with norm_quant after it, for the fused op)."""
    found = []
    for row in rows:
        size = _size(row["kib"])
        found.append({"name": f"{row['name']} {size}", "us": row["best_us"]})
        if row["nccl_us"] is not None:
            name = row["name"].replace("all_reduce", "nccl").replace("all_gather", "nccl all_gather")
            name = name.replace("fused", "+ norm_quant")
            found.append({"name": f"{name} {size}", "us": row["nccl_us"]})
    return found


def compile_ahead(ranks: Ranks, sizes: Sequence[int]) -> None:
    """All kernels, on all cores."""
    works = (make() for make in every(ranks, sizes))
    compile_all(k for w in works for t in w.tactics() for k in w.plugin.kernels(t, types_of(w.inputs)))


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows for people, and what else the record holds; "failed" if a result was wrong. Raises RankError."""
    if args.world is None:
        return one_gpu.run()
    ranks = open_ranks(args.world, args.tactics)
    sizes = sorted(args.sizes)
    rows: list[dict[str, Any]] = []
    before = blamed(args.output) if args.again else {"failures": [], "dropped": []}
    ranks.dropped |= set(before["dropped"])
    facts: dict[str, Any] = {"world": ranks.world.world, "rows": [], "checks": dict(before), "failed": args.again}
    compile_ahead(ranks, sizes)

    def begin(name: str, found: dict[str, Any]) -> None:
        under_way = {"failures": found["failures"], "dropped": sorted(ranks.dropped), "under_way": name}
        _save(args, rows, {**facts, "checks": under_way})

    for part in (p for p in PARTS if p in args.parts):
        if part == "time":
            for row in timing(ranks, [s for s in sizes if s <= TIMED]):
                rows += [row] if row["best_us"] else []
                facts["rows"] = flat(rows)
                _save(args, rows, facts)
            facts["rows"] = [*facts["rows"], *messages(ranks)]
            _save(args, rows, facts)
            continue
        found = checks(ranks, sizes, begin, before) if part == "check" else stress(ranks, args.stress, sizes)
        for failure in found.get("failures", ()):
            print(f"rank {ranks.world.rank}: {failure}", flush=True)
        facts["checks"] |= {**found, "dropped": sorted(ranks.dropped)}
        facts["failed"] |= not ranks.same(not found.get("failures") and not found.get("wrong"))
        _save(args, rows, facts)
    return rows, facts


def blamed(output: Path | None) -> dict[str, Any]:
    """What an earlier run's file says of tactics that failed, and of the one that was under way when it ended. Raises
    RankError where there is no such file."""
    try:
        checks = json.loads(Path(output or "").read_bytes())["checks"]
        failures, dropped = list(checks.get("failures", [])), set(checks.get("dropped", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RankError(f"--again goes on after a run that wrote --output {output}: {error}") from error
    if "under_way" in checks:
        failures.append(f"{checks['under_way']}: the job ended while it was checked")
        dropped.add(checks["under_way"])
    return {"failures": failures, "dropped": sorted(dropped)}


def _save(args: argparse.Namespace, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    if args.world.rank == 0:
        args.save(rows, facts)
