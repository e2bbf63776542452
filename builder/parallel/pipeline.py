"""Which rank holds which layers: rank = stage * tp_size + rank within the stage.

A stage is a range of layers; the first also has the embedding, the last the final norm and lm_head. Between stages goes
the residual stream: `hidden_states.out` of one is `hidden_states` of the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fp8.builder.parallel.split import SplitError, evenly


@dataclass(frozen=True)
class Place:
    """One rank among all; alone unless told otherwise."""

    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    pp_layers: tuple[int, ...] = ()  # layers of each stage; empty: as even as they go

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def stage(self) -> int:
        return self.rank // self.tp_size

    def layers(self, num_layers: int) -> range:
        """The layers of this rank's stage."""
        return stages(num_layers, self.pp_size, self.pp_layers)[self.stage]


def stages(num_layers: int, pp_size: int, pp_layers: Sequence[int] = ()) -> list[range]:
    """The layers of every stage. Raises SplitError if a stage would have none, or `pp_layers` does not add up.

    Without `pp_layers` they are as even as they go, and the last stages, which have lm_head, get the smaller numbers.
    """
    if pp_layers and len(pp_layers) != pp_size:
        raise SplitError(f"pp_layers names {len(pp_layers)} stages, but pp_size is {pp_size}")
    if pp_size > num_layers:
        raise SplitError(f"pp_size is {pp_size}, but the model has {num_layers} layers, and every stage needs one")
    counts = list(pp_layers) or evenly(num_layers, pp_size)
    if min(counts) < 1 or sum(counts) != num_layers:
        raise SplitError(
            f"stages of {', '.join(map(str, counts))} layers are not the model's {num_layers}; every stage needs "
            "at least one layer, and together they must be all of them"
        )
    bounds = itertools.accumulate(counts, initial=0)
    return [range(a, b) for a, b in itertools.pairwise(bounds)]
