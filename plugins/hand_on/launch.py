"""Messages between neighbours of a ring of ranks, through memory that they share: where they lie, and launches."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fp8.plugins.all_reduce.region import Regions
    from fp8.plugins.cuda import Function

THREADS, BLOCKS, UNIT = 256, 256, 16  # of a launch, at most; bytes of a thread
LARGEST = THREADS * BLOCKS * UNIT  # bytes of a message
KINDS = 2  # of messages, each with counters and places of its own
HEADER = 2 * KINDS * BLOCKS * 4  # bytes of counters: sent and received


def region_bytes(depth: int) -> int:
    """Bytes of a rank's region, with `depth` places for messages of each kind; all of it is zero at first."""
    return HEADER + KINDS * depth * LARGEST


class Channel:
    """Messages of one kind from each rank of `regions` to the next; `functions` are the plugin's kernels.

    They arrive in order, each as large as its receiver says. Who sends sees to it that, of the messages before, all but
    the last `depth` - 1 have been received: a place holds one message.
    """

    def __init__(self, functions: Sequence[Function], regions: Regions, kind: int, depth: int) -> None:
        from fp8.plugins.cuda import Launch

        rank, world = regions.rank, len(regions.addresses)
        own, after = regions.addresses[rank], regions.addresses[(rank + 1) % world]
        area = HEADER + kind * depth * LARGEST
        self._data, self._bytes = ctypes.c_uint64(0), ctypes.c_uint64(0)
        send, receive = functions

        def bound(function: Function, region: int, counters: int) -> Launch:
            places, turns = ctypes.c_uint64(region + area), ctypes.c_uint64(own + counters * BLOCKS * 4)
            return Launch(function, THREADS, [self._data, places, turns, ctypes.c_uint32(depth), self._bytes])

        self._send, self._receive = bound(send, after, 2 * kind), bound(receive, own, 2 * kind + 1)

    def send(self, tensor: torch.Tensor) -> None:
        """Enqueues the sending; returns before anybody has the message."""
        self._send(self._grid(tensor))

    def receive(self, into: torch.Tensor) -> None:
        """What is enqueued next on this stream finds the message there."""
        self._receive(self._grid(into))

    def _grid(self, tensor: torch.Tensor) -> int:
        assert fits(tensor) and tensor.is_contiguous() and tensor.data_ptr() % UNIT == 0
        self._data.value, self._bytes.value = tensor.data_ptr(), tensor.nbytes
        return -(-tensor.nbytes // (THREADS * UNIT))


def fits(tensor: torch.Tensor) -> bool:
    return 0 < tensor.nbytes <= LARGEST and tensor.nbytes % 4 == 0
