"""Linear layers of at most 128 tokens: the tactic of few_tokens.cu, its legality, its cost model and its launch.

Serves `gemm` and `gemm_swiglu`. The kernel streams the weights once; a tactic says how the weight matrix is cut over
the SMs and how much of it is in flight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fp8.plugins.base import Kernel, Launcher, Plugin, StepShape, Tensor
from fp8.plugins.gemm.types import GROUP_ROWS, blockwise, group_rows

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function, Launch

MAX_TOKENS = 128
WIDTHS = (8, 16, 32, 64, 96, 128)  # values of TOKENS that are offered
SMS = 132  # of an H200
SM_SHARED = 228 * 1024  # bytes of shared memory per SM, of which every CTA costs CTA_SHARED beside what it asks for
CTA_SHARED = 1024
CTA_SHARED_MAX = 227 * 1024
ATOM = 128  # bytes of K in a swizzle atom
PROMOTED = 288  # TOKENS x WARPGROUPS (3 or 4) for which there are registers for two sets of accumulators
_WEIGHTS = {"float8_e4m3fn": 0, "bfloat16": 1, "float16": 2}
_OUTPUTS = {"bfloat16": 0, "float16": 1, "float32": 2, "float8_e4m3fn": 3}
WINDOW = 48 * 1024  # bytes of weights that are on their way to an SM at a time before x is there
FEW_WEIGHTS = 4096 * 4096  # up to so many, promoted products of 64 tokens are for few_tokens.cu


@dataclass(frozen=True)
class FewTokens:
    """Constants of few_tokens.cu. A CTA: ROWS weight rows, 1/SPLIT of K, a ring of STAGES x ATOMS * 128 bytes of K."""

    TOKENS: int  # wgmma's N: one of WIDTHS
    ROWS: int  # multiple of 16, at most 256
    SPLIT: int  # CTAs of a cluster that share the rows
    STAGES: int
    ATOMS: int
    FOLD: int = 1  # columns of K stacked in one wgmma: 64 / ROWS or 1
    WARPGROUPS: int = 1
    BLOCKWISE: int = 0  # 1: a stage brings the scales of its columns of K
    kind: str = "few_tokens"

    @property
    def tiles(self) -> int:
        return -(-self.ROWS * self.FOLD // 64)

    @property
    def threads(self) -> int:
        return 128 * self.WARPGROUPS + 64

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory: ring (and what the last tile reads past it), partial sums, fold scratch,
        blockwise scales."""
        x_atoms = self.ATOMS * self.TOKENS * ATOM
        ring = self.STAGES * (self.ATOMS * self.ROWS * ATOM + x_atoms)
        overrun = max(0, (self.tiles * 64 - self.ROWS * self.FOLD) * ATOM - x_atoms)
        owned = -(-self.tiles * self.TOKENS // 8 // self.SPLIT)
        scratch = 4 * 64 * self.TOKENS if self.FOLD > 1 else 0
        scales = self.BLOCKWISE * self.STAGES * self.ATOMS * (self.TOKENS + self.ROWS // GROUP_ROWS) * 4
        return ring + overrun + owned * (self.SPLIT - 1) * 64 * 8 * 4 + scratch + scales

    @property
    def ctas_per_sm(self) -> int:
        return min(SM_SHARED // (self.shared + CTA_SHARED), 2048 // self.threads)


def legal(inputs: Sequence[Tensor | None]) -> str | None:
    """Why few_tokens.cu cannot execute these operands, or None. (Both plugins check dtypes and K before.)"""
    x = inputs[0]
    if x is None or x.dtype not in _WEIGHTS:
        found = "absent" if x is None else x.dtype
        return f"x is {found}, expected one of {', '.join(_WEIGHTS)}"
    return None


def _sizes(inputs: Sequence[Tensor | None]) -> tuple[int, int, int]:
    """(N, K, bytes per weight)."""
    w = inputs[1]
    assert w is not None
    n, k = w.shape
    return int(n), int(k), 1 if w.dtype == "float8_e4m3fn" else 2


def promotes(plugin: Plugin, inputs: Sequence[Tensor | None]) -> bool:
    """Whether the products of each 128 of K are added in float32, scaled or not."""
    return blockwise(inputs) or plugin.attributes()["accumulation"] == "precise"


def kernels(plugin: Plugin, tactic: FewTokens, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
    """The one kernel of a tactic."""
    n, k, _ = _sizes(inputs)
    x, x_scale, w_scale, bias = inputs[0], *inputs[2:5]
    assert x is not None
    (y,) = plugin.infer(inputs)
    constants = {
        "GEMM_N": n,
        "GEMM_K": k,
        "WEIGHT": _WEIGHTS[x.dtype],
        "OUT": _OUTPUTS[y.dtype],
        "SWIGLU": int(plugin.name == "gemm_swiglu"),
        "ROUND": int(plugin.attributes()["out_dtype"] == "float16"),
        "X_SCALE": 0 if x_scale is None else 3 if tactic.BLOCKWISE else 1 if x_scale.shape[0] == 1 else 2,
        "W_SCALE": 0 if w_scale is None else 1 + tactic.BLOCKWISE,
        "W_GROUP": group_rows(inputs),
        "BIAS": int(bias is not None),
        "PROMOTE": int(promotes(plugin, inputs)),
        "TOKENS": tactic.TOKENS,
        "ROWS": tactic.ROWS,
        "SPLIT": tactic.SPLIT,
        "STAGES": tactic.STAGES,
        "ATOMS": tactic.ATOMS,
        "FOLD": tactic.FOLD,
        "WARPGROUPS": tactic.WARPGROUPS,
    }
    return (Kernel("gemm", "few_tokens.cu", "few_tokens", tuple(constants.items())),)


def window(tactic: FewTokens, blocks: int) -> int:
    """Stages of the first fill that are on their way at a time in a step: WINDOW bytes on an SM or a little more, two
    stages of each block at least; all where blocks take turns, as x is there before most of them."""
    if blocks > SMS * tactic.ctas_per_sm:
        return tactic.STAGES
    of_sm = -(-blocks // SMS) * tactic.ATOMS * tactic.ROWS * ATOM
    return min(tactic.STAGES, max(2, -(-WINDOW // of_sm)))


def workspace(plugin: Plugin, tactic: FewTokens, inputs: Sequence[Tensor | None], max_tokens: int) -> int:
    """None: partial sums meet in shared memory."""
    return 0


def bind(
    plugin: Plugin,
    tactic: FewTokens,
    functions: Sequence[Function],
    tensors: Sequence[torch.Tensor | None],
    workspace: torch.Tensor | None,
    early: bool = False,
    windowed: bool = False,
    more: Sequence[Any] = (),
) -> Launcher:
    """Packs the launch over x, w, x_scale, w_scale, bias (, out_scale), y, and the further arguments of a variant.
    `early`: the next kernel starts at once. `windowed`: what the kernel in front loads is not to queue behind all of
    the first fill.

    A box of x's tensor map has the step's rows, as each one of a box that is past the map's end takes longer than one
    that is there: there is one packed launch per row count, made when first needed.
    """
    from fp8.plugins.cuda import Launch, matrix_map

    x, w, x_scale, w_scale, bias = tensors[:5]
    out_scale = tensors[5] if plugin.name == "gemm_swiglu" else None
    y = tensors[-1]
    assert x is not None and w is not None and y is not None
    w_map = matrix_map(w, ATOM // w.element_size(), tactic.ROWS)
    grid = -(-w.shape[0] // tactic.ROWS) * tactic.SPLIT
    logits = plugin.attributes().get("rows") == "L"
    first = window(tactic, grid) if windowed else tactic.STAGES
    launches: dict[int, Launch] = {}

    def pack(rows: int) -> Launch:
        x_map = matrix_map(x[:rows], ATOM // x.element_size(), rows)
        args = [w_map, x_map, x_scale, w_scale, bias, out_scale, y, ctypes.c_int(rows)]
        args += [ctypes.c_int(early), ctypes.c_int(first), *more]
        return Launch(functions[0], tactic.threads, args, tactic.shared, grid, tactic.SPLIT)

    def launch(step: StepShape) -> None:
        rows = step.logits_rows if logits else step.tokens
        if rows == 0:
            return
        assert rows <= tactic.TOKENS, f"{rows} rows, but the tactic takes at most {tactic.TOKENS}"
        if rows not in launches:
            launches[rows] = pack(rows)
        launches[rows]()

    return launch


def candidates(plugin: Plugin, inputs: Sequence[Tensor | None], tokens: int) -> list[FewTokens]:
    """Tactics for up to `tokens` rows (none if that is more than MAX_TOKENS), best first by `cost`."""
    if tokens > MAX_TOKENS or legal(inputs):
        return []
    n, k, size = _sizes(inputs)
    found = enumerate_tactics(n, k * size, tokens, int(blockwise(inputs)))
    if promotes(plugin, inputs):
        found = [t for t in found if t.WARPGROUPS <= 2 or t.TOKENS * t.WARPGROUPS <= PROMOTED]
    return sorted(found, key=lambda t: (cost(t, n, k * size, tokens), repr(t)))


def allowed(plugin: Plugin, tactic: FewTokens, inputs: Sequence[Tensor | None], tokens: int) -> bool:
    """Whether the tactic is one of `candidates`, or one of them with a shallower ring: beside another kernel's blocks a
    deep one finds no room."""
    same = (t for t in candidates(plugin, inputs, tokens) if t == replace(tactic, STAGES=t.STAGES))
    return any(2 <= tactic.STAGES <= t.STAGES for t in same)


def favoured(plugin: Plugin, inputs: Sequence[Tensor | None], tokens: int) -> bool:
    """Whether few_tokens.cu is likely to beat gemm.cu: beyond 96 tokens the products bound it, unless K is so long that
    gemm.cu has too few tiles, and beyond 32 where they are promoted (measurements in few_tokens.cu), or 64 where there
    are few weights (64 x 4096 x 4096 blockwise: 6.4 us instead of 7.0)."""
    n, k, size = _sizes(inputs)
    if promotes(plugin, inputs):
        return tokens <= (64 if n * k <= FEW_WEIGHTS else 32)
    return tokens <= 96 or k * size > 8192


def enumerate_tactics(n: int, k_bytes: int, tokens: int, blockwise: int = 0) -> list[FewTokens]:
    """What is worth timing: the row counts of `_row_counts`, stages of 8 to 16 KB of weights where the rows allow."""
    width = next(t for t in WIDTHS if t >= tokens)
    atoms_of_k = -(-k_bytes // ATOM)
    found = set()
    for split in (s for s in (1, 2, 4) if s <= atoms_of_k):
        for rows in _row_counts(n, split):
            for atoms in (a for a in (1, 2, 4) if (a == 1 and rows > 64) or 64 <= a * rows <= 128):
                for fold in {1, 64 // rows if rows in (16, 32) else 1}:
                    for per_sm in (1, 2, 3):
                        t = FewTokens(width, rows, split, 2, atoms, fold, BLOCKWISE=blockwise)
                        found.add(_fill(t, per_sm, -(-atoms_of_k // split)))
    return [t for t in found if t and -(-atoms_of_k // t.ATOMS) >= t.SPLIT]


def _row_counts(n: int, split: int) -> list[int]:
    """Row counts that spread N over whole waves of the SMs, and the full wgmma tiles."""
    fit = {-(-n * split // (16 * SMS * waves)) * 16 for waves in (1, 2, 3, 4)}
    return sorted(r for r in fit | {64, 128} if 16 <= r <= 256)


def _fill(t: FewTokens, per_sm: int, k_atoms: int) -> FewTokens | None:
    """The tactic with the deepest ring that lets `per_sm` CTAs share an SM; None if that has fewer than two stages."""
    if t.ATOMS % t.FOLD or t.TOKENS * t.FOLD > 128:
        return None
    t = replace(t, WARPGROUPS=t.tiles if t.TOKENS >= 32 else 1)
    budget = min(SM_SHARED // per_sm - 2 * CTA_SHARED, CTA_SHARED_MAX - CTA_SHARED)
    useful = 2 if k_atoms == 1 else -(-k_atoms // t.ATOMS)  # a ring has two stages, also where there is one to load
    for stages in range(min(budget // (t.ATOMS * (t.ROWS + t.TOKENS) * ATOM), useful, 24), 1, -1):
        found = replace(t, STAGES=stages)
        if found.shared <= budget:
            return found
    return None


def cost(t: FewTokens, n: int, k_bytes: int, tokens: int) -> float:
    """Microseconds that the model expects of one kernel in a chain of its like (programmatic dependent launch).

    Form and coefficients are fitted to about 750 timings of eight layers (N 4096..28672, K 1024..14336, e4m3) at 1, 16
    and 64 tokens on an H200. Its first choice was within 1.3% of the fastest but for four cases of 35 (up to 6%); its
    first three held one within 0.3%, but once (4%). `alone` and `split` are fitted again to 98 timings, with the sums
    as they are now and every start at 5/32 of w left: then the first choice was within 1.6% of the fastest in 15 cases.
    Memory is read at 4.55 TB/s since maps are without L2 promotion, 4.25 before: one first choice of 28 became another.
    `shallow`: 64x57344x8192 took 167 us with 2 stages in a ring, 124 to 137 with 3, 117 with 4, 114 with 5.
    """
    weights = n * k_bytes
    ctas = -(-n // t.ROWS) * t.SPLIT
    slots = SMS * t.ctas_per_sm
    memory = weights / 4.55e6
    l2 = (weights + ctas * tokens * k_bytes / t.SPLIT) / 9.7e6
    wgmmas = -(-ctas // SMS) * t.tiles * 4 * k_bytes / t.SPLIT / ATOM / t.FOLD  # per SM
    mma = wgmmas * max(21, t.TOKENS * t.FOLD / 2) / 1.9e3  # 64 rows of A bound each, then the products
    turnover = (-(-ctas // slots) - 1) * (3.2 if t.ctas_per_sm == 1 else 2.7)  # a CTA that follows one starts cold
    ahead = min(ctas, slots) * t.STAGES * t.ATOMS * t.ROWS * ATOM  # bytes that PDL lets this kernel fetch early
    short = 13.9 * (1 - min(1.0, ahead / (0.148 * weights)))
    alone = 0.55 if weights < 26e6 and 2 * ctas > slots else 0.0  # the next kernel finds no room beside this one
    idle = 3.1 * (1 - min(1.0, ctas / SMS))
    split = 0.09 * (t.SPLIT - 1) * (1 + 0.14 * t.TOKENS)
    depth = t.STAGES * t.ATOMS * min(t.ctas_per_sm, -(-ctas // SMS))  # of the rings of this kernel on an SM
    wide = 18 / depth if t.TOKENS > 64 else 0.0
    refilled = k_bytes > t.SPLIT * t.STAGES * t.ATOMS * ATOM
    shallow = 0.5 / (t.STAGES - 1) ** 2.5 if refilled else 0.0
    streaming = max(memory, l2, mma) * (1 + shallow)
    return streaming + 0.44 * mma + turnover + short + alone + idle + split + wide + 4.7 / t.STAGES
