"""What the row plugins (norm_quant, quantize, act_quant) ask of their operands, and the types that they give."""

from __future__ import annotations

from collections.abc import Sequence

from fp8.plugins.base import SCALE_BLOCK, Dim, PluginError, Tensor

DTYPES = ("bfloat16", "float16", "float32")  # float32 is for the reference alone
QUANTS = ("none", "static", "per_token", "block")
ROW_QUANTS = (*QUANTS, "from_amax")
VECTOR = 8  # 16-bit values in one 16-byte access


def check_tensor(name: str, found: Tensor | None, dtypes: Sequence[str], shape: tuple[Dim | None, ...]) -> Tensor:
    """The tensor, if it is given with one of the dtypes and the shape (None in it: any size). Raises PluginError."""
    wanted = f"{' or '.join(dtypes)} [{', '.join('any' if n is None else str(n) for n in shape)}]"
    if found is None:
        raise PluginError(f"{name} is absent, expected {wanted}")
    fits = len(found.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
    if found.dtype not in dtypes or not fits:
        raise PluginError(f"{name} is {found.dtype} {list(found.shape)}, expected {wanted}")
    return found


def check_absent(name: str, found: Tensor | None, why: str) -> None:
    """Raises PluginError if an input is given that the attributes leave no use for."""
    if found is not None:
        raise PluginError(f"{name} is given, but {why}; leave it out")


def check_quant(quant: str, scale: Tensor | None, allowed: Sequence[str] = QUANTS) -> None:
    """Raises PluginError unless `quant` is known and the scale is there exactly when it is static, or the rows' amax in
    its place."""
    if quant not in allowed:
        raise PluginError(f"quant is {quant!r}, expected {' or '.join(map(repr, allowed))}")
    if quant == "static":
        check_tensor("scale", scale, ("float32",), (1,))
    elif quant == "from_amax":
        check_tensor("amax", scale, ("float32",), (None,))
    else:
        check_absent("scale", scale, f"quant is {quant!r}")


def scaled(quant: str) -> bool:
    """Whether the scales are an output."""
    return quant in ("per_token", "from_amax", "block")


def outputs(quant: str, dtype: str, rows: Dim, width: Dim) -> tuple[Tensor, ...]:
    """y in e4m3 or (quant "none") `dtype`, then y_scale f32 [rows] where scales are per token, [rows, width / 128] for
    "block". Raises PluginError if the blocks do not divide the width."""
    y = Tensor(dtype if quant == "none" else "float8_e4m3fn", (rows, width))
    if quant != "block":
        return (y, Tensor("float32", (rows,))) if scaled(quant) else (y,)
    if not isinstance(width, int) or width % SCALE_BLOCK:
        raise PluginError(f"rows have {width} values, expected a multiple of {SCALE_BLOCK} for quant 'block'")
    return (y, Tensor("float32", (rows, width // SCALE_BLOCK)))


def check_rows(name: str, dtype: str, width: Dim, limit: int) -> int:
    """The row length, if the CUDA kernels can take rows of it: 16-bit, whole 16-byte units, at most `limit` values.
    Raises PluginError otherwise."""
    if dtype == "float32":
        raise PluginError("x is float32, but the CUDA kernels take bfloat16 or float16; choose a 16-bit dtype")
    if not isinstance(width, int) or width % VECTOR or width == 0:
        raise PluginError(
            f"{name}={width} is not a multiple of {VECTOR} (rows are read in 16-byte units); pad the model's {name}"
        )
    if width > limit:
        raise PluginError(f"{name}={width} exceeds {limit} (a row is held in one block's registers); shard the tensor")
    return width
