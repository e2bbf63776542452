"""What a plugin is timed against in the same run: cuBLASLt, DeepGEMM and cuDNN, or what torch has for the purpose.

A peer does the same work on the same inputs, or less of it where none does all of it: attention peers leave out the
rotary embedding and the write of K and V, norm peers the residual sum and the quantization.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fp8.plugins.base import SCALE_BLOCK, Plugin, StepShape
from fp8.scripts.benchmarks import cudnn_attention

if TYPE_CHECKING:
    import torch

Tensors = Sequence["torch.Tensor | None"]
Launch = Callable[[], object]
Peer = Callable[[Tensors], Launch]  # over one set of a case's inputs and outputs
MERGED = 3  # parts of a merged linear that have one scale each; more distinct ones are one per row
LEAST_ROWS = 16  # cuBLASLt's FP8 products take rows in sixteens


def peers_of(plugin: Plugin, step: StepShape, tensors: Tensors) -> dict[str, Peer]:
    """Peers by name, the one that counts first; none where torch has nothing like it."""
    fp8 = tensors[0] is not None and tensors[0].element_size() == 1
    if plugin.name in ("gemm", "gemm_swiglu"):
        if fp8 and tensors[2] is not None and tensors[2].dim() == 2:
            return _blockwise_peers(plugin, tensors)
        return {"cuBLASLt": _scaled_product} if fp8 else {"cuBLAS": _product}
    if plugin.name == "attention" and not step.decode_sequences:
        return cudnn_attention.peers(plugin, step, tensors)
    simple: dict[str, Peer] = {"norm_quant": _norm, "embedding": _gather, "concat": _cat, "sampling": _argmax}
    return {f"torch {plugin.name}": simple[plugin.name]} if plugin.name in simple else {}


def _scaled_product(tensors: Tensors) -> Launch:
    """torch._scaled_mm with scalar scales, or with one per row and column where x has one per row; sums as the tensor
    cores do, like ours."""
    import torch

    x, w, x_scale, w_scale = tensors[:4]
    assert x is not None and w is not None and x_scale is not None and w_scale is not None
    n = w.shape[0]
    rows = max(LEAST_ROWS, x.shape[0])
    padded = torch.zeros(rows, x.shape[1], dtype=x.dtype, device=x.device) if rows > x.shape[0] else x
    if padded is not x:
        padded[: x.shape[0]] = x
    if x_scale.numel() > 1 or (x.shape[0] == 1 and len(w_scale.unique()) > MERGED):
        scales = x_scale.reshape(-1, 1).expand(-(-rows // x_scale.numel()) * x_scale.numel(), 1)[:rows]
        both = (scales.contiguous(), w_scale.reshape(1, -1))
    else:
        both = (x_scale.reshape(()), w_scale[0].clone().reshape(()))
    out = torch.empty(rows, n, dtype=torch.bfloat16, device=x.device)
    return lambda: torch._scaled_mm(padded, w.t(), *both, out_dtype=out.dtype, use_fast_accum=True, out=out)


def _blockwise_peers(plugin: Plugin, tensors: Tensors) -> dict[str, Peer]:
    """Scaled in blocks of 128 x 128, with bfloat16 results: cuBLASLt's, and DeepGEMM's where a package of it is
    installed."""
    w, w_scale = tensors[1], tensors[3]
    assert w is not None and w_scale is not None
    square = w_scale.shape[0] == -(-w.shape[0] // SCALE_BLOCK)
    if not square or plugin.name != "gemm" or plugin.attributes()["out_dtype"] != "bfloat16":
        return {}
    return {"cuBLASLt": _scaled_blocks, **({"DeepGEMM": _deep_gemm} if importlib.util.find_spec("deep_gemm") else {})}


def _scaled_blocks(tensors: Tensors) -> Launch:
    """torch._scaled_mm, which knows scales in blocks (CUDA 12.9, sm_90) by their strides: of x by columns, of w by rows
    of a multiple of four."""
    import torch

    x, w, x_scale, w_scale = tensors[:4]
    assert x is not None and w is not None and x_scale is not None and w_scale is not None
    n, blocks = w_scale.shape
    rows = torch.zeros(n, -(-blocks // 4) * 4, device=x.device)[:, :blocks].copy_(w_scale)
    scales = x_scale.t().contiguous().t(), rows.t()
    out = torch.empty(x.shape[0], w.shape[0], dtype=torch.bfloat16, device=x.device)
    return lambda: torch._scaled_mm(x, w.t(), *scales, out_dtype=out.dtype, out=out)


def _deep_gemm(tensors: Tensors) -> Launch:
    """The scales of x lie as its own kernels leave them: per 128 of K a column, padded to 16 bytes."""
    import deep_gemm
    import torch

    x, w, x_scale, w_scale = tensors[:4]
    assert x is not None and w is not None and x_scale is not None and w_scale is not None
    rows, blocks = x_scale.shape
    columns = torch.zeros(blocks, -(-rows // 4) * 4, device=x.device)[:, :rows].t()
    columns.copy_(x_scale)
    out = torch.empty(rows, w.shape[0], dtype=torch.bfloat16, device=x.device)
    return lambda: deep_gemm.fp8_gemm_nt((x, columns), (w, w_scale), out)


def _product(tensors: Tensors) -> Launch:
    import torch

    x, w = tensors[:2]
    assert x is not None and w is not None
    out = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    return lambda: torch.mm(x, w.t(), out=out)


def _norm(tensors: Tensors) -> Launch:
    import torch

    x, weight = tensors[0], tensors[2]
    assert x is not None and weight is not None
    return lambda: torch.nn.functional.rms_norm(x, (x.shape[1],), weight, 1e-5)


def _gather(tensors: Tensors) -> Launch:
    import torch

    ids, table, out = tensors[0], tensors[1], tensors[-1]
    assert ids is not None and table is not None and out is not None
    inside = ids.clamp(min=0)
    return lambda: torch.index_select(table, 0, inside, out=out)


def _cat(tensors: Tensors) -> Launch:
    import torch

    parts, out = [t for t in tensors[:-1] if t is not None], tensors[-1]
    return lambda: torch.cat(parts, 1, out=out)


def _argmax(tensors: Tensors) -> Launch:
    logits = tensors[0]
    assert logits is not None
    return lambda: logits.argmax(1)
