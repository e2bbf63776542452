"""Which linear layers do the first part of the attention after them (`fp8.plugins.attention.joined`), and which add
the residual of the norm after them (`fp8.plugins.norm_quant.summed`).

That is decided when the linear's tactics are known: the graph stays as it is, and so does what the references execute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from fp8.builder.engine import Join, Step, Sum, TacticChoice
from fp8.builder.plan import Node
from fp8.builder.tune import Compiler, Cubin, Site, tactic_fields
from fp8.plugins.attention import joined
from fp8.plugins.attention.plugin import Attention
from fp8.plugins.base import Kernel
from fp8.plugins.gemm.plugin import Gemm
from fp8.plugins.norm_quant import summed
from fp8.plugins.norm_quant.plugin import NormQuant

OF_NORM = 2  # its first inputs: the residual and what a linear writes


def pairs(nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Places of a linear layer and of the attention that alone reads what it writes."""
    return [
        (i, j)
        for i, j in _alone(nodes)
        if isinstance(nodes[j].plugin, Attention) and nodes[j].inputs[0] == nodes[i].outputs[0]
    ]


def residual_pairs(nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Places of a linear layer and of the norm that comes next, alone reads what it writes, and writes its sum with a
    residual; not of other ranks' rows too."""
    found = []
    for i, j in _alone(nodes):
        norm, (y,) = nodes[j].plugin, nodes[i].outputs
        summed_ = isinstance(norm, NormQuant) and norm.summed_by(nodes[i].plugin)
        if summed_ and j == i + 1 and nodes[j].inputs[:OF_NORM].count(y) == 1:
            found.append((i, j))
    return found


def early(nodes: Sequence[Node]) -> dict[str, int]:
    """What may be written while the linear before it still reads its x, and that linear's place."""
    found = {}
    for i, j in _alone(nodes):
        for k in nodes[j].plugin.early_outputs(nodes[i].plugin):
            found[nodes[j].outputs[k]] = i
    return found


def _alone(nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Places of a linear layer and of the one step that reads what it writes."""
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for name in set(filter(None, node.inputs)):
            readers.setdefault(name, []).append(i)
    behind = {i: readers.get(node.outputs[0], []) for i, node in enumerate(nodes) if isinstance(node.plugin, Gemm)}
    return [(i, places[0]) for i, places in behind.items() if len(places) == 1]


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


def adding(linear: Node, step: Step) -> list[Kernel | None]:
    """For each tactic of the linear's step, its kernel that adds a residual; None where there is none, or where it
    would not be worth it."""
    assert isinstance(linear.plugin, Gemm)
    found = []
    for choice in step.tactics:
        kernel = summed.kernel(linear.plugin, linear.types, linear.plugin.tactic(choice.tactic))
        found.append(kernel if choice.max_tokens > summed.LEAST else None)
    return found


def norm_of_sum(node: Node, most: int) -> Site:
    """The norm that reads the sum, for up to `most` rows."""
    assert isinstance(node.plugin, NormQuant)
    x, _, *others = node.types
    return Site(summed.norm_of_sum(node.plugin), (x, None, *others), most, node.name)


def add(
    nodes: Sequence[Node],
    steps: Sequence[Step],
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> tuple[tuple[Sum, ...], Mapping[str, Cubin]]:
    """Compiles. Where a linear's kernel is refused, with a warning, its norm adds the residual; the norm's is simpler
    than the one that it has."""
    wanted = []
    for i, j in residual_pairs(nodes):
        most = steps[i].tactics[-1].max_tokens
        site = norm_of_sum(nodes[j], most)
        tactic = site.candidates()[0]
        wanted.append((i, j, adding(nodes[i], steps[i]), site.kernels(tactic), tactic, most))
    cubins: dict[str, Cubin] = {}
    sums = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiler = Compiler(pool, progress, warn)
        compiler.submit([k for _, _, front, last, *_ in wanted for k in (*front, *last) if k])
        for i, j, front, last, tactic, most in wanted:
            keys, compiled = _compiled(compiler, front)
            behind = compiler.cubins(last)
            if behind and any(keys):
                cubins |= {**{c.key: c for c in behind}, **compiled}
                choice = TacticChoice(most, tactic_fields(tactic), tuple(c.key for c in behind))
                sums.append(Sum(i, j, keys, choice))
    return tuple(sums), cubins


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
            keys, compiled = _compiled(compiler, several)
            cubins |= compiled
            if any(keys):
                joins.append(Join(i, j, keys))
    return tuple(joins), cubins


def _compiled(compiler: Compiler, kernels: Sequence[Kernel | None]) -> tuple[tuple[str, ...], dict[str, Cubin]]:
    """The key of each, "" where there is none or it is refused; and the cubins."""
    found = [compiler.cubins([kernel]) if kernel else None for kernel in kernels]
    return tuple(c[0].key if c else "" for c in found), {c.key: c for several in found for c in several or ()}
