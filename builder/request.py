"""What to build, from which checkpoint, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8.builder.checkpoint import Checkpoint, read_json, token_ids
from fp8.builder.engine import Limits, ModelInfo
from fp8.builder.formats.base import Format
from fp8.builder.graph import Graph
from fp8.builder.imports.base import refuse_unconverted
from fp8.builder.parallel.pipeline import Place
from fp8.builder.parallel.tensor import TensorParallel
from fp8.builder.quantization_config import read_dtype, read_format
from fp8.builder.quantize import Model
from fp8.builder.target import TARGETS, Journal, Target
from fp8.builder.workplace import BuildError
from fp8.plugins.gemm.types import ACCUMULATIONS

ALONE = Place()
MOST_RANKS = 1024
MOST_TOKENS, MOST_SEQUENCES = 1 << 20, (1 << 16) - 1  # of a step; a launch has no more rows of blocks


@dataclass(frozen=True)
class Reporter:
    """Where progress goes: (stage, done, total), remarks and warnings."""

    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    remark: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Request:
    """What to build. Without `max_seq_len` it is the model's."""

    max_batch_size: int = 64
    max_seq_len: int | None = None
    max_num_tokens: int = 8192
    target: str = "sm_90a"
    verify: bool = False
    tune: bool = False
    dump_passes: Path | None = None
    explain: str | None = None
    debug_tensors: tuple[str, ...] | None = None  # globs; None: no debug output
    tp_size: int = 1
    pp_size: int = 1
    pp_layers: tuple[int, ...] = ()  # layers of each pipeline stage; empty: as even as they go
    fp8_accumulation: str = "fast"  # of e4m3 products: as the tensor cores add, or "precise": float32 every 128 of K
    fp8_all_reduce: int = 0  # KiB from which on sums over ranks travel as e4m3; 0: none
    dtype: str | None = None  # of the activations: the checkpoint's, or "float32", which only references execute
    hollow: bool = False  # leave the matrices out of the weights file: benchmarks make up their own

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise BuildError(f"target {self.target!r} is not known; expected {' or '.join(TARGETS)}")
        if self.dtype not in (None, "float32") or (self.dtype and self.target != "cpu"):
            raise BuildError(
                f"dtype is {self.dtype!r} for target {self.target}; only float32 for target cpu can be chosen, as the "
                "kernels' activations have the checkpoint's 16-bit type"
            )
        if self.fp8_accumulation not in ACCUMULATIONS:
            expected = " or ".join(ACCUMULATIONS)
            raise BuildError(f"fp8_accumulation is {self.fp8_accumulation!r}, expected {expected}")
        if self.fp8_all_reduce < 0:
            raise BuildError(f"fp8_all_reduce is {self.fp8_all_reduce} KiB, expected a size, or 0 for none")
        for name in ("max_batch_size", "max_seq_len", "max_num_tokens", "tp_size", "pp_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BuildError(f"{name} is {value}, expected at least 1")
        for name, most in (("max_num_tokens", MOST_TOKENS), ("max_batch_size", MOST_SEQUENCES)):
            if getattr(self, name) > most:
                raise BuildError(f"{name} is {getattr(self, name)}, expected at most {most}")
        if self.tp_size * self.pp_size > MOST_RANKS:
            raise BuildError(
                f"tp_size {self.tp_size} x pp_size {self.pp_size} are more than {MOST_RANKS} ranks; one rank is one GPU"
            )
        if self.max_num_tokens < self.max_batch_size:
            raise BuildError(
                f"max_num_tokens {self.max_num_tokens} is below max_batch_size {self.max_batch_size}: a step of one "
                "token per sequence would not fit"
            )

    @property
    def places(self) -> list[Place]:
        """The places of all ranks."""
        return [self.place(rank) for rank in range(self.tp_size * self.pp_size)]

    def place(self, rank: int = 0) -> Place:
        """Raises BuildError if there is no such rank."""
        if not 0 <= rank < self.tp_size * self.pp_size:
            raise BuildError(
                f"rank is {rank}, expected 0 to {self.tp_size * self.pp_size - 1} (tp_size x pp_size ranks)"
            )
        return Place(rank, self.tp_size, self.pp_size, self.pp_layers)


@dataclass
class Source:
    """A checkpoint with what it says of itself."""

    model: Model
    checkpoint: Checkpoint
    format: Format = field(init=False)
    dtype: str = field(init=False)
    config: Any = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.model.read_config(self.checkpoint.config)
        refuse_unconverted(self.checkpoint)
        self.format = read_format(self.checkpoint.config)
        dtype = self.format.dtype or read_dtype(self.checkpoint.config)
        self.dtype = "bfloat16" if dtype == "float32" else dtype  # the kernels' activations have 16 bits

    def limits(self, request: Request) -> Limits:
        """Raises BuildError if max_seq_len exceeds the model's."""
        most = self.config.max_position_embeddings
        wanted = request.max_seq_len or most
        if wanted > most:
            raise BuildError(
                f"max_seq_len {wanted} exceeds the model's max_position_embeddings {most}; rotary positions beyond it "
                "were never trained"
            )
        return Limits(request.max_batch_size, wanted, request.max_num_tokens)

    def emit(self, limits: Limits, place: Place = ALONE) -> Graph:
        """The layers of a rank's stage, not yet divided among the ranks of the stage."""
        layers = place.layers(self.config.num_layers)
        return self.model.emit(
            self.config, self.checkpoint, self.format, self.dtype, layers=layers, max_positions=limits.max_seq_len
        )

    def tensor_parallel(self, place: Place) -> TensorParallel:
        return TensorParallel(self.info(), place.tp_rank, place.tp_size, self.format.unit)

    def passes_target(
        self, request: Request, place: Place, journal: Journal | None = None, kept: frozenset[str] = frozenset()
    ) -> Target:
        """What the passes get to know."""
        parallel = self.tensor_parallel(place) if place.tp_size > 1 else None
        limits = self.limits(request)
        return Target(
            request.target, limits, journal or Journal(), kept, parallel, request.fp8_accumulation,
            request.fp8_all_reduce, request.dtype,
        )  # fmt: skip

    def info(self, dtype: str | None = None) -> ModelInfo:
        """`dtype`: of the activations, if not the checkpoint's."""
        c, raw = self.config, self.checkpoint.config
        path = self.checkpoint.directory / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        of_end = generation if "eos_token_id" in generation else raw
        eos, bos = (token_ids(of, f"{end}_token_id", c.vocab_size) for of, end in ((of_end, "eos"), (raw, "bos")))
        dtype = dtype or self.dtype
        kv_dtype = "float8_e4m3fn" if self.format.fp8_kv_cache else dtype
        return ModelInfo(
            raw["model_type"], dtype, self.format.name, c.vocab_size, c.num_layers, c.num_heads, c.num_kv_heads,
            c.head_dim, c.hidden_size, c.max_position_embeddings, kv_dtype, next(iter(bos), None), eos,
        )  # fmt: skip
