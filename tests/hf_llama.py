"""Tiny random Llamas made by Hugging Face transformers: the oracle of graphs, calibration and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd": {
        "vocab_size": 331, "hidden_size": 60, "intermediate_size": 44, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 26, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5e5},
    },
}  # fmt: skip
KIN: dict[str, dict[str, Any]] = {  # of other model types
    "mistral": {"kind": "Mistral", "sliding_window": None},
    "mistral_window": {"kind": "Mistral", "sliding_window": 128},
    "qwen2": {"kind": "Qwen2"},
    "qwen2_yarn": {
        "kind": "Qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen2_tied": {"kind": "Qwen2", "tie_word_embeddings": True, "sliding_window": 32, "max_window_layers": 1},
}
BASE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make(
    directory: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", kind: str = "Llama", **changes: Any
) -> Any:
    """Saves a random model of that dtype and returns it in float32. Activations have about unit variance."""
    torch.manual_seed(len(repr(changes)))
    config = getattr(transformers, f"{kind}Config")(**{**BASE, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        random = torch.randn_like(p)
        if "norm" in name:
            p.data = 1 + 0.2 * random
        else:
            p.data = random * (0.2 if name.endswith("bias") else p.shape[-1] ** -0.5)
    model.model.embed_tokens.weight.data *= BASE["hidden_size"] ** 0.5
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    # Read anew: `model.to` has rounded the rotary frequencies as well, which are not in the checkpoint.
    return load(directory)


def load(directory: Path) -> Any:
    """A checkpoint as transformers has it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def add_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.save(str(directory / "tokenizer.json"))


def sequences(*lengths: int, vocab: int = 300, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def logits(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    """The model's logits of every token of all sequences, one after the other."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([s])).logits[0] for s in sequences])


def sqnr(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Signal to noise in dB."""
    reference, found = reference.double(), found.double()
    noise = (reference - found).square().sum()
    return float("inf") if noise == 0 else 10 * torch.log10(reference.square().sum() / noise).item()
