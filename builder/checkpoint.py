"""Reading a checkpoint directory: config.json and safetensors files, mapped, never loaded whole.

Headers are validated byte by byte before anything is believed (https://github.com/huggingface/safetensors#format):
8 bytes of little-endian header length, a JSON header, then one gapless run of tensor data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors library itself
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16), "U32": np.dtype(np.uint32), "I32": np.dtype(np.int32), "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32), "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip

SCALES = ("F32", "BF16", "F16", "F64", "F8_E8M0")  # types of scales

LFS_POINTER = b"version "  # what git leaves of a file that git-lfs was to fetch: no header is so long
FOREIGN = {  # a file that gives away what a directory is, with and without a config.json
    "rank0.engine": "is an engine directory; give the checkpoint that it was built from",
    "rank0.safetensors": "is a TensorRT-LLM checkpoint; give what fp8-quantize --model_dir makes of it",
}
UNCONVERTED = {
    "*.gguf": "holds GGUF files, which are not read",
    "*.nemo": "holds a NeMo model, which is not read",
    "params.json": "holds a model as Meta stores it, which is not read",
}  # without a config.json


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: names the file or tensor, what was expected and what was found."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor's bytes lie: `offset` counts from the beginning of `file`."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def array(self) -> np.ndarray:
        """The values, mapped read-only."""
        if self.nbytes == 0:
            return np.zeros(self.shape, self.dtype)
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))
        return raw.view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of one safetensors file. Raises CheckpointError if the file breaks the format anywhere."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix == LFS_POINTER:
                raise CheckpointError(f"{path} is a Git LFS pointer instead of the weights; run git lfs pull there")
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path}: the safetensors header claims {length} bytes, the file has {size} (header limit "
                    f"{MAX_HEADER_BYTES}); it is truncated or damaged, fetch it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON ({error}); fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object; fetch it again")
    metadata = header.pop("__metadata__", {})
    entries = {name: _entry(path, 8 + length, name, fields) for name, fields in header.items()}
    _check_gapless(path, 8 + length, size, entries)
    return entries, metadata if isinstance(metadata, dict) else {}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _entry(path: Path, data: int, name: str, fields: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{path}: {name}: dtype, shape or data_offsets missing or malformed; fetch the file again"
        )
    if dtype not in DTYPES:
        other = (
            "; FNUZ codes mean other values than E4M3's, quantize the original model" if "FNUZ" in str(dtype) else ""
        )
        raise CheckpointError(f"{path}: {name}: dtype {dtype} is unknown; known are {', '.join(DTYPES)}{other}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: {name}: shape {list(shape)} of {dtype} takes {expected} bytes, data_offsets span {end - begin}"
        )
    return Entry(name, path, data + begin, expected, DTYPES[dtype], shape)


def _check_gapless(path: Path, data: int, size: int, entries: dict[str, Entry]) -> None:
    position = data
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != position:
            how = "overlaps the tensor before it" if entry.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: {entry.name} {how}; the header is damaged, fetch the file again")
        position += entry.nbytes
    if position != size:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes, the file has {size}: truncated or damaged, fetch it again"
        )


class Checkpoint:
    """A Hugging Face checkpoint directory: `config` and tensors by name, in one file or in indexed shards."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a directory; expected a Hugging Face checkpoint directory")
        self._refuse_foreign()
        self.config: dict[str, Any] = read_json(self.directory / "config.json")

    def _refuse_foreign(self) -> None:
        for file, what in FOREIGN.items():
            if (self.directory / file).is_file():
                raise CheckpointError(f"{self.directory} {what} (it has {file})")
        if (self.directory / "config.json").is_file():
            return
        for pattern, what in UNCONVERTED.items():
            if any(self.directory.glob(pattern)):
                raise CheckpointError(f"{self.directory} {what}; give the model's Hugging Face directory")

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor of the checkpoint."""
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            return self._indexed(index)
        if single.is_file():
            return read_header(single)[0]
        pickled = " (pickled .bin files are not read; convert them to safetensors)" * bool(
            list(self.directory.glob("*.bin"))
        )
        raise CheckpointError(f"{self.directory} has neither {index.name} nor {single.name}{pickled}")

    def _indexed(self, index: Path) -> dict[str, Entry]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map is missing or malformed")
        shards: dict[str, dict[str, Entry]] = {}
        for file in sorted(set(weight_map.values())):
            path = self.directory / file
            if Path(file).name != file:
                raise CheckpointError(f"{index}: shard {file!r} is not a plain file name")
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; {index.name} names it as a shard")
            shards[file] = read_header(path)[0]
        for name, file in weight_map.items():
            if name not in shards[file]:
                raise CheckpointError(f"{self.directory / file} has no tensor {name}; {index.name} says it does")
        return {name: shards[file][name] for name, file in weight_map.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def entry(self, name: str, shape: tuple[int, ...] | None = None) -> Entry:
        """Where a tensor lies. Raises CheckpointError if it is missing or not of the expected shape."""
        if name not in self.entries:
            raise CheckpointError(f"{name} is missing from the checkpoint in {self.directory}")
        entry = self.entries[name]
        if shape is not None and entry.shape != shape:
            raise CheckpointError(f"{name} has shape {list(entry.shape)}, expected {list(shape)} ({entry.file})")
        return entry

    def scale(self, name: str, size: int = 1) -> np.ndarray:
        """A scale as float32 [size], stored as [], [1], [N] or [N, 1] in any float dtype.

        Raises CheckpointError if it is missing, of another size, or has an element that is not finite and positive.
        """
        return self.scales(name, {(size,), (size, 1)} | ({()} if size == 1 else set())).reshape(size)

    def scales(self, name: str, shapes: set[tuple[int, ...]]) -> np.ndarray:
        """Scales as float32, stored in one of the shapes in any float dtype. Raises CheckpointError as `scale` does."""
        entry = self.entry(name)
        if entry.shape not in shapes or entry.dtype not in [DTYPES[k] for k in SCALES]:
            expected = " or ".join(str(list(s)) for s in sorted(shapes))
            raise CheckpointError(
                f"{name} is {entry.dtype} {list(entry.shape)}, expected floats of shape {expected} ({entry.file})"
            )
        values = entry.array().astype(np.float32)
        bad = values[~(np.isfinite(values) & (values > 0))]
        if bad.size:
            raise CheckpointError(
                f"{name} holds the scale {bad[0]}; scales must be finite and above 0, quantize the model again"
            )
        return values


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def token_ids(config: dict[str, Any], key: str, vocab_size: int) -> tuple[int, ...]:
    """One token, several or none, of those that there are: some checkpoints name tokens beyond their vocabulary.
    Raises CheckpointError for what are no tokens."""
    value = config.get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in listed):
        raise CheckpointError(f"{key} is {value!r}, expected a token id, a list of them, or null")
    return tuple(token for token in listed if 0 <= token < vocab_size)
