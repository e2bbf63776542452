"""What an engine could do at best on one H200: the yardstick of fp8-bench latency."""

from __future__ import annotations

from fp8.builder.engine import Plan
from fp8.scripts.benchmarks.ceilings import H200

LINEARS = ("gemm", "gemm_swiglu")


def bound(plan: Plan, batch: int, input_len: int, output_len: int) -> float:
    """Tokens/s if nothing but these took time: linears at their tensor-core rate for the prompts, then per output token
    all linears' weights and the cached K and V once from memory. Attention's own arithmetic is left out."""
    flops_seconds, weight_bytes = 0.0, 0.0
    for step in plan.steps:
        if step.plugin not in LINEARS:
            continue
        w = plan.buffer(step.inputs[1])
        n, k = (int(d) for d in w.shape)
        rows = batch if plan.buffer(step.outputs[0]).shape[0] == "L" else batch * input_len
        flops_seconds += H200.seconds(0, 2.0 * n * k * rows, w.dtype)
        weight_bytes += n * k * (1 if w.dtype == "float8_e4m3fn" else 2)
    context = input_len + output_len / 2
    decode = (output_len - 1) * (weight_bytes + batch * context * kv_token_bytes(plan)) / H200.copy
    return batch * output_len / (flops_seconds + decode)


def kv_token_bytes(plan: Plan) -> int:
    """Bytes of K and V of one token in all layers."""
    model = plan.model
    width = 1 if model.kv_cache_dtype in ("fp8", "float8_e4m3fn") else 2
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * width
