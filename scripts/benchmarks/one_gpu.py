"""Ranks that share one GPU, each a stream: the kernels over peer memory for any number of ranks, checked where there is
one card. What NVLink adds, and time, need several."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fp8.builder.parallel.lockstep import Group, Member
from fp8.plugins.all_gather.plugin import AllGather
from fp8.plugins.all_reduce.plugin import AllReduce
from fp8.plugins.all_reduce.region import Regions, region_bytes
from fp8.plugins.all_reduce_norm_quant.plugin import AllReduceNormQuant
from fp8.plugins.base import Plugin, StepShape, types_of
from fp8.plugins.compile import compile_all
from fp8.plugins.norm_quant.cases import TOLERANCE as QUANTS
from fp8.runtime.launcher import RankError
from fp8.scripts.benchmarks.case_buffers import Functions
from fp8.scripts.benchmarks.checks import error

if TYPE_CHECKING:
    import torch

WORLDS = (2, 4, 8)
BLOCKS = 8  # of a rank's launch: the blocks of all ranks run at the same time
HIDDEN = 1024
ROWS = (1, 5, 16)
TURNS = 20
NORM_ERROR = 1e-2  # of a norm's outputs: sums in another order flip a code in some 10^4, by an eighth of its value
Inputs = list["torch.Tensor | None"]


class Shared:
    """Ranks with regions on this GPU; each has the attributes of a GPU's communicator that a launch asks for."""

    def __init__(self, world: int) -> None:
        import torch

        self.group = Group(world)
        self.memory = [torch.zeros(region_bytes(world), dtype=torch.uint8, device="cuda") for _ in range(world)]
        self.streams = [torch.cuda.Stream() for _ in range(world)]
        addresses = tuple(m.data_ptr() for m in self.memory)
        for rank, member in enumerate(self.group.members):
            member.regions = Regions(rank, addresses)  # type: ignore[attr-defined]

    @property
    def members(self) -> list[Member]:
        return self.group.members


def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per number of ranks. Raises RankError without a Hopper GPU."""
    import torch

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # a stream must not wait for another
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise RankError("all_reduce needs a Hopper GPU, or one for each rank: mpirun -n 2 fp8-bench all_reduce")
    rows, failures = [], []
    functions = Functions()
    for world in WORLDS:
        shared, count = Shared(world), 0
        made = list(works(world))
        compile_all(k for plugin, inputs in made for t in tactics(plugin, inputs) for k in kernels(plugin, t, inputs))
        for plugin, inputs in made:
            for tactic in tactics(plugin, inputs):
                wrong = check(shared, functions, plugin, tactic, inputs)
                failures += [f"world {world}, {plugin}, {tactic}: {wrong}"] * bool(wrong)
                count += 1
        rows.append({"world": world, "checked": count})
    for failure in failures:
        print(failure, flush=True)
    return rows, {"world": 1, "checks": {"failures": failures}, "failed": bool(failures)}


def works(world: int) -> Iterator[tuple[Plugin, list[Inputs]]]:
    """Plugins, with the inputs of every rank."""
    import torch

    draw = torch.Generator("cuda").manual_seed(world)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=draw)

    for rows in ROWS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield AllReduce("sum", world), [[normal(rows, HIDDEN).to(dtype)] for _ in range(world)]
        yield AllReduce("sum", world, 1), [[normal(rows, HIDDEN).bfloat16()] for _ in range(world)]
        yield AllReduce("max", world), [[normal(rows)] for _ in range(world)]
    for rows, quant in ((min(r, BLOCKS), q) for r in ROWS for q in QUANTS):
        scale = torch.tensor([0.0071], device="cuda") if quant == "static" else None
        common = [normal(rows, HIDDEN).bfloat16(), normal(HIDDEN).bfloat16(), None, scale]
        parts: list[Inputs] = [[normal(rows, HIDDEN).bfloat16(), *common] for _ in range(world)]
        yield AllReduceNormQuant(quant=quant, world=world), parts
    columns = tuple(256 + 16 * (rank % 3) for rank in range(world))
    for rows in ROWS:
        yield AllGather(columns), [[normal(rows, n)] for n in columns]


def tactics(plugin: Plugin, inputs: Sequence[Inputs]) -> list[Any]:
    """Those that need nothing but peer memory, with few blocks."""
    found = plugin.tactics(types_of(inputs[0]), len(inputs[0][0]))
    if isinstance(plugin, AllReduceNormQuant):
        return [t for t in found if t.reduce is None]
    if isinstance(plugin, AllGather):
        return [t for t in found if t.over_peers]
    few = [dataclasses.replace(t, blocks=BLOCKS) for t in found if t.over_peers]
    size = inputs[0][0].nbytes
    return [t for t in dict.fromkeys(few) if t.method != "push" or size <= BLOCKS * t.threads * t.units * 16]


def kernels(plugin: Plugin, tactic: Any, inputs: Sequence[Inputs]) -> Any:
    return plugin.kernels(tactic, types_of(inputs[0]))


def check(shared: Shared, functions: Functions, plugin: Plugin, tactic: Any, inputs: Sequence[Inputs]) -> str:
    """What is wrong after any of some launches in turn, or nothing."""
    import torch

    rows = len(inputs[0][0])
    step = StepShape(rows, 1, 0, rows, rows, rows)
    reference = plugin.reference
    tasks = [
        functools.partial(reference, *own, step=step, comm=member)  # type: ignore[call-arg]
        for own, member in zip(inputs, shared.members, strict=True)
    ]
    expected = shared.group.run(tasks)[0]
    found = functions.of(kernels(plugin, tactic, inputs))
    outputs = [[torch.empty_like(t) for t in expected] for _ in inputs]
    launchers = [
        plugin.bind(tactic, found, [*own, *out], None, comm=member)  # type: ignore[call-arg]
        for own, out, member in zip(inputs, outputs, shared.members, strict=True)
    ]
    for turn in range(TURNS):
        for output in (o for out in outputs for o in out):
            output.view(torch.uint8).fill_(255)
        torch.cuda.synchronize()
        for launch, stream in zip(launchers, shared.streams, strict=True):
            with torch.cuda.stream(stream):
                launch(step)
        torch.cuda.synchronize()
        for rank, out in enumerate(outputs):
            errors = [error(a, b) for a, b in zip(out, expected, strict=True)]
            bound = NORM_ERROR if isinstance(plugin, AllReduceNormQuant) else 0.0
            if errors[-1] > 0 or max(errors) > bound:
                return f"turn {turn}, rank {rank}: errors {errors}"
    return ""
