"""Names of element types: torch's names are ours; ONNX has numbers, safetensors codes, numpy (with ml_dtypes) types."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx

ONNX = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "int8": onnx.TensorProto.INT8,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int32": "I32"}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "int32": 4, "int64": 8, "bool": 1}
NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
_NAMES = {int(number): name for name, number in ONNX.items()}


def dtype_name(dtype: Any) -> str:
    """The name of an ONNX element type, a numpy type or a name."""
    if isinstance(dtype, str):
        return dtype
    return _NAMES[dtype] if isinstance(dtype, int) else np.dtype(dtype).name


def numpy_dtype(name: str) -> np.dtype:
    return NUMPY.get(name) or np.dtype(name)
