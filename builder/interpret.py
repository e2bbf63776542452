"""The reference interpreter: the meaning of every operator that the builder emits, in torch, on CPU or GPU.

Nodes of domain "fp8" are plugins and run their reference. Subexpressions of constants are computed once and kept;
everything else is freed after its last reader.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F

from fp8.builder.e4m3 import quantize
from fp8.builder.graph import stored_array
from fp8.plugins import base
from fp8.plugins.base import BLOCK_SIZE, StepShape

PLUGIN_DOMAIN = "fp8"
Observer = Callable[[str, torch.Tensor], None]
Attributes = Mapping[str, Any]

# numpy has no such types of its own; torch.from_numpy takes them as integers of the same width.
_VIEWS = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}


class InterpreterError(ValueError):
    """A graph or a feed that cannot be interpreted: names the node or the input."""


def to_torch(array: np.ndarray, device: str | torch.device = "cpu") -> torch.Tensor:
    """A copy of an array in torch, bfloat16 and e4m3 (of ml_dtypes) included."""
    view, dtype = _VIEWS.get(array.dtype.name, (None, None))
    plain = np.array(array.view(view) if view else array, order="C")
    tensor = torch.from_numpy(plain)
    return (tensor.view(dtype) if dtype else tensor).to(device)


def torch_dtype(onnx_type: int) -> torch.dtype:
    return getattr(torch, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type)).name)


class Interpreter:
    """Runs a graph. Constants stay on `device` between calls. The graph of one of several ranks needs `comm`."""

    def __init__(
        self, graph: gs.Graph, device: str | torch.device = "cpu", comm: base.Communicator | None = None
    ) -> None:
        self.graph = graph
        self.comm = comm
        self.device = torch.device(device)
        self._constants: dict[str, torch.Tensor] = {}
        self._folded: set[str] = set()  # computed tensors that depend on constants only
        self._plugins: dict[int, base.Plugin] = {}
        self._tensors = graph.tensors()

    @torch.no_grad()
    def __call__(
        self,
        feeds: Mapping[str, torch.Tensor],
        observe: Observer | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Values of `outputs` (any tensors; default the graph's outputs), computing nothing that they do not need.

        `observe(name, value)` sees every value as it is computed. Plugins write KV caches in place: feed those on the
        interpreter's device, and they hold this step's K and V afterwards.
        """
        wanted = [t.name for t in self.graph.outputs] if outputs is None else list(outputs)
        nodes = self._needed(wanted, feeds)
        values: dict[str, torch.Tensor] = {n: t.to(self.device) for n, t in feeds.items()}
        step = step_shape(feeds)
        readers = Counter(t.name for node in nodes for t in node.inputs)
        readers.update(wanted)
        for node in nodes:
            self._run(node, values, step, observe)
            for tensor in node.inputs:
                readers[tensor.name] -= 1
                if not readers[tensor.name]:
                    values.pop(tensor.name, None)
        return {name: values[name] if name in values else self._constant(self._tensors[name]) for name in wanted}

    def _needed(self, wanted: Sequence[str], feeds: Mapping[str, torch.Tensor]) -> list[gs.Node]:
        """Nodes that the wanted tensors depend on, producers first; constant subexpressions left out."""
        order: list[gs.Node] = []
        finished: dict[int, bool] = {}
        stack = [self._tensor(name) for name in reversed(wanted)]
        while stack:
            tensor = stack[-1]
            node = tensor.inputs[0] if tensor.inputs else None
            if tensor.name in feeds or self._is_constant(tensor) or (node and finished.get(id(node))):
                stack.pop()
            elif node is None:
                raise InterpreterError(f"{tensor.name} is neither fed, constant, nor computed by a node")
            elif id(node) not in finished:
                finished[id(node)] = False
                stack.extend(reversed(node.inputs))
            else:
                finished[id(node)] = True
                if (
                    node.domain != PLUGIN_DOMAIN
                    and len(node.outputs) == 1
                    and all(self._is_constant(t) for t in node.inputs)
                ):
                    self._folded.add(tensor.name)
                else:
                    order.append(node)
        return order

    def _tensor(self, name: str) -> gs.Tensor:
        if name not in self._tensors:
            raise InterpreterError(f"the graph has no tensor {name}")
        return self._tensors[name]

    def _is_constant(self, tensor: gs.Tensor) -> bool:
        return isinstance(tensor, gs.Constant) or tensor.is_empty() or tensor.name in self._folded

    def _constant(self, tensor: gs.Tensor) -> torch.Tensor:
        if tensor.name not in self._constants:
            self._constants[tensor.name] = self._constant_value(tensor)
        return self._constants[tensor.name]

    def _constant_value(self, tensor: gs.Tensor) -> torch.Tensor:
        if isinstance(tensor, gs.Constant):
            array = stored_array(tensor)
            # int64 constants are shapes and axes: the host reads them.
            return to_torch(array, "cpu" if array.dtype == np.int64 else self.device)
        node = tensor.inputs[0]
        inputs = [None if t.is_empty() else self._constant_value(t) for t in node.inputs]
        return self._standard(node, inputs)

    def _run(self, node: gs.Node, values: dict[str, torch.Tensor], step: StepShape, observe: Observer | None) -> None:
        inputs = [self._input(t, values) for t in node.inputs]
        if node.domain == PLUGIN_DOMAIN:
            results = base.run_reference(self._plugin(node), inputs, step, self.comm)
        else:
            result = self._standard(node, inputs)
            results = result if isinstance(result, tuple) else (result,)
        for tensor, value in zip(node.outputs, results, strict=True):
            values[tensor.name] = value
            if observe is not None:
                observe(tensor.name, value)

    def _input(self, tensor: gs.Tensor, values: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if tensor.is_empty():
            return None
        return values[tensor.name] if tensor.name in values else self._constant(tensor)

    def _standard(self, node: gs.Node, inputs: Sequence[torch.Tensor | None]) -> Any:
        if node.op not in OPS:
            raise InterpreterError(f"{node.name}: operator {node.op} (domain {node.domain or 'onnx'!r}) is not known")
        return OPS[node.op](node.attrs, *inputs)

    def _plugin(self, node: gs.Node) -> base.Plugin:
        if id(node) not in self._plugins:
            self._plugins[id(node)] = plugin_of(node)
        return self._plugins[id(node)]


def plugin_of(node: gs.Node) -> base.Plugin:
    """The plugin that a node of domain "fp8" stands for, its attributes as the plugin's fields."""
    kind = base.load(re.sub(r"(?<!^)(?=[A-Z])", "_", node.op).lower())
    types = {f.name: f.type for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = set(node.attrs) - set(types)
    if unknown:
        raise InterpreterError(f"{node.name}: {node.op} has no attribute {', '.join(sorted(unknown))}")
    return kind(**{k: bool(v) if types[k] in ("bool", bool) else v for k, v in node.attrs.items()})


def step_shape(feeds: Mapping[str, torch.Tensor]) -> StepShape:
    """Sizes of the step that the feeds describe, for plugins."""
    rows = next((feeds[n].shape[0] for n in ("input_ids", "position_ids", "hidden_states") if n in feeds), 1)
    if "query_start" not in feeds:
        return StepShape.prefill(rows)
    starts = feeds["query_start"].tolist()
    queries = [end - begin for begin, end in itertools.pairwise(starts)]
    decode = next((i for i, q in enumerate(queries) if q != 1), len(queries))
    wanted = feeds["logits_indices"].shape[0] if "logits_indices" in feeds else rows
    context = int(feeds["sequence_lengths"].max())
    return StepShape(rows, len(queries), decode, max(queries[decode:], default=0), context, wanted)


# Operators: (attributes, *inputs) -> output


def _gemm(a: Attributes, x: torch.Tensor, w: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    w = w.T if a.get("transB") else w
    return x @ w if c is None else torch.addmm(c, x, w)


def _along(a: Attributes, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A scale per index of an axis, or per block of it, shaped to broadcast against x."""
    if scale.ndim == 0:
        return scale
    axis = a.get("axis", 1)
    if block := a.get("block_size"):
        return scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.ndim
    shape[axis] = -1
    return scale.reshape(shape)


def _quantize(a: Attributes, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return quantize(x, _along(a, scale, x))


def _dequantize(a: Attributes, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.float() * _along(a, scale, x)


def _rms_norm(a: Attributes, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + a["epsilon"]) * weight


def _rotary(
    a: Attributes, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    heads = x.unflatten(-1, (a["num_heads"], -1))  # [1, T, H, D]
    rotated = a.get("rotary_embedding_dim") or heads.shape[-1]
    first, second, rest = heads.split([rotated // 2, rotated // 2, heads.shape[-1] - rotated], -1)
    cos, sin = cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).flatten(-2)


def _attention(a: Attributes, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q = q.unflatten(-1, (a["q_num_heads"], -1)).transpose(1, 2)
    k, v = (x.unflatten(-1, (a["kv_num_heads"], -1)).transpose(1, 2) for x in (k, v))
    grouped = a["q_num_heads"] != a["kv_num_heads"]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=a["scale"], enable_gqa=grouped)
    return out.transpose(1, 2).flatten(-2)


def _reshape(a: Attributes, x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    return x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(shape.tolist())])


def _scatter_rows(a: Attributes, data: torch.Tensor, rows: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    if rows.shape[-1] != 1:
        raise InterpreterError(
            f"ScatterND with indices {list(rows.shape)}: only whole rows ([T, 1]) are scattered here"
        )
    return data.index_copy(0, rows[:, 0], updates)


def _reduce(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda a, x, axes: function(x, tuple(axes.tolist()), keepdim=bool(a.get("keepdims", 1)))


def _elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda a, *inputs: function(*inputs)


OPS: dict[str, Callable[..., Any]] = {
    "Abs": _elementwise(torch.abs),
    "Add": _elementwise(torch.add),
    "And": _elementwise(torch.logical_and),
    "Attention": _attention,
    "Cast": lambda a, x: x.to(torch_dtype(a["to"])),
    "Ceil": _elementwise(torch.ceil),
    "Concat": lambda a, *xs: torch.cat(xs, a["axis"]),
    "DequantizeLinear": _dequantize,
    "Div": _elementwise(torch.div),
    "Equal": _elementwise(torch.eq),
    "Gather": lambda a, table, rows: table.index_select(0, rows.flatten().long()).unflatten(0, rows.shape),
    "Gemm": _gemm,
    "GreaterOrEqual": _elementwise(torch.ge),
    "Identity": lambda a, x: x,
    "LessOrEqual": _elementwise(torch.le),
    "MatMul": _elementwise(torch.matmul),
    "Max": _elementwise(torch.maximum),
    "Min": _elementwise(torch.minimum),
    "Mul": _elementwise(torch.mul),
    "Pow": _elementwise(torch.pow),
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "ReduceMax": _reduce(torch.amax),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "ScatterND": _scatter_rows,
    "Sigmoid": _elementwise(torch.sigmoid),
    "Split": lambda a, x, sizes: x.split(sizes.tolist(), a.get("axis", 0)),
    "Sub": _elementwise(torch.sub),
    "Transpose": lambda a, x: x.permute(*a["perm"]),
    "Unsqueeze": lambda a, x, axes: x.unsqueeze(int(axes)),
    "Where": _elementwise(torch.where),
}


# Feeds


def step_inputs(
    sequences: Sequence[tuple[Sequence[int], int]], max_context: int = 128, all_logits: bool = True
) -> dict[str, torch.Tensor]:
    """Feeds of one step, in the slots form of the unfused graph and in the paged form of the fused one at once.

    A sequence is (new tokens, number of tokens already cached). Where each position lives depends on the number of
    sequences and on `max_context` only, so a later step of the same sequences finds what an earlier one wrote; pages of
    different sequences are interleaved. Sequences with one new token come first if the plugins are to run them as
    decode rows. Logits are wanted of every row, or of each sequence's last.
    """
    count, pages = len(sequences), -(-max_context // BLOCK_SIZE)
    tables = torch.arange(count * pages).reshape(pages, count).T.contiguous()  # page p of sequence i is block p*B + i
    ids, positions, owners, slots, starts, lengths = [], [], [], [], [0], []
    slot_sequences = torch.full((count * pages * BLOCK_SIZE,), -1)
    slot_positions = torch.full_like(slot_sequences, -1)
    for i, (tokens, past) in enumerate(sequences):
        context = past + len(tokens)
        if context > max_context:
            raise InterpreterError(f"sequence {i} has {context} tokens, more than max_context {max_context}")
        everything = torch.arange(context)
        homes = tables[i, everything // BLOCK_SIZE] * BLOCK_SIZE + everything % BLOCK_SIZE
        slot_sequences[homes], slot_positions[homes] = i, everything
        ids += list(tokens)
        positions.append(everything[past:])
        owners.append(torch.full((len(tokens),), i))
        slots.append(homes[past:])
        starts.append(starts[-1] + len(tokens))
        lengths.append(context)
    feeds = {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.cat(positions),
        "sequence_ids": torch.cat(owners),
        "slot_mapping": torch.cat(slots),
        "slot_sequence_ids": slot_sequences,
        "slot_position_ids": slot_positions,
        "query_start": torch.tensor(starts),
        "sequence_lengths": torch.tensor(lengths),
        "block_tables": tables,
        "logits_indices": torch.arange(len(ids)) if all_logits else torch.tensor(starts[1:]) - 1,
    }
    return {name: value.to(torch.int32) for name, value in feeds.items()}


def empty_caches(graph: gs.Graph, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeroed KV caches for the cache inputs of a graph in either form, as large as a step's slots."""
    slots = feeds["slot_sequence_ids"].shape[0]
    caches = {}
    for tensor in graph.inputs:
        if tensor.name.startswith("kv_cache."):
            first = (slots,) if len(tensor.shape) == 3 else (slots // BLOCK_SIZE,)
            dtype = getattr(torch, np.dtype(tensor.dtype).name)
            caches[tensor.name] = torch.zeros(*first, *tensor.shape[1:], dtype=dtype)
    return caches


def next_caches(caches: Mapping[str, torch.Tensor], results: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The caches for the next step: what the graph returned as `<cache>.out`, else what plugins wrote in place."""
    return {name: results.get(f"{name}.out", cache) for name, cache in caches.items()}
