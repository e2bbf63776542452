"""The arithmetic of dividing a model: every part is somebody's, and parts of reshaped tensors are found again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fp8.builder.engine import ModelInfo
from fp8.builder.parallel.layout import box, local_shape, reshaped
from fp8.builder.parallel.pipeline import Place, stages
from fp8.builder.parallel.split import AXES, UNIT, SplitError, columns, divide, head_ranges

RANKS = st.integers(1, 16)


def model(heads: int, kv_heads: int) -> ModelInfo:
    return ModelInfo("llama", "bfloat16", "bf16", 320, 2, heads, kv_heads, 64, 192, 256, "bfloat16")


@given(st.integers(1, 4000), RANKS)
def test_columns_are_divided_in_units_of_16(size: int, ranks: int) -> None:
    if size < UNIT * (ranks - 1) + 1:
        with pytest.raises(SplitError, match="too few"):
            columns(size, ranks)
        return
    parts = columns(size, ranks)
    assert parts[0][0] == 0 and parts[-1][1] == size and len(parts) == ranks
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    sizes = [stop - start for start, stop in parts]
    assert all(n % UNIT == 0 for n in sizes[:-1]) and min(sizes) > 0
    assert max(sizes[:-1], default=0) - min(sizes) < 2 * UNIT


@given(st.integers(1, 16), st.integers(1, 16), RANKS)
def test_heads_are_divided_with_their_kv_heads(kv_heads: int, group: int, ranks: int) -> None:
    heads = kv_heads * group
    if ranks > heads:
        with pytest.raises(SplitError, match="heads are too few"):
            head_ranges(heads, kv_heads, ranks)
        return
    shares = head_ranges(heads, kv_heads, ranks)
    queries = [q for q, _ in shares]
    assert queries[0][0] == 0 and queries[-1][1] == heads and all(stop > start for start, stop in queries)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(queries))
    for (start, stop), (kv_start, kv_stop) in shares:
        own = range(kv_start, kv_stop)
        assert {h // group for h in range(start, stop)} == set(own)
        count = (stop - start) / len(own)
        assert all((start + i) // group - kv_start == int(i // count) for i in range(stop - start))
    if ranks <= kv_heads:
        assert sum(stop - start for _, (start, stop) in shares) == kv_heads  # none twice


@pytest.mark.parametrize("axis", AXES)
def test_one_rank_has_all_of_every_axis(axis: str) -> None:
    assert divide(axis, 384, model(6, 3), 1) == [(0, 384)]


def test_an_axis_without_a_rule_is_refused_by_name() -> None:
    with pytest.raises(SplitError, match="no rule divides the axis 'experts'"):
        divide("experts", 8, model(6, 3), 2)


@given(st.data())
def test_a_part_of_a_tensor_is_the_same_part_after_a_reshape(data: st.DataObject) -> None:
    """Against numpy: reshaping the part gives the part of the reshaped whole; what cannot be followed is refused."""
    factors = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    groupings = []
    for _ in range(2):
        cuts = sorted(data.draw(st.sets(st.integers(0, len(factors)), max_size=3)) | {0, len(factors)})
        groupings.append([int(np.prod(factors[a:b])) for a, b in itertools.pairwise(cuts)])
    before, after = groupings
    dim = data.draw(st.integers(0, len(before) - 1))
    start = data.draw(st.integers(0, before[dim] - 1))
    stop = data.draw(st.integers(start + 1, before[dim]))
    layout = box(before, [(start, stop) if i == dim else None for i in range(len(before))])
    whole = np.arange(np.prod(factors)).reshape(before)
    part = whole[tuple(slice(None) if r is None else slice(*r) for r in layout)]
    try:
        found = reshaped(before, layout, after)
    except SplitError:
        assume(False)
    expected = whole.reshape(after)[tuple(slice(None) if r is None else slice(*r) for r in found)]
    assert np.array_equal(part.reshape(local_shape(after, found)), expected)


def test_heads_of_a_group_are_followed_into_it() -> None:
    """[T, H D] -> [T, KVH, G, D] with two ranks per KV head."""
    assert reshaped(("T", 6 * 8), (None, (16, 24)), ("T", 2, 3, 8)) == (None, (0, 1), (2, 3), None)
    assert reshaped(("T", 2, 3, 8), (None, (1, 2), (0, 2), None), ("T", 48)) == (None, (24, 40))
    with pytest.raises(SplitError, match="no box"):
        reshaped(("T", 48), (None, (16, 40)), ("T", 2, 3, 8))


@given(st.integers(1, 100), st.integers(1, 12))
def test_stages_are_as_even_as_they_go(layers: int, count: int) -> None:
    if count > layers:
        with pytest.raises(SplitError, match="every stage needs one"):
            stages(layers, count)
        return
    found = stages(layers, count)
    assert [i for stage in found for i in stage] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1 and len(found[-1]) == min(map(len, found))


@pytest.mark.parametrize(
    ("counts", "says"),
    [((20, 20, 24), "names 3 stages, but pp_size is 4"), ((20, 20, 24, 15), "not the model's 80"),
     ((40, 40, 0, 0), "at least one layer")],
)  # fmt: skip
def test_stages_that_are_not_the_model_are_refused(counts: tuple[int, ...], says: str) -> None:
    assert list(map(len, stages(80, 4, (20, 20, 24, 16)))) == [20, 20, 24, 16]
    with pytest.raises(SplitError, match=says):
        stages(80, 4, counts)


def test_ranks_of_a_stage_are_neighbours() -> None:
    places = [Place(rank, 4, 2) for rank in range(8)]
    assert [(p.stage, p.tp_rank) for p in places] == [(s, t) for s in range(2) for t in range(4)]
