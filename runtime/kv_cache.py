"""The paged KV cache's bookkeeping: which block of 64 tokens is whose. Pure Python; the memory is the session's.

A full block may be published under a key that stands for all tokens up to its end; whoever begins with the same tokens
shares it. A published block that nobody holds keeps its contents until the pool needs it: the least recently held goes
first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

Key = bytes


class KVCacheError(RuntimeError):
    """The KV pool cannot hold what is asked of it."""


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


def extend_keys(keys: list[Key], tokens: Sequence[int], block_size: int, blocks: int) -> None:
    """Lengthens `keys` to those of the first `blocks` blocks of `tokens`; each hashes its tokens and the key before.

    128 bits of BLAKE2: two prefixes that share a key by chance are not to be expected, by intent hardly to be found.
    """
    for i in range(len(keys), blocks):
        block = array("i", tokens[i * block_size : (i + 1) * block_size])
        keys.append(hashlib.blake2b((keys[-1] if keys else b"") + block.tobytes(), digest_size=16).digest())


class BlockPool:
    """`num_blocks` blocks, each free or held by one or several sequences.

    Free blocks without contents are taken first, the last freed before others: its lines may still be in the L2 cache.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1:
            raise KVCacheError(f"a KV pool of {num_blocks} blocks holds nothing; at least 1 is needed")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: dict[int, None] = {}  # published blocks that nobody holds, the least recently held first
        self._holders = [0] * num_blocks
        self._published: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that `allocate` can give; those whose contents are kept in case of need count."""
        return len(self._free) + len(self._idle)

    @property
    def cached_blocks(self) -> int:
        """Free blocks whose contents are kept."""
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks. Raises KVCacheError if there are fewer; then nothing is taken."""
        if count > self.free_blocks:
            raise KVCacheError(f"{count} KV blocks wanted, {self.free_blocks} of {self.num_blocks} are free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def find(self, keys: Iterable[Key]) -> list[int]:
        """The published blocks of the longest run of `keys` from the first; takes nothing."""
        found = []
        for key in keys:
            block = self._published.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Holds blocks that `find` gave, or that somebody holds, beside whoever holds them already."""
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] += 1

    def shared(self, block: int) -> bool:
        """Several hold it: who wants to write takes another one, and a copy of what is in this."""
        return self._holders[block] > 1

    def idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` nobody holds: sharing those makes that many fewer free."""
        return sum(block in self._idle for block in blocks)

    def publish(self, block: int, key: Key) -> None:
        """Lets others share a held block whose contents are complete; the first block published for a key stays."""
        if not self._holders[block]:
            raise KVCacheError(f"KV block {block} is published, but nobody holds it")
        if key not in self._published and block not in self._key_of:
            self._published[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Gives blocks back, one holder each. Raises KVCacheError on one that is not held."""
        for block in reversed(blocks):  # the end of a sequence is evicted before its beginning, which more share
            if not self._holders[block]:
                raise KVCacheError(f"KV block {block} is released, but nobody holds it")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def forget_contents(self) -> None:
        """Nothing published so far is shared any more: for when a step failed and wrote who knows what."""
        self._free += reversed(self._idle)
        self._idle.clear()
        self._published.clear()
        self._key_of.clear()

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        del self._published[self._key_of.pop(block)]
        return block
