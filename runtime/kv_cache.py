"""The paged KV cache's bookkeeping: which block of 64 tokens is whose. Pure Python; the memory is the session's."""

from __future__ import annotations

from collections.abc import Iterable


class KVCacheError(RuntimeError):
    """The KV pool cannot hold what is asked of it."""


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """`num_blocks` blocks, each free or owned once. Last freed, first used: its lines may still be in the L2 cache."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1:
            raise KVCacheError(f"a KV pool of {num_blocks} blocks holds nothing; at least 1 is needed")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owned = bytearray(num_blocks)

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks. Raises KVCacheError if there are fewer; then nothing is taken."""
        if count > len(self._free):
            raise KVCacheError(f"{count} KV blocks wanted, {len(self._free)} of {self.num_blocks} are free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._owned[block] = 1
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Gives blocks back. Raises KVCacheError on one that is not owned."""
        for block in blocks:
            if not self._owned[block]:
                raise KVCacheError(f"KV block {block} is released, but nobody owns it")
            self._owned[block] = 0
            self._free.append(block)
