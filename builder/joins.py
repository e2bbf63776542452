"""Which linear layers do the first part of the attention behind them (`fp8.plugins.attention.joined`).

That is decided when the linear's tactics are known: the graph stays as it is, and so does what the references execute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from fp8.builder.engine import Join, Step
from fp8.builder.plan import Node
from fp8.builder.tune import Compiler, Cubin
from fp8.plugins.attention import joined
from fp8.plugins.attention.plugin import Attention
from fp8.plugins.base import Kernel
from fp8.plugins.gemm.plugin import Gemm


def pairs(nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Places of a linear layer and of the attention that alone reads what it writes."""
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for name in set(filter(None, node.inputs)):
            readers.setdefault(name, []).append(i)
    found = []
    for i, node in enumerate(nodes):
        behind = readers.get(node.outputs[0], [])
        alone = len(behind) == 1 and nodes[behind[0]].inputs[0] == node.outputs[0]
        if isinstance(node.plugin, Gemm) and alone and isinstance(nodes[behind[0]].plugin, Attention):
            found.append((i, behind[0]))
    return found


def kernels(linear: Node, attention: Node, step: Step) -> list[Kernel | None]:
    """For each tactic of the linear's step, its kernel with attention's first part; None where there is none, or where
    it would not be worth it."""
    assert isinstance(linear.plugin, Gemm) and isinstance(attention.plugin, Attention)
    found = []
    for choice in step.tactics:
        tactic = linear.plugin.tactic(choice.tactic)
        kernel = joined.kernel(attention.plugin, attention.types, linear.plugin, linear.types, tactic)
        found.append(kernel if joined.worth(attention.types, choice.max_tokens) else None)
    return found


def join(
    nodes: Sequence[Node],
    steps: Sequence[Step],
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[tuple[Join, ...], Mapping[str, Cubin]]:
    """Compiles. A kernel that is refused is left out, with a warning: the two stay apart there."""
    wanted = {(i, j): kernels(nodes[i], nodes[j], steps[i]) for i, j in pairs(nodes)}
    cubins: dict[str, Cubin] = {}
    joins = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiler = Compiler(pool, progress, warn)
        compiler.submit([k for several in wanted.values() for k in several if k])
        for (i, j), several in wanted.items():
            hashes = []
            for kernel in several:
                compiled = compiler.cubins([kernel]) if kernel else None
                cubins |= {c.key: c for c in compiled or ()}
                hashes.append(compiled[0].key if compiled else "")
            if any(hashes):
                joins.append(Join(i, j, tuple(hashes)))
    return tuple(joins), cubins
