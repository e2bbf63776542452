"""decode_layers_ranks: decode_layers of several ranks, which add up what o and down give inside the launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp8.plugins.all_reduce.region import MOST_HIDDEN, MOST_WORLD, layers_constants
from fp8.plugins.all_reduce_norm_quant.plugin import AllReduceNormQuant
from fp8.plugins.base import Communicator, Kernel, Launcher, Plugin, PluginError, StepShape, Tensor
from fp8.plugins.decode_layers import launch
from fp8.plugins.decode_layers.plugin import DecodeLayers, Whole
from fp8.plugins.decode_layers.sizes import GRID, Sizes, of_layer
from fp8.plugins.norm_quant.plugin import NormQuant

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


@dataclass(frozen=True)
class DecodeLayersRanks(DecodeLayers):
    """decode_layers for `world` ranks that share the layers. Each has its heads and its part of the MLP; what o and
    down give is summed over the ranks as all_reduce_norm_quant does. y is this rank's share; residual_out is the same
    on all ranks."""

    name: ClassVar[str] = "decode_layers_ranks"
    collective: ClassVar[bool] = True
    world: int = 0

    @property
    def norm(self) -> NormQuant:
        return AllReduceNormQuant("rms", self.epsilon, "static", world=self.world)

    def reference(  # type: ignore[override]
        self, *inputs: torch.Tensor | None, step: StepShape, comm: Communicator
    ) -> tuple[torch.Tensor, ...]:
        def run(plugin: Plugin, given: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
            if plugin.collective:
                return plugin.reference(*given, step=step, comm=comm)  # type: ignore[call-arg]
            return plugin.reference(*given, step=step)

        return self._walk(inputs, run)

    def check(self, inputs: Sequence[Tensor | None]) -> None:
        if not 2 <= self.world <= MOST_WORLD:
            raise PluginError(f"{self.world} ranks share the layers, expected 2 to {MOST_WORLD}")
        super().check(inputs)
        hidden = self.sizes(of_layer(inputs, 0)).hidden
        if hidden > MOST_HIDDEN:
            raise PluginError(f"the hidden size is {hidden}, expected at most {MOST_HIDDEN}: more does not fit")

    def windows(self, sizes: Sizes) -> tuple[int, ...]:
        """A layer of few weights is mostly waits for words, which all that is on its way holds up."""
        return (2, 3) if sizes.stages < 64 * GRID else (3, 4)

    def kernels(self, tactic: Whole, inputs: Sequence[Tensor | None]) -> tuple[Kernel, ...]:
        (alone,) = super().kernels(tactic, inputs)
        return (Kernel(alone.plugin, alone.source, alone.entry, (*alone.constants, *layers_constants(self.world))),)

    def workspace(self, tactic: Whole, inputs: Sequence[Tensor | None], max_tokens: int, max_sequences: int) -> int:
        alone = super().workspace(tactic, inputs, max_tokens, max_sequences)
        return alone + launch.kept_bytes(self.sizes(of_layer(inputs, 0)))

    def bind(  # type: ignore[override]
        self,
        tactic: Whole,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
        comm: Any,
    ) -> Launcher:
        """`comm`: as all_reduce's, with `regions`: without peer memory there is no such launch."""
        assert workspace is not None and comm.regions is not None
        return launch.bind(self, tactic, functions[0], tensors, workspace, comm.regions)
