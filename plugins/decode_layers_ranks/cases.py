"""Cases of decode_layers_ranks: shares of models. With one rank, for types and shapes; several are
checked by `fp8-bench all_reduce`."""

from __future__ import annotations

import dataclasses

import torch

from fp8.plugins.base import Case
from fp8.plugins.decode_layers.cases import case
from fp8.plugins.decode_layers_ranks.plugin import DecodeLayersRanks

WORLD = 2


def shared(case: Case, world: int = WORLD) -> Case:
    """`case`: of one rank's share."""
    plugin = DecodeLayersRanks(**dataclasses.asdict(case.plugin), world=world)  # type: ignore[call-overload]
    return dataclasses.replace(case, plugin=plugin)


CASES = [
    shared(case(2, 1, 256, 1152, 70, layers=1)),
    shared(case(2, 1, 256, 1152, 333)),
    shared(case(4, 2, 384, 1280, 333, dtype=torch.float16)),
    shared(case(16, 16, 4096, 5504, 1088)),
    shared(case(16, 4, 4096, 7168, 1)),
    shared(case(32, 4, 8192, 14336, 700, layers=1)),
]
