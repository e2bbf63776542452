"""A checkpoint that another tool quantized, seen under the names that are used here; no value is changed.

Scales come out in float32, which holds each of the types in which they are stored, and in the shapes of our formats.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8.builder.checkpoint import DTYPES, Checkpoint, CheckpointError, Entry
from fp8.builder.formats.base import Format, FormatError, load
from fp8.builder.formats.fp8_block import ROWS
from fp8.builder.imports.base import ORIGINAL, Scheme
from fp8.builder.quantization_config import read_dtype
from fp8.plugins.base import SCALE_BLOCK

E4M3 = DTYPES["F8_E4M3"]


class Imported(Checkpoint):
    """The original's tensors; scales by our names. `found` holds those that were asked for, in the shape in which they
    are written: a dry emission of the model finds them all, and what is missing or misshapen."""

    def __init__(self, original: Checkpoint, scheme: Scheme) -> None:
        self.directory, self.config = original.directory, original.config
        self.original, self.scheme = original, scheme
        self.entries = original.entries
        self.found: dict[str, np.ndarray] = {}
        self._sources: set[str] = set()
        quantized = [n.removesuffix(".weight") for n, e in self.entries.items() if is_quantized(n, e)]
        self.quantized = frozenset(quantized)
        for module in quantized:
            self._check(module)

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors but the scales that were asked for."""
        return (name for name in self.original if name not in self._sources)

    def format(self, kv_cache_dtype: str) -> Format:
        """That of the checkpoint, in which every linear is as it is stored."""
        name = self.scheme.format
        if name == "bf16" and read_dtype(self.config) == "float16":
            name = "fp16"
        modules = (n.removesuffix(".weight") for n in self.entries if n.endswith(".weight"))
        plain = tuple(sorted(set(modules) - self.quantized))
        return load(name)(kv_cache_dtype, plain, **self.scheme.options)

    def _check(self, module: str) -> None:
        """Raises CheckpointError or FormatError for an e4m3 weight that the engine cannot keep."""
        entry = self.entry(f"{module}.weight")
        if self.scheme.format == "bf16":
            raise CheckpointError(
                f"{entry.name} is float8_e4m3fn, and {self.scheme.tool}'s configuration quantizes no linear; {ORIGINAL}"
            )
        if module == "lm_head" or len(entry.shape) != 2:
            raise CheckpointError(
                f"{entry.name} is float8_e4m3fn {list(entry.shape)}; linears [N, K] other than lm_head can be, "
                f"this stays in the model's type here; {ORIGINAL}"
            )
        if pattern := self.scheme.ignores(module):
            raise CheckpointError(
                f"{entry.name} is float8_e4m3fn, and {pattern!r} in {self.scheme.tool}'s configuration leaves it "
                "unquantized; one of the two is wrong, fetch the checkpoint again"
            )
        if self.scheme.format == "fp8_block" and (entry.shape[1] % SCALE_BLOCK or entry.shape[0] % ROWS):
            raise FormatError(
                f"{entry.name} is {list(entry.shape)}; with scales of blocks, K must be a multiple of {SCALE_BLOCK} "
                f"and N of {ROWS} here; {ORIGINAL} --qformat fp8_rowwise"
            )

    def leave(self, name: str) -> None:
        """A scale that is there and not wanted."""
        if source := self.source(name):
            self._sources.add(source)

    def source(self, name: str) -> str | None:
        """The original's name of a scale."""
        module, _, kind = name.rpartition(".")
        suffixes = getattr(self.scheme, kind, (kind,))
        return next((f"{module}.{s}" for s in suffixes if f"{module}.{s}" in self.original), None)

    def scale(self, name: str, size: int = 1) -> np.ndarray:
        """float32 [size]; one of a whole tensor stands for all channels if the scheme says so. Raises CheckpointError
        as `Checkpoint.scale` does, by the original's name."""
        shapes: set[tuple[int, ...]] = {(size,), (size, 1)}
        if size == 1 or (self.scheme.one_weight_scale and name.endswith(".weight_scale")):
            shapes |= {(), (1,), (1, 1)}
        values = self._read(name, shapes).reshape(-1)
        values = np.repeat(values, size) if values.size == 1 else values
        self.found[name] = values.reshape(size, 1) if size > 1 else values
        return values

    def scales(self, name: str, shapes: set[tuple[int, ...]]) -> np.ndarray:
        """float32, in the one shape [N / 128, K / 128]; ModelOpt's have a dimension of 1 after each."""
        ((n, k),) = shapes
        self.found[name] = self._read(name, {(n, k), (n, 1, k, 1)}).reshape(n, k)
        return self.found[name]

    def _read(self, name: str, shapes: set[tuple[int, ...]]) -> np.ndarray:
        source = self.source(name)
        if source is None:
            module, _, kind = name.rpartition(".")
            expected = f"{module}.{getattr(self.scheme, kind, (kind,))[0]}"
            raise CheckpointError(
                f"{expected} is missing from the checkpoint in {self.directory}; its configuration "
                f"({self.scheme.tool}) says that it is there; fetch it again"
            )
        self._sources.add(source)
        return self.original.scales(source, shapes)


def is_quantized(name: str, entry: Entry) -> bool:
    return name.endswith(".weight") and entry.dtype == E4M3
