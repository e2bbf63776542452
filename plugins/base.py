"""What a plugin is: one op with its attributes, legality, tactics, CUDA kernels, launch and torch reference.

A plugin lives in `plugins/<name>/plugin.py` as a frozen dataclass named in CamelCase (`norm_quant` -> `NormQuant`);
its fields are its attributes in the graph and in the plan. The folder is the registry: `load("norm_quant")`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

Dim = int | str  # a symbolic size is its name: "T" packed tokens, "B" sequences, "L" rows whose logits are wanted
E4M3_MAX = 448.0  # largest finite float8_e4m3fn value (OCP 8-bit floating point specification, 2023)
BLOCK_SIZE = 64  # tokens per KV-cache block
SCALE_BLOCK = 128  # channels that share a scale where activations or weights are scaled block by block


class PluginError(ValueError):
    """An op that cannot be executed as typed: names the op, what was found, what is needed, and the remedy."""


@dataclass(frozen=True)
class Tensor:
    """Type of one value: `dtype` is a torch dtype's name ("bfloat16", "float8_e4m3fn", ...)."""

    dtype: str
    shape: tuple[Dim, ...]


def types_of(tensors: Sequence[torch.Tensor | None]) -> list[Tensor | None]:
    return [t if t is None else Tensor(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in tensors]


@dataclass(frozen=True)
class StepShape:
    """The host-known sizes of one step. Sequences with one query token (decode) come first in the packed rows."""

    tokens: int  # T
    sequences: int  # B
    decode_sequences: int  # the first rows: sequence i owns token i
    max_query: int  # longest query among the remaining (prefill) sequences, 0 if there is none
    max_context: int  # longest context, new tokens included
    logits_rows: int  # L

    @staticmethod
    def prefill(tokens: int) -> StepShape:
        """One sequence of `tokens` new tokens and no cached ones."""
        return StepShape(tokens, 1, 0, tokens, tokens, 1)


@dataclass(frozen=True)
class Kernel:
    """One compilation: a .cu file beside the plugin, its entry point and the constants it is specialised for.

    `constants` become `#define NAME VALUE` before the source.
    """

    plugin: str
    source: str
    entry: str
    constants: tuple[tuple[str, int | float | str], ...] = ()


Launcher = Callable[[StepShape], None]


class Communicator(Protocol):
    """The ranks that share the layers of one engine (one pipeline stage), in order. Handed in, never global.

    Every rank must call the same collectives in the same order; a call returns when all have come.
    """

    rank: int
    world: int

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, in rank order; dtypes are equal, shapes may differ."""


class Alone:
    """The communicator of a single rank."""

    rank, world = 0, 1

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]


class Plugin:
    """Base of all plugins. A subclass is a frozen dataclass; `tensors` below are its inputs, then its outputs;
    an absent optional input is None.

    A `collective` plugin communicates with the other ranks: its `reference` and `bind` take a further argument `comm`.
    One that `hands_over` can let the launch after it start at once, or when it is in nobody's way, and leave memory to
    the launch before it while that is at work: its `bind` takes further arguments `early` and `windowed`. It writes the
    inputs `updates`, beside the caches, in place, as its reference does."""

    name: ClassVar[str]
    collective: ClassVar[bool] = False
    updates: ClassVar[tuple[int, ...]] = ()
    hands_over: ClassVar[bool] = False

    def infer(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Types of the outputs. Raises PluginError where the inputs cannot be what the op takes."""
        raise NotImplementedError

    def reference(self, *inputs: torch.Tensor | None, step: StepShape) -> tuple[torch.Tensor, ...]:
        """The op's meaning in torch, on CPU or GPU: float32 inside, rounded where the graph rounds."""
        raise NotImplementedError

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        """Raises PluginError if no CUDA tactic can execute the op on these (possibly symbolic) types."""

    def early_outputs(self, before: Plugin) -> tuple[int, ...]:
        """Places of the outputs that may be written while the step before it still reads its own inputs: by this op's
        kernels, where they do not wait for that one's end, or by that one's, where it does a part of this op. `before`
        writes what this op alone reads. No such output may lie where an input of `before` does: the arena has its
        place taken from that step on."""
        return ()

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[Any]:
        """Legal tactics (frozen dataclasses of ints and strings) for up to `tokens` rows, the favourite first."""
        raise NotImplementedError

    def legal(self, tactic: Any, inputs: Sequence[Tensor | None], tokens: int) -> bool:
        """Whether a tactic, which a table may hold, can run up to `tokens` rows, be it among the favourites or not."""
        return tactic in self.tactics(inputs, tokens)

    def buckets(self, max_tokens: int) -> list[int]:
        """Upper ends of the token ranges that may want different tactics."""
        return [max_tokens]

    def tactic(self, fields: dict[str, Any]) -> Any:
        """The tactic record for a plan's or a tuned table's fields."""
        raise NotImplementedError

    def kernels(self, tactic: Any, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        """What to compile for a tactic."""
        raise NotImplementedError

    @property
    def timed_as(self) -> Plugin:
        """Whose timings hold for this one, too."""
        return self

    def workspace(self, tactic: Any, inputs: Sequence[Tensor | None], max_tokens: int, max_sequences: int) -> int:
        """Bytes of zero-initialised scratch that the tactic needs; kernels leave its counters at zero."""
        return 0

    def bind(
        self,
        tactic: Any,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        """Packs the launch once over buffers of maximal size; the result enqueues it on torch's current stream."""
        raise NotImplementedError

    def attributes(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Threads:
    """The tactic of a kernel that has only one: threads of a block."""

    threads: int


class OneTactic(Plugin):
    """Base of plugins with one tactic, blocks of `threads`, for whatever `infer` takes."""

    threads: ClassVar[int] = 256

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        self.infer(inputs)

    def tactics(self, inputs: Sequence[Tensor | None], tokens: int) -> list[Threads]:
        self.check(inputs)
        return [Threads(self.threads)]

    def tactic(self, fields: dict[str, Any]) -> Threads:
        return Threads(**fields)


def run_reference(
    plugin: Plugin, inputs: Sequence[torch.Tensor | None], step: StepShape, comm: Communicator | None
) -> tuple[torch.Tensor, ...]:
    """The plugin's reference, which gets `comm` if it is a collective. Raises PluginError if there is none then."""
    if not plugin.collective:
        return plugin.reference(*inputs, step=step)
    if comm is None:
        raise PluginError(
            f"{plugin.name} needs the other ranks of this engine, which is built for several; start all of them with "
            "mpirun"
        )
    return plugin.reference(*inputs, step=step, comm=comm)  # type: ignore[call-arg]


def names() -> list[str]:
    """All plugins: the folders beside this file."""
    import fp8.plugins

    return sorted(m.name for m in pkgutil.iter_modules(fp8.plugins.__path__) if m.ispkg)


def load(name: str) -> type[Plugin]:
    """The plugin class of a folder."""
    if name not in names():
        raise PluginError(f"plugin {name!r} does not exist; there are {', '.join(names())}")
    module = importlib.import_module(f"fp8.plugins.{name}.plugin")
    return getattr(module, "".join(part.capitalize() for part in name.split("_")))


@dataclass(frozen=True)
class Case:
    """One test and benchmark case of a plugin: fresh random inputs, the step, and how close a kernel must come.

    `make(generator, device)` returns the inputs; `tolerance` bounds ||out - reference|| / ||reference|| per output
    (outputs in FP8 are dequantized codes), and `why` justifies it by the formats' rounding.
    """

    name: str
    plugin: Plugin
    make: Callable[[torch.Generator, str], list[torch.Tensor | None]]
    step: StepShape
    tolerance: float
    why: str
    bytes: int = 0  # device memory traffic of the op, for GB/s
    flops: int = 0
