"""Layers that ranks share, in one launch: the ranks' weights differ, what they make of them is to be the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fp8.plugins.base import Case, Launcher, StepShape, types_of
from fp8.plugins.decode_layers.sizes import SHARED
from fp8.plugins.decode_layers_ranks.cases import CASES
from fp8.scripts.benchmarks.checks import error
from fp8.scripts.benchmarks.exchanges import SEED, Ranks, Work, generator

if TYPE_CHECKING:
    import torch

COMMON = tuple(map(SHARED.index, ("residual", "block_tables", "cos", "sin")))  # the same on all ranks


@dataclass(frozen=True)
class SharedLayers(Work):
    """`given`: a case of one rank's share. What launches read is held as long as this is: a graph holds nothing."""

    given: Case
    held: list[Any]

    @property
    def step(self) -> StepShape:
        return self.given.step

    def launcher(self, tactic: Any) -> Launcher:
        import torch

        types, plugin = types_of(self.inputs), self.plugin
        functions, tensors = self.ranks.functions.of(plugin.kernels(tactic, types)), list(self.inputs)
        for key, value in plugin.cache_places():  # type: ignore[attr-defined]
            tensors[key], tensors[value] = plugin.pack_cache(tensors[key], tensors[value])  # type: ignore[attr-defined]
        size = plugin.workspace(tactic, types, 1, 1)
        workspace = torch.zeros(size, dtype=torch.uint8, device=self.inputs[0].device)  # type: ignore[union-attr]
        launch = plugin.bind(tactic, functions, [*tensors, *self.outputs], workspace, comm=self.ranks.group)  # type: ignore[call-arg]
        self.held.extend([launch, tensors, workspace])
        return launch

    def wrong(self) -> str:
        found = max(error(a, b) for a, b in zip(self.outputs, self.expected, strict=True))
        if not found < self.given.tolerance:
            return f"error {found:.3g}, expected at most {self.given.tolerance}"
        return "" if self.alike() else "the ranks' residuals differ"

    def alike(self) -> bool:
        """Whether all ranks have the same residual, bit by bit."""
        import torch

        first, *others = self.ranks.group.all_gather(self.outputs[-1].view(torch.uint8))
        return all(torch.equal(first, other) for other in others)


def makers(ranks: Ranks) -> list[Callable[[], SharedLayers]]:
    return [partial(layers, ranks, case) for case in CASES]


def layers(ranks: Ranks, case: Case) -> SharedLayers:
    """Every rank draws the same, and turns what is its own by as many rows as its number says."""
    plugin = replace(case.plugin, world=ranks.world.world)  # type: ignore[type-var]
    inputs = case.make(generator(99, SEED), "cuda")
    own = [t if i in COMMON or t is None or t.dim() < 2 else _turned(t, ranks.world.rank) for i, t in enumerate(inputs)]
    return SharedLayers(case.name, plugin, 1, own, ranks, case, [])


def _turned(x: torch.Tensor, by: int) -> torch.Tensor:
    import torch

    return torch.roll(x.view(torch.uint8), by * x.element_size(), 0 if len(x) > 1 else 1).view(x.dtype)


def settled(work: SharedLayers) -> SharedLayers:
    """What it gives once is expected from then on, bit by bit. Raises AssertionError if that is wrong."""
    import torch

    work.launcher(work.tactics()[0])(work.step)
    torch.cuda.synchronize()
    assert not work.wrong(), f"{work.name}: {work.wrong()}"
    work.__dict__["expected"] = tuple(t.clone() for t in work.outputs)
    return work
