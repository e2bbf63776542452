"""The block pool: no block lost, none handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8.runtime.kv_cache import BlockPool, KVCacheError, blocks_for, extend_keys


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
    with pytest.raises(KVCacheError, match="nobody holds it"):
        pool.release(blocks)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(KVCacheError, match="at least 1"):
        BlockPool(0, 64)


def test_blocks_are_rounded_up() -> None:
    assert [blocks_for(n, 64) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]


def keys(*tokens: int) -> list[bytes]:
    found: list[bytes] = []
    extend_keys(found, tokens, 2, len(tokens) // 2)
    return found


def test_a_key_stands_for_all_tokens_before_it() -> None:
    a, b, c = keys(1, 2, 3, 4, 9), keys(1, 2, 3, 4), keys(5, 2, 3, 4)
    assert a == b and len(a) == 2
    assert b[0] != c[0] and b[1] != c[1]


def test_published_blocks_are_shared_until_the_pool_needs_them() -> None:
    pool = BlockPool(4, 2)
    blocks, prefix = pool.allocate(2), keys(1, 2, 3, 4)
    for block, key in zip(blocks, prefix, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    assert (pool.free_blocks, pool.cached_blocks) == (4, 2)
    assert pool.find([*prefix, *keys(7, 7)]) == blocks and pool.find(keys(7, 7)) == []
    pool.share(blocks)
    pool.share(blocks)
    pool.release(blocks)
    assert (pool.free_blocks, pool.cached_blocks) == (2, 0)
    pool.release(blocks)
    taken = pool.allocate(3)
    assert pool.find(prefix) == blocks[:1], "the end of a prefix is evicted before its beginning"
    pool.release(taken)
    assert pool.free_blocks == 4


def test_the_least_recently_held_block_is_evicted() -> None:
    pool = BlockPool(2, 2)
    a, b = pool.allocate(2)
    pool.publish(a, b"a")
    pool.publish(b, b"b")
    pool.release([a])
    pool.release([b])
    pool.share([a])
    pool.release([a])
    assert pool.allocate(1) == [b]
    assert pool.find([b"a"]) == [a] and pool.find([b"b"]) == []


def test_forgotten_contents_are_not_shared_and_no_block_is_lost() -> None:
    pool = BlockPool(3, 2)
    held, idle = pool.allocate(2)
    pool.publish(held, b"held")
    pool.publish(idle, b"idle")
    pool.release([idle])
    pool.forget_contents()
    assert pool.find([b"held"]) == pool.find([b"idle"]) == []
    pool.release([held])
    assert sorted(pool.allocate(3)) == [0, 1, 2]
