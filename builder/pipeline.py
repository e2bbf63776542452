"""The compiler's table of contents: PASSES in order, with a dump and a verification after each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_graphsurgeon as gs

from fp8.builder.engine import unwritable, write_atomically
from fp8.builder.passes.accumulate import accumulate
from fp8.builder.passes.fold import fold
from fp8.builder.passes.fp8_all_reduce import fp8_all_reduce
from fp8.builder.passes.fuse import fuse
from fp8.builder.passes.fuse_all_reduce import fuse_all_reduce
from fp8.builder.passes.lower_attention import lower_attention
from fp8.builder.passes.merge_linears import merge_linears
from fp8.builder.passes.tensor_parallel import tensor_parallel
from fp8.builder.passes.widen import widen
from fp8.builder.rewrite import tensor_type
from fp8.builder.target import Target
from fp8.builder.workplace import BuildError

Pass = Callable[[gs.Graph, Target], int]  # rewrites the graph, returns how many places it changed
BEFORE: tuple[Pass, ...] = (  # where asked for
    tensor_parallel,  # a model -> the part of one rank, with all-reduces
    widen,  # activations in float32
)
PASSES: tuple[Pass, ...] = (
    fold,  # stored weights in the model's dtype; dead nodes
    merge_linears,  # q, k, v -> one linear and a split; gate, up alike
    lower_attention,  # slots -> pages; RoPE, KV write, attention, output quantization -> attention
    fuse,  # everything else -> plugins
)


AFTER: tuple[Pass, ...] = (  # where asked for
    fp8_all_reduce,  # sums over ranks travel as e4m3
    fuse_all_reduce,  # a sum over ranks and the norm of it
    accumulate,  # FP8 sums promoted to float32
)
LOSSY: dict[str, float] = {"fp8_all_reduce": 15.0}  # passes that change numbers, as asked: dB that the logits keep


def passes(target: Target) -> tuple[Pass, ...]:
    wanted: dict[Pass, bool] = {
        tensor_parallel: target.parallel is not None,
        widen: target.dtype == "float32",
        fp8_all_reduce: target.parallel is not None and target.fp8_all_reduce > 0,
        fuse_all_reduce: target.parallel is not None,
        accumulate: target.fp8_accumulation != "fast",
    }
    return (*(p for p in BEFORE if wanted[p]), *PASSES, *(p for p in AFTER if wanted[p]))


def run(graph: gs.Graph, target: Target, after: Callable[[str, int, gs.Graph], None] = lambda *_: None) -> gs.Graph:
    """Runs all passes in place; `after(pass name, changes, graph)` is called once per pass."""
    for rewrite in passes(target):
        count = rewrite(graph, target)
        after(rewrite.__name__, count, graph)
    return graph


def dump(graph: gs.Graph, directory: Path, index: int, name: str) -> None:
    """Writes `<index>_<name>.txt`: one line per node, in order, with types. Raises BuildError if it cannot."""
    lines = [f"{n.name}: {n.op}({_types(n.inputs)}) {_attributes(n)} -> {_types(n.outputs)}\n" for n in graph.nodes]
    path = directory / f"{index}_{name}.txt"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, ["".join(lines).encode()])
    except OSError as error:
        raise BuildError(unwritable(path, error)) from error


def _types(tensors: list[gs.Tensor]) -> str:
    found = ((t.name, tensor_type(t)) for t in tensors)
    return ", ".join(f"{name} {t.dtype}[{','.join(map(str, t.shape))}]" if t else "-" for name, t in found)


def _attributes(node: gs.Node) -> str:
    return "{" + ", ".join(f"{k}={v}" for k, v in node.attrs.items()) + "}"
