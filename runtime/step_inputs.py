"""A step's inputs: fixed places in one buffer, filled on the host and uploaded with one copy.

The buffer starts with the table of sampled tokens (one per slot, written by the sampler, never uploaded), followed by
the fields of `layout`. `sources` points into the buffer, at a sampled token or at an uploaded one, so a decode row
takes its input from the step before without the host having seen it.

A step's end leaves the inputs one token on (plugins/advance). A decode step that `Packer.follows` finds to take just
these is neither packed nor uploaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fp8.builder.engine import Limits
from fp8.plugins.base import StepShape
from fp8.runtime.request import Request
from fp8.runtime.scheduler import Row

if TYPE_CHECKING:
    import torch

ALIGNMENT = 128  # bytes


def layout(limits: Limits) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Fields that are uploaded, in order: dtype and maximal shape."""
    tokens, sequences, rows = limits.max_num_tokens, limits.max_batch_size, limits.logits_rows
    int32, int64, float32 = np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)
    return {
        "token_ids": (int32, (tokens,)),
        "sources": (int32, (tokens,)),
        "position_ids": (int32, (tokens,)),
        "slot_mapping": (int32, (tokens,)),
        "query_start": (int32, (sequences + 1,)),
        "sequence_lengths": (int32, (sequences,)),
        "block_tables": (int32, (sequences, limits.sequence_blocks)),
        "logits_indices": (int32, (rows,)),
        "temperature": (float32, (rows,)),
        "counter": (int32, (rows,)),
        "seed": (int64, (rows,)),
        "slots": (int64, (rows,)),  # where the sampled tokens go
        "stage": (int32, (rows,)),  # and in which of the host's buffers; filled by the upload
    }


class Packer:
    """Writes scheduled rows into host arrays named as in `layout`, without torch and without a loop over tokens.

    What stays the same while a request runs (its blocks, temperature, seed) is kept by slot."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.spare_slot = limits.max_batch_size  # padding rows read and write here
        self.first_token_id = _aligned(4 * (limits.max_batch_size + 1)) // 4  # index of token_ids[0] in the buffer
        width = limits.sequence_blocks
        self._tables = np.zeros((limits.max_batch_size + 1, width), np.int32)
        self._temperature = np.zeros(limits.max_batch_size + 1, np.float32)
        self._seed = np.zeros(limits.max_batch_size + 1, np.int64)
        self._owner: list[list[int] | None] = [None] * (limits.max_batch_size + 1)  # the list of blocks, by identity
        self._written = [0] * (limits.max_batch_size + 1)  # of its blocks, how many are in the table
        self._before: Sequence[Row] | None = None  # the rows whose inputs lie on the device, one token on
        self._longest = 0  # context among them

    def ran(self, rows: Sequence[Row], shape: StepShape) -> None:
        """The step of `rows` is enqueued, and the device's inputs are one token on."""
        if shape.decode_sequences == len(rows) == shape.logits_rows and all(row.request.search is None for row in rows):
            self._before, self._longest = rows, shape.max_context

    def follows(self, rows: Sequence[Row]) -> StepShape | None:
        """The shape of a step whose inputs are those that the step before, the last one that `ran`, left on the device:
        of the same sequences, one token on, each on the page that it was on. Else None. Says so once."""
        before, self._before = self._before, None
        if before is None or len(before) != len(rows) or not all(map(self._goes_on, rows, before)):
            return None
        n = len(rows)
        return StepShape(n, n, n, 0, self._longest + 1, n)

    def _goes_on(self, row: Row, before: Row) -> bool:
        request = row.request
        return (
            request is before.request
            and row.start == before.start + 1
            and row.count == 1
            and row.samples
            and row.start % self.limits.block_size != 0
            and self._owner[request.slot] is request.blocks
        )

    def pack(self, rows: Sequence[Row], host: dict[str, np.ndarray]) -> StepShape:
        """Fills `host` with `rows` (single tokens first) and returns the step's shape."""
        self._before = None  # its inputs are to be uploaded, whoever uses them
        requests, singles = [row.request for row in rows], [row.count for row in rows].count(1)
        slots = self._update_tables(requests)
        starts = np.array([row.start for row in rows[:singles]], np.int32)
        self._pack_singles(requests[:singles], starts, slots[:singles], host)
        at, max_query = singles, 0
        for i, row in enumerate(rows[singles:], singles):
            self._pack_chunk(row, i, at, host)
            at += row.count
            max_query = max(max_query, row.count)
        longest = int(host["sequence_lengths"][: len(rows)].max())
        columns = -(-longest // self.limits.block_size)
        host["block_tables"][: len(rows), :columns] = self._tables[slots, :columns]
        return self._pack_samples(rows, slots, StepShape(at, len(rows), singles, max_query, longest, 0), host)

    def want_all_logits(self, shape: StepShape, host: dict[str, np.ndarray]) -> StepShape:
        """Turns a packed step into one that computes the logits of every token."""
        rows = shape.tokens
        host["logits_indices"][:rows] = np.arange(rows, dtype=np.int32)
        host["temperature"][:rows] = 0
        host["slots"][:rows] = self.spare_slot
        return StepShape(
            shape.tokens, shape.sequences, shape.decode_sequences, shape.max_query, shape.max_context, rows
        )

    def pad(self, shape: StepShape, rows: int, host: dict[str, np.ndarray]) -> None:
        """Grows a decode step to `rows` rows: the added ones have no context, write no K and V, and go nowhere."""
        for name, value in self._padding().items():
            host[name][shape.tokens : rows] = value
        host["query_start"][: rows + 1] = np.arange(rows + 1, dtype=np.int32)
        host["logits_indices"][:rows] = np.arange(rows, dtype=np.int32)

    def live(self, shape: StepShape, host: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parts of the packed arrays that a step of that shape reads, for another rank's `restore`."""
        return {name: host[name][where] for name, where in self._live(shape).items()}

    def restore(self, shape: StepShape, live: dict[str, np.ndarray], host: dict[str, np.ndarray]) -> None:
        for name, where in self._live(shape).items():
            host[name][where] = live[name]

    def _live(self, shape: StepShape) -> dict[str, tuple[slice, ...]]:
        tokens, sequences, rows = (slice(0, n) for n in (shape.tokens, shape.sequences, shape.logits_rows))
        columns = slice(0, -(-shape.max_context // self.limits.block_size))
        sizes = {"query_start": (slice(0, shape.sequences + 1),), "block_tables": (sequences, columns)}
        sizes |= {name: (tokens,) for name in ("token_ids", "sources", "position_ids", "slot_mapping")}
        sizes |= {name: (rows,) for name in ("logits_indices", "temperature", "counter", "seed", "slots")}
        return sizes | {"sequence_lengths": (sequences,)}

    def _padding(self) -> dict[str, int]:
        return {
            "sources": self.spare_slot, "position_ids": 0, "slot_mapping": -1, "sequence_lengths": 0, "temperature": 0,
            "counter": 0, "seed": 0, "slots": self.spare_slot, "block_tables": 0,
        }  # fmt: skip

    def _pack_singles(
        self, requests: Sequence[Request], positions: np.ndarray, slots: np.ndarray, host: dict[str, np.ndarray]
    ) -> None:
        n, block = len(requests), self.limits.block_size
        host["sources"][:n] = slots
        known = positions < np.fromiter((len(r.tokens) for r in requests), np.int32, n)
        for i in np.flatnonzero(known).tolist():
            host["token_ids"][i] = requests[i].tokens[positions[i]]
            host["sources"][i] = self.first_token_id + i
        host["position_ids"][:n] = positions
        host["slot_mapping"][:n] = self._tables[slots, positions // block] * block + positions % block
        host["sequence_lengths"][:n] = positions + 1
        host["query_start"][: n + 1] = np.arange(n + 1)

    def _pack_chunk(self, row: Row, sequence: int, at: int, host: dict[str, np.ndarray]) -> None:
        end, block = row.start + row.count, self.limits.block_size
        here = slice(at, at + row.count)
        positions = np.arange(row.start, end, dtype=np.int32)
        host["token_ids"][here] = row.request.tokens[row.start : end]
        host["sources"][here] = np.arange(self.first_token_id + here.start, self.first_token_id + here.stop)
        host["position_ids"][here] = positions
        host["slot_mapping"][here] = self._tables[row.request.slot, positions // block] * block + positions % block
        host["sequence_lengths"][sequence] = end
        host["query_start"][sequence + 1] = here.stop

    def _pack_samples(
        self, rows: Sequence[Row], slots: np.ndarray, shape: StepShape, host: dict[str, np.ndarray]
    ) -> StepShape:
        chosen = np.flatnonzero([row.samples for row in rows])
        n = len(chosen)
        host["logits_indices"][:n] = host["query_start"][1:][chosen] - 1
        host["temperature"][:n] = self._temperature[slots[chosen]]
        host["counter"][:n] = np.array([row.index for row in rows], np.int32)[chosen]
        host["seed"][:n] = self._seed[slots[chosen]]
        host["slots"][:n] = slots[chosen]
        return StepShape(shape.tokens, shape.sequences, shape.decode_sequences, shape.max_query, shape.max_context, n)

    def _update_tables(self, requests: Sequence[Request]) -> np.ndarray:
        """Brings the slots' rows up to date and returns the slots. A preempted request comes back with another list of
        blocks; what is known of a slot goes by that list."""
        owner, written, slots = self._owner, self._written, [r.slot for r in requests]
        for request, slot in zip(requests, slots, strict=True):
            blocks = request.blocks
            if owner[slot] is not blocks:
                owner[slot], written[slot] = blocks, 0
                self._temperature[slot], self._seed[slot] = request.params.temperature, request.seed
            if written[slot] < len(blocks):
                self._tables[slot, written[slot] : len(blocks)] = blocks[written[slot] :]
                written[slot] = len(blocks)
        return np.array(slots, np.int32)


class StepInputs:
    """The buffer on the device and its staging copies on the host (the same memory on a CPU).

    `device[name]` are maximal-size views for kernels to be bound to; `host[k][name]` are numpy views of staging copy k.
    `read[k]` are the tokens that the step of staging copy k sampled, in the order of its rows, for the host: the device
    writes them there.
    """

    def __init__(self, limits: Limits, device: torch.device, stages: int) -> None:
        import torch

        fields, (offsets, size) = layout(limits), _offsets(limits)
        self._head = offsets["token_ids"]
        self._bytes = torch.zeros(size, dtype=torch.uint8, device=device)
        pinned = device.type == "cuda"
        self._staging = torch.zeros(stages, size, dtype=torch.uint8, pin_memory=True) if pinned else self._bytes[None]
        self.host = [_views(self._staging[k % len(self._staging)].numpy(), fields, offsets) for k in range(stages)]
        self._fields = torch.tensor(_fields(limits, offsets), dtype=torch.int32, device=device)
        self._turn = torch.zeros(2, dtype=torch.int32, device=device)
        self.device = {
            name: _view(self._bytes, offsets[name], getattr(torch, dtype.name), shape)
            for name, (dtype, shape) in fields.items()
        }
        self.tokens = self._bytes.view(torch.int32)  # what `sources` points into
        self.sampled = self.tokens[: limits.max_batch_size + 1]
        self.input_ids = torch.zeros(limits.max_num_tokens, dtype=torch.int32, device=device)
        self.read = torch.zeros(stages, limits.logits_rows, dtype=torch.int32, pin_memory=pinned)

    @property
    def to_advance(self) -> list[torch.Tensor]:
        """The advance plugin's tensors after the tokens."""
        names = ("position_ids", "slot_mapping", "sequence_lengths", "counter", "stage")
        return [self.device["slots"], self.sampled, self.input_ids, *(self.device[name] for name in names), self.read]

    @property
    def to_fetch(self) -> list[torch.Tensor]:
        """The fetch plugin's tensors."""
        return [self._staging, self._fields, self._bytes, self._turn]

    def seal(self, stage: int) -> None:
        """The last thing that the host writes into a staging buffer."""
        self.host[stage]["stage"][:] = stage

    def upload(self, stage: int) -> None:
        """Enqueues the copy of a staging buffer to the device; the sampled tokens stay as they are."""
        self.seal(stage)
        if self._bytes.is_cuda:
            self._bytes[self._head :].copy_(self._staging[stage, self._head :], non_blocking=True)

    def gather_input_ids(self, tokens: int) -> None:
        """input_ids[i] = buffer[sources[i]], on the device."""
        import torch

        torch.index_select(self.tokens, 0, self.device["sources"][:tokens], out=self.input_ids[:tokens])


def _offsets(limits: Limits) -> tuple[dict[str, int], int]:
    """The offset of each field, and the end of the last."""
    offsets, size = {}, _aligned(4 * (limits.max_batch_size + 1))
    for name, (dtype, shape) in layout(limits).items():
        offsets[name] = size
        size = _aligned(size + dtype.itemsize * math.prod(shape))
    return offsets, size


def _fields(limits: Limits, offsets: dict[str, int]) -> list[tuple[int, int, int]]:
    """The fetch plugin's."""
    counted = {"query_start": 2, "sequence_lengths": 1, "block_tables": 1}
    counted |= dict.fromkeys(("token_ids", "sources", "position_ids", "slot_mapping"), 0)
    return [
        (offsets[name], counted.get(name, 3), dtype.itemsize * math.prod(shape[1:]))
        for name, (dtype, shape) in layout(limits).items()
    ]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _views(buffer: np.ndarray, fields: dict, offsets: dict[str, int]) -> dict[str, np.ndarray]:
    return {
        name: buffer[offsets[name] : offsets[name] + dtype.itemsize * int(np.prod(shape))].view(dtype).reshape(shape)
        for name, (dtype, shape) in fields.items()
    }


def _view(buffer: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return buffer[offset : offset + dtype.itemsize * math.prod(shape)].view(dtype).view(shape)
