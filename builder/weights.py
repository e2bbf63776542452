"""Weights as the kernels read them, written by streaming: never more than one merged weight in memory.

A graph's constant is one tensor of the checkpoint or `Prepared` from several: concatenated, interleaved, expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import torch
from onnx_graphsurgeon.ir.tensor import LazyValues

from fp8.builder.dtypes import BYTES, SAFETENSORS, dtype_name, numpy_dtype
from fp8.builder.engine import safetensors_header, write_atomically

Function = Callable[..., torch.Tensor]


class Prepared(LazyValues):
    """A constant computed from others when it is wanted: `function(*parts)` in torch. Its shape is known at once: from
    those of the parts or, where `function` looks at values (which torch refuses on the meta device), from these."""

    def __init__(self, parts: Sequence[gs.Constant], function: Function) -> None:
        self.parts = tuple(parts)
        self.function = function
        try:
            meta = function(*(torch.empty(tuple(p.shape), dtype=torch_dtype(p), device="meta") for p in parts))
        except NotImplementedError:
            meta = self.load_torch()
        self.shape = list(meta.shape)
        self.dtype = numpy_dtype(str(meta.dtype).removeprefix("torch."))
        self.nbytes = meta.numel() * meta.element_size()

    def load(self) -> np.ndarray:
        return to_numpy(self.load_torch())

    def load_torch(self) -> torch.Tensor:
        return self.function(*(to_torch(p) for p in self.parts))


def prepared(name: str, parts: Sequence[gs.Constant], function: Function) -> gs.Constant:
    return gs.Constant(name, Prepared(parts, function))


class Sliced(LazyValues):
    """A box of a constant: of a stored one, only that part of the file is read."""

    def __init__(self, whole: gs.Constant, box: Sequence[tuple[int, int] | None]) -> None:
        self.whole = whole
        self.box = tuple(slice(None) if r is None else slice(*r) for r in box)
        self.shape = [d if r is None else r[1] - r[0] for d, r in zip(whole.shape, box, strict=True)]
        self.dtype = whole.dtype
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def load(self) -> np.ndarray:
        values = self.whole._values
        return (values.load() if isinstance(values, LazyValues) else values)[self.box]


def sliced(name: str, whole: gs.Constant, box: Sequence[tuple[int, int] | None]) -> gs.Constant:
    return gs.Constant(name, Sliced(whole, box))


def concatenate(*parts: torch.Tensor) -> torch.Tensor:
    """Concatenates along the first dimension. (torch.cat on meta tensors would import torch's compiler: a second of
    every build.)"""
    if parts[0].is_meta:
        return parts[0].new_empty(sum(p.shape[0] for p in parts), *parts[0].shape[1:])
    return torch.cat(parts)


def torch_dtype(tensor: gs.Tensor) -> torch.dtype:
    return getattr(torch, dtype_name(tensor.dtype))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    name = str(tensor.dtype).removeprefix("torch.")
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.view(numpy_dtype(name)).reshape(tuple(tensor.shape))


def to_torch(constant: gs.Constant) -> torch.Tensor:
    """The values of a constant; nothing is kept in the graph."""
    values = constant._values
    if isinstance(values, Prepared):
        return values.load_torch()
    array = np.array(values.load() if isinstance(values, LazyValues) else values).reshape(-1)  # a copy, off the file
    return torch.from_numpy(array.view(np.uint8)).view(torch_dtype(constant)).reshape(tuple(constant.shape))


def write(path: Path, constants: Iterable[gs.Constant], progress: Callable[[int], None] | None = None) -> str:
    """Writes a safetensors file atomically and returns its Digest. Same constants, same bytes."""
    order = sorted(constants, key=lambda c: (-BYTES[dtype_name(c.dtype)], c.name))  # wide types first: all stay aligned
    entries = [(c.name, SAFETENSORS[dtype_name(c.dtype)], tuple(c.shape), size(c)) for c in order]

    def chunks() -> Iterator[bytes | memoryview]:
        yield safetensors_header(entries, {"format": "pt"})
        for constant in order:
            data = to_torch(constant).contiguous().reshape(-1).view(torch.uint8).numpy()
            assert data.nbytes == size(constant), constant.name
            yield data.data
            if progress:
                progress(data.nbytes)

    return write_atomically(path, chunks())


def size(constant: gs.Constant) -> int:
    return int(np.prod(constant.shape, dtype=np.int64)) * BYTES[dtype_name(constant.dtype)]
