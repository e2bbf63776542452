"""The block pool: no block lost, none handed out twice."""

from __future__ import annotations

from collections import Counter
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.runtime.kv_cache import BlockPool, KVCacheError, blocks_for, extend_keys


class Model:
    """What a pool must be doing, by sets: who holds what, and what each key stands for."""

    def __init__(self, size: int) -> None:
        self.pool, self.size = BlockPool(size, 64), size
        self.held: list[list[int]] = []  # per sequence
        self.contents: dict[int, bytes] = {}  # of published blocks, until they are given to somebody anew

    def allocate(self, n: int) -> None:
        if n > self.pool.free_blocks:
            with pytest.raises(KVCacheError, match=f"{n} KV blocks wanted"):
                self.pool.allocate(n)
            return
        before, cached = set(self.contents), self.pool.cached_blocks
        blocks = self.pool.allocate(n)
        assert not {b for held in self.held for b in held} & set(blocks), "handed out while held"
        evicted = before & set(blocks)
        assert self.pool.cached_blocks == cached - len(evicted), "contents go only where a block is needed"
        for block in blocks:
            self.contents.pop(block, None)
        self.held.append(blocks)

    def release(self, n: int) -> None:
        self.pool.release(self.held.pop(n % len(self.held)) if self.held else [])

    def publish(self, n: int) -> None:
        """The block gets contents number n, unless it has some."""
        blocks = [b for held in self.held for b in held]
        if not blocks:
            return
        block, key = blocks[n % len(blocks)], bytes([n % 7])
        self.pool.publish(block, key)
        if block not in self.contents and key not in self.contents.values():
            self.contents[block] = key

    def share(self, n: int) -> None:
        keys = [bytes([(n + i) % 7]) for i in range(3)]
        found = self.pool.find(keys)
        known = {key: block for block, key in self.contents.items()}
        assert found == [known[k] for k in takewhile(known.__contains__, keys)]
        idle = self.pool.idle(found)
        free = self.pool.free_blocks
        self.pool.share(found)
        assert self.pool.free_blocks == free - idle
        self.held.append(found)

    def forget(self, n: int) -> None:
        self.pool.forget_contents()
        self.contents.clear()

    def check(self) -> None:
        owned = {b for blocks in self.held for b in blocks}
        assert all(0 <= b < self.size for b in owned)
        assert self.pool.free_blocks == self.size - len(owned)
        assert self.pool.cached_blocks == len(self.contents.keys() - owned)


ACTIONS = st.sampled_from(["allocate", "allocate", "release", "release", "publish", "publish", "share", "forget"])


@settings(max_examples=10_000, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(ACTIONS, st.integers(0, 12)), max_size=25))
def test_no_block_is_lost_or_handed_out_twice_and_contents_are_found_while_they_are_there(
    size: int, trace: list[tuple[str, int]]
) -> None:
    model = Model(size)
    for action, n in trace:
        getattr(model, action)(n)
        model.check()
    while model.held:
        model.release(0)
    assert model.pool.free_blocks == size
    assert sorted(model.pool.allocate(size)) == list(range(size))


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from(["take", "fork", "write", "drop"]), st.integers(0, 50)), max_size=80),
)
def test_forked_sequences_share_blocks_until_they_write(size: int, trace: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(size, 64), []
    for what, n in trace:
        chosen = held[n % len(held)] if held else []
        if what == "take" and pool.free_blocks:
            held.append(pool.allocate(1 + n % pool.free_blocks))
        elif what == "fork" and chosen:
            pool.share(chosen)
            held.append(list(chosen))
        elif what == "drop" and chosen:
            held.remove(chosen)
            pool.release(chosen)
        elif what == "write" and chosen and pool.shared(chosen[-1]) and pool.free_blocks:
            old, chosen[-1] = chosen[-1], pool.allocate(1)[0]
            pool.release([old])
        count = Counter(b for blocks in held for b in blocks)
        assert all(pool.shared(b) == (count[b] > 1) for b in count)
        assert pool.free_blocks == size - len(count)
    for blocks in held:
        pool.release(blocks)
    assert sorted(pool.allocate(size)) == list(range(size))


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
