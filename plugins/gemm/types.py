"""What both gemm plugins ask of their operands."""

from __future__ import annotations

from collections.abc import Sequence

from fp8.plugins.base import SCALE_BLOCK, Dim, PluginError, Tensor

BYTES = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4}
GROUP_ROWS = 8  # of w that share a blockwise scale at least: neighbours in a thread's accumulators
OUT_DTYPES = ("bfloat16", "float16", "float32")
ACCUMULATIONS = ("fast", "precise")  # of e4m3 products: as the tensor cores add, or in float32 every 128 of K


def operands(inputs: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """x [rows, K] and w [N, K], checked to be of one dtype and one K. Raises PluginError otherwise."""
    x, w = inputs[:2]
    if x is None or w is None:
        raise PluginError("x and w must be given")
    if x.dtype not in BYTES or x.dtype != w.dtype:
        raise PluginError(
            f"x is {x.dtype} and w is {w.dtype}, expected one of {', '.join(BYTES)} for both; quantize both or neither"
        )
    if len(x.shape) != 2 or len(w.shape) != 2 or not isinstance(w.shape[0], int) or x.shape[1] != w.shape[1]:
        raise PluginError(
            f"x has shape {list(x.shape)} and w {list(w.shape)}, expected [rows, K] and [N, K] with one K"
        )
    return x, w


def check_vector(name: str, found: Tensor | None, sizes: tuple[Dim, ...]) -> None:
    """Raises PluginError unless the optional vector is float32 with one of the sizes."""
    if found is None or (found.dtype == "float32" and len(found.shape) == 1 and found.shape[0] in sizes):
        return
    expected = " or ".join(f"[{n}]" for n in dict.fromkeys(sizes))
    raise PluginError(f"{name} is {found.dtype} {list(found.shape)}, expected float32 {expected}")


def blockwise(inputs: Sequence[Tensor | None]) -> bool:
    """Whether x has a scale per row and SCALE_BLOCK of K, and w one per `group_rows` rows and SCALE_BLOCK of K."""
    return inputs[2] is not None and len(inputs[2].shape) == 2


def group_rows(inputs: Sequence[Tensor | None]) -> int:
    """Rows of w that share a blockwise scale: SCALE_BLOCK, or GROUP_ROWS where the blocks of parts that are joined or
    cut do not meet its multiples."""
    w, scale = inputs[1], inputs[3]
    if w is None or scale is None or len(scale.shape) != 2:
        return GROUP_ROWS
    return SCALE_BLOCK if scale.shape[0] == -(-int(w.shape[0]) // SCALE_BLOCK) else GROUP_ROWS


def check_scales(inputs: Sequence[Tensor | None], rows: Dim, n: int, k: Dim) -> None:
    """Raises PluginError unless both operands' scales are vectors, or both are blockwise matrices."""
    if not blockwise(inputs):
        check_vector("x_scale", inputs[2], (1, rows))
        check_vector("w_scale", inputs[3], (n,))
        return
    if not isinstance(k, int) or k % SCALE_BLOCK or n % GROUP_ROWS:
        raise PluginError(
            f"w is [{n}, {k}], expected N in multiples of {GROUP_ROWS} and K of {SCALE_BLOCK} for blockwise scales"
        )
    for name, found, size in (("x_scale", inputs[2], rows), ("w_scale", inputs[3], -(-n // group_rows(inputs)))):
        expected = Tensor("float32", (size, k // SCALE_BLOCK))
        if found != expected:
            text = f"{found.dtype} {list(found.shape)}" if found else "absent"
            raise PluginError(f"{name} is {text}, expected float32 {list(expected.shape)}")


def check_accumulation(inputs: Sequence[Tensor | None], accumulation: str) -> None:
    """Raises PluginError unless the sums can be taken so: "precise" is of e4m3 products, which alone lose bits."""
    if accumulation not in ACCUMULATIONS:
        raise PluginError(f"accumulation is {accumulation!r}, expected {' or '.join(map(repr, ACCUMULATIONS))}")
    if accumulation == "precise" and inputs[0] is not None and inputs[0].dtype != "float8_e4m3fn":
        raise PluginError(f"accumulation is 'precise' and x {inputs[0].dtype}, whose sums are float32 as they are")


def check_types(inputs: Sequence[Tensor | None], out_dtype: str) -> tuple[Dim, int]:
    """Checks x, w, x_scale, w_scale, bias and the output's dtype; returns (rows, N)."""
    x, w = operands(inputs)
    rows, n = x.shape[0], int(w.shape[0])
    check_scales(inputs, rows, n, x.shape[1])
    check_vector("bias", inputs[4], (n,))
    if out_dtype not in OUT_DTYPES:
        raise PluginError(f"out_dtype is {out_dtype}, expected one of {', '.join(OUT_DTYPES)}")
    if BYTES[x.dtype] > 1 and out_dtype not in (x.dtype, "float32"):
        raise PluginError(f"x is {x.dtype} and the output {out_dtype}, expected {x.dtype} or float32; insert a Cast")
    return rows, n


def check_tensor_cores(inputs: Sequence[Tensor | None]) -> None:
    """Raises PluginError where TMA and wgmma cannot take the operands."""
    x, _ = operands(inputs)
    k = x.shape[1]
    if x.dtype == "float32":
        raise PluginError("x is float32, but the tensor cores take float8_e4m3fn, bfloat16, float16; choose one")
    unit = 16 // BYTES[x.dtype]
    if not isinstance(k, int) or k % unit or k == 0:
        remedy = "pad it, or keep this layer in 16 bits" if unit == 16 else "pad it"
        raise PluginError(f"K={k} is not a multiple of {unit} (TMA rows are 16-byte units); {remedy}.")
