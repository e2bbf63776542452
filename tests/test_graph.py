"""What the emitted graph looks like: names, types, references into the checkpoint, and refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import tiny_checkpoint
import torch
from safetensors.torch import load_file, save_file

from fp8.builder.checkpoint import Checkpoint, CheckpointError
from fp8.builder.formats.base import Format
from fp8.builder.graph import Graph, StoredValues, serialize
from fp8.builder.interpret import to_torch
from fp8.models import llama

FORMATS = [
    (name, kv) for name in ("bf16", "fp16", "fp8", "fp8_channel", "fp8_rowwise", "fp8_block") for kv in ("auto", "fp8")
]


def emit(directory: Path, format: Format, dtype: str = "bfloat16") -> Graph:
    checkpoint = Checkpoint(directory)
    return llama.emit(llama.read_config(checkpoint.config), checkpoint, format, dtype)


def tiny(directory: Path, name: str = "fp8", kv: str = "fp8", exclude: tuple[str, ...] = ()) -> tuple[Graph, Format]:
    format = tiny_checkpoint.qformat(name, kv, exclude)
    tiny_checkpoint.write(directory, format)
    return emit(directory, format), format


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("name", "kv"), FORMATS)
def test_onnx_checker_accepts_the_graph(name: str, kv: str, dtype: str, tmp_path: Path) -> None:
    format = tiny_checkpoint.qformat(name, kv)
    tiny_checkpoint.write(tmp_path, format, torch_dtype="float16" if name == "fp16" else "bfloat16")
    onnx.checker.check_model(serialize(emit(tmp_path, format, dtype)), full_check=True)


@pytest.mark.parametrize(("name", "kv"), FORMATS)
def test_declared_types_are_the_inferred_ones(name: str, kv: str, tmp_path: Path) -> None:
    graph, _ = tiny(tmp_path, name, kv)
    declared = {t.name: (np.dtype(t.dtype).name, list(t.shape)) for t in graph.tensors().values() if t.inputs}
    bare = graph.copy()
    for node in bare.nodes:
        for tensor in node.outputs:
            if tensor not in bare.outputs:
                tensor.dtype = tensor.shape = None
    inferred = gs.import_onnx(onnx.shape_inference.infer_shapes(serialize(bare), strict_mode=True)).tensors()
    for tensor, (dtype, shape) in declared.items():
        found = inferred[tensor]
        kind = onnx.helper.tensor_dtype_to_np_dtype(found.dtype) if isinstance(found.dtype, int) else found.dtype
        assert np.dtype(kind).name == dtype, tensor
        assert len(found.shape) == len(shape), tensor
        assert all(a == b for a, b in zip(found.shape, shape, strict=True) if isinstance(a, int) and isinstance(b, int))


def test_node_names_are_unique_module_paths(tmp_path: Path) -> None:
    graph, _ = tiny(tmp_path)
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    assert "model.layers.1.mlp.down_proj/gemm" in names
    assert all("/" in name for name in names)


def test_weights_point_into_the_safetensors_file(tmp_path: Path) -> None:
    graph, _ = tiny(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    stored = {n: t for n, t in graph.tensors().items() if isinstance(getattr(t, "_values", None), StoredValues)}
    assert set(stored) == {n for n in expected if "scale" not in n} == set(graph.axes)
    for name, constant in stored.items():
        place = {e.key: e.value for e in constant._values.tensor.external_data}
        raw = Path(place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]
        assert raw == expected[name].view(torch.uint8).numpy().tobytes(), name
        assert torch.equal(to_torch(constant._values.load()).float(), expected[name].float()), name


def test_every_weight_has_logical_axes(tmp_path: Path) -> None:
    graph, _ = tiny(tmp_path)
    assert graph.axes["model.layers.0.self_attn.k_proj.weight"] == ("kv_heads", "embed")
    assert graph.axes["model.layers.0.mlp.down_proj.weight"] == ("embed", "mlp")
    assert graph.axes["model.embed_tokens.weight"] == ("vocab", "embed")
    assert all(len(axes) == len(graph.tensors()[name].shape) for name, axes in graph.axes.items())
    assert graph.copy().axes == graph.axes and graph.copy().activations == graph.activations


def test_an_activation_is_quantized_once_and_dequantized_per_reader(tmp_path: Path) -> None:
    graph, _ = tiny(tmp_path)
    ops = Counter((node.op, node.name.rpartition("/")[2]) for node in graph.nodes)
    layers = tiny_checkpoint.CONFIG["num_hidden_layers"]
    assert ops["QuantizeLinear", "quantize"] == 4 * layers  # qkv, o, gate and up, down
    assert ops["DequantizeLinear", "dequantize"] == 7 * layers
    assert ops["DequantizeLinear", "dequantize_weight"] == 7 * layers


def test_readers_with_different_scales_share_the_largest(tmp_path: Path) -> None:
    format = tiny_checkpoint.qformat("fp8")
    tiny_checkpoint.write(tmp_path, format)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.input_scale"] = torch.tensor([0.5])
    save_file(tensors, tmp_path / "model.safetensors")
    graph = emit(tmp_path, format)
    assert graph.tensors()["model.layers.0.self_attn.q_proj.input_scale"].values == 0.5


def test_excluded_modules_stay_in_the_models_dtype(tmp_path: Path) -> None:
    graph, _ = tiny(tmp_path, exclude=("*.down_proj", "re:model.layers.0.self_attn.[qk]_proj"))
    names = {node.name for node in graph.nodes}
    assert "model.layers.0.mlp.down_proj/widen_weight" in names
    assert "model.layers.0.self_attn.k_proj/widen_weight" in names
    assert "model.layers.0.self_attn.v_proj/dequantize_weight" in names
    assert "model.layers.1.self_attn.k_proj/dequantize_weight" in names


BAD_SCALES = {"zero": 0.0, "nan": float("nan"), "negative": -0.5, "infinite": float("inf")}


@pytest.mark.parametrize("kind", ["missing", "shape", *BAD_SCALES])
@pytest.mark.parametrize("scale", ["mlp.up_proj.input_scale", "mlp.up_proj.weight_scale", "self_attn.v_scale"])
def test_bad_scale_is_refused_by_name(scale: str, kind: str, tmp_path: Path) -> None:
    format = tiny_checkpoint.qformat("fp8", "fp8")
    tiny_checkpoint.write(tmp_path, format)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.{scale}"
    if kind == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.ones(7) if kind == "shape" else torch.tensor([BAD_SCALES[kind]])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=name):
        emit(tmp_path, format)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float16])
def test_scales_are_read_in_any_shape_and_dtype(stored: torch.dtype, tmp_path: Path) -> None:
    format = tiny_checkpoint.qformat("fp8_rowwise", "fp8")
    tiny_checkpoint.write(tmp_path, format)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("scale"):
            tensors[name] = tensor.squeeze().to(stored)
    save_file(tensors, tmp_path / "model.safetensors")
    emit(tmp_path, format)


WRONG = {
    "missing": (None, "is missing"),
    "shape": (torch.zeros(3, 3, dtype=torch.float8_e4m3fn), r"has shape \[3, 3\], expected \[320, 192\]"),
    "dtype": (torch.zeros(320, 192, dtype=torch.int8), "has dtype int8, expected float8_e4m3fn"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weight_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    format = tiny_checkpoint.qformat("fp8")
    tiny_checkpoint.write(tmp_path, format)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    value, message = WRONG[kind]
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        emit(tmp_path, format)
