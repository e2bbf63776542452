"""GraphBuilder: typed emission of standard ONNX operators over onnx-graphsurgeon; the only thing a model sees.

How a consumer walks the graph:

- A node is named `<Hugging Face module>/<role>`, its one output tensor has the node's name, and graph outputs have the
  names of the contract (`logits`, `kv_cache.{i}.key.out`, ...). Constants read from the checkpoint keep their tensor's
  name; constants made here are `<module>/<what>` or `constant/<value>`; `rotary.cos` and `rotary.sin` are the tables.
- DT is the model's dtype. Where DT is float32 no Cast is emitted, every edge `-Cast->` below is then an identity.
- A linear M reading x (float32), F being the first linear that reads the same x:
    unquantized  x -Cast[F/round]-> DT -Cast[M/widen]-> f32 -Gemm[M/gemm]-> f32 -Cast[M/output]-> DT
    fp8          x -QuantizeLinear[F/quantize]-> e4m3 -DequantizeLinear[M/dequantize]-> f32 -Gemm ... as above
    fp8_channel  the same
    fp8_rowwise  the same with a scale computed per token: Abs[F/abs], ReduceMax[F/row_amax], Min[F/bounded_amax],
                 Div[F/scaled_amax], Max[F/input_scale]
    fp8_block    with a scale per 128 channels of a token (block_size 128): Abs[F/abs], Reshape[F/groups],
                 ReduceMax[F/group_amax], Div[F/scaled_amax], Max[F/input_scale]; Gather[M/row_scales] spreads the
                 scales of the weight's blocks over its rows
  The Gemm (transB=1) takes M.weight through Cast[M/widen_weight] or DequantizeLinear[M/dequantize_weight], and the bias
  through Cast[M/widen_bias]. lm_head has no /output Cast. A weight stored in another float dtype than DT first passes
  Cast[<tensor>/convert].
- A norm M: Cast[M/widen], Cast[M/widen_weight], RMSNormalization[M/norm]; its f32 output is the x of the linears.
- model.layers.{i}: Add[.../attention_residual], Add[.../mlp_residual]; inside .../self_attn and .../mlp see
  `fp8.models.blocks`.
- `graph.axes[weight]` are the logical axes of a weight, `graph.activations[scale]` is the tensor whose amax a
  calibrated scale (`M.input_scale`, `self_attn.q_scale`, ...) comes from, in every format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from fp8.builder.checkpoint import Checkpoint, CheckpointError, Entry
from fp8.builder.formats.base import Format

OPSET = 23  # the first with RMSNormalization, RotaryEmbedding and Attention; 24 and 25 add nothing that is used
IR_VERSION = 11
Dim = int | str

F32 = np.dtype(np.float32)
I32 = np.dtype(np.int32)
I64 = np.dtype(np.int64)
BOOL = np.dtype(np.bool_)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOATS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), F32)


class StoredValues(LazyValues):
    """Values that stay in their safetensors file until somebody asks; exported as external data, never copied."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self.shape = list(entry.shape)
        self.dtype = entry.dtype
        self.nbytes = entry.nbytes

    def load(self) -> np.ndarray:
        return self.entry.array()

    @property
    def tensor(self) -> onnx.TensorProto:
        """A proto whose `location` is the file's absolute path; the exporter makes it relative to the model."""
        proto = onnx.TensorProto(name=self.entry.name, data_type=onnx_dtype(self.dtype), dims=self.entry.shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        where = {
            "location": str(self.entry.file.resolve()),
            "offset": str(self.entry.offset),
            "length": str(self.nbytes),
        }
        for key, value in where.items():
            proto.external_data.add(key=key, value=value)
        return proto


class Graph(gs.Graph):
    """A graphsurgeon graph that also knows its weights' logical axes and what its calibrated scales measure."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.axes: dict[str, tuple[str, ...]] = {}
        self.activations: dict[str, str] = {}
        self.registered: dict[str, gs.Tensor] = {}
        super().__init__(*args, **kwargs)

    @property
    def linears(self) -> list[str]:
        """Modules of the linears that a format may quantize, as the model has them in order."""
        end = ".input_scale"
        return [name.removesuffix(end) for name in self.activations if name.endswith(end)]

    def copy(self, tensor_map: Any = None) -> Graph:
        plain = super().copy(tensor_map)
        result = Graph(
            nodes=plain.nodes, inputs=plain.inputs, outputs=plain.outputs, name=plain.name, opset=plain.opset,
            import_domains=plain.import_domains, ir_version=plain.ir_version,
        )  # fmt: skip
        result.axes, result.activations = dict(self.axes), dict(self.activations)
        result.registered = dict(self.registered)
        return result


def onnx_dtype(dtype: np.dtype | str) -> int:
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def stored_array(constant: gs.Constant) -> np.ndarray:
    """A constant's values without making it forget its file (`constant.values` would inline them for good)."""
    values = constant._values
    return values.load() if isinstance(values, LazyValues) else values


def serialize(graph: gs.Graph) -> onnx.ModelProto:
    """The ONNX model with every weight inline. For graphs that fit in memory (and in protobuf's 2 GB)."""
    model = gs.export_onnx(graph)
    for proto in model.graph.initializer:
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            place = {e.key: e.value for e in proto.external_data}
            with open(place["location"], "rb") as file:
                file.seek(int(place["offset"]))
                proto.raw_data = file.read(int(place["length"]))
            proto.ClearField("data_location")
            proto.ClearField("external_data")
    return model


@dataclass(frozen=True)
class Linear:
    """A linear layer by its Hugging Face module: weight [out_features, in_features] with logical axes in that order."""

    name: str
    out_features: int
    in_features: int
    axes: tuple[str, str]
    bias: bool = False


class GraphBuilder:
    """Emits one graph. Every method returns a tensor whose dtype and shape are known ("T" tokens, "S" slots, ...)."""

    def __init__(self, name: str, checkpoint: Checkpoint, format: Format, dtype: str):
        self.checkpoint = checkpoint
        self.format = format
        self.dtype = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype {dtype} is not one of bfloat16, float16, float32")
        self.graph = Graph(name=name, opset=OPSET, ir_version=IR_VERSION)
        self._constants: dict[str, gs.Constant] = {}
        self._emitted: dict[str, gs.Variable] = {}

    # Inputs, outputs, constants

    def input(self, name: str, dtype: np.dtype, shape: Sequence[Dim]) -> gs.Variable:
        tensor = gs.Variable(name, dtype, list(shape))
        self.graph.inputs.append(tensor)
        return tensor

    def output(self, tensor: gs.Variable, name: str) -> None:
        """Makes `tensor` a graph output of that name."""
        tensor.name = name
        self.graph.outputs.append(tensor)

    def register_network_output(self, name: str, tensor: gs.Tensor) -> None:
        """Makes `tensor` a debug tensor `<its module>/<name>`, which an engine built with --enable_debug_output can
        dump; any other engine is the same as without. Raises ValueError for a name that the module has already."""
        full = f"{tensor.name.split('/', 1)[0]}/{name}"
        if self.graph.registered.setdefault(full, tensor) is not tensor:
            raise ValueError(f"register_network_output: {full} is registered already; choose another name")

    def constant(self, name: str, values: np.ndarray) -> gs.Constant:
        """A small constant held in memory; the same name is the same constant."""
        if name not in self._constants:
            self._constants[name] = gs.Constant(name, np.ascontiguousarray(values).reshape(np.shape(values)))
        return self._constants[name]

    def scalar(self, value: float) -> gs.Constant:
        return self.constant(f"constant/{value!r}", np.array(value, np.float32))

    def indices(self, *values: int) -> gs.Constant:
        """int64 shape or axes operand."""
        return self.constant("constant/" + "_".join(map(str, values)), np.array(values, np.int64))

    def stored(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], dtypes: Sequence[np.dtype]
    ) -> gs.Constant:
        """A checkpoint tensor, by reference. Raises CheckpointError if it is missing, misshapen or of another dtype."""
        if name not in self._constants:
            entry = self.checkpoint.entry(name, shape)
            if entry.dtype not in dtypes:
                expected = " or ".join(d.name for d in dtypes)
                raise CheckpointError(f"{name} has dtype {entry.dtype}, expected {expected} ({entry.file})")
            self._constants[name] = gs.Constant(name, StoredValues(entry))
            self.graph.axes[name] = axes
        return self._constants[name]

    def weight(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> gs.Tensor:
        """An unquantized weight in DT."""
        return self.cast(self.stored(name, shape, axes, FLOATS), self.dtype, f"{name}/convert")

    # Operators

    def op(
        self, op: str, name: str, inputs: Sequence[gs.Tensor], dtype: np.dtype, shape: Sequence[Dim], **attrs: Any
    ) -> gs.Variable:
        """One node with one output of its name; a node of that name is emitted once."""
        if name not in self._emitted:
            out = gs.Variable(name, dtype, list(shape))
            self.graph.nodes.append(gs.Node(op, name, attrs, list(inputs), [out]))
            self._emitted[name] = out
        return self._emitted[name]

    def same(self, op: str, name: str, *inputs: gs.Tensor, **attrs: Any) -> gs.Variable:
        """An elementwise node: dtype and shape of its first input."""
        return self.op(op, name, inputs, inputs[0].dtype, inputs[0].shape, **attrs)

    def cast(self, x: gs.Tensor, dtype: np.dtype, name: str) -> gs.Tensor:
        if x.dtype == dtype:
            return x
        return self.op("Cast", name, [x], dtype, x.shape, to=onnx_dtype(dtype))

    def round(self, x: gs.Tensor, name: str) -> gs.Tensor:
        """float32 -> DT."""
        return self.cast(x, self.dtype, name)

    def widen(self, x: gs.Tensor, name: str) -> gs.Tensor:
        """DT -> float32."""
        return self.cast(x, F32, name)

    def quantize(self, x: gs.Tensor, scale: gs.Tensor, name: str, **along: int) -> gs.Variable:
        """e4m3(clamp(x / scale, +-448)): x float32, scale [], or one per index of `axis`, or (with `block_size`) one
        per so many elements along `axis`."""
        attrs = {"saturate": 1, "output_dtype": onnx_dtype(E4M3), **along}
        return self.op("QuantizeLinear", name, [x, scale], E4M3, x.shape, **attrs)

    def dequantize(self, x: gs.Tensor, scale: gs.Tensor, name: str, **along: int) -> gs.Variable:
        """x * scale in float32; `axis` and `block_size` as in `quantize`."""
        return self.op("DequantizeLinear", name, [x, scale], F32, x.shape, **along)

    def reshape(self, x: gs.Tensor, shape: Sequence[Dim], name: str) -> gs.Variable:
        """At most one dimension may be symbolic."""
        target = self.indices(*(d if isinstance(d, int) else -1 for d in shape))
        return self.op("Reshape", name, [x, target], x.dtype, shape)

    def transpose(self, x: gs.Tensor, perm: Sequence[int], name: str) -> gs.Variable:
        return self.op("Transpose", name, [x], x.dtype, [x.shape[p] for p in perm], perm=list(perm))

    def unsqueeze(self, x: gs.Tensor, axis: int, name: str) -> gs.Variable:
        shape = list(x.shape)
        shape.insert(axis, 1)
        return self.op("Unsqueeze", name, [x, self.indices(axis)], x.dtype, shape)

    def reduce(self, op: str, x: gs.Tensor, axis: int, name: str, keepdims: bool) -> gs.Variable:
        axis %= len(x.shape)
        shape = [1 if i == axis else d for i, d in enumerate(x.shape) if keepdims or i != axis]
        return self.op(op, name, [x, self.indices(axis)], x.dtype, shape, keepdims=int(keepdims))

    def gather(self, table: gs.Tensor, rows: gs.Tensor, name: str) -> gs.Variable:
        """Rows of a [N, K] table."""
        return self.op("Gather", name, [table, rows], table.dtype, [*rows.shape, *table.shape[1:]], axis=0)

    def gemm(self, x: gs.Tensor, w: gs.Tensor, linear: Linear, out_dtype: np.dtype) -> gs.Tensor:
        """out_dtype(x @ w^T + bias), float32 inside: x [T, K], w [N, K]."""
        name = linear.name
        operands = [x, w]
        if linear.bias:
            bias = self.weight(f"{name}.bias", (linear.out_features,), linear.axes[:1])
            operands.append(self.widen(bias, f"{name}/widen_bias"))
        y = self.op("Gemm", f"{name}/gemm", operands, F32, [x.shape[0], linear.out_features], transB=1)
        return self.cast(y, out_dtype, f"{name}/output")

    # Quantization decisions belong to the format

    def linears(self, x: gs.Tensor, linears: Sequence[Linear]) -> list[gs.Tensor]:
        """The linears that read x (float32 [T, K]), each -> DT [T, N], quantized as the format has it."""
        self.graph.activations.update({f"{m.name}.input_scale": x.name for m in linears})
        return self.format.linears(self, x, linears)

    def plain_linear(
        self, x: gs.Tensor, linear: Linear, out_dtype: np.dtype, first: str | None = None, weight: str | None = None
    ) -> gs.Tensor:
        """A linear in DT. `first` is the linear under whose name x is rounded, `weight` the tensor that it reads, where
        these are not its own (tied embeddings)."""
        rounded = self.round(x, f"{first or linear.name}/round")
        stored = weight or f"{linear.name}.weight"
        table = self.weight(stored, (linear.out_features, linear.in_features), linear.axes)
        wide = self.widen(table, f"{linear.name}/widen_weight")
        return self.gemm(self.widen(rounded, f"{linear.name}/widen"), wide, linear, out_dtype)

    def scale(self, name: str, size: int | None = None) -> gs.Constant:
        """A checkpoint's scale as float32: [] if `size` is None, else [size]."""
        if name not in self._constants:
            values = self.checkpoint.scale(name, size or 1)
            self._constants[name] = gs.Constant(name, values if size else values.reshape(()))
        return self._constants[name]

    def scales(self, name: str, shape: tuple[int, int]) -> gs.Constant:
        """A checkpoint's matrix of scales as float32."""
        if name not in self._constants:
            self._constants[name] = gs.Constant(name, self.checkpoint.scales(name, {shape}).reshape(shape))
        return self._constants[name]

    def quantized_weight(self, linear: Linear) -> gs.Constant:
        """The e4m3 codes of a linear's weight, [N, K]."""
        shape = (linear.out_features, linear.in_features)
        return self.stored(f"{linear.name}.weight", shape, linear.axes, [E4M3])
