"""THE engine format: what `fp8-build` writes and the runtime reads. Imports nothing heavy.

engine_dir/
  config.json          what the model is, its limits, the compatibility record (for people and tools)
  rank{r}.engine       a safetensors container: the plan as JSON in the metadata, cubins as byte tensors
  rank{r}.safetensors  weights in the layout that the kernels read; tied to the plan by hash
  tokenizer files      copied from the checkpoint
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fp8.plugins.sampling.memory import option_bytes

FORMAT_VERSION = 3
PIECE = 16 << 20  # bytes of a file that are hashed by themselves

Kind = str  # "input" | "weight" | "activation" | "kv_cache" | "output"


class EngineError(RuntimeError):
    """An engine that cannot be written, read or run here: says which file, what was expected and what was found."""


@dataclass(frozen=True)
class Buffer:
    """One tensor of the plan. Sizes are ints or "T" (packed tokens), "L" (logits rows), "B" (sequences)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    kind: Kind
    offset: int | None = None  # activations: bytes into the arena, sized for the maximal step


@dataclass(frozen=True)
class Tap:
    """A tensor that `fp8-run --debug_mode` writes: a buffer, or some columns of one."""

    name: str
    buffer: str
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class TacticChoice:
    """Which kernels run a step of up to `max_tokens` rows."""

    max_tokens: int
    tactic: dict[str, Any]
    kernels: tuple[str, ...]  # content hashes into Engine.cubins
    workspace: int = 0  # bytes
    workspace_offset: int = 0  # into the engine's workspace: steps share a region only if they run the same kernels


@dataclass(frozen=True)
class Step:
    """One plugin call. Inputs and outputs are buffer names, "" for an absent optional one."""

    name: str
    plugin: str
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tactics: tuple[TacticChoice, ...] = ()  # ascending max_tokens; empty in an engine for target "cpu"


@dataclass(frozen=True)
class Join:
    """A linear layer in whose kernels the first part of the attention after it is done, for the rows of prompts."""

    linear: int  # places among the plan's steps
    attention: int
    kernels: tuple[str, ...]  # for the linear's tactics in turn: a content hash, or "" where the two stay apart


@dataclass(frozen=True)
class Sum:
    """A linear layer in whose kernels the residual of the norm after it is added, so that the norm reads the sum."""

    linear: int  # places among the plan's steps
    norm: int
    kernels: tuple[str, ...]  # for the linear's tactics in turn: a content hash, or "" where the two stay apart
    behind: TacticChoice  # the norm of the sum


@dataclass(frozen=True)
class Merged:
    """One launch in place of `count` steps from `first` on, where a step has one token, of a context of at most
    `max_context`."""

    first: int
    count: int
    max_context: int
    step: Step


@dataclass(frozen=True)
class Limits:
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    block_size: int = 64

    @property
    def sequence_blocks(self) -> int:
        """KV blocks of one sequence of max_seq_len."""
        return -(-self.max_seq_len // self.block_size)

    @property
    def logits_rows(self) -> int:
        """L at most; fp8-eval takes the logits of so many tokens in one step, however small the batch."""
        return max(self.max_batch_size, 256)


@dataclass(frozen=True)
class ModelInfo:
    """What the runtime must know of the model."""

    architecture: str
    dtype: str
    format: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    max_position_embeddings: int
    kv_cache_dtype: str
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Compatibility:
    format_version: int
    package_version: str
    target: str  # "sm_90a" | "cpu"
    rank: int = 0
    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1


@dataclass(frozen=True)
class Share:
    """What one of several ranks holds of the model: ranges [start, stop)."""

    layers: tuple[int, int]
    axes: dict[str, tuple[int, int]]  # "heads", "kv_heads", "mlp" and "vocab" columns


@dataclass(frozen=True)
class Plan:
    compatibility: Compatibility
    model: ModelInfo
    limits: Limits
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    arena_bytes: int  # activations of the maximal step
    workspace_bytes: int  # all workspace regions, zeroed once at load
    weights_digest: str
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)  # hash -> source, entry, constants, registers, ...
    fusion_report: list[dict[str, Any]] = field(default_factory=list)  # one entry per Q/DQ pair
    taps: tuple[Tap, ...] = ()
    share: Share | None = None  # what of the model it is; None: all of it
    joins: tuple[Join, ...] = ()
    merged: Merged | None = None
    unmerged: str = ""  # why there is none, in an engine for a GPU
    sums: tuple[Sum, ...] = ()

    def buffer(self, name: str) -> Buffer:
        return self._index[name]

    @property
    def _index(self) -> dict[str, Buffer]:
        index = self.__dict__.get("_cached_index")
        if index is None:
            index = {b.name: b for b in self.buffers}
            object.__setattr__(self, "_cached_index", index)
        return index

    @property
    def sampling_bytes(self) -> int:
        """Device memory that options of sampling take at most, in the stage that has the logits."""
        place, limits = self.compatibility, self.limits
        if place.rank // place.tp_size < place.pp_size - 1:
            return 0
        return option_bytes(
            limits.max_batch_size,
            limits.max_seq_len,
            self.model.vocab_size,
            min(limits.logits_rows, limits.max_num_tokens),
        )

    def to_json(self) -> str:
        facts = dataclasses.asdict(self)
        for name in ("share", "merged", "unmerged"):
            if not facts[name]:
                del facts[name]
        return json.dumps(facts, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Plan:
        d = json.loads(text)
        steps = tuple(map(_step, d["steps"]))
        merged = d.get("merged") and Merged(**{**d["merged"], "step": _step(d["merged"]["step"])})
        buffers = tuple(Buffer(b["name"], b["dtype"], tuple(b["shape"]), b["kind"], b["offset"]) for b in d["buffers"])
        taps = tuple(Tap(t["name"], t["buffer"], t["columns"] and tuple(t["columns"])) for t in d.get("taps", ()))
        share = d.get("share") and Share(
            tuple(d["share"]["layers"]), {axis: tuple(part) for axis, part in d["share"]["axes"].items()}
        )
        sums = tuple(Sum(s["linear"], s["norm"], tuple(s["kernels"]), _choice(s["behind"])) for s in d.get("sums", ()))
        joins = tuple(Join(j["linear"], j["attention"], tuple(j["kernels"])) for j in d.get("joins", ()))
        model = ModelInfo(**{**d["model"], "eos_token_ids": tuple(d["model"]["eos_token_ids"])})
        return Plan(
            Compatibility(**d["compatibility"]), model, Limits(**d["limits"]), buffers, steps, d["arena_bytes"],
            d["workspace_bytes"], d["weights_digest"], d["kernels"], d["fusion_report"], taps, share, joins, merged,
            d.get("unmerged", ""), sums,
        )  # fmt: skip


def _step(facts: dict[str, Any]) -> Step:
    return Step(
        facts["name"], facts["plugin"], facts["attributes"], tuple(facts["inputs"]), tuple(facts["outputs"]),
        tuple(map(_choice, facts["tactics"])),
    )  # fmt: skip


def _choice(facts: dict[str, Any]) -> TacticChoice:
    return TacticChoice(**{**facts, "kernels": tuple(facts["kernels"])})


@dataclass(frozen=True)
class Engine:
    """A plan with its cubins; the weights stay in `weights_path`."""

    plan: Plan
    cubins: dict[str, bytes]
    directory: Path

    @property
    def weights_path(self) -> Path:
        return self.directory / f"rank{self.plan.compatibility.rank}.safetensors"


def engine_bytes(plan: Plan, cubins: dict[str, bytes]) -> bytes:
    """The container. Same plan and cubins, same bytes."""
    text = plan.to_json()
    names = sorted(cubins)
    metadata = {
        "format": "fp8-engine", "version": str(FORMAT_VERSION), "plan": text, "sha256": _digest(text, cubins)
    }  # fmt: skip
    header = safetensors_header([(f"cubin/{n}", "U8", (len(cubins[n]),), len(cubins[n])) for n in names], metadata)
    return b"".join([header, *(cubins[n] for n in names)])


def safetensors_header(entries: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """Header of a safetensors file whose data follow in the order of the entries (name, type code, shape, bytes).

    Written here because the library's writer orders the metadata at random, and a second build gives the same bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest(plan: str, cubins: dict[str, bytes]) -> str:
    h = hashlib.sha256(plan.encode())
    for name in sorted(cubins):
        h.update(name.encode())
        h.update(cubins[name])
    return h.hexdigest()


def load(directory: str | Path, rank: int = 0, verify_weights: bool = True) -> Engine:
    """Reads and checks a rank's engine. Raises EngineError on another format version, a damaged or a foreign file."""
    directory = Path(directory)
    path = directory / f"rank{rank}.engine"
    if not path.is_file() and (directory / "rank0.engine").is_file():
        last = len(list(directory.glob("rank*.engine"))) - 1
        raise EngineError(f"{path} does not exist; the ranks of this engine are 0 to {last}")
    if not path.is_file():
        raise EngineError(f"{path} does not exist; {directory} is not an engine directory (fp8-build writes one)")
    try:
        with safe_open(path, framework="np") as file:
            meta = file.metadata() or {}
            if meta.get("format") != "fp8-engine":
                raise EngineError(f"{path} is not an fp8-engine file")
            if meta.get("version") != str(FORMAT_VERSION):
                raise EngineError(
                    f"{path} has format version {meta.get('version')}, "
                    f"this package reads {FORMAT_VERSION}; build it again"
                )
            cubins = {n.removeprefix("cubin/"): file.get_tensor(n).tobytes() for n in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise EngineError(f"{path} is damaged: {error}; build it again") from error
    if _digest(meta.get("plan", ""), cubins) != meta.get("sha256"):
        raise EngineError(f"{path} is damaged: its plan or cubins do not match their hash; build it again")
    engine = Engine(Plan.from_json(meta["plan"]), cubins, directory)
    if not engine.weights_path.is_file():
        raise EngineError(f"{engine.weights_path} is missing; it holds the weights of {path}")
    if verify_weights:
        check_weights(engine, file_digest(engine.weights_path))
    return engine


def check_weights(engine: Engine, found: str) -> None:
    """Raises EngineError if `found`, the Digest of the weights file, is not the one that the plan was built with."""
    expected = engine.plan.weights_digest
    if found != expected:
        raise EngineError(
            f"{engine.weights_path} is not the weights file that the engine was built with (digest {found[:12]}, "
            f"expected {expected[:12]}): damaged or exchanged; build it again"
        )


class Digest:
    """The sha256 of the sha256 digests of a file's pieces of 16 MiB, one after the other. Pieces are hashed side by
    side, for one core hashes more slowly than weights are read. Use it in a `with` statement."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self._pieces: list[Any] = []
        self._room = 0  # left in the last piece
        self._last: Future | None = None

    def __enter__(self) -> Digest:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def update(self, data: bytes | memoryview) -> list[Future]:
        """Takes in what comes next, which must stay as it is until the futures are done."""
        view, futures = memoryview(data), []
        while view:
            if not self._room:
                self._pieces.append(hashlib.sha256())
                self._room = PIECE
            elif self._last:
                self._last.result()  # the same piece goes on: in order
            part, view = view[: self._room], view[self._room :]
            self._room -= len(part)
            self._last = self._pool.submit(self._pieces[-1].update, part)
            futures.append(self._last)
        return futures

    def hexdigest(self) -> str:
        """The digest of everything taken in, once all futures are done."""
        return hashlib.sha256(b"".join(piece.digest() for piece in self._pieces)).hexdigest()


def file_digest(path: Path, progress: Callable[[int], None] | None = None) -> str:
    buffers = [memoryview(bytearray(4 * PIECE)) for _ in range(2)]
    hashed: list[list[Future]] = [[], []]
    turn = 0
    with path.open("rb", buffering=0) as file, Digest() as digest:
        while count := file.readinto(buffers[turn]):
            hashed[turn] = digest.update(buffers[turn][:count])
            turn = 1 - turn
            for future in hashed[turn]:
                future.result()
            if progress:
                progress(count)
    return digest.hexdigest()


def unwritable(path: Path, error: OSError) -> str:
    """What is said of a file or directory that could not be written."""
    full = "; the disk is full, free some space and run again" if error.errno == errno.ENOSPC else ""
    return f"{path} cannot be written: {error.strerror or error}{full}"


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Writes to a temporary name beside `path`, then renames; returns the Digest of what was written."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file, Digest() as digest:
            for chunk in chunks:
                hashed = digest.update(chunk)
                file.write(chunk)
                for future in hashed:
                    future.result()
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return digest.hexdigest()
