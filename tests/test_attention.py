"""attention: the reference against torch's and onnx's own operators, the cache layouts, what is refused, and that the
prefill and write kernels compile clean; on a GPU, that written caches have the reference's bits."""

from __future__ import annotations

import dataclasses

import onnx
import onnx.reference
import pytest
import torch
from onnx import TensorProto, helper

from fp8.plugins import compile
from fp8.plugins.attention import cases, layout, prefill, rope_kv_write
from fp8.plugins.attention.plugin import INPUTS, Attention
from fp8.plugins.attention.reference import quantize, rotate
from fp8.plugins.base import Case, Kernel, PluginError, StepShape, Tensor, types_of

E4M3 = torch.float8_e4m3fn
SMALL = [c for c in cases.cases() if c.flops < 10**9]


def named(case: Case, seed: int = 0) -> dict[str, torch.Tensor | None]:
    return dict(zip(INPUTS, case.make(torch.Generator().manual_seed(seed), "cpu"), strict=True))


def types(case: Case) -> list[Tensor | None]:
    return types_of([*named(case).values()])


def run(case: Case, inputs: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """Output of the reference in float32; the caches among the inputs are written."""
    (y,) = case.plugin.reference(*inputs.values(), step=case.step)
    return y.float() * (inputs["out_scale"] if inputs["out_scale"] is not None else 1.0)


def dense(case: Case, inputs: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """torch's scaled_dot_product_attention over the written, dequantized caches, a sequence at a time."""
    plugin, dtype = case.plugin, inputs["qkv"].dtype
    rows = inputs["qkv"].view(len(inputs["qkv"]), -1, plugin.head_dim)[:, : plugin.num_heads].float()
    q = rotate(rows, inputs["position_ids"].long(), inputs["cos"], inputs["sin"])
    scale = inputs["q_scale"]
    q = quantize(q, scale) * scale if scale is not None else q.to(dtype).float()
    out = torch.zeros_like(q)
    for i in range(case.step.sequences):
        begin, end = inputs["query_start"][i : i + 2].tolist()
        length = int(inputs["sequence_lengths"][i])
        if not length:
            continue
        blocks = inputs["block_tables"][i, : -(-length // 64)].long()
        k, v = (
            (inputs[f"{name}_cache"].float()[blocks].flatten(0, 1)[:length]) * (inputs[f"{name[0]}_scale"] or 1.0)
            for name in ("key", "value")
        )
        visible = torch.arange(length) <= torch.arange(length - (end - begin), length).unsqueeze(1)
        o = torch.nn.functional.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), visible,
            scale=plugin.softmax_scale, enable_gqa=True,
        )  # fmt: skip
        out[begin:end] = o.transpose(0, 1)
    return out.flatten(1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", [c for c in SMALL if not c.plugin.quant_out], ids=lambda c: c.name)
def test_reference_is_softmax_attention_over_the_written_cache(case: Case) -> None:
    inputs = named(case)
    found = run(case, inputs)
    # e4m3: P has 3 bits of mantissa (rms error 2.6e-2 of a value, less when averaged); 16 bits: the output's rounding
    bound = 3e-2 if inputs["key_cache"].dtype == E4M3 else 2.5e-3
    assert relative(found, dense(case, inputs)) < bound


def test_reference_rounds_the_output_to_codes_of_its_scale() -> None:
    case = next(c for c in SMALL if c.plugin.quant_out and c.name.startswith("mixed"))
    inputs = named(case)
    unquantized = dataclasses.replace(
        case, plugin=dataclasses.replace(case.plugin, quant_out=False, out_dtype="float32")
    )
    exact = run(unquantized, {**named(case), "out_scale": None})
    scale = inputs["out_scale"]
    assert torch.equal(run(case, inputs), quantize(exact, scale) * scale)


def test_decode_rows_mean_the_same_as_prefill_rows_of_one_token() -> None:
    for case in (c for c in SMALL if c.name.startswith("mixed") and c.plugin.head_dim == 64):
        step = case.step
        as_prefill = StepShape(step.tokens, step.sequences, 0, step.max_query, step.max_context, step.logits_rows)
        assert step.decode_sequences > 1
        found = run(case, named(case))
        assert relative(run(dataclasses.replace(case, step=as_prefill), named(case)), found) < 5e-3


def test_rows_of_no_sequence_and_of_an_empty_one_are_zero_and_write_nothing() -> None:
    padded = next(c for c in SMALL if c.name.startswith("mixed"))
    assert (run(padded, named(padded))[-3:] == 0).all()
    empty = next(c for c in SMALL if c.name.startswith("empty"))
    inputs = named(empty)
    before = inputs["key_cache"].clone()
    assert (run(empty, inputs)[:9] == 0).all()
    written = (inputs["key_cache"].float() != before.float()).flatten(2).any(2).sum()
    assert written == 70  # the tokens of the other sequence


def test_only_the_mapped_slots_are_written_and_hold_quantized_values() -> None:
    case = next(c for c in SMALL if c.name.startswith("no rotary"))
    inputs = named(case)
    before = inputs["value_cache"].clone()
    run(case, inputs)
    plugin, slots = case.plugin, inputs["slot_mapping"].long()
    values = inputs["qkv"].view(len(slots), -1, plugin.head_dim)[:, -plugin.num_kv_heads :].float()
    flat = inputs["value_cache"].float().flatten(0, 1)
    assert torch.equal(flat[slots], quantize(values, inputs["v_scale"]))
    others = torch.ones(len(flat), dtype=torch.bool).index_fill(0, slots, False)
    assert torch.equal(flat[others], before.float().flatten(0, 1)[others])


@pytest.mark.parametrize("rotary_dim", [64, 20, 6])
def test_rotation_is_onnx_rotary_embedding(rotary_dim: int) -> None:
    x = torch.randn(7, 3, 64)
    cos, sin = cases.rotary_tables(50, rotary_dim, "cpu")
    positions = torch.tensor([0, 1, 5, 49, 3, 3, 8])
    node = helper.make_node(
        "RotaryEmbedding", ["x", "cos", "sin", "positions"], ["y"], num_heads=3, rotary_embedding_dim=rotary_dim
    )
    kinds = {"x": TensorProto.FLOAT, "cos": TensorProto.FLOAT, "sin": TensorProto.FLOAT, "positions": TensorProto.INT64}
    given = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    graph = helper.make_graph([node], "g", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    feeds = {"x": x.flatten(1)[None], "cos": cos, "sin": sin, "positions": positions[None]}
    (expected,) = onnx.reference.ReferenceEvaluator(model).run(None, {k: v.numpy() for k, v in feeds.items()})
    assert torch.allclose(rotate(x, positions, cos, sin).flatten(1), torch.from_numpy(expected)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
def test_cache_layouts_convert_into_each_other(dtype: str) -> None:
    key, value = (torch.randn(3, 64, 2, 128).to(getattr(torch, dtype)) for _ in range(2))
    packed = layout.pack_cache(key, value)
    assert tuple(tuple(t.shape) for t in packed) == layout.cache_shape(3, 2, 128, dtype)
    for found, expected in zip(layout.unpack_cache(*packed), (key, value), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found.float(), expected.float())


def test_packed_values_of_16_tokens_are_transposed_and_permuted() -> None:
    value = torch.arange(64).view(1, 64, 1, 1).expand(1, 64, 1, 64).to(E4M3)
    _, packed = layout.pack_cache(value, value)
    assert sorted(layout.PERMUTATION) == list(range(32))
    token = [group + t for group in (0, 32) for t in layout.PERMUTATION]
    dimension = packed[0, 0].view(4, 64, 16)[:, 5].flatten()
    assert torch.equal(dimension.float(), torch.tensor(token, dtype=torch.float32).to(E4M3).float())


BASE = next(c for c in SMALL if c.name.startswith("chunks 8/1x128 e4m3"))


@pytest.mark.parametrize(
    ("change", "attributes", "reason"),
    [
        ({}, {"num_heads": 7, "num_kv_heads": 2}, "multiple of num_kv_heads"),
        ({"qkv": Tensor("bfloat16", ("T", 100))}, {}, "expected .* \\[T, 1280\\]"),
        ({"slot_mapping": Tensor("int64", ("T",))}, {}, "slot_mapping is int64"),
        ({"k_scale": None}, {}, "k_scale is absent"),
        ({"out_scale": Tensor("float32", (1,))}, {}, "out_scale is given"),
        ({"cos": None}, {}, "cos is absent"),
        ({"cos": Tensor("float32", (9, 65)), "sin": Tensor("float32", (9, 65))}, {}, "R at most head_dim"),
        ({"value_cache": Tensor("bfloat16", ("blocks", 64, 1, 128))}, {}, "both caches"),
        ({"key_cache": Tensor("float8_e4m3fn", ("blocks", 16, 1, 128))}, {}, "expected \\[blocks, 64, 1, 128\\]"),
        ({}, {"out_dtype": "float16"}, "insert a Cast"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(
    change: dict[str, Tensor | None], attributes: dict[str, object], reason: str
) -> None:
    plugin = dataclasses.replace(BASE.plugin, **attributes)
    given = {**dict(zip(INPUTS, types(BASE), strict=True)), **change}
    BASE.plugin.check(types(BASE))
    with pytest.raises(PluginError, match=reason):
        plugin.check(list(given.values()))


def test_a_head_dimension_without_kernels_is_refused_by_check_alone() -> None:
    case = cases.case("odd", cases.whole(5), (2, 1), 96)
    case.plugin.infer(types(case))
    with pytest.raises(PluginError, match="head_dim is 96"):
        case.plugin.check(types(case))


def kernels() -> list[Kernel]:
    """The write kernel of every case's shape and every prefill tactic of it, once each."""
    found = []
    for case in cases.cases():
        if case.plugin.num_heads == 8:
            given = types(case)
            found.append(rope_kv_write.kernel(case.plugin, given))
            found += [k for t in prefill.candidates(case.plugin, given) for k in prefill.kernels(case.plugin, t, given)]
    return list(dict.fromkeys(found))


def test_kernels_compile_without_spills_and_with_overlapping_wgmma() -> None:
    for cubin in compile.compile_all(kernels()).values():
        assert not cubin.serialized and cubin.spill_bytes == 0, (cubin.kernel, cubin.log)


def test_tactics_survive_the_plan_and_fit_the_shared_memory() -> None:
    for case in SMALL:
        given = types(case)
        for tactic in case.plugin.tactics(given, case.step.tokens):
            assert case.plugin.tactic(dataclasses.asdict(tactic)) == tactic
            fp8 = given[8].dtype == "float8_e4m3fn"
            assert prefill.shared_bytes(case.plugin.head_dim, fp8, tactic) <= prefill.SHARED_LIMIT


@pytest.mark.parametrize("fp8", [True, False])
def test_work_list_has_room_for_every_piece(fp8: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(1, 600, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator)
        for rows, longest in ((prefill.UNIT, prefill.LONG), (prefill.tile_rows(fp8), prefill.LONG - 1)):
            pieces = sum(-(-int(n) // rows) for n in lengths)
            assert pieces <= prefill.most_pieces(int(lengths.sum()), len(lengths), fp8, longest)


@pytest.mark.parametrize("tokens", [2, 7, 64])
def test_the_tolerance_of_few_tokens_covers_what_flipped_codes_do_to_them(tokens: int) -> None:
    """P off by 3e-4 before it becomes a code, as by the tensor cores' sums: 400 draws of one prompt of 8 heads."""
    generator, heads, dim = torch.Generator().manual_seed(0), 8, 64

    def drawn() -> torch.Tensor:
        return torch.randn(400, heads, tokens, dim, generator=generator).to(E4M3).float()

    scores = (drawn() @ drawn().mT * dim**-0.5).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    p, v = torch.softmax(scores, -1) * 256, drawn()
    off = p * (1 + 3e-4 * torch.randn(p.shape, generator=generator))
    exact, found = (x.to(E4M3).float() @ v for x in (p, off))
    errors = (exact - found).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    tolerance, _ = cases.fp8_tolerance(cases.Batch(((tokens, tokens),)).codes * heads, quant_out=False)
    assert tolerance / 4 < errors.max() < tolerance
    assert tolerance > cases.TOLERANCES[True, False][0]


def launched(
    plugin: Attention, kinds: list[Tensor | None], packed: list[torch.Tensor | None], step: StepShape
) -> torch.Tensor:
    """The output. packed: inputs on the GPU, the caches in the kernels' layout; kinds: as `infer` takes them."""
    from fp8.plugins.cuda import Module

    tactic = plugin.tactics(kinds, step.tokens)[0]
    functions = [Module(compile.compile_kernel(k).code).function(k.entry) for k in plugin.kernels(tactic, kinds)]
    (out,) = plugin.infer(kinds)
    y = torch.empty(out.shape, dtype=getattr(torch, out.dtype), device="cuda")
    size = plugin.workspace(tactic, kinds, step.tokens, step.sequences)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
    plugin.bind(tactic, functions, [*packed, y], workspace)(step)
    return y


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")
def test_kernels_write_the_references_bits_into_the_cache() -> None:
    for case in SMALL:
        given = case.make(torch.Generator("cuda").manual_seed(3), "cuda")
        packed = list(given)
        packed[8], packed[9] = layout.pack_cache(given[8], given[9])
        launched(case.plugin, types_of(given), packed, case.step)
        case.plugin.reference(*given, step=case.step)
        for found, expected in zip(layout.unpack_cache(*packed[8:10]), given[8:10], strict=True):
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), case.name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("heads", [(8, 2), (32, 8)])  # whose rows are divided into other pieces
@pytest.mark.parametrize(("prompt", "chunk"), [(700, 77), (1000, 333), (2500, 1001)])
def test_the_last_rows_of_a_prompt_are_the_same_bits_as_a_chunk_of_their_own(
    prompt: int, chunk: int, heads: tuple[int, int]
) -> None:
    """With an e4m3 cache, whose sums of 1024 tokens are cut by the tokens' places in the context alone."""
    case = cases.case("whole", cases.whole(prompt), heads)
    given = case.make(torch.Generator("cuda").manual_seed(3), "cuda")
    kinds, packed = types_of(given), list(given)
    packed[8], packed[9] = layout.pack_cache(given[8], given[9])
    whole = launched(case.plugin, kinds, packed, case.step)
    packed[:3] = [t[-chunk:].contiguous() for t in packed[:3]]
    packed[3] = torch.tensor([0, chunk], dtype=torch.int32, device="cuda")
    alone = launched(case.plugin, kinds, packed, StepShape(chunk, 1, 0, chunk, prompt, 1))
    assert torch.equal(whole[-chunk:].view(torch.uint8), alone.view(torch.uint8))
