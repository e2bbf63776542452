"""Train the bundled example: a tiny Llama that writes Python, learnt from the standard library's own sources.

    python scripts/train_example.py --output_dir examples            # minutes on one data-centre GPU
    python scripts/train_example.py --output_dir /tmp/try --steps 3  # a dry run on a CPU

Writes OUTPUT_DIR/tiny-python-llama/ (a Hugging Face directory in bf16), OUTPUT_DIR/heldout.txt (whole files never
seen in training) and OUTPUT_DIR/calibration.txt (files of the training part). Same sources, same choice of files.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

END_OF_TEXT = "<|endoftext|>"
# Other projects' code, tests, and files that are tables rather than programs.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
EXCLUDED_FILES = {"html/entities.py"}
# A file that states terms of its own beside the PSF licence is left out, of training and of the texts.
OWN_TERMS = re.compile(r"permission (is hereby granted|to use)|redistribution and use|all rights reserved", re.I)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, save the sources; written to training.json beside the weights."""

    with_tests: bool = True  # the `test` package doubles the text; whole test files never enter heldout.txt
    vocab_size: int = 2048
    context: int = 1024
    epochs: int = 22
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    heldout_bytes: int = 160_000
    validation_bytes: int = 160_000
    calibration_bytes: int = 200_000
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Source texts, one string per file, in a fixed pseudo-random order."""

    train: list[str]
    validation: list[str]
    heldout: list[str]
    calibration: list[str]  # a part of train


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    recipe = Recipe(with_tests=not args.without_tests, epochs=args.epochs, dropout=args.dropout)
    torch.manual_seed(recipe.seed)
    corpus = read_corpus(args.stdlib, recipe)
    tokenizer = train_tokenizer(corpus.train, recipe.vocab_size)
    model, history = train(corpus, tokenizer, recipe, minutes=args.minutes, steps=args.steps)
    heldout = text_loss(model, tokenizer, corpus.heldout, recipe)
    facts = {
        "recipe": asdict(recipe),
        "sources": f"CPython {args.source_version} standard library",
        "bytes": {name: sum(len(t.encode()) for t in texts) for name, texts in vars(corpus).items()},
        "history": history,
        "heldout": heldout,
    }
    write(args.output_dir, model, tokenizer, corpus, recipe, facts)
    print(f"held-out: perplexity {heldout['perplexity']:.3f} per token, {heldout['bits_per_byte']:.4f} bits per byte")
    print(greedy(model, tokenizer, "def fibonacci(n):", 120))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--source_version", default=sys.version.split()[0], help="the version that --stdlib belongs to")
    parser.add_argument("--without_tests", action="store_true", help="leave the `test` package out of training")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--dropout", type=float, default=Recipe.dropout)
    parser.add_argument("--minutes", type=float, default=5.0, help="time for training; the schedule shortens to fit")
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps (a dry run)")
    return parser.parse_args(argv)


# --- text ---


def read_corpus(stdlib: Path, recipe: Recipe) -> Corpus:
    """Split the library's files: held-out and validation from the library proper, the rest is for training."""
    paths = [p for p in stdlib.rglob("*.py") if wanted(p.relative_to(stdlib), recipe.with_tests)]
    if len(paths) < 100:
        sys.exit(f"train_example: {stdlib} holds {len(paths)} Python sources; give the library's folder with --stdlib")
    paths.sort(key=lambda p: hashlib.sha256(p.relative_to(stdlib).as_posix().encode()).digest())
    texts: dict[str, str] = {}  # by name, each content once
    seen: set[str] = set()
    for path in paths:
        text = path.read_text("utf-8", errors="ignore")
        if len(text) > 200 and text not in seen and not OWN_TERMS.search(text):
            seen.add(text)
            texts[path.relative_to(stdlib).as_posix()] = text
    # Middle-sized files of the library proper: the measured text should be many programs, none of them a test.
    fit = [name for name, text in texts.items() if not name.startswith("test/") and 2_000 < len(text) < 40_000]
    heldout = take(fit, texts, recipe.heldout_bytes)
    validation = take(fit[len(heldout) :], texts, recipe.validation_bytes)
    calibration = take(fit[len(heldout) + len(validation) :], texts, recipe.calibration_bytes)
    apart = {*heldout, *validation}
    return Corpus(
        train=[text for name, text in texts.items() if name not in apart],
        validation=[texts[name] for name in validation],
        heldout=[texts[name] for name in heldout],
        calibration=[texts[name] for name in calibration],
    )


def wanted(name: Path, with_tests: bool) -> bool:
    folders = set(name.parts[:-1])
    if folders & EXCLUDED_FOLDERS or name.as_posix() in EXCLUDED_FILES:
        return False
    return "test" not in folders or (with_tests and len(name.parts) == 2 and name.name.startswith("test_"))


def take(names: list[str], texts: dict[str, str], limit: int) -> list[str]:
    """The longest prefix of `names` whose texts have at most `limit` characters."""
    total, chosen = 0, []
    for name in names:
        total += len(texts[name])
        if total > limit:
            break
        chosen.append(name)
    return chosen


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every text has tokens, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one row of ids, each text after an END_OF_TEXT: int64 [tokens]."""
    end = tokenizer.encode(END_OF_TEXT).ids[0]
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.append(end)
        ids.extend(encoding.ids)
    return torch.tensor([*ids, end])


# --- training ---


def model_config(recipe: Recipe) -> LlamaConfig:
    """Sizes that are multiples of 16 and not of 128, a head_dim that is not hidden / heads: the odd cases."""
    return LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=336,
        intermediate_size=864,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attention_dropout=recipe.dropout,
    )


def train(
    corpus: Corpus, tokenizer: Tokenizer, recipe: Recipe, minutes: float, steps: int | None
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """AdamW on float32 weights under bf16 autocast, cosine schedule; keeps the weights that validate best, in bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = pack(tokenizer, corpus.train)
    model = LlamaForCausalLM(model_config(recipe)).to(device)
    add_dropout(model, recipe.dropout)
    epoch_steps = (len(data) - 1) // (recipe.context * recipe.batch)
    total = steps or epoch_steps * recipe.epochs
    optimizer = optimizer_of(model, recipe)
    begin, limit = time.monotonic(), minutes * 60

    def rate(step: int) -> float:  # short of time, the schedule runs faster: the rate always ends low
        return cosine(step, max(step / total, (time.monotonic() - begin) / limit))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(data)} tokens, {total} steps on {device}")
    history: list[dict[str, float]] = []
    best: dict[str, torch.Tensor] = {}
    for step, batch in zip(range(1, total + 1), batches(data, recipe), strict=False):
        loss = training_loss(model, batch.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        late = time.monotonic() - begin > limit
        if step % epoch_steps == 0 or step == total or late:
            bits = text_loss(model, tokenizer, corpus.validation, recipe)["bits_per_byte"]
            history.append({"step": step, "train_loss": loss.item(), "validation_bits_per_byte": bits})
            print(f"{time.monotonic() - begin:6.1f} s  {history[-1]}", flush=True)
            if bits == min(h["validation_bits_per_byte"] for h in history):
                best = {name: w.to(torch.bfloat16).clone() for name, w in model.state_dict().items()}
        if late:
            print(f"stopped after {minutes} minutes")
            break
    model.load_state_dict(best)  # rounded to bf16: what is written is what is measured
    return model, history


def training_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Dropout on each branch before its residual add; Llama has none of its own, and the text is small."""

    def drop_first(module: nn.Module, _: object, output: tuple) -> tuple:
        return (nn.functional.dropout(output[0], rate, module.training), *output[1:])

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop_first)
        layer.mlp.register_forward_hook(lambda m, _, y: nn.functional.dropout(y, rate, m.training))


def optimizer_of(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95))


def cosine(step: int, progress: float) -> float:
    """Warm-up over 100 steps, then down to a hundredth of the peak rate as `progress` goes from 0 to 1."""
    return min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def batches(data: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Windows [batch, context + 1] of the packed row, shuffled; each epoch cuts at another offset."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        offset = int(torch.randint(recipe.context, (1,), generator=generator))
        starts = torch.arange(offset, len(data) - recipe.context - 1, recipe.context)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for part in starts.split(recipe.batch):
            if len(part) == recipe.batch or len(starts) < recipe.batch:
                yield data[part[:, None] + torch.arange(recipe.context + 1)]


# --- measuring and writing ---


@torch.inference_mode()
def text_loss(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str], recipe: Recipe) -> dict[str, float]:
    """Loss of bf16-rounded weights computed in float32, over windows of the context length that do not overlap."""
    device = model.device
    rounded = LlamaForCausalLM(replace_dropout(model.config)).to(device).eval()
    rounded.load_state_dict({name: w.to(torch.bfloat16) for name, w in model.state_dict().items()})
    data = pack(tokenizer, texts)
    total = 0.0
    for start in range(0, len(data) - 1, recipe.context):
        window = data[start : start + recipe.context + 1].to(device)
        logits = rounded(input_ids=window[None, :-1], use_cache=False).logits[0]
        total += cross_entropy(logits.float(), window[1:], reduction="sum").item()
    tokens, size = len(data) - 1, sum(len(t.encode()) for t in texts)
    return {"perplexity": math.exp(total / tokens), "bits_per_byte": total / math.log(2) / size, "tokens": tokens}


def replace_dropout(config: LlamaConfig) -> LlamaConfig:
    return LlamaConfig(**{**config.to_dict(), "attention_dropout": 0.0})


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    model.eval()
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(ids)


def write(
    output_dir: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, corpus: Corpus, recipe: Recipe, facts: dict
) -> None:
    folder = output_dir / "tiny-python-llama"
    folder.mkdir(parents=True, exist_ok=True)
    model.config = replace_dropout(model.config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": recipe.context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    (output_dir / "heldout.txt").write_text("".join(corpus.heldout), encoding="utf-8")
    (output_dir / "calibration.txt").write_text("".join(corpus.calibration), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
