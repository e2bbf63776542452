"""One rank's kernel by itself, on one GPU: what it reads of the others, zeros, lies there before it starts. So a kernel
that waits for other ranks can be held against its reference where there is one card, and under compute-sanitizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fp8.plugins.all_reduce.region import LAYERS_PLACES, LAYERS_SUMS, Regions, layers_area, region_bytes
from fp8.plugins.base import Launcher, Plugin, StepShape
from fp8.plugins.decode_layers.sizes import of_layer
from fp8.plugins.decode_layers_ranks.plugin import DecodeLayersRanks
from fp8.plugins.hand_on import launch as hand_on
from fp8.plugins.hand_on.plugin import HandOn

if TYPE_CHECKING:
    import torch

    from fp8.plugins.cuda import Function


def runs_alone(plugin: Plugin) -> bool:
    """Whether it communicates with nobody, or can be timed with silent others: of several layers no more than two, as
    each place of a share is filled once in a launch."""
    return not plugin.collective or isinstance(plugin, HandOn) or _in_layers(plugin)


def _in_layers(plugin: Plugin) -> bool:
    return isinstance(plugin, DecodeLayersRanks) and 2 * plugin.layers <= LAYERS_PLACES


class LoneRank:
    """Rank 0 of `world`, as a GPU's communicator; everything of the others is zero. Of one rank, hand_on's ring."""

    rank = 0

    def __init__(self, plugin: Plugin, device: str) -> None:
        self.plugin, self.device = plugin, device
        self.world = plugin.world if isinstance(plugin, DecodeLayersRanks) else 1

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor, *(tensor.new_zeros(tensor.shape) for _ in range(1, self.world))]

    @cached_property
    def memory(self) -> list[torch.Tensor]:
        import torch

        size = hand_on.region_bytes(1) if self.world == 1 else region_bytes(self.world)
        return [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(self.world)]

    @property
    def regions(self) -> Regions:
        return Regions(0, tuple(m.data_ptr() for m in self.memory))

    ring = regions

    def bind(
        self,
        tactic: Any,
        functions: Sequence[Function],
        tensors: Sequence[torch.Tensor | None],
        workspace: torch.Tensor | None,
    ) -> Launcher:
        """The plugin's launch, with what the other ranks would have sent in front of it."""
        launch = self.plugin.bind(tactic, functions, tensors, workspace, comm=self)  # type: ignore[call-arg]
        speak = self._shares(tensors) if _in_layers(self.plugin) else lambda: None

        def run(step: StepShape) -> None:
            speak()
            launch(step)

        return run

    def _shares(self, tensors: Sequence[torch.Tensor | None]) -> Callable[[], None]:
        """Zeros with the tags of the next launch, where sums.cuh has the other ranks' shares."""
        import torch

        plugin = self.plugin
        assert isinstance(plugin, DecodeLayersRanks)
        hidden = plugin.sizes(of_layer(tensors, 0)).hidden
        words = self.memory[0][layers_area(self.world) :].view(torch.int32)
        size = LAYERS_PLACES * self.world * hidden
        places = words[LAYERS_SUMS // 4 :][:size].view(LAYERS_PLACES // 2, 2, self.world, hidden)

        def speak() -> None:
            before = int(words[0])
            for tag in range(before + 1, before + 1 + plugin.layers):
                places[:, tag % 2, 1:] = tag << 16

        return speak
