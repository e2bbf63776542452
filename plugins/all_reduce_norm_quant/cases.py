"""Cases of all_reduce_norm_quant: norm_quant's with a residual, and ranks of which each has a part of the sum. With one
rank for types and shapes; several are checked by `fp8-bench all_reduce`."""

from __future__ import annotations

import dataclasses

from fp8.plugins.all_reduce_norm_quant.plugin import AllReduceNormQuant
from fp8.plugins.base import Case
from fp8.plugins.norm_quant import cases as norm_quant

WORLD = 2
MOST = 256  # rows


def joined(case: Case) -> Case:
    return dataclasses.replace(case, plugin=AllReduceNormQuant(**dataclasses.asdict(case.plugin), world=WORLD))  # type: ignore[call-overload]


CASES = [
    joined(case)
    for case in norm_quant.CASES
    if case.plugin.residual and not case.plugin.gather and case.step.tokens <= MOST
]
