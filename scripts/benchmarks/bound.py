"""What an engine could do at best on H200s: the yardstick of fp8-bench latency."""

from __future__ import annotations

import math

from fp8.builder.dtypes import BYTES
from fp8.builder.engine import Plan
from fp8.scripts.benchmarks.ceilings import H200

LINEARS = ("gemm", "gemm_send", "gemm_swiglu")


def bound(plan: Plan, batch: int, input_len: int, output_len: int) -> float:
    """Tokens/s if nothing but these took time: linears at their tensor-core rate for the prompts, then per output token
    all linears' weights and the cached K and V once from memory, at the rate of a copy, of which the targets are: a
    pure read is up to 7% faster. Attention's own arithmetic is left out, and it is not taken into account that most
    tokens of a prompt need no linear after the last attention.

    Of several ranks, `plan` is one's, which does its part without a wait for the others; pipeline stages have a part of
    the sequences each, so every stage reads its weights once for each part."""
    flops_seconds, weight_bytes = 0.0, 0.0
    for step in plan.steps:
        if step.plugin not in LINEARS:
            continue
        w = plan.buffer(step.inputs[1])
        n, k = (int(d) for d in w.shape)
        rows = batch if plan.buffer(step.outputs[0]).shape[0] == "L" else batch * input_len
        flops_seconds += H200.product_seconds(2.0 * n * k * rows, w.dtype)
        weight_bytes += n * k * (1 if w.dtype == "float8_e4m3fn" else 2)
    stages, chunks = plan.compatibility.pp_size, math.ceil(batch * input_len / plan.limits.max_num_tokens)
    prompts = flops_seconds * (chunks + stages - 1) / chunks
    context = input_len + output_len / 2
    step_bytes = stages * weight_bytes + max(batch, stages) * context * kv_token_bytes(plan)
    return batch * output_len / (prompts + (output_len - 1) * step_bytes / H200.copy)


def kv_token_bytes(plan: Plan) -> int:
    """Bytes of K and V of one token in all layers of the plan."""
    caches = [b for b in plan.buffers if b.kind == "kv_cache"]
    return sum(int(b.shape[2]) * int(b.shape[3]) * BYTES[b.dtype] for b in caches)
