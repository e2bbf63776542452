"""The buffers of one case of a plugin: inputs in the kernels' layout, poisoned outputs, the reference's results."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8.plugins import base, compile
from fp8.plugins.base import Case, Launcher, Plugin, types_of
from fp8.plugins.timing import GRAPH_SECONDS, Graph, capture, sets_for
from fp8.scripts.benchmarks.lone_rank import LoneRank

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function

# Where its matrices lie is worth up to 6% to a kernel (cuBLASLt's): smaller sets lie in so many places at least.
PLACES, SMALLER = 3, 1 << 30
GUARD = 4096  # bytes after every output that must stay as they are


def all_cases(plugin: str = "", part: str = "") -> list[tuple[str, Case]]:
    """(plugin name, case) of `cases.py` and `*_cases.py` in a plugin's folder: `CASES`, or what `cases()` returns."""
    found = []
    for name in base.names():
        if plugin and name != plugin:
            continue
        folder = Path(importlib.import_module(f"fp8.plugins.{name}").__path__[0])
        for path in sorted(folder.glob("*cases.py")):
            module = importlib.import_module(f"fp8.plugins.{name}.{path.stem}")
            cases = module.CASES if hasattr(module, "CASES") else module.cases()
            found += [(name, case) for case in cases if part in case.name]
    return found


def caches(plugin: Plugin) -> list[tuple[int, int]]:
    """Places of the key and value caches among the inputs of a plugin that has them in a layout of its own."""
    return plugin.cache_places() if hasattr(plugin, "cache_places") else []


class Functions:
    """Loads each cubin once."""

    def __init__(self) -> None:
        self._held: dict[str, Function] = {}

    def of(self, kernels: Sequence[base.Kernel]) -> list[Function]:
        return [self._function(k) for k in kernels]

    def _function(self, kernel: base.Kernel) -> Function:
        from fp8.plugins.cuda import Module

        cubin = compile.compile_kernel(kernel)
        if cubin.key not in self._held:
            self._held[cubin.key] = Module(cubin.code).function(kernel.entry)
        return self._held[cubin.key]


class CaseBuffers:
    """Fresh inputs of a case, drawn with `seed`. `given` are they as the reference takes them."""

    def __init__(self, case: Case, seed: int, device: str) -> None:
        import torch

        self.case, self.plugin, self.device = case, case.plugin, device
        self.comm = LoneRank(case.plugin, device) if case.plugin.collective else None
        self.bind = case.plugin.bind if self.comm is None else self.comm.bind
        self.given = case.make(torch.Generator(device).manual_seed(seed), device)
        self.types = types_of(self.given)
        self.plugin.check(self.types)
        self.output_types = self.plugin.infer(self.types)
        self.places = caches(self.plugin)
        self.inputs = self._packed()

    def _packed(self) -> list[torch.Tensor | None]:
        inputs = list(self.given)
        for key, value in self.places:
            inputs[key], inputs[value] = self.plugin.pack_cache(self.given[key], self.given[value])
        return inputs

    @cached_property
    def expected(self) -> list[torch.Tensor]:
        """The reference's outputs, and what it writes in place as it leaves it."""
        copies = [t if t is None else t.clone() for t in self.given]
        found = list(base.run_reference(self.plugin, copies, self.case.step, self.comm))
        caches = [i for pair in self.places for i in pair]
        return found + [copies[i] for i in caches or self.plugin.updates]

    def fresh_inputs(self) -> list[torch.Tensor | None]:
        return [t if t is None else t.clone() for t in self.inputs]

    def outputs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs full of 0xFF (NaN in every float format), and the guards after them."""
        import torch

        values, guards = [], []
        for t in self.output_types:
            dtype = getattr(torch, t.dtype)
            size = torch.Size(t.shape).numel() * dtype.itemsize
            memory = torch.full((size + GUARD,), 255, dtype=torch.uint8, device=self.device)
            values.append(memory[:size].view(dtype).view(t.shape))
            guards.append(memory[size:])
        return values, guards

    def workspace(self, tactic: Any) -> torch.Tensor | None:
        import torch

        step = self.case.step
        size = self.plugin.workspace(tactic, self.types, max(step.tokens, step.logits_rows), step.sequences)
        return torch.zeros(size, dtype=torch.uint8, device=self.device) if size else None

    @cached_property
    def sets(self) -> list[list[torch.Tensor | None]]:
        """Inputs and outputs, as often as launches must rotate to find nothing in the L2 cache."""
        size = sum(t.nbytes for t in [*self.inputs, *self.outputs()[0]] if t is not None)
        count = max(sets_for(size), PLACES if size < SMALLER else 1)
        return [[*self.fresh_inputs(), *self.outputs()[0]] for _ in range(count)]

    def captured(self, tactic: Any, functions: Sequence[Function], lasting: float = GRAPH_SECONDS) -> Graph:
        """A graph of the tactic's launches over the sets."""
        return self._captured(self.bind, tactic, functions, lasting)

    def captured_write(self, tactic: Any, functions: Sequence[Function]) -> Graph | None:
        """A graph of what comes before the products of attention over prompts: rotary embedding, quantization, cache
        write."""
        if not hasattr(self.plugin, "bind_parts") or self.case.step.decode_sequences:
            return None
        parts = self.plugin.bind_parts
        return self._captured(lambda *arguments: parts(*arguments)[0], tactic, functions)

    def _captured(
        self, bind: Callable[..., Launcher], tactic: Any, functions: Sequence[Function], lasting: float = GRAPH_SECONDS
    ) -> Graph:
        workspace = self.workspace(tactic)
        launchers = [bind(tactic, functions, tensors, workspace) for tensors in self.sets]
        launches: list[Callable[[], object]] = [partial(launch, self.case.step) for launch in launchers]
        return capture(launches, lasting)
