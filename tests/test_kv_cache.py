"""The block pool: no block lost, none handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8.runtime.kv_cache import BlockPool, KVCacheError, blocks_for


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_blocks_are_owned_once_and_never_lost(size: int, trace: list[tuple[bool, int]]) -> None:
    pool, held = BlockPool(size, 64), []
    for allocate, n in trace:
        if not allocate:
            pool.release(held.pop(n % len(held)) if held else [])
        elif n <= pool.free_blocks:
            held.append(pool.allocate(n))
        else:
            with pytest.raises(KVCacheError, match=f"{n} KV blocks wanted"):
                pool.allocate(n)
        owned = [b for blocks in held for b in blocks]
        assert len(set(owned)) == len(owned)
        assert all(0 <= b < size for b in owned)
        assert pool.free_blocks == size - len(owned)


def test_a_block_released_twice_is_an_error() -> None:
    pool = BlockPool(4, 64)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(KVCacheError, match="nobody owns it"):
        pool.release(blocks)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(KVCacheError, match="at least 1"):
        BlockPool(0, 64)


def test_blocks_are_rounded_up() -> None:
    assert [blocks_for(n, 64) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
