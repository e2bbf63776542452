"""Writing a checkpoint's tensors: safetensors shards of bounded size, streamed one tensor at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

MAX_SHARD_BYTES = 5_000_000_000
_NAMES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its type is known before its values are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Tensors that are computed together, such as a weight and its scale; they go into one shard."""

    tensors: tuple[Planned, ...]
    compute: Callable[[], dict[str, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


def write_shards(
    directory: Path, groups: Sequence[Group], progress: Callable[[int, int], None], max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """model.safetensors, or model-0000i-of-0000n.safetensors and their index. One group is in memory at a time."""
    shards = list(_split(groups, max_bytes))
    total = sum(g.nbytes for g in groups)
    done = 0
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (directory / file).open("wb") as out:
            out.write(_header(shard))
            for group in shard:
                values = group.compute()
                for planned in group.tensors:
                    out.write(_data(values[planned.name], planned))
                    weight_map[planned.name] = file
                done += group.nbytes
                progress(done, total)
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _split(groups: Sequence[Group], max_bytes: int) -> Iterator[list[Group]]:
    shard: list[Group] = []
    size = 0
    for group in groups:
        if shard and size + group.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += group.nbytes
    yield shard


def _header(shard: Sequence[Group]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in (t for group in shard for t in group.tensors):
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _data(value: torch.Tensor, planned: Planned) -> memoryview:
    assert value.dtype == planned.dtype and tuple(value.shape) == planned.shape, planned.name
    flat = value.cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
