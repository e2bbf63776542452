"""What ranks exchange over NVLink, as ops of one size each, of data that differ by rank: what fp8-bench all_reduce
checks and times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from fp8.plugins.all_gather.plugin import AllGather, AllGatherTactic
from fp8.plugins.all_reduce.plugin import AllReduce
from fp8.plugins.all_reduce.region import SENT_ROWS, region_bytes
from fp8.plugins.all_reduce_norm_quant.plugin import AllReduceNormQuant, AllReduceNormQuantTactic
from fp8.plugins.base import Launcher, Plugin, StepShape, Threads, types_of
from fp8.plugins.decode_layers.plugin import Whole
from fp8.plugins.hand_on import launch as hand_on
from fp8.plugins.hand_on.plugin import HandOn
from fp8.plugins.norm_quant.cases import TOLERANCE as QUANTS
from fp8.runtime.comm import HostGroup, World
from fp8.runtime.launcher import RankError
from fp8.runtime.peer_memory import share
from fp8.scripts.benchmarks.case_buffers import Functions
from fp8.scripts.benchmarks.checks import error
from fp8.scripts.benchmarks.one_gpu import NORM_ERROR
from fp8.scripts.benchmarks.sent import DEPTH, SentSum, whole

if TYPE_CHECKING:
    import torch

    from fp8.runtime.nccl import NcclGroup

HIDDEN = 4096  # values of a row
FP8_FROM = 512  # KiB
FEW_ROWS = (1, 3, 16, 64, 256)
LOGITS_ROWS = (1, 16, 64)
HANDED = (4, 260, 8192, 262144 + 12, hand_on.LARGEST)  # bytes
SENT_FEW = (1, 3, SENT_ROWS)  # rows
SEED = 1


@dataclass
class Ranks:
    """This rank's GPU and its way to the others."""

    world: World
    group: NcclGroup
    functions: Functions
    only: str = ""  # part of the names of tactics
    dropped: set[str] = field(default_factory=set)  # names of tactics that failed

    def offers(self, name: str) -> bool:
        return name.startswith("nccl") or (self.only in name and name not in self.dropped)

    def drop(self, names: Iterable[str]) -> None:
        """What failed on any rank, on all of them."""
        for found in self.world.exchange(json.dumps(sorted(names))):
            self.dropped |= set(json.loads(found))

    def same(self, ok: bool) -> bool:
        """Whether it is so on all ranks."""
        return all(text == "1" for text in self.world.exchange(str(int(ok))))

    def slowest(self, seconds: float) -> float:
        return max(map(float, self.world.exchange(repr(seconds))))


def open_ranks(world: World, only: str = "") -> Ranks:
    """Raises RankError if the ranks are no GPUs that reach each other."""
    import torch

    from fp8.runtime.nccl import NcclGroup

    if not torch.cuda.is_available() or torch.cuda.device_count() <= world.launch.local_rank:
        raise RankError(f"rank {world.rank} has no GPU of its own; all_reduce needs one for each rank")
    device = torch.device("cuda", world.launch.local_rank)
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream())
    members = range(world.world)
    group = NcclGroup(world, members)
    for name, size in (("regions", region_bytes(world.world)), ("ring", hand_on.region_bytes(world.world))):
        found = share(HostGroup(world, members), device, size)
        if isinstance(found, str):
            raise RankError(f"the GPUs share no memory: {found}")
        world.at_end(found.close)
        setattr(group, name, found.regions)
    return Ranks(world, group, Functions(), only)


@dataclass(frozen=True)
class Work:
    """One op at one size: inputs that differ by rank where they may, outputs, what is expected."""

    name: str
    plugin: Plugin
    rows: int
    inputs: list[torch.Tensor | None]
    ranks: Ranks

    @property
    def step(self) -> StepShape:
        return StepShape(self.rows, 1, 0, self.rows, self.rows, self.rows)

    @cached_property
    def outputs(self) -> list[torch.Tensor]:
        import torch

        found = self.plugin.infer(types_of(self.inputs))
        return [torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="cuda") for t in found]

    @cached_property
    def expected(self) -> tuple[torch.Tensor, ...]:
        if isinstance(self.plugin, AllGather):
            return (self._columns(self.plugin.parts),)
        return self.plugin.reference(*self.inputs, step=self.step, comm=self.ranks.group)  # type: ignore[call-arg]

    def _columns(self, parts: Sequence[int]) -> torch.Tensor:
        """All ranks' columns; NCCL takes tensors of one shape."""
        import torch

        (x,) = self.inputs
        wide = torch.nn.functional.pad(x, (0, max(parts) - x.shape[1]))
        return torch.cat([p[:, :n] for p, n in zip(self.ranks.group.all_gather(wide), parts, strict=True)], 1)

    def tactics(self) -> list[Any]:
        return [t for t in self.plugin.tactics(types_of(self.inputs), self.rows) if self.ranks.offers(label(t))]

    def poison(self) -> None:
        import torch

        for output in self.outputs:
            output.view(torch.uint8).fill_(255)

    def launcher(self, tactic: Any) -> Launcher:
        found = self.ranks.functions.of(self.plugin.kernels(tactic, types_of(self.inputs)))
        return self.plugin.bind(tactic, found, [*self.inputs, *self.outputs], None, comm=self.ranks.group)  # type: ignore[call-arg]

    def wrong(self) -> str:
        """What is wrong with the outputs, or nothing."""
        import torch

        for i, (found, wanted) in enumerate(zip(self.outputs, self.expected, strict=True)):
            if not self._normed or i == len(self.outputs) - 1:
                if not torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)):
                    return f"output {i} has other bits, error {error(found, wanted):.3g}"
            elif error(found, wanted) > NORM_ERROR:
                return f"output {i} has error {error(found, wanted):.3g}"
        return ""

    @property
    def _normed(self) -> bool:
        return isinstance(self.plugin, AllReduceNormQuant | SentSum)


def generator(rank: int, seed: int) -> torch.Generator:
    import torch

    return torch.Generator("cuda").manual_seed(seed * 64 + rank)


def sums(
    ranks: Ranks, kib: int, dtype: str = "bfloat16", operation: str = "sum", fp8: bool = False, seed: int = SEED
) -> Work:
    import torch

    kind = getattr(torch, dtype)
    rows = max(1, kib * 1024 // (HIDDEN * kind.itemsize))
    draw = generator(ranks.world.rank, seed)
    x = torch.randn(rows, HIDDEN, device="cuda", generator=draw).to(kind)
    name = f"{operation} {dtype}{' fp8' if fp8 else ''} {kib} KB"
    return Work(name, AllReduce(operation, ranks.world.world, int(fp8)), rows, [x], ranks)


def amax(ranks: Ranks, rows: int) -> Work:
    import torch

    x = torch.randn(rows, device="cuda", generator=generator(ranks.world.rank, SEED)).abs()
    return Work(f"max float32 {rows} rows", AllReduce("max", ranks.world.world), rows, [x], ranks)


def norms(ranks: Ranks, rows: int, quant: str = "static", hidden: int = HIDDEN, dtype: str = "bfloat16") -> Work:
    import torch

    kind = getattr(torch, dtype)
    own, common = generator(ranks.world.rank, SEED), generator(99, SEED)
    x = torch.randn(rows, hidden, device="cuda", generator=own).to(kind)
    residual = (3 * torch.randn(rows, hidden, device="cuda", generator=common)).to(kind)
    weight = (1 + 0.2 * torch.randn(hidden, device="cuda", generator=common)).to(kind)
    scale = torch.tensor([0.0071], device="cuda") if quant == "static" else None
    plugin = AllReduceNormQuant(quant=quant, world=ranks.world.world)
    return Work(f"fused {quant} {rows}x{hidden} {dtype}", plugin, rows, [x, residual, weight, None, scale], ranks)


def sent(ranks: Ranks, rows: int, quant: str = "static", hidden: int = HIDDEN) -> Work:
    import torch

    own, common = generator(ranks.world.rank, SEED), generator(99, SEED)
    linear = [whole(own, rows, DEPTH), whole(own, hidden, DEPTH), None, None, None]
    residual = (3 * torch.randn(rows, hidden, device="cuda", generator=common)).bfloat16()
    weight = (1 + 0.2 * torch.randn(hidden, device="cuda", generator=common)).bfloat16()
    scale = torch.tensor([0.0071], device="cuda") if quant == "static" else None
    plugin = SentSum(ranks.world.world, quant)
    return Work(f"sent {quant} {rows}x{hidden}", plugin, rows, [*linear, residual, weight, None, scale], ranks)


def logits(ranks: Ranks, rows: int, uneven: bool = False, seed: int = SEED) -> Work:
    """The gathering of logits of a vocabulary of 32000, in parts."""
    import torch

    world = ranks.world.world
    parts = tuple(32000 // world + (16 * (rank - world + 1) if uneven else 0) for rank in range(world))
    x = torch.randn(rows, parts[ranks.world.rank], device="cuda", generator=generator(ranks.world.rank, seed))
    return Work(f"gather {rows}x{parts}", AllGather(parts), rows, [x], ranks)


def handed(ranks: Ranks, size: int, seed: int = SEED) -> Work:
    """Bytes, a multiple of 4."""
    import torch

    draw = generator(ranks.world.rank, seed)
    x = torch.randint(1 << 31, (size // 4,), device="cuda", generator=draw).int()
    return Work(f"hand on {size} bytes", HandOn(), len(x), [x], ranks)


def makers(ranks: Ranks, sizes: Sequence[int]) -> list[Callable[[], Work]]:
    """What is checked."""
    return [
        *(partial(sums, ranks, kib) for kib in sizes),
        *(partial(sums, ranks, kib, fp8=True) for kib in sizes if kib >= FP8_FROM),
        *(partial(sums, ranks, kib, dtype) for kib in sizes[:4] for dtype in ("float16", "float32")),
        *(partial(amax, ranks, rows) for rows in (1, 7, 1000, 8192)),
        *(partial(norms, ranks, rows, quant) for rows in FEW_ROWS for quant in QUANTS),
        *(partial(sent, ranks, rows, quant) for rows in SENT_FEW for quant in QUANTS),
        *(partial(sent, ranks, 2, "static", hidden) for hidden in (264, 16384)),
        *(partial(norms, ranks, 5, "static", hidden, "float16") for hidden in (264, 8192, 16384)),
        *(partial(logits, ranks, rows, uneven) for rows in LOGITS_ROWS for uneven in (False, True)),
        *(partial(handed, ranks, size) for size in HANDED),
    ]


def label(tactic: Any) -> str:
    if isinstance(tactic, Whole):
        return f"layers, {tactic.STAGES} stages, {tactic.WINDOW} on their way"
    if isinstance(tactic, AllReduceNormQuantTactic):
        row = f"row {tactic.row.threads}x{tactic.row.held}"
        if tactic.sent:
            return f"sent, {row}"
        return f"fused, {row}" if tactic.reduce is None else f"{label(tactic.reduce)} + norm_quant"
    if isinstance(tactic, Threads):
        return f"hand on {tactic.threads}"
    if not tactic.over_peers:
        return "nccl"
    if isinstance(tactic, AllGatherTactic):
        return f"{tactic.method} {tactic.threads}x{tactic.units}"
    return f"{tactic.method} {tactic.threads}x{tactic.units} b{tactic.blocks}{' fp8' if tactic.fp8 else ''}"
