"""Facts about decode attention that need no GPU; the kernels' values are tests/test_plugins.py's on one."""

import itertools

import pytest

from fp8.plugins import compile
from fp8.plugins.attention import decode
from fp8.plugins.attention.decode import Decode, Shape
from fp8.plugins.attention.decode_cases import CASES, block_tables
from fp8.plugins.attention.plugin import Attention
from fp8.plugins.base import PluginError, StepShape, Tensor

SHAPES = [(32, 32, 128), (32, 8, 128), (64, 8, 128), (48, 3, 64), (71, 1, 64), (40, 2, 128)]


def inputs(plugin: Attention, cache: str, dtype: str = "bfloat16") -> list[Tensor | None]:
    pool = Tensor(cache, ("blocks", 64, plugin.num_kv_heads, plugin.head_dim))
    width = (plugin.num_heads + 2 * plugin.num_kv_heads) * plugin.head_dim
    return [Tensor(dtype, ("T", width)), *[None] * 7, pool, pool, *[None] * 4]


def attention(heads: int, kv_heads: int, head_dim: int) -> Attention:
    return Attention(heads, kv_heads, head_dim, head_dim**-0.5)


@pytest.mark.parametrize("cache", ["float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_tactics_that_fit_the_multiprocessor(shape: tuple[int, int, int], cache: str) -> None:
    plugin = attention(*shape)
    found = decode.candidates(plugin, inputs(plugin, cache))
    of = decode.shape(plugin, inputs(plugin, cache))
    assert len(found) >= 2 and len(set(found)) == len(found)
    for tactic in found:
        assert tactic.decode_slots >= 2
        assert tactic.decode_blocks * (of.shared_bytes(tactic, 128) + 1024) <= 228 * 1024


@pytest.mark.parametrize("cache", ["float8_e4m3fn", "bfloat16"])
def test_kernels_of_all_group_sizes_compile(cache: str) -> None:
    plugins = [attention(*shape) for shape in SHAPES]
    every = [(p, t) for p in plugins for t in decode.candidates(p, inputs(p, cache))[:1]]
    cubins = compile.compile_all(k for p, t in every for k in decode.kernels(p, t, inputs(p, cache))).values()
    assert len(cubins) == sum(len(set(t.variants())) for _, t in every)  # for many units, for few, for the fewest
    assert not any(c.serialized for c in cubins)
    assert not any(c.spill_bytes for c in cubins)


def test_odd_numbers_of_rotation_pairs_have_kernels() -> None:
    plugin, given = attention(8, 2, 128), inputs(attention(8, 2, 128), "float8_e4m3fn")
    given[6] = given[7] = Tensor("float32", ("positions", 3))
    every = [k for tactic in decode.candidates(plugin, given) for k in decode.kernels(plugin, tactic, given)]
    assert {dict(k.constants)["VEC"] for k in every} == {1}
    assert compile.compile_all(every)


@pytest.mark.parametrize(
    "kv_heads, sequences, warps, blocks, parts",
    [
        (8, 1, 8, 32, 0),  # of one sequence the kernel knows the length
        (8, 4, 8, 128, 4),
        (8, 8, 9, 132, 2),
        (8, 12, 9, 132, 0),  # 96 blocks of 132 would have a unit
        (8, 16, 9, 132, 1),
        (8, 32, 6, 264, 1),
        (8, 64, 3, 528, 1),
        (32, 4, 9, 132, 1),
        (32, 32, 3, 528, -2),  # a block has several units
        (32, 40, 3, 528, 0),  # three units each for 427 blocks of 528
    ],
)
def test_contexts_of_one_length_are_dealt_without_counting(
    kv_heads: int, sequences: int, warps: int, blocks: int, parts: int
) -> None:
    tactic = Decode(3, 2, 4)
    which, grid, found = decode.dealing(Shape(128, kv_heads, 32 // kv_heads, True), tactic, sequences, 2048)
    assert (tactic.variants()[which].decode_warps, grid, found) == (warps, blocks, parts)


def test_groups_of_more_than_sixteen_heads_are_several_units() -> None:
    assert Shape(128, 8, 16, True).units == 8
    assert Shape(128, 8, 17, True).units == 16
    assert Shape(64, 1, 71, True).units == 5


def test_a_multiprocessor_holds_fewer_blocks_where_a_step_has_very_many_sequences() -> None:
    of, tactic = Shape(128, 8, 4, True), Decode()
    held = {n: of.blocks(tactic, n) for n in (1, 64, 1024, 2048, 8192)}
    assert held == {1: 4, 64: 4, 1024: 4, 2048: 3, 8192: 3}
    for n, blocks in held.items():
        assert blocks * (of.shared_bytes(tactic, n) + 1024) <= 228 * 1024 < 5 * (of.shared_bytes(tactic, n) + 1024)


def test_contexts_of_more_tokens_than_the_kernel_counts_are_refused() -> None:
    of = Shape(128, 8, 4, True)
    of.check_context(1 << 20)
    with pytest.raises(PluginError, match=r"contexts of 8388608 tokens.*counts 4193280 at most; build the engine"):
        of.check_context(1 << 23)


def test_workspace_holds_a_partial_result_for_each_block() -> None:
    plugin, tactic = attention(32, 8, 128), Decode()
    size = decode.workspace(plugin, tactic, inputs(plugin, "float8_e4m3fn"), 64, 64)
    assert size == tactic.grid * 4 * 32 * (4 + 2) * 4  # four heads, and for each four columns a maximum and a sum too


def test_cases_scatter_their_blocks_and_use_none_twice() -> None:
    tables, blocks = block_tables([0, 64, 65, 300])
    used = [b for b in itertools.chain(*tables) if b >= 0]
    assert len(set(used)) == len(used) == 1 + 2 + 5 and max(used) < blocks
    assert used != sorted(used)


def test_cases_are_all_decode_rows() -> None:
    for case in CASES:
        step: StepShape = case.step
        assert step.tokens == step.sequences == step.decode_sequences and step.max_query == 0
