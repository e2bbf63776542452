"""What each operator makes of operands of which a rank holds a part: the result's part, and the node made to fit.

A rule returns the result's layout and, where every rank has only its share of the sum or maximum, by which operation
the shares become the whole. Attributes and operands that state sizes (heads, shapes) are rewritten to the rank's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import onnx_graphsurgeon as gs

from fp8.builder.graph import stored_array
from fp8.builder.parallel.layout import Layout, Shape, broadcast, needed, reshaped
from fp8.builder.parallel.split import Range, SplitError
from fp8.plugins.gemm.types import GROUP_ROWS


class Parts(Protocol):
    """What a rule asks of the rewrite."""

    rank: int  # among the ranks that share this graph

    def shape(self, tensor: gs.Tensor) -> Shape:
        """The shape of the whole tensor."""

    def layout(self, tensor: gs.Tensor) -> Layout: ...

    def require(self, node: gs.Node, index: int, layout: Layout) -> None:
        """Makes an operand hold that part: a constant or a cache is cut; anything else must hold it already."""

    def integers(self, *values: int) -> gs.Constant:
        """An int64 operand."""


Rule = Callable[[Parts, gs.Node], tuple[Layout, str | None]]


def elementwise(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    operands = [(parts.shape(t), parts.layout(t)) for t in node.inputs]
    result = broadcast(operands, len(parts.shape(node.outputs[0])))
    for i, (shape, layout) in enumerate(operands):
        parts.require(node, i, needed(shape, layout, result))
    return result, None


def gemm(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    """x [T, K], w [N, K], bias [N]. A bias is added to the part of rank 0, so that its linear still takes it."""
    if not node.attrs.get("transB") or node.attrs.get("transA"):
        raise SplitError("a Gemm is split as x w^T only")
    (rows, k), (n, w_k) = (parts.layout(t) for t in node.inputs[:2])
    k = k or w_k
    parts.require(node, 0, (rows, k))
    parts.require(node, 1, (n, k))
    if len(node.inputs) > 2 and k and parts.rank:
        node.inputs = node.inputs[:2]
    elif len(node.inputs) > 2:
        parts.require(node, 2, (n,))
    return (rows, n), "sum" if k else None


def matmul(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    a, b = node.inputs
    shapes, layouts = [parts.shape(t) for t in (a, b)], [parts.layout(t) for t in (a, b)]
    stacks = [(s[:-2], y[:-2]) for s, y in zip(shapes, layouts, strict=True)]
    stack = broadcast(stacks, max(len(s) for s, _ in stacks))
    k = layouts[0][-1] or layouts[1][-2]
    ends = (layouts[0][-2], k), (k, layouts[1][-1])
    for i, ((shape, layout), end) in enumerate(zip(stacks, ends, strict=True)):
        parts.require(node, i, (*needed(shape, layout, stack), *end))
    return (*stack, ends[0][0], ends[1][1]), "sum" if k else None


def attention(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    """q [1, T, H D], k and v [1, S, KVH D]: every query head must find its own KV head at the place that it reads."""
    q, k, v = (parts.layout(t) for t in node.inputs[:3])
    if q[:2] != (None, None) or k != v or any(is_part for t in node.inputs[3:] for is_part in parts.layout(t)):
        raise SplitError("attention is split by heads only")
    heads, kv_heads = node.attrs["q_num_heads"], node.attrs["kv_num_heads"]
    group = heads // kv_heads
    first, last = _heads(parts, node.inputs[0], q[2], heads)
    kv_first, kv_last = _heads(parts, node.inputs[1], k[2], kv_heads)
    count, kv_count = last - first, kv_last - kv_first
    wanted = [(first + i) // group - kv_first for i in range(count)]
    if count % kv_count or wanted != [i // (count // kv_count) for i in range(count)]:
        raise SplitError(f"query heads [{first}, {last}) do not share KV heads [{kv_first}, {kv_last}) evenly")
    node.attrs |= {"q_num_heads": count, "kv_num_heads": kv_count}
    return q, None


def _heads(parts: Parts, tensor: gs.Tensor, part: Range | None, heads: int) -> Range:
    """The heads that a range of columns holds."""
    size = int(parts.shape(tensor)[-1])
    start, stop = part or (0, size)
    head = size // heads
    if start % head or stop % head:
        raise SplitError(f"columns [{start}, {stop}) are no whole heads of {head}")
    return start // head, stop // head


def rotary(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    """x [1, T, H D]."""
    layout = parts.layout(node.inputs[0])
    if any(layout[:-1]):
        raise SplitError("a rotary embedding is split by heads only")
    first, last = _heads(parts, node.inputs[0], layout[-1], node.attrs["num_heads"])
    node.attrs["num_heads"] = last - first
    return layout, None


def reshape(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    data, target = node.inputs
    layout = reshaped(parts.shape(data), parts.layout(data), parts.shape(node.outputs[0]))
    sizes = stored_array(target).tolist()
    node.inputs[1] = parts.integers(*(p[1] - p[0] if p else d for p, d in zip(layout, sizes, strict=True)))
    return layout, None


def transpose(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    layout = parts.layout(node.inputs[0])
    return tuple(layout[i] for i in node.attrs["perm"]), None


def unsqueeze(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    layout = list(parts.layout(node.inputs[0]))
    for axis in sorted(stored_array(node.inputs[1]).tolist()):
        layout.insert(axis, None)
    return tuple(layout), None


def reduction(operation: str) -> Rule:
    """A reduction over a dimension that is split leaves every rank with its share of the result."""

    def rule(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
        layout = parts.layout(node.inputs[0])
        axes = {axis % len(layout) for axis in stored_array(node.inputs[1]).tolist()}
        keep = node.attrs.get("keepdims", 1)
        result = tuple(None if i in axes else p for i, p in enumerate(layout) if keep or i not in axes)
        return result, operation if any(layout[i] for i in axes) else None

    return rule


def gather(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    data, rows = (parts.layout(t) for t in node.inputs)
    if node.attrs.get("axis", 0) != 0 or data[0]:
        raise SplitError("rows are gathered from whole tables only")
    return (*rows, *data[1:]), None


def scatter_rows(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    """data [S, ...], rows [T, 1], updates [T, ...]: a cache is cut as what is written to it."""
    layout = (None, *parts.layout(node.inputs[2])[1:])
    parts.require(node, 0, layout)
    return layout, None


def scaled(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    """x and its scale: one, or one per index of `axis`, or one per block along it."""
    layout = parts.layout(node.inputs[0])
    axis, block = node.attrs.get("axis", 1), node.attrs.get("block_size", 0)
    if block:
        parts.require(node, 1, tuple(_blocks(p, block if i == axis else 0) for i, p in enumerate(layout)))
    elif len(parts.shape(node.inputs[1])) == 1:
        parts.require(node, 1, (layout[axis],))
    return layout, None


def _blocks(part: Range | None, block: int) -> Range | None:
    """The blocks that a range covers. Along other dimensions (block 0) there is a scale per index, but kernels take
    that of every eighth."""
    if part is None:
        return None
    if part[0] % (block or GROUP_ROWS) or (block and part[1] % block):
        raise SplitError(
            f"[{part[0]}, {part[1]}) parts the {block or GROUP_ROWS} values that share a scale; choose another "
            "tp_size, or another format"
        )
    return (part[0] // block, part[1] // block) if block else part


def last_dimension_whole(parts: Parts, node: gs.Node) -> tuple[Layout, str | None]:
    layout = parts.layout(node.inputs[0])
    if layout[-1] or node.attrs.get("axis", -1) not in (-1, len(layout) - 1):
        raise SplitError("it normalizes over a dimension that is split")
    return layout, None


ELEMENTWISE = (
    "Abs", "Add", "Cast", "Ceil", "Div", "Exp", "Gelu", "Identity", "Max", "Min", "Mul", "Neg", "Pow", "Sigmoid",
    "Sqrt", "Sub", "Tanh", "Where",
)  # fmt: skip
RULES: dict[str, Rule] = {
    **{op: elementwise for op in ELEMENTWISE},
    "Attention": attention,
    "DequantizeLinear": scaled,
    "Gather": gather,
    "Gemm": gemm,
    "LayerNormalization": last_dimension_whole,
    "MatMul": matmul,
    "QuantizeLinear": scaled,
    "RMSNormalization": last_dimension_whole,
    "ReduceMax": reduction("max"),
    "ReduceSum": reduction("sum"),
    "Reshape": reshape,
    "RotaryEmbedding": rotary,
    "ScatterND": scatter_rows,
    "Softmax": last_dimension_whole,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
