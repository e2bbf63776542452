"""few_tokens.cu: what it takes, what its tactics cost, that they compile, and (on a GPU) what they compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp8.plugins.base import Plugin, StepShape, Tensor
from fp8.plugins.compile import compile_all, compile_kernel, key
from fp8.plugins.gemm import few_tokens
from fp8.plugins.gemm.few_tokens import CTA_SHARED_MAX, SMS, FewTokens
from fp8.plugins.gemm.plugin import Gemm
from fp8.plugins.gemm.types import blockwise
from fp8.plugins.gemm_swiglu.plugin import GemmSwiglu

E4M3, BF16, F16, F32 = "float8_e4m3fn", "bfloat16", "float16", "float32"
LAYERS = [
    (12288, 4096),
    (4096, 4096),
    (22016, 4096),
    (4096, 11008),
    (6144, 4096),
    (28672, 4096),
    (32000, 8192),
    (777, 304),
    (336, 128),
    (336, 48),
]


def operands(dtype: str, n: int, k: int, scales: str = "tensor", bias: bool = False) -> list[Tensor | None]:
    x_scale = {"none": None, "tensor": Tensor(F32, (1,)), "token": Tensor(F32, ("T",))}.get(scales)
    w_scale = None if scales == "none" else Tensor(F32, (n,))
    if scales == "block":
        x_scale, w_scale = Tensor(F32, ("T", k // 128)), Tensor(F32, (n // 8, k // 128))
    return [Tensor(dtype, ("T", k)), Tensor(dtype, (n, k)), x_scale, w_scale, Tensor(F32, (n,)) if bias else None]


VARIANTS: dict[str, tuple[Plugin, list[Tensor | None]]] = {
    "e4m3 to bf16": (Gemm(), operands(E4M3, 1000, 1040)),
    "e4m3 per token to f16": (Gemm(out_dtype=F16), operands(E4M3, 1000, 1040, "token", bias=True)),
    "e4m3 block": (Gemm(), operands(E4M3, 1000, 1152, "block", bias=True)),
    "e4m3 precise": (Gemm(accumulation="precise", out_dtype=F32), operands(E4M3, 1000, 1040)),
    "swiglu precise": (
        GemmSwiglu(accumulation="precise"),
        [*operands(E4M3, 1008, 1040, bias=True), Tensor(F32, (1,))],
    ),
    "e4m3 odd N": (Gemm(), operands(E4M3, 779, 1040, bias=True)),
    "bf16 logits odd N": (Gemm(out_dtype=F32, rows="L"), operands(BF16, 777, 520, "none")),
    "f16 to f16": (Gemm(out_dtype=F16), operands(F16, 512, 1024, "none", bias=True)),
    "swiglu e4m3 to e4m3": (GemmSwiglu(), [*operands(E4M3, 1008, 1040, bias=True), Tensor(F32, (1,))]),
    "swiglu e4m3 to f16": (GemmSwiglu(quant="none", out_dtype=F16), [*operands(E4M3, 1008, 1040, "token"), None]),
    "swiglu bf16 to bf16": (GemmSwiglu(quant="none"), [*operands(BF16, 1008, 520, "none", bias=True), None]),
}


def cuts(tokens: int, plugin: Plugin, inputs: list[Tensor | None]) -> list[FewTokens]:
    """Every way to cut the work: folded, split evenly and not, several warpgroups, rows past the last tile."""
    block, promotes = int(blockwise(inputs)), few_tokens.promotes(plugin, inputs)
    found = [
        FewTokens(tokens, 32, 1, 3, 2, 2),
        FewTokens(tokens, 32, 2, 3, 2),
        FewTokens(tokens, 48, 3, 2, 2),
        FewTokens(tokens, 96, 1, 3, 1),
        FewTokens(tokens, 128, 4, 2, 1, 1, 2),
        FewTokens(tokens, 256, 1, 2, 1, 1, 4),
    ]
    found += [FewTokens(tokens, 16, 2, 2, 4, 4)] if tokens <= 16 else []
    fit = (t for t in found if not promotes or t.WARPGROUPS <= 2 or t.TOKENS * t.WARPGROUPS <= few_tokens.PROMOTED)
    return [replace(t, BLOCKWISE=block) for t in fit]


def test_float32_operands_are_refused_with_what_is_taken() -> None:
    reason = few_tokens.legal(operands(F32, 64, 64, "none"))
    assert reason is not None and "float32" in reason and E4M3 in reason
    assert few_tokens.candidates(Gemm(), operands(F32, 64, 64, "none"), 8) == []


@pytest.mark.parametrize(("n", "k_bytes"), LAYERS)
@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 65, 128])
def test_tactics_hold_the_tokens_and_fit_shared_memory(n: int, k_bytes: int, tokens: int) -> None:
    found = few_tokens.enumerate_tactics(n, k_bytes, tokens)
    assert found and len(found) == len(set(found))
    for t in found:
        assert tokens <= t.TOKENS <= max(8, 2 * tokens - 1) and t.STAGES >= 2
        assert t.shared + 1024 <= CTA_SHARED_MAX and t.ctas_per_sm >= 1  # barriers and token scales take the 1024:
        assert 8 * (3 * t.STAGES + 1) + 4 * t.TOKENS <= 1024


@pytest.mark.parametrize("tokens", [1, 16, 64, 128])
def test_the_first_fill_of_a_step_has_two_stages_or_a_window_on_their_way(tokens: int) -> None:
    for n, k_bytes in (*LAYERS, (128256, 8192)):
        for t in few_tokens.enumerate_tactics(n, k_bytes, tokens):
            blocks = -(-n // t.ROWS) * t.SPLIT
            window, at_once = few_tokens.window(t, blocks), blocks <= SMS * t.ctas_per_sm
            one = -(-blocks // SMS) * t.ATOMS * t.ROWS * 128  # a stage of each block on a multiprocessor
            fits = (48 << 10) <= window * one < (48 << 10) + one
            assert window == t.STAGES if not at_once else window in (2, t.STAGES) or fits


@pytest.mark.parametrize(("n", "k_bytes"), [layer for layer in LAYERS if layer[0] > 4000])
def test_the_model_puts_one_wave_on_nearly_every_sm_first(n: int, k_bytes: int) -> None:
    best = few_tokens.candidates(Gemm(), operands(E4M3, n, k_bytes), 8)[0]
    ctas = -(-n // best.ROWS) * best.SPLIT
    assert 0.9 * SMS <= ctas <= SMS * best.ctas_per_sm


def test_more_than_128_tokens_are_left_to_other_tactics() -> None:
    assert few_tokens.candidates(Gemm(), operands(E4M3, 4096, 4096), 129) == []


def test_beyond_96_tokens_only_a_long_k_comes_first() -> None:
    kinds = {(n, k, m): Gemm().tactics(operands(E4M3, n, k), m)[0].kind for n, k in LAYERS[:4] for m in (96, 128)}
    assert {layer for layer, kind in kinds.items() if kind == "few_tokens"} == {
        *((n, k, 96) for n, k in LAYERS[:4]),
        (4096, 11008, 128),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_compile_without_spills_or_serialized_wgmma(variant: str) -> None:
    plugin, inputs = VARIANTS[variant]
    width = 96 if few_tokens.promotes(plugin, inputs) else 128
    for tactic in (
        FewTokens(8, 32, 1, 3, 2, 2),
        FewTokens(64, 128, 4, 2, 1, 1, 2),
        FewTokens(width, 176, 1, 2, 1, 1, 3),
    ):
        tactic = replace(tactic, BLOCKWISE=int(blockwise(inputs)))
        cubin = compile_kernel(few_tokens.kernels(plugin, tactic, inputs)[0])
        assert not cubin.serialized and cubin.spill_bytes == 0 and cubin.registers <= 144


def random_tensors(inputs: list[Tensor | None], rows: int) -> list[torch.Tensor | None]:
    tensors: list[torch.Tensor | None] = []
    for i, t in enumerate(inputs):
        if t is None:
            tensors.append(None)
            continue
        shape = [rows if n == "T" else n for n in t.shape]
        value = torch.randn(*shape, device="cuda") if i in (0, 1, 4) else torch.rand(*shape, device="cuda") * 0.1 + 0.05
        tensors.append((value * 0.1 if t.dtype == BF16 else value).to(getattr(torch, t.dtype)))
    return tensors


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs kernels: needs an H100 or H200")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cut_computes_the_reference_and_writes_no_other_row(variant: str) -> None:
    from fp8.plugins.cuda import Module

    plugin, inputs = VARIANTS[variant]
    tactics = [t for width in few_tokens.WIDTHS for t in cuts(width, plugin, inputs)]
    cubins = compile_all(few_tokens.kernels(plugin, t, inputs)[0] for t in tactics)
    (out,) = plugin.infer(inputs)
    # The tensor cores add e4m3 products in about 22 bits: ~1e-3 beside the output's own rounding.
    limit = {E4M3: 2e-2, BF16: 4e-3, F16: 3e-3, F32: 2e-3}[out.dtype]
    for rows in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 97, 128):
        step = StepShape(rows, 1, 0, rows, rows, rows)
        tensors = random_tensors(inputs, 130)
        valid = [t[:rows] if t is not None and t.shape[0] == 130 else t for t in tensors]
        expected = plugin.reference(*valid, step=step)[0].float()
        tensors[0].view(torch.uint8)[rows:] = 0x7F  # rows past the last hold NaN
        for tactic in (t for t in tactics if rows <= t.TOKENS):
            y = torch.empty(130, out.shape[1], device="cuda", dtype=getattr(torch, out.dtype))
            y.view(torch.uint8).fill_(0x7F)
            function = Module(cubins[key(few_tokens.kernels(plugin, tactic, inputs)[0])].code).function("few_tokens")
            in_step = rows % 2 == 0
            few_tokens.bind(plugin, tactic, [function], [*tensors, y], None, in_step, in_step)(step)
            torch.cuda.synchronize()
            assert (y[:rows].float() - expected).norm() <= limit * expected.norm(), (tactic, rows)
            assert (y.view(torch.uint8)[rows:] == 0x7F).all(), (tactic, rows)
