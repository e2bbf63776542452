"""The cases whose times are compared with peers and targets: the linears, attention and norms of Llama 7B, 8B and 70B.

Names are stable: the record and its targets know a figure by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fp8.plugins.attention import cases as attention
from fp8.plugins.attention import decode_cases
from fp8.plugins.base import Case
from fp8.plugins.gemm import cases as gemm
from fp8.plugins.gemm_swiglu import cases as gemm_swiglu
from fp8.plugins.norm_quant import cases as norm_quant

LINEARS = (
    (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (6144, 4096), (28672, 4096), (4096, 14336),
    (57344, 8192), (8192, 28672),
)  # fmt: skip
ROWS = (1, 16, 64, 128, 512, 2048, 8192)
BLOCKWISE = ((12288, 4096), (4096, 4096), (24576, 4096), (4096, 14336), (7168, 16384))
BLOCKWISE_FEW, BLOCKWISE_MANY = (64, 128), (512, 2048, 4096, 8192)  # rows; the latter are timed in bursts, too
BURSTS = ", bursts"  # of a figure that is of bursts, not of sustained load
MODES = {"per-tensor": "static", "rowwise": "rowwise"}
FILLED = 4096  # tokens that short prompts are batched up to
PROMPTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
HEADS = ((32, 32), (32, 8))
DECODES = ((1, 1024), (8, 1024), (32, 1024), (64, 1024), (64, 4096), (16, 16384))
PRODUCTS = ", products alone"  # of attention: without its first kernel, which peers have no part of
NORM_TOKENS = (1, 64, 2048, 16384)


@dataclass(frozen=True)
class Timed:
    """A case under the name of its figure. `rows` are the inputs whose first dimension counts a step's tokens: with
    them symbolic, tactics are those that an engine would have. `bursts`: timed in bursts, too."""

    name: str
    plugin: str
    case: Case
    rows: tuple[int, ...] = ()
    bursts: bool = False


def timed_cases() -> list[Timed]:
    """Those that a target is set for come first: where time runs out, the others are lost."""
    return [*_linears(), *_blockwise(), *_prompts(), *_decodes(), *_norms(), *_swiglu(), *_bf16_linears()]


def _linears() -> Iterator[Timed]:
    for n, k in LINEARS:
        for m in ROWS:
            for title, mode in MODES.items():
                yield Timed(f"gemm fp8 {title} {m}x{n}x{k}", "gemm", gemm.case(m, n, k, mode), _rows(mode))


def _bf16_linears() -> Iterator[Timed]:
    for n, k in LINEARS[:4]:
        for m in ROWS:
            yield Timed(f"gemm bf16 {m}x{n}x{k}", "gemm", gemm.case(m, n, k, "none", "bfloat16"), (0,))


def _rows(mode: str) -> tuple[int, ...]:
    return (0,) if mode == "static" else (0, 2)


def _blockwise() -> Iterator[Timed]:
    """Activations scaled 1 x 128, weights 128 x 128."""
    for n, k in BLOCKWISE:
        for m in (*BLOCKWISE_FEW, *BLOCKWISE_MANY):
            name = f"gemm fp8 blockwise {m}x{n}x{k}"
            yield Timed(name, "gemm", gemm.case(m, n, k, "block"), (0, 2), bursts=m in BLOCKWISE_MANY)


def _swiglu() -> Iterator[Timed]:
    for features, k in ((11008, 4096), (14336, 4096)):
        for m in ROWS:
            name = f"gemm_swiglu fp8 per-tensor {m}x{features}x{k}"
            yield Timed(name, "gemm_swiglu", gemm_swiglu.case(m, features, k), (0,))


def _prompts() -> Iterator[Timed]:
    for heads in HEADS:
        for length in PROMPTS:
            batch = attention.whole(*[length] * max(1, FILLED // length))
            for kind, fp8 in (("fp8", True), ("bf16", False)):
                name = f"attention prompt {kind} {len(batch)}x{length} {heads[0]}/{heads[1]}"
                title = f"prompt {length}" if len(batch) == 1 else f"{len(batch)} x {length}"
                yield Timed(name, "attention", attention.case(title, batch, heads, fp8=fp8))
        for title, fp8 in (("fp8", True), ("bf16", False)):
            name = f"attention prompt {title} 1x1024 {heads[0]}/{heads[1]}"
            yield Timed(name, "attention", attention.case("prompt 1024", attention.whole(1024), heads, fp8=fp8))


def _decodes() -> Iterator[Timed]:
    for heads, kv_heads, batch, length in (
        *((*heads, b, n) for heads in HEADS for b, n in DECODES),
        (64, 8, 128, 2048),
    ):
        for title, fp8 in (("fp8", True), ("bf16", False)):
            case = decode_cases.case(heads, kv_heads, 128, [length] * batch, fp8=fp8)
            yield Timed(f"attention decode {title} {batch}x{length} {heads}/{kv_heads}", "attention", case)


def _norms() -> Iterator[Timed]:
    for quant in ("static", "per_token", "block"):
        for tokens in NORM_TOKENS:
            case = norm_quant.case(tokens, 4096, quant)
            yield Timed(f"norm_quant {quant} {tokens}x4096", "norm_quant", case)
