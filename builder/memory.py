"""Where activations live: their liveness -> offsets in one arena."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fp8.builder.dtypes import BYTES
from fp8.builder.engine import Buffer, Limits, Step

ALIGNMENT = 256  # bytes; TMA wants 16, a full L2 sector line is 128, cudaMalloc gives 256


def buffer_bytes(buffer: Buffer, limits: Limits) -> int:
    """Size for the maximal step."""
    batch = limits.max_batch_size
    sizes = {"T": limits.max_num_tokens, "B": batch, "B+1": batch + 1, "L": limits.logits_rows, "blocks": 1}
    count = 1
    for dim in buffer.shape:
        count *= sizes[dim] if isinstance(dim, str) else dim
    return count * BYTES[buffer.dtype]


def place(
    buffers: dict[str, Buffer], steps: Iterable[Step], limits: Limits, early: Mapping[str, int] | None = None
) -> tuple[dict[str, int], int]:
    """Offsets of the activations in one arena, and its size: the largest first, each at the lowest place that is free
    from the step that writes it through the last one that reads it. `early`: those that a step before may write."""
    lives: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        for name in (*step.inputs, *step.outputs):
            if name and buffers[name].kind == "activation":
                lives.setdefault(name, [(early or {}).get(name, index), index])[1] = index
    sizes = {name: align(buffer_bytes(buffers[name], limits)) for name in lives}
    offsets: dict[str, int] = {}
    for name in sorted(lives, key=lambda n: (-sizes[n], lives[n][0], n)):
        first, last = lives[name]
        offset = 0
        for other in sorted(offsets, key=offsets.__getitem__):
            if lives[other][0] > last or first > lives[other][1]:
                continue
            if offset + sizes[name] <= offsets[other]:
                break
            offset = max(offset, offsets[other] + sizes[other])
        offsets[name] = offset
    return offsets, max((offsets[n] + sizes[n] for n in offsets), default=0)


def align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
