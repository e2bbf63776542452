"""Linear layers of many tokens: the tactic of gemm.cu, its cost model and its launch, for gemm and gemm_swiglu."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fp8.plugins.base import SCALE_BLOCK, Kernel, Launcher, Plugin, StepShape, Tensor, types_of
from fp8.plugins.gemm.types import BYTES, blockwise, group_rows, operands

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

SMS = 132  # of an H200
SHARED_MAX = 227 * 1024  # bytes of shared memory that a CTA may have
ATOM = 128  # bytes of K in a stage
L2_BYTES = 46.0  # that the L2 gives each SM per clock when all of them ask
DEVICE_BYTES = 2400.0  # of device memory per clock
CODES = {"bfloat16": 0, "float16": 1, "float32": 2}
OPERANDS = {"float8_e4m3fn": 0, "bfloat16": 1, "float16": 2}
CLUSTERS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (4, 1, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4)]  # M, N, split of K
PROMOTED_N = 192  # columns for which a warpgroup of 64 rows has registers twice
TWO_SETS = (96, 128)  # columns for which a warpgroup may have two sets of products
PROMOTION = 250  # clocks that the tensor cores idle in a k block while its products are promoted
SCALE = 20  # and for each scale of its columns beyond the first
SECOND_SET = 0.98  # of the time that a tile takes with one; of two warpgroups up to SHORT k blocks, beyond that longer
SHORT = 64
LARGE_PROMOTION = 215  # the same of 64 rows where a warpgroup has 128
LARGE_EPILOGUE = 1500  # clocks more of such a tile where a fourth stage leaves room for one store buffer only
OFFERED = 6  # candidates that are worth timing
SUSTAINED = 2048  # tokens from which on steps are long
STAYING = 12 << 20  # bytes of x that stay in the L2 cache while w passes through it
MOST_SHARE = max(m for m, _, _ in CLUSTERS)  # row blocks of a cluster, of which a group has whole ones
MOST_GROUP = 1024  # row blocks, more than any step has


@dataclass(frozen=True)
class ManyTokens:
    """Constants of gemm.cu, and `GROUP` row blocks that the raster keeps together."""

    BLOCK_M: int  # 64, 128 or 256
    BLOCK_N: int
    STAGES: int
    PINGPONG: int = 0
    CLUSTER_M: int = 1
    CLUSTER_N: int = 1
    SPLIT: int = 1
    SETS: int = 1  # of accumulators for products that are promoted: one is added while the other's are under way
    kind: str = "many_tokens"

    @property
    def cluster(self) -> int:
        return self.CLUSTER_M * self.CLUSTER_N * self.SPLIT

    @property
    def warpgroups(self) -> int:
        return 1 if self.BLOCK_M == 64 and not self.PINGPONG else 2

    def group(self, row_bytes: int) -> int:
        """Row blocks of x that stay in the L2 cache while the columns of w pass. Each group reads w from memory once,
        and under the power limit its bytes cost clocks: groups of 3072 rows instead of 1024 at K = 4096 make 8192 x
        22016 x 4096 1131 instead of 1229 us, 2048 rows 288 instead of 294, and steps of llama-3.1-8B, in turn, of 1536
        decode rows 1.4% shorter, of 1016 and eight prompts of 128 0.9%, of 1524 and twelve 0.6%, of 480 and 7712 2.3%.
        1024 rows at least (of tiles of 256 rows, 2048): with 2048 at K = 8192 128 x 128 tiles keep the tensor cores of
        an H200 busy for 90 to 92% of the clocks, not 98%; 1536 are as fast as 1024."""
        rows = max(1024, STAYING // row_bytes)
        return min(max(rows // self.BLOCK_M // MOST_SHARE * MOST_SHARE, 8), MOST_GROUP)

    def units(self, rows: int, n: int) -> int:
        """Clusters' worth of tiles."""
        return -(-rows // (self.BLOCK_M * self.CLUSTER_M)) * -(-n // (self.BLOCK_N * self.CLUSTER_N))

    def grid(self, rows: int, n: int, sms: int) -> int:
        """CTAs: all that fit at once, or (split K) one per tile and part."""
        units = self.units(rows, n)
        return (units if self.SPLIT > 1 else min(units, clusters(self.cluster, sms))) * self.cluster


def clusters(size: int, sms: int = SMS) -> int:
    """Clusters that run at once. An H200 has room for 66 of two and 30 of four: its processing clusters differ."""
    return sms // size if size <= 2 else (sms - 12) // size


@dataclass(frozen=True)
class Problem:
    """What gemm.cu needs to know of a plugin call."""

    n: int
    k_blocks: int
    constants: tuple[tuple[str, int], ...]

    @cached_property
    def _values(self) -> dict[str, int]:
        return dict(self.constants)

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    @property
    def blockwise(self) -> bool:
        return self["X_SCALE"] == 3

    @property
    def out_bytes(self) -> int:
        return 1 if self["QUANT"] else 4 if self["OUT"] == 2 else 2

    def chunk(self, block_n: int) -> int:
        """Bytes of a row that leave in one TMA store: the widest swizzle that divides the tile."""
        tile = block_n // (1 + self["SWIGLU"]) * self.out_bytes
        return next((c for c in (128, 64, 32) if tile % c == 0), 0)

    def scale_vector(self, t: ManyTokens) -> int:
        """Blockwise scales of a row that are loaded at once: 16 bytes where K and its parts divide so."""
        return next(v for v in (4, 2, 1) if self.k_blocks % (v * t.SPLIT) == 0 or v == 1)

    def scales_by_tma(self, t: ManyTokens) -> bool:
        """Whether blockwise scales come by TMA: in tiles of 256 rows (for others a warp copies them faster) where rows
        of scales are multiples of 16 bytes."""
        blocks = self.blockwise and self["W_GROUP"] == SCALE_BLOCK
        return blocks and t.BLOCK_M == 256 and self.scale_vector(t) == 4

    def scale_slots(self, t: ManyTokens) -> int:
        """Scales of a row that shared memory holds: those of the stages, and what is loaded beside them."""
        v = self.scale_vector(t)
        return (t.STAGES + 2 * v - 1) // v * v

    def buffers(self, t: ManyTokens) -> int:
        """A warpgroup's store buffers: two. Where products are promoted, and a stage more is worth more, as many of a
        tile's chunks as have room beside the ring."""
        if not self["TMA_STORE"]:
            return 0
        if not self["PROMOTE"]:
            return 2
        chunk = self.chunk(t.BLOCK_N)
        chunks = t.BLOCK_M // t.warpgroups // 64 * (t.BLOCK_N // (1 + self["SWIGLU"]) * self.out_bytes // chunk)
        return max(1, min(chunks, (SHARED_MAX - self._shared(t, 0)) // (t.warpgroups * 64 * chunk)))

    def shared(self, t: ManyTokens) -> int:
        """Bytes of dynamic shared memory: stages, store buffers, scales and biases, barriers."""
        return self._shared(t, self.buffers(t))

    def _shared(self, t: ManyTokens, count: int) -> int:
        stages = t.STAGES * (t.BLOCK_M + t.BLOCK_N) * ATOM
        buffers = count * 64 * self.chunk(t.BLOCK_N)
        filled = 16 * self._values.get("ADD", 0)
        vectors = (int(self["W_SCALE"] == 1 or self["X_SCALE"] == 1) + self["BIAS"]) * t.BLOCK_N * 4
        width = min(self["W_GROUP"], math.gcd(t.BLOCK_N, SCALE_BLOCK))
        whole = 8 if self.scales_by_tma(t) else 4
        scales = self.blockwise * self.scale_slots(t) * (-(-(t.BLOCK_M + t.BLOCK_N // width) // whole) * whole) * 4
        return stages + t.warpgroups * (buffers + vectors + filled) + scales + 16 * t.STAGES


def problem(plugin: Plugin, inputs: Sequence[Tensor | None]) -> Problem:
    x, w = operands(inputs)
    x_scale, w_scale, bias = inputs[2:5]
    attributes = plugin.attributes()
    n, k = int(w.shape[0]), int(w.shape[1])
    swiglu, quant = int(plugin.name == "gemm_swiglu"), int(attributes.get("quant") == "static")
    out = CODES[attributes["out_dtype"]]
    row_bytes = n // (1 + swiglu) * (1 if quant else 2)
    constants = {
        "GEMM_N": n,
        "GEMM_K": k,
        "OPERAND": OPERANDS[x.dtype],
        "OUT": out,
        "SWIGLU": swiglu,
        "QUANT": quant,
        "X_SCALE": 0 if x_scale is None else 3 if blockwise(inputs) else 1 if x_scale.shape[0] == 1 else 2,
        "W_SCALE": 0 if w_scale is None else 2 if blockwise(inputs) else 1,
        "W_GROUP": group_rows(inputs),
        "BIAS": int(bias is not None),
        "PROMOTE": int(blockwise(inputs) or attributes["accumulation"] == "precise"),
        "TMA_STORE": int(out != 2 and row_bytes % 16 == 0),
    }
    return Problem(n, -(-k * BYTES[x.dtype] // ATOM), tuple(constants.items()))


def adding(p: Problem) -> Problem:
    """The problem whose output is the sum with another tensor, which comes to the buffers that the sum leaves from."""
    return replace(p, constants=(*p.constants, ("ADD", 1)))


def candidates(plugin: Plugin, inputs: Sequence[Tensor | None], tokens: int) -> list[ManyTokens]:
    """The tactics that `cost` likes best for up to `tokens` rows, best first. Each is legal for any number of rows."""
    p = problem(plugin, inputs)
    return sorted(enumerate_tactics(p, tokens), key=lambda t: cost(t, p, tokens))[:OFFERED]


def legal(t: ManyTokens, p: Problem, tokens: int) -> bool:
    """Whether the tactic is among the enumerated ones, or one of them with a shallower ring."""
    sums = t.BLOCK_M * t.BLOCK_N * 4 if t.SPLIT > 1 else 0  # they meet in the ring
    ring = t.STAGES * (t.BLOCK_M + t.BLOCK_N) * ATOM
    if t.STAGES < 2 or ring < sums:
        return False
    found = enumerate_tactics(p, tokens)
    return any(t.STAGES <= d.STAGES and t == replace(d, STAGES=t.STAGES) for d in found)


def enumerate_tactics(p: Problem, tokens: int) -> Iterator[ManyTokens]:
    """Tiles whose accumulators fit the registers, with the ways to share loads or K that the sizes allow."""
    tiles = [(m, n, 0) for m in (64, 128) for n in (32, 64, 96, 128, 160, 192, 224, 256)]
    tiles += [(256, n, 0) for n in (64, 96, 128)]
    tiles += [(64, n, 1) for n in (64, 128, 192, 256)] + [(128, n, 1) for n in (64, 96, 128)]
    spills = not p["TMA_STORE"] or (p["SWIGLU"] and p["BIAS"])
    tiles += [(128, 192, 1)] if heat(tokens, p.n) == 1 and not spills else []
    blocks = p.blockwise and p["W_GROUP"] == SCALE_BLOCK
    for block_m, block_n, pingpong in tiles:
        if (block_m > 64 and tokens <= block_m // 2) or not p.chunk(block_n):
            continue
        rows = block_m if pingpong or block_m == 64 else block_m // 2  # of a warpgroup
        if p["PROMOTE"] and (pingpong or (rows // 64 + 1) * block_n > 2 * PROMOTED_N):
            continue
        if p["PROMOTE"] and rows > 64 and (block_n < 128 or not blocks):
            continue  # 128 x 192 was faster than 256 x 96 by 1 to 9% at 20 of 20 sizes
        for cluster_m, cluster_n, split in CLUSTERS:
            few_tiles = -(-tokens // block_m) * -(-p.n // block_n) <= clusters(split)
            if tokens <= block_m * (cluster_m - 1) or p.n <= block_n * (cluster_n - 1):
                continue
            if p["PROMOTE"] and cluster_m * cluster_n > (2 if rows == 64 else 1):
                continue  # pairs gain little already, and lose with 256 rows
            if block_m // cluster_n % 8 or block_n // cluster_m % 8:  # parts are whole swizzle atoms
                continue
            if split > 1 and (pingpong or not few_tiles or p.k_blocks < 4 * split or (p["PROMOTE"] and rows > 64)):
                continue
            room = p["PROMOTE"] and split == 1 and (block_m == 64 or (block_m == block_n == 128 and blocks))
            for sets in (1, 2) if room and block_n in TWO_SETS and p.k_blocks % 2 == 0 else (1,):
                t = deepest(p, ManyTokens(block_m, block_n, 0, pingpong, cluster_m, cluster_n, split, sets))
                if t and (split == 1 or t.STAGES * (block_m + block_n) * ATOM >= block_m * block_n * 4):
                    yield t
                if t and p["PROMOTE"] and rows > 64 and t.STAGES > 3:  # with buffers for all of a tile
                    yield replace(t, STAGES=3)


def deepest(p: Problem, t: ManyTokens) -> ManyTokens | None:
    """The tactic with as many stages as fit, 10 at most; None if they are fewer than two."""
    for stages in range(10, 1, -1):
        found = replace(t, STAGES=stages)
        if p.shared(found) <= SHARED_MAX:
            return found
    return None


def heat(tokens: int, n: int) -> float:
    """How far the power limit sets the clocks: not at all below 2048 tokens, where steps are short, and fully from 16
    waves of 128 x 128 tiles on; fewer are to a part a kernel's begin and end."""
    return min(1.0, tokens * n / (16 * SMS * 128 * 128)) if tokens >= SUSTAINED else 0.0


def cost(t: ManyTokens, p: Problem, tokens: int) -> float:
    """Clocks that the model expects; its numbers are fitted to 1500 timings on an H200 (9% rms, its
    choice 0.5% slower than the best on average, M 128 to 8192, e4m3 and bfloat16).

    A tile costs its k blocks (tensor cores, and what shared memory and L2 add) and an epilogue, which another
    warpgroup hides. Tiles come in waves, of which a part-filled last one is somewhat faster; no kernel outruns
    its weights.

    That is of bursts. Under the power limit an H200 has a third fewer clocks but the same L2, which then feeds tiles of
    128 x 128 or 128 x 192 in turn as fast as the tensor cores take them: these are 87 to 99% busy at the 18 shapes of
    Llama 7B, 8B and 70B with 2048 and 8192 tokens (256 x 128 and 128 x 256: 82 to 95%, as no one hides their epilogue).
    """
    units = t.units(tokens, p.n)
    busy = min(1.0, units * t.cluster / SMS)
    multiply = t.BLOCK_M * t.BLOCK_N / 32
    shared = t.BLOCK_M / 64 * (64 + t.BLOCK_N) + t.BLOCK_M + t.BLOCK_N
    l2 = (t.BLOCK_M / t.CLUSTER_N + t.BLOCK_N / t.CLUSTER_M) * ATOM / L2_BYTES * busy
    block = 0.94 * multiply + 0.07 * shared + 0.17 * l2 + 75 * (t.cluster > 1) + p["PROMOTE"] * promotion(t, p)
    main = -(-p.k_blocks // t.SPLIT) * block
    if t.SETS == 2:
        main *= SECOND_SET if t.warpgroups == 1 or p.k_blocks <= SHORT else 1 / SECOND_SET
    writers = 2 if t.warpgroups == 2 and not t.PINGPONG else 1
    epilogue = 500 + 0.155 * t.BLOCK_M * t.BLOCK_N / writers * (1 + 0.5 * p["SWIGLU"])
    epilogue += LARGE_EPILOGUE * (p["PROMOTE"] and t.BLOCK_M == 256 and p.buffers(t) == 1)
    waves = units / clusters(t.cluster)
    warm, whole = min(1.0, waves / 8), 0.68
    main *= 1 + 0.1 * warm * max(0.0, t.BLOCK_N / 128 - 1)
    if t.PINGPONG and t.BLOCK_M == 128 and t.BLOCK_N >= 128:
        hot, loads = heat(tokens, p.n), t.BLOCK_M / t.CLUSTER_N + t.BLOCK_N / t.CLUSTER_M
        unhidden = 600 * p["SWIGLU"] * (t.BLOCK_N == 128)
        main += hot * (p.k_blocks * multiply * (0.96 + 0.02 * loads / (t.BLOCK_M + t.BLOCK_N)) + unhidden - main)
        whole += hot * (1 - whole)
    waves = max(1.0, whole * math.ceil(waves) + (1 - whole) * waves)
    work = (0.96 + 0.015 * warm) * waves * main + epilogue + 1100 if t.PINGPONG else waves * (main + epilogue)
    work += (2150 + 2500 * p["PROMOTE"]) * t.SPLIT if t.SPLIT > 1 else 0
    stream = 1.39 * p.n * p.k_blocks * ATOM / DEVICE_BYTES
    return (work**4.2 + stream**4.2) ** (1 / 4.2) + 1970


def promotion(t: ManyTokens, p: Problem) -> int:
    """Clocks that it adds to a k block. With these numbers the model takes the best tile or one within 2.3% of it at 26
    blockwise sizes of 64 to 8192 tokens, from 512 on under sustained load (300 for all tiles: 5 to 9% slower at three).
    It is of 64 rows of a warpgroup: one of 128 promotes twice in a k block.
    """
    scales = t.BLOCK_N // math.gcd(t.BLOCK_N, SCALE_BLOCK) if p.blockwise and p["W_GROUP"] == SCALE_BLOCK else 1
    rows = t.BLOCK_M // t.warpgroups
    return ((PROMOTION if rows == 64 else LARGE_PROMOTION) + SCALE * (scales - 1)) * (rows // 64)


def kernels(plugin: Plugin, tactic: ManyTokens, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
    """The one kernel of a tactic."""
    return (kernel(problem(plugin, inputs), tactic),)


def kernel(p: Problem, t: ManyTokens) -> Kernel:
    knobs = {"BLOCK_M": t.BLOCK_M, "BLOCK_N": t.BLOCK_N, "STAGES": t.STAGES, "PINGPONG": t.PINGPONG}
    knobs["GROUP"] = t.group(p.k_blocks * ATOM)
    knobs |= {"CLUSTER_M": t.CLUSTER_M, "CLUSTER_N": t.CLUSTER_N, "SPLIT": t.SPLIT, "SETS": t.SETS}
    knobs |= {"SCALE_VECTOR": p.scale_vector(t), "SCALES_BY_TMA": int(p.scales_by_tma(t)), "BUFFERS": p.buffers(t)}
    return Kernel("gemm", "gemm.cu", "gemm", p.constants + tuple(knobs.items()))


def bind(
    plugin: Plugin,
    tactic: ManyTokens,
    functions: Sequence[Function],
    tensors: Sequence[torch.Tensor | None],
    further: Sequence[Any] = (),
    added: torch.Tensor | None = None,
) -> Launcher:
    """Packs the launch over x, w, x_scale, w_scale, bias (, out_scale) and y; a call sets the rows and the grid.
    `further`: arguments of a kernel with more in its epilogue; `added`: what one that is `adding` adds to y."""
    import torch

    from fp8.plugins.cuda import Launch, matrix_map

    *inputs, y = tensors
    p = problem(plugin, types_of(inputs))
    x, w, x_scale, w_scale, bias = inputs[:5]
    assert x is not None and w is not None and y is not None
    out_scale = inputs[5] if plugin.name == "gemm_swiglu" else None
    x_map = matrix_map(x, ATOM // x.element_size(), tactic.BLOCK_M // tactic.CLUSTER_N)
    w_map = matrix_map(w, ATOM // w.element_size(), tactic.BLOCK_N // tactic.CLUSTER_M)
    chunk = p.chunk(tactic.BLOCK_N)
    y_map = matrix_map(y, chunk // y.element_size(), 64, chunk) if p["TMA_STORE"] else x_map
    count = ctypes.c_int(0)
    if added is not None:
        p, further = adding(p), [*further, matrix_map(added, chunk // added.element_size(), 64, chunk)]
    if p.scales_by_tma(tactic):
        assert x_scale is not None
        further = [*further, matrix_map(x_scale, p.scale_vector(tactic), tactic.BLOCK_M, 0)]
    args = [x_map, w_map, y_map, x_scale, w_scale, bias, out_scale, y, count, *further]
    threads = 128 * (tactic.warpgroups + 1)
    launch = Launch(functions[0], threads, args, p.shared(tactic), cluster=tactic.cluster)
    sms = torch.cuda.get_device_properties(x.device).multi_processor_count
    logits = plugin.attributes().get("rows") == "L"

    def run(step: StepShape) -> None:
        rows = step.logits_rows if logits else step.tokens
        if rows:
            count.value = rows
            launch(tactic.grid(rows, p.n, sms))

    return run
