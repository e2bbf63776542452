"""gemm and gemm_swiglu: meaning against float64, legality, and that every tactic offered compiles as intended."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fp8.plugins.base import Case, PluginError, StepShape, Tensor, load, types_of
from fp8.plugins.compile import compile_kernel
from fp8.plugins.gemm import many_tokens
from fp8.plugins.gemm.cases import CASES
from fp8.plugins.gemm.cases import case as gemm_case
from fp8.plugins.gemm.few_tokens import FewTokens
from fp8.plugins.gemm.library import Library
from fp8.plugins.gemm.many_tokens import ManyTokens
from fp8.plugins.gemm.plugin import Gemm
from fp8.plugins.gemm_swiglu.cases import CASES as SWIGLU_CASES
from fp8.plugins.gemm_swiglu.cases import case as swiglu_case
from fp8.plugins.gemm_swiglu.plugin import GemmSwiglu
from fp8.plugins.gemm_swiglu.reference import deinterleave, interleave

E4M3 = "float8_e4m3fn"


def tensors(case: Case) -> list[torch.Tensor | None]:
    return case.make(torch.Generator().manual_seed(7), "cpu")


def operands(n: int = 64, k: int = 64, dtype: str = E4M3, rows: int | str = "T") -> list[Tensor | None]:
    f32 = "float32"
    return [Tensor(dtype, (rows, k)), Tensor(dtype, (n, k)), Tensor(f32, (1,)), Tensor(f32, (n,)), Tensor(f32, (n,))]


def spread(scale: torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """A scalar, one scale per row, or one per 1, 8 or 128 rows and 128 columns."""
    if scale.ndim == 1:
        return scale.numpy().reshape(-1, 1)
    rows = next(n for n in (1, 8, 128) if -(-shape[0] // n) == scale.shape[0])
    return np.kron(scale.numpy(), np.ones((rows, 128)))[: shape[0]]


def exact(x, w, x_scale, w_scale, bias) -> np.ndarray:
    """float64, element by element in the other order: scales applied before the products."""
    x, w = x.double().numpy(), w.double().numpy()
    if x_scale is not None:
        x = x * spread(x_scale.double(), x.shape)
    if w_scale is not None:
        w = w * spread(w_scale.double(), w.shape)
    y = np.einsum("tk,nk->tn", x, w)
    return y if bias is None else y + bias.double().numpy()


SMALL = [c for c in CASES if c.flops < 5e7]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_gemm_reference_is_the_float64_product_rounded_once(case: Case) -> None:
    inputs = tensors(case)
    (y,) = case.plugin.reference(*inputs, step=case.step)
    expected = torch.from_numpy(exact(*inputs))
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-20}[y.dtype]
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= unit * expected.abs() + 1e-5).all()


def test_swiglu_reference_equals_two_linears_and_an_activation() -> None:
    torch.manual_seed(3)
    x, gate, up = torch.randn(5, 48), torch.randn(24, 48) / 7, torch.randn(24, 48) / 7
    w = interleave(gate, up).bfloat16()
    plugin = GemmSwiglu("silu", "static", "bfloat16")
    scale = torch.tensor([0.01])
    (codes,) = plugin.reference(x.bfloat16(), w, None, None, None, scale, step=StepShape.prefill(5))
    g, u = ((x.bfloat16().double() @ m.bfloat16().double().t()).float().bfloat16().double() for m in (gate, up))
    h = g / (1 + torch.exp(-g)) * u
    expected = (h.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert codes.dtype == torch.float8_e4m3fn
    assert (codes.float() != expected.float()).float().mean() < 0.05  # a float32 sum may round a gate the other way
    assert torch.allclose(codes.float(), expected.float(), rtol=0.13)


def test_swiglu_saturates_codes_at_448() -> None:
    plugin = GemmSwiglu("silu", "static", "bfloat16")
    x, w = torch.full((1, 16), 4.0).bfloat16(), torch.ones(16, 16).bfloat16()
    (codes,) = plugin.reference(x, w, None, None, None, torch.tensor([1e-3]), step=StepShape.prefill(1))
    assert codes.float().tolist() == [[448.0] * 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_interleaved_rows_come_apart_again(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(24, 3).to(dtype) for _ in range(2))
    both = interleave(gate, up)
    assert torch.equal(both[:8].float(), gate[:8].float()) and torch.equal(both[8:16].float(), up[:8].float())
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(deinterleave(both), (gate, up), strict=True))


def test_interleave_refuses_odd_groups() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        interleave(torch.zeros(12, 2), torch.zeros(12, 2))


def test_symbolic_rows_are_inferred() -> None:
    assert Gemm("float32", "L").infer(operands(rows="L")) == (Tensor("float32", ("L", 64)),)
    inputs = [*operands(), Tensor("float32", (1,))]
    assert GemmSwiglu().infer(inputs) == (Tensor(E4M3, ("T", 32)),)
    inputs[2] = Tensor("float32", ("T",))
    GemmSwiglu().check(inputs)


def replaced(inputs: list, index: int, value: Tensor | None) -> list:
    return [value if i == index else t for i, t in enumerate(inputs)]


REFUSED = [
    (operands(k=4100), "K=4100 is not a multiple of 16 .TMA rows are 16-byte units.; pad it, or keep this layer"),
    (operands(k=4100, dtype="bfloat16"), "K=4100 is not a multiple of 8"),
    (operands(dtype="float32"), "x is float32 and the output bfloat16"),
    (replaced(operands(), 1, Tensor("bfloat16", (64, 64))), "x is float8_e4m3fn and w is bfloat16"),
    (replaced(operands(), 1, Tensor(E4M3, (64, 32))), "expected .rows, K. and .N, K. with one K"),
    (replaced(operands(), 2, Tensor("float32", (7,))), "x_scale is float32 .7., expected float32 .1. or .T."),
    (replaced(operands(), 3, Tensor("float32", (1,))), "w_scale is float32 .1., expected float32 .64."),
    (replaced(operands(), 4, Tensor("bfloat16", (64,))), "bias is bfloat16 .64., expected float32 .64."),
    (replaced(operands(), 0, None), "x and w must be given"),
    (operands(dtype="float16"), "x is float16 and the output bfloat16"),
]


@pytest.mark.parametrize("inputs, message", REFUSED)
def test_gemm_refuses_with_a_remedy(inputs: list[Tensor | None], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        Gemm("bfloat16").check(inputs)


def test_float32_is_for_the_reference_only() -> None:
    plugin = Gemm("float32")
    assert plugin.infer(operands(dtype="float32"))[0].dtype == "float32"
    with pytest.raises(PluginError, match="x is float32, but the tensor cores take"):
        plugin.check(operands(dtype="float32"))


def test_rows_must_be_counted_as_x_has_them() -> None:
    with pytest.raises(PluginError, match="x has L rows, but the launch would count T; set rows to 'L'"):
        Gemm().check(operands(rows="L"))
    Gemm(rows="L").check(operands(rows="L"))


def test_swiglu_refuses_what_it_cannot_pair() -> None:
    scale = Tensor("float32", (1,))
    for plugin, inputs, message in [
        (GemmSwiglu(), [*operands(n=24), scale], "w has 24 rows, expected groups of 8"),
        (GemmSwiglu("gelu"), [*operands(), scale], "activation is 'gelu', expected 'silu'"),
        (GemmSwiglu(), [*operands(), None], "out_scale is absent, but quant is 'static'"),
        (GemmSwiglu(quant="none"), [*operands(), scale], "out_scale is given, but quant is 'none'"),
        (GemmSwiglu(quant="none", out_dtype="float32"), [*operands(), None], "out_dtype is float32"),
    ]:
        with pytest.raises(PluginError, match=message):
            plugin.check(inputs)


def test_every_case_is_legal_and_has_tactics() -> None:
    for case in CASES + SWIGLU_CASES:
        inputs = types_of(tensors(case)) if case.flops < 5e7 else None
        if inputs:
            case.plugin.check(inputs)
            assert case.plugin.tactics(inputs, case.step.tokens)


def test_tactics_survive_a_round_trip_through_fields() -> None:
    import dataclasses

    for tokens in (8, 1000):
        for tactic in Gemm().tactics(operands(4096, 4096), tokens):
            assert load("gemm")().tactic(dataclasses.asdict(tactic)) == tactic


def test_few_tokens_come_first_up_to_96_and_end_at_128() -> None:
    inputs = [*operands(4096, 4096)[:4], None]
    few, both, many = ([t.kind for t in Gemm().tactics(inputs, tokens)] for tokens in (96, 97, 129))
    assert few[0] == "few_tokens" and "many_tokens" in few
    assert both[0] == "many_tokens" and "few_tokens" in both
    assert set(many) == {"many_tokens", "library"} and many[0] == "many_tokens"


def test_precise_sums_are_offered_by_what_can_promote_them() -> None:
    inputs = [*operands(4096, 4096)[:4], None]
    for tokens in (1, 64, 2048):
        for tactic in Gemm(accumulation="precise").tactics(inputs, tokens):
            for kernel in Gemm(accumulation="precise").kernels(tactic, inputs):
                assert dict(kernel.constants)["PROMOTE"] == 1
    swiglu = GemmSwiglu(accumulation="precise").tactics([*inputs, Tensor("float32", (1,))], 8)
    assert {t.kind for t in swiglu} == {"few_tokens", "many_tokens"}
    for plain in Gemm().tactics(inputs, 8):
        assert all(dict(kernel.constants)["PROMOTE"] == 0 for kernel in Gemm().kernels(plain, inputs))


def test_precise_sums_are_of_e4m3() -> None:
    with pytest.raises(PluginError, match="accumulation is 'precise' and x bfloat16, whose sums are float32"):
        Gemm(accumulation="precise").check(operands(dtype="bfloat16"))
    with pytest.raises(PluginError, match="accumulation is 'exact', expected 'fast' or 'precise'"):
        Gemm(accumulation="exact").check(operands())


def test_buckets_end_at_the_maximum() -> None:
    assert Gemm().buckets(1000) == [1, 8, 16, 32, 64, 96, 128, 256, 512, 1000]
    assert GemmSwiglu().buckets(8) == [1, 8] and GemmSwiglu().buckets(1) == [1]


def test_few_tokens_may_have_a_shallower_ring_than_is_offered() -> None:
    inputs = [*operands(4096, 4096)[:4], None]
    legal = [n for n in range(20) if Gemm().legal(FewTokens(8, 32, 1, n, 2, 2), inputs, 8)]
    assert legal == list(range(2, 17))  # 16 stages hold all of K
    assert not Gemm().legal(FewTokens(8, 40, 1, 8, 2), inputs, 8)
    assert not Gemm().legal(FewTokens(8, 32, 1, 8, 2, 2), inputs, 9)


def test_the_library_is_offered_only_for_the_same_op() -> None:
    def offered(plugin, inputs) -> bool:
        return Library() in plugin.tactics(inputs, 128)

    scaled = operands(4096, 4096)[:4]
    assert offered(Gemm(), [*scaled, None])
    assert not offered(Gemm(), operands(4096, 4096))  # its bias is rounded
    assert not offered(Gemm("float32"), [*scaled, None])
    assert not offered(Gemm(), [*operands(1000, 4096)[:4], None])
    assert offered(Gemm(), [*operands(1000, 4096, "bfloat16")[:2], None, None, None])


def test_a_tactic_with_a_shallower_ring_is_legal() -> None:
    inputs = [*operands(4096, 4096)[:4], None]
    assert Gemm().legal(ManyTokens(128, 128, 6), inputs, 512) and Gemm().legal(ManyTokens(128, 128, 4), inputs, 512)
    assert not Gemm().legal(ManyTokens(128, 128, 7), inputs, 512)
    assert not Gemm().legal(ManyTokens(128, 136, 4), inputs, 512)
    assert Gemm().legal(ManyTokens(128, 128, 2, SPLIT=2), inputs, 128)
    assert not Gemm().legal(ManyTokens(128, 256, 2, SPLIT=2), inputs, 128)  # its sums need three stages


def test_every_offered_tactic_fits_shared_memory_and_the_grid() -> None:
    for n, k in [(12288, 4096), (4096, 11008), (1003, 864), (384, 320), (24, 16)]:
        problem = many_tokens.problem(Gemm(), operands(n, k))
        for tokens in (1, 65, 300, 4096):
            for t in many_tokens.enumerate_tactics(problem, tokens):
                assert problem.shared(t) <= many_tokens.SHARED_MAX
                assert t.grid(tokens, n, many_tokens.SMS) % t.cluster == 0
                assert t.grid(1, n, many_tokens.SMS) >= t.cluster


def test_a_group_of_the_raster_is_what_stays_in_the_l2_cache_in_whole_clusters() -> None:
    for k in (128, 2048, 4096, 8192, 14336, 28672):
        p = many_tokens.problem(Gemm(), [*operands(4096, k)[:4], None])
        for t in many_tokens.enumerate_tactics(p, 8192):
            group = t.group(k)
            assert group % t.CLUSTER_M == 0 and group >= 8
            assert group * t.BLOCK_M <= max(1024, 8 * t.BLOCK_M, many_tokens.STAYING // k)
            assert dict(many_tokens.kernel(p, t).constants)["GROUP"] == group
    tile = ManyTokens(128, 128, 6, 1)
    assert [tile.group(k) for k in (4096, 8192, 14336)] == [24, 12, 8]


def test_a_lone_warpgroup_has_two_sets_of_products_where_k_blocks_are_even() -> None:
    def tactics(k: int, accumulation: str = "precise") -> list[ManyTokens]:
        problem = many_tokens.problem(Gemm(accumulation=accumulation), [*operands(12288, k)[:4], None])
        every = many_tokens.enumerate_tactics(problem, 64)
        return sorted(every, key=lambda t: many_tokens.cost(t, problem, 64))

    best = tactics(4096)[0]
    assert best.SETS == 2 and best.warpgroups == 1
    assert all(t.SETS == 1 or t.warpgroups == 1 for t in tactics(4096))
    assert {t.SETS for t in tactics(4096 + 128)} == {t.SETS for t in tactics(4096, "fast")} == {1}


def test_many_waves_take_tiles_in_turn_for_scales_of_both_kinds() -> None:
    for n, k in [(12288, 4096), (4096, 4096), (4096, 11008), (6144, 4096), (57344, 8192), (8192, 28672)]:
        for tokens in (2048, 8192):
            scalar = operands(n, k)[:4]
            by_rows = [*scalar[:2], Tensor("float32", ("T",)), scalar[3]]
            best, same = (many_tokens.candidates(Gemm(), [*inputs, None], tokens)[0] for inputs in (scalar, by_rows))
            assert best == same and best.PINGPONG and best.BLOCK_M == 128 and best.BLOCK_N in (128, 192)


def test_tiles_of_192_columns_in_turn_are_offered_where_no_register_spills() -> None:
    def offered(plugin, inputs, tokens: int) -> bool:
        problem = many_tokens.problem(plugin, inputs)
        return any(t.PINGPONG and t.BLOCK_N == 192 and t.BLOCK_M == 128 for t in enumerate_tactics(problem, tokens))

    enumerate_tactics, inputs = many_tokens.enumerate_tactics, operands(57344, 8192)
    assert offered(Gemm(), inputs, 8192) and not offered(Gemm(), inputs, 64)
    assert not offered(Gemm(), operands(4096, 4096), 2048)  # few waves
    assert not offered(Gemm("float32"), inputs, 8192)
    assert not offered(GemmSwiglu(), [*inputs, Tensor("float32", (1,))], 8192)  # a bias beside


COMPILED = [
    (gemm_case(1, 12288, 4096, "rowwise", bias=True), ManyTokens(128, 192, 4, 1, 2)),
    (gemm_case(1, 12288, 4096, "none", "bfloat16", bias=True), ManyTokens(128, 192, 4, 1)),
    (swiglu_case(1, 11008, 4096, quant="none"), ManyTokens(128, 192, 5, 1, 2)),
    (gemm_case(1, 12288, 4096), ManyTokens(128, 256, 4)),
    (gemm_case(1, 12288, 4096, "rowwise"), ManyTokens(256, 128, 4)),
    (gemm_case(1, 12288, 4096), ManyTokens(128, 128, 6, 1, 2)),
    (gemm_case(1, 4096, 4096), ManyTokens(128, 64, 8, 0, 1, 4)),
    (gemm_case(1, 4096, 11008), ManyTokens(128, 64, 8, SPLIT=2)),
    (gemm_case(1, 12288, 4096, "none", "bfloat16", bias=True), ManyTokens(128, 192, 4)),
    (gemm_case(1, 1003, 864, out="float32"), ManyTokens(64, 256, 4)),
    (gemm_case(1, 12288, 4096, accumulation="precise"), ManyTokens(128, 192, 4)),
    (gemm_case(1, 12288, 4096, "block"), ManyTokens(128, 192, 4)),
    (gemm_case(1, 4096, 4096, "block"), ManyTokens(64, 96, 10, SETS=2)),
    (gemm_case(1, 4096, 2304, "block8", bias=True), ManyTokens(64, 128, 6, SETS=2)),  # 16 k blocks and 2
    (gemm_case(1, 4096, 256, "block", out="float32"), ManyTokens(64, 128, 4, SETS=2)),
    (gemm_case(1, 392, 384, "block", bias=True), ManyTokens(64, 32, 10, CLUSTER_N=4)),
    (gemm_case(1, 4096, 11008, accumulation="precise"), ManyTokens(64, 64, 10, SPLIT=2)),
    (gemm_case(1, 392, 320, bias=True, accumulation="precise"), ManyTokens(64, 32, 10, CLUSTER_N=4)),  # 3 k blocks
    (swiglu_case(1, 11008, 4096, accumulation="precise"), ManyTokens(128, 192, 4)),
    (swiglu_case(1, 11008, 4096, accumulation="precise"), ManyTokens(64, 128, 6, SETS=2)),
    (swiglu_case(1, 11008, 4096), ManyTokens(128, 256, 4)),
    (swiglu_case(1, 11008, 4096), ManyTokens(128, 128, 6, 1)),
    (swiglu_case(1, 11008, 4096, quant="none"), ManyTokens(64, 256, 4, 1)),
]


@pytest.mark.parametrize("case, tactic", COMPILED, ids=lambda v: getattr(v, "name", "tactic"))
def test_kernel_compiles_without_spills_and_keeps_its_wgmma_pipeline(case: Case, tactic: ManyTokens) -> None:
    rows = case.step.tokens
    assert rows == 1
    generator = torch.Generator().manual_seed(0)
    inputs = types_of(case.make(generator, "cpu"))
    (kernel,) = case.plugin.kernels(tactic, inputs)
    cubin = compile_kernel(kernel)
    assert cubin.spill_bytes == 0
    assert not cubin.serialized
    assert cubin.registers <= 168 or tactic.warpgroups == 1


@pytest.mark.parametrize("rows", [65, 512, 2048])
def test_the_favourite_tactics_compile(rows: int) -> None:
    inputs = [*operands(4096, 4096)[:4], None]
    for tactic in many_tokens.candidates(Gemm(), inputs, rows)[:2]:
        cubin = compile_kernel(Gemm().kernels(tactic, inputs)[0])
        assert cubin.spill_bytes == 0 and not cubin.serialized
