"""Peers of prompt attention: cuDNN's, in FP8 through nvidia-cudnn-frontend where that is installed, in 16 bits through
torch. Whole prompts of one length only."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fp8.plugins.base import StepShape

if TYPE_CHECKING:
    import torch

E4M3_MAX = 448.0


def peers(
    plugin: Any, step: StepShape, tensors: Sequence[torch.Tensor | None]
) -> dict[str, Callable[[Sequence[torch.Tensor | None]], Callable[[], object]]]:
    """Peers of a case of the attention plugin, by name."""
    key_cache = tensors[8]
    assert key_cache is not None
    if step.decode_sequences or step.tokens != step.sequences * step.max_context:
        return {}
    if key_cache.element_size() == 2:
        return {"cuDNN BF16": lambda t: _torch(plugin, step, t)}
    if importlib.util.find_spec("cudnn") is None:
        return {}
    return {"cuDNN FP8": lambda t: _cudnn(plugin, step, t)}


def _heads(plugin: Any, step: StepShape, qkv: torch.Tensor | None) -> list[torch.Tensor]:
    """q, k, v of a packed qkv, as [B, H, S, D] views."""
    assert qkv is not None
    counts = [plugin.num_heads, plugin.num_kv_heads, plugin.num_kv_heads]
    parts = qkv.view(step.sequences, step.max_context, sum(counts), plugin.head_dim).split(counts, 2)
    return [p.contiguous().transpose(1, 2) for p in parts]


def _torch(plugin: Any, step: StepShape, tensors: Sequence[torch.Tensor | None]) -> Callable[[], object]:
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = _heads(plugin, step, tensors[0])
    grouped = plugin.num_heads != plugin.num_kv_heads

    def launch() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    return launch


def _cudnn(plugin: Any, step: StepShape, tensors: Sequence[torch.Tensor | None]) -> Callable[[], object]:
    """E4M3 in and out, static scales, causal."""
    import cudnn
    import torch

    scale = float(tensors[10][0])  # type: ignore[index]
    q, k, v = ((t / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn) for t in _heads(plugin, step, tensors[0]))
    out = torch.empty(q.transpose(1, 2).shape, dtype=q.dtype, device=q.device).transpose(1, 2)
    shapes = tuple((tuple(t.shape), tuple(t.stride())) for t in (q, k, v, out))
    graph, handle, places = _graph(shapes, plugin.softmax_scale)
    values = dict(zip(("q", "k", "v", "out"), (q, k, v, out), strict=True))
    factors = {"scale_s": E4M3_MAX, "descale_s": 1 / E4M3_MAX, "scale_o": 1 / scale}
    for name in places.keys() - values.keys():
        values[name] = torch.full((1, 1, 1, 1), factors.get(name, scale), device=q.device)
    pack = {place: values[name] for name, place in places.items()}
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)

    def launch() -> None:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(pack, workspace, handle=handle)

    return launch


@functools.lru_cache(maxsize=1)  # the sets of a case share it
def _graph(shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], softmax_scale: float) -> tuple[Any, Any, Any]:
    """cuDNN's graph over q, k, v and out of these shapes and strides, its handle, and its tensors by name."""
    import cudnn

    handle, kinds = cudnn.create_handle(), cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT, handle=handle
    )
    places = {
        name: graph.tensor(name=name, dim=list(shape), stride=list(stride), data_type=kinds.FP8_E4M3)
        for name, (shape, stride) in zip("qkv", shapes[:3], strict=True)
    }
    for name in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o"):
        places[name] = graph.tensor(name=name, dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kinds.FLOAT)
    out, _, *maxima = graph.sdpa_fp8(
        **places, generate_stats=False, attn_scale=softmax_scale, use_causal_mask=True, name="sdpa"
    )
    out.set_output(True).set_dim(list(shapes[3][0])).set_stride(list(shapes[3][1])).set_data_type(kinds.FP8_E4M3)
    for name, amax in zip(("amax_s", "amax_o"), maxima, strict=True):
        places[name] = amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(kinds.FLOAT)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph, handle, {**places, "out": out}
