"""Weights from the engine's file to the GPU: one pass over the file through pinned buffers, hashed on the way."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from typing import TYPE_CHECKING, BinaryIO

from fp8.builder.engine import Digest, Engine, EngineError, check_weights
from fp8.runtime.reference import MakeWeight, check_weight, missing

if TYPE_CHECKING:
    import torch

CHUNK = 64 << 20
DTYPES = {
    "F8_E4M3": "float8_e4m3fn", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "I32": "int32", "I64": "int64",
    "U8": "uint8", "I8": "int8",
}  # fmt: skip
ALIGNMENT = 256  # of each weight on the device: TMA wants 16


def load_to_gpu(engine: Engine, device: torch.device, make: MakeWeight | None = None) -> dict[str, torch.Tensor]:
    """All weights of the plan, by name: those of the file in one allocation, others as `make` makes them.

    Raises EngineError if the file is not the one that the plan was built with (its hash is checked as it streams by).
    """
    import torch

    with engine.weights_path.open("rb") as file:
        header, entries = _header(file, engine, make)
        places, size = _places(entries)
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        found = _stream(file, header, entries, places, memory)
    check_weights(engine, found)
    weights = {}
    if make is not None:
        weights = {b.name: make(b, device) for b in engine.plan.buffers if b.kind == "weight" and b.name not in entries}
    for name, entry in entries.items():
        dtype = getattr(torch, DTYPES[entry["dtype"]])
        end = places[name] + math.prod(entry["shape"]) * dtype.itemsize
        weights[name] = memory[places[name] : end].view(dtype).view(entry["shape"])
    return weights


def _header(file: BinaryIO, engine: Engine, make: MakeWeight | None) -> tuple[bytes, dict[str, dict]]:
    length = file.read(8)
    text = file.read(int.from_bytes(length, "little"))
    try:
        entries = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
    except ValueError as error:
        raise EngineError(
            f"{engine.weights_path} is damaged: its header is not JSON ({error}); build it again"
        ) from error
    for buffer in engine.plan.buffers:
        if buffer.kind != "weight":
            continue
        if buffer.name not in entries:
            if make is None:
                raise missing(engine, buffer)
            continue
        entry = entries[buffer.name]
        check_weight(engine, buffer, DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]))
    return length + text, dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))


def _places(entries: dict[str, dict]) -> tuple[dict[str, int], int]:
    places, size = {}, 0
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        places[name] = size
        size += -(-(end - begin) // ALIGNMENT) * ALIGNMENT
    return places, max(size, 1)


def _stream(
    file: BinaryIO, header: bytes, entries: dict[str, dict], places: dict[str, int], memory: torch.Tensor
) -> str:
    """Copies the data section to its places, two chunks in flight; returns the digest of the whole file."""
    import torch

    spans = [(*entry["data_offsets"], places[name]) for name, entry in entries.items()]
    buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    events = [torch.cuda.Event() for _ in buffers]
    hashed: list[list[Future]] = [[], []]
    position, turn = 0, 0
    with Digest() as digest:
        digest.update(header)
        while True:
            events[turn].synchronize()
            for pending in hashed[turn]:
                pending.result()
            view = buffers[turn].numpy()
            count = file.readinto(view.data)  # type: ignore[attr-defined]
            if not count:
                break
            hashed[turn] = digest.update(view[:count].data)
            spans = _copy(buffers[turn], position, count, spans, memory)
            events[turn].record()
            position, turn = position + count, 1 - turn
    torch.cuda.current_stream().synchronize()
    return digest.hexdigest()


def _copy(chunk: torch.Tensor, position: int, count: int, spans: list, memory: torch.Tensor) -> list:
    """Copies what the chunk (file bytes `position` to `position + count` of the data) holds of each tensor; returns
    the tensors that go on after it."""
    for begin, end, place in spans:
        if begin >= position + count:
            break
        low, high = max(begin, position), min(end, position + count)
        if low < high:
            memory[place + low - begin : place + high - begin].copy_(
                chunk[low - position : high - position], non_blocking=True
            )
    return [span for span in spans if span[1] > position + count]
