"""Cases of gemm_send: gemm's of rows that a norm can take. With one rank, for types and shapes; several are
checked by `fp8-bench all_reduce`."""

from __future__ import annotations

import dataclasses

from fp8.plugins.base import Case
from fp8.plugins.gemm import cases as gemm
from fp8.plugins.gemm_send.plugin import GemmSend

WORLD = 2
MOST = 16  # rows


def sent(case: Case) -> Case:
    return dataclasses.replace(case, plugin=GemmSend(**dataclasses.asdict(case.plugin), world=WORLD))  # type: ignore[call-overload]


CASES = [
    sent(case)
    for case in gemm.CASES
    if case.plugin.rows == "T" and case.plugin.out_dtype == "bfloat16" and case.step.tokens <= MOST
]
