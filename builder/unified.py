"""TensorRT-LLM's unified checkpoint, as its `convert_checkpoint.py` and ModelOpt's export_tensorrt_llm_checkpoint write
it (config.json with `architecture`, rank{r}.safetensors), seen as the Hugging Face directory that it came from.

Tensors are parts of the ranks' files, joined when they are read. q, k and v of a rank lie in one tensor, one after the
other, and share a scale; `mlp.fc` is gate_proj, `mlp.gate` up_proj, `mlp.proj` down_proj.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fp8.builder.checkpoint import DTYPES, Checkpoint, CheckpointError, Entry, read_header, read_json
from fp8.builder.imports.base import ORIGINAL
from fp8.builder.quantization_config import object_of

MODELS = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
KEYS = {  # theirs: Hugging Face's
    "dtype": "torch_dtype", "vocab_size": "vocab_size", "hidden_size": "hidden_size", "hidden_act": "hidden_act",
    "intermediate_size": "intermediate_size", "num_hidden_layers": "num_hidden_layers", "head_size": "head_dim",
    "num_attention_heads": "num_attention_heads", "num_key_value_heads": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings", "norm_epsilon": "rms_norm_eps", "rotary_base": "rope_theta",
    "share_embedding_table": "tie_word_embeddings", "attn_bias": "attention_bias", "mlp_bias": "mlp_bias",
    "rotary_scaling": "rope_scaling", "rotary_pct": "partial_rotary_factor",
}  # fmt: skip
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rotary_base")
LINEARS = {  # theirs: Hugging Face's, and the axis that ranks divide
    "attention.dense": ("self_attn.o_proj", 1), "mlp.fc": ("mlp.gate_proj", 0), "mlp.gate": ("mlp.up_proj", 0),
    "mlp.proj": ("mlp.down_proj", 1),
}  # fmt: skip
NORMS = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
SCALES = {"activation_scaling_factor": "input_scale", "weights_scaling_factor": "weight_scale"}


@dataclass(frozen=True)
class Joined(Entry):
    """Rows [begin, end) of tensors of several ranks, one after the other along an axis, up to `shape`."""

    parts: tuple[tuple[Entry, int, int], ...] = ()
    axis: int = 0

    def array(self) -> np.ndarray:
        joined = np.concatenate([entry.array()[begin:end] for entry, begin, end in self.parts], self.axis)
        return joined[: self.shape[0]].view(self.dtype)


def open_checkpoint(directory: Path) -> Checkpoint:
    """A Hugging Face directory, or what is seen as one."""
    if (directory / "rank0.safetensors").is_file() and not (directory / "rank0.engine").is_file():
        return UnifiedCheckpoint(directory)
    return Checkpoint(directory)


class UnifiedCheckpoint(Checkpoint):
    """By Hugging Face's names. What is not recognised keeps its own: a tensor that no model reads, which is refused."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        stored = read_json(directory / "config.json")
        mapping = object_of(stored, "mapping")
        ranks = mapping.get("tp_size", mapping.get("world_size", 1))
        if mapping.get("world_size", ranks) != ranks or type(ranks) is not int or ranks < 1:
            raise CheckpointError(
                f"{directory / 'config.json'}: mapping is {dict(mapping)}; only tensor parallelism is read (tp_size = "
                f"world_size); {ORIGINAL}"
            )
        self.config = hugging_face(directory, stored)
        self.ranks = [read_header(directory / f"rank{r}.safetensors")[0] for r in range(ranks)]
        self.entries = {entry.name: entry for entry in self._entries()}

    def _entries(self) -> Iterator[Entry]:
        left = dict(self.ranks[0])
        for entry, sources in self._known():
            for name in sources:
                left.pop(name, None)
            yield entry
        yield from left.values()

    def _known(self) -> Iterator[tuple[Entry, tuple[str, ...]]]:
        """Entries by our names, and of which tensors of a rank they are made."""
        tables = {"transformer.vocab_embedding": "model.embed_tokens", "lm_head": "lm_head"}
        for theirs, ours in tables.items():
            yield from self._rows(f"{theirs}.weight", f"{ours}.weight", rows=self.config["vocab_size"])
        yield from self._same("transformer.ln_f.weight", "model.norm.weight")
        for i in range(self.config["num_hidden_layers"]):
            theirs, ours = f"transformer.layers.{i}", f"model.layers.{i}"
            for norm, name in NORMS.items():
                yield from self._same(f"{theirs}.{norm}.weight", f"{ours}.{name}.weight")
            yield from self._attention(f"{theirs}.attention", f"{ours}.self_attn")
            for module, (name, axis) in LINEARS.items():
                yield from self._linear(f"{theirs}.{module}", f"{ours}.{name}", axis)

    def _linear(self, theirs: str, ours: str, axis: int) -> Iterator[tuple[Entry, tuple[str, ...]]]:
        yield from self._rows(f"{theirs}.weight", f"{ours}.weight", axis=axis)
        whole = self._same if axis else self._rows
        yield from whole(f"{theirs}.bias", f"{ours}.bias")
        yield from whole(f"{theirs}.per_channel_scale", f"{ours}.weight_scale")
        for scale, name in SCALES.items():
            yield from self._same(f"{theirs}.{scale}", f"{ours}.{name}")

    def _attention(self, theirs: str, ours: str) -> Iterator[tuple[Entry, tuple[str, ...]]]:
        c, ranks = self.config, len(self.ranks)
        heads, kv_heads = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
        dim = c.get("head_dim") or c["hidden_size"] // heads
        if heads % ranks or kv_heads % ranks:
            raise CheckpointError(
                f"{self.directory}: {kv_heads} KV heads on {ranks} ranks are kept more than once, which is not read; "
                f"{ORIGINAL}"
            )
        begin = 0
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            end = begin + count // ranks * dim
            for kind, name in (("weight", "weight"), ("bias", "bias"), ("per_channel_scale", "weight_scale")):
                yield from self._rows(f"{theirs}.qkv.{kind}", f"{ours}.{part}_proj.{name}", begin, end)
            for scale, name in SCALES.items():
                yield from self._same(f"{theirs}.qkv.{scale}", f"{ours}.{part}_proj.{name}")
            begin = end
        both = f"{theirs}.kv_cache_scaling_factor"
        for part in ("k", "v"):
            alone = f"{theirs}.{part}_cache_scaling_factor"
            source = alone if alone in self.ranks[0] else both
            for entry, sources in self._same(source, f"{ours}.{part}_scale"):
                yield entry, (*sources, both)

    def _rows(
        self, theirs: str, ours: str, begin: int = 0, end: int | None = None, axis: int = 0, rows: int | None = None
    ) -> Iterator[tuple[Entry, tuple[str, ...]]]:
        """The ranks' parts along an axis; nothing if there are none. `rows`: of all; the rest is padding, and ranks
        that have them all have copies."""
        if theirs not in self.ranks[0]:
            return
        found = [self._of(rank, theirs) for rank in range(len(self.ranks))]
        first = found[0]
        if rows is not None and first.shape[0] >= rows:
            found = found[:1]
        shape = list(first.shape)
        shape[0] = (first.shape[0] if end is None else end) - begin
        shape[axis] *= len(found)
        if rows is not None:
            shape[0] = min(shape[0], rows)
        dtype = DTYPES["F8_E4M3"] if first.dtype == DTYPES["I8"] else first.dtype  # old files have codes as int8
        parts = tuple((entry, begin, entry.shape[0] if end is None else end) for entry in found)
        size = int(np.prod(shape)) * dtype.itemsize
        yield Joined(ours, first.file, first.offset, size, dtype, tuple(shape), parts, axis), (theirs,)

    def _same(self, theirs: str, ours: str) -> Iterator[tuple[Entry, tuple[str, ...]]]:
        """A tensor of which every rank has a copy. Raises CheckpointError if they differ."""
        if theirs not in self.ranks[0]:
            return
        found = [self._of(rank, theirs) for rank in range(len(self.ranks))]
        first = found[0]
        if any(entry.array().tobytes() != first.array().tobytes() for entry in found[1:]):
            raise CheckpointError(
                f"{theirs} differs between ranks in {self.directory}, expected copies; export the checkpoint again"
            )
        yield Entry(ours, first.file, first.offset, first.nbytes, first.dtype, first.shape), (theirs,)

    def _of(self, rank: int, name: str) -> Entry:
        first, entry = self.ranks[0][name], self.ranks[rank].get(name)
        if entry is None or (entry.shape, entry.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"{self.directory}: {name} is {entry and list(entry.shape)} in rank{rank}.safetensors and "
                f"{list(first.shape)} in rank0.safetensors, expected equal parts; export the checkpoint again"
            )
        return entry


def hugging_face(directory: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as Hugging Face has it. Raises CheckpointError for what it does not say, or says of another model."""
    where = directory / "config.json"
    architecture = stored.get("architecture")
    if architecture not in MODELS:
        raise CheckpointError(
            f"{where}: architecture {architecture!r} of this TensorRT-LLM checkpoint is not read; known are "
            f"{', '.join(MODELS)}"
        )
    for key in NEEDED:
        if stored.get(key) is None:
            raise CheckpointError(
                f"{where}: {key} is missing; add it: Hugging Face's config.json has it as {KEYS[key]}"
            )
    if stored.get("position_embedding_type", "rope_gpt_neox") not in ("rope_gpt_neox", "yarn"):
        raise CheckpointError(
            f"{where}: position_embedding_type {stored['position_embedding_type']!r} is not read, expected "
            "rope_gpt_neox"
        )
    config = {ours: stored[key] for key, ours in KEYS.items() if stored.get(key) is not None}
    config |= {"model_type": MODELS[architecture], "architectures": [architecture]}
    quantization = object_of(stored, "quantization")
    if quantization.get("quant_algo") or quantization.get("kv_cache_quant_algo"):
        config["quantization_config"] = _scheme(quantization)
    return config


def _scheme(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """As the tool says it that has the same scheme. What is excluded the tensors tell."""
    if quantization.get("clamp_val"):  # rowwise: the bound of a token's largest magnitude
        return {"quant_method": "fbgemm_fp8", "activation_scale_ub": max(quantization["clamp_val"])}
    kv = quantization.get("kv_cache_quant_algo")
    return {
        "quant_method": "modelopt",
        "quant_algo": quantization.get("quant_algo") or "none",
        "kv_cache_quant_algo": kv,
    }
