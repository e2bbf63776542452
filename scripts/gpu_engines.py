"""Engines on the GPU against the same engines interpreted: logits of prefill chunks and of decode steps.

    python -m fp8.scripts.gpu_engines --base bf16_engine --data heldout.txt --output engines.json ENGINE_DIR...

Every engine takes the same text twice, through the CUDA kernels and through the plugins' references on the CPU: some
sequences of different lengths as one packed prefill in chunks, then single decode steps that are fed the text's own
tokens; then the text's perplexity over windows. Asked for: SQNR of the logits >= 35 dB without FP8, >= 25 dB with;
perplexity within 0.3%. Told beside: an FP8 engine's own distance from the `--base` engine (its cost of quantization).
Exits with 1 if what is asked for is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fp8.builder.verify import sqnr
from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.scoring import token_losses
from fp8.runtime.session import Session
from fp8.runtime.tokenizer import load_tokenizer
from fp8.scripts.provenance import add_argument, save_results

if TYPE_CHECKING:
    import torch

LENGTHS = (1, 63, 64, 65, 130, 301)  # tokens of the sequences' prompts: around the KV blocks' edges
CHUNK = 40  # the longest prompt enters in chunks of this many tokens, so that later ones attend to cached ones
DECODE_STEPS = 24
WINDOW, WINDOWS = 512, 16  # of the perplexity
HIGH_PRECISION_DB, FP8_DB, PERPLEXITY = 35.0, 25.0, 0.003
COLUMNS = {
    "prefill dB": ("prefill_db", 1),
    "decode dB": ("decode_db", 1),
    "needed": ("needed_db", 1),
    "own distance": ("own_db", 1),
    "perplexity CPU": ("perplexity_cpu", 4),
    "GPU": ("perplexity_gpu", 4),
}


def logits(
    session: Session, tokens: list[int], lengths: Sequence[int] = LENGTHS, decode_steps: int = DECODE_STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """(prefill logits, decode logits) f32 of sequences cut from `tokens`, on the CPU."""
    import torch

    requests, block = [], 0
    for i, length in enumerate(lengths):
        prompt = tokens[i * 17 :][: length + decode_steps]
        count = blocks_for(len(prompt), session.limits.block_size)
        requests.append(
            Request(i, prompt, SamplingParams(), 1, blocks=list(range(block, block + count)), slot=i)
        )  # fmt: skip
        block += count
    prefill, decode = [], []
    for start in range(0, max(lengths), CHUNK):
        parts = [(r, min(CHUNK, n - start)) for r, n in zip(requests, lengths, strict=True) if n > start]
        rows = [Row(r, start, count, False, 0) for r, count in sorted(parts, key=lambda p: p[1] > 1)]
        prefill.append(session.token_logits(rows).cpu().clone())
    for step in range(decode_steps):
        rows = [Row(r, n + step, 1, False, 0) for r, n in zip(requests, lengths, strict=True)]
        decode.append(session.token_logits(rows).cpu().clone())
    return torch.cat(prefill), torch.cat(decode)


def perplexity(session: Session, tokens: list[int], windows: int = WINDOWS) -> float:
    spans = [tokens[i * WINDOW :][:WINDOW] for i in range(windows)]
    return math.exp(np.concatenate([token_losses(session, span)[0] for span in spans]).mean())


def compare(directory: Path, base: tuple[torch.Tensor, torch.Tensor], tokens: list[int]) -> dict[str, Any]:
    """One row of the table; `base` are the unquantized engine's logits."""
    import torch

    cpu, gpu = Session(directory, "cpu"), Session(directory, "cuda", max_kv_blocks=64)
    expected, found = logits(cpu, tokens), logits(gpu, tokens)
    fp8 = cpu.model.format.startswith("fp8") or cpu.model.kv_cache_dtype == "float8_e4m3fn"
    row: dict[str, Any] = {"engine": str(directory), "format": cpu.model.format}
    row["kv_cache_dtype"] = cpu.model.kv_cache_dtype
    row["prefill_db"], row["decode_db"] = (sqnr(f, e) for e, f in zip(expected, found, strict=True))
    row["needed_db"] = FP8_DB if fp8 else HIGH_PRECISION_DB
    row["own_db"] = sqnr(torch.cat(expected), torch.cat(base)) if fp8 else None
    row["perplexity_cpu"], row["perplexity_gpu"] = perplexity(cpu, tokens), perplexity(gpu, tokens)
    row["finite"] = all(bool(torch.isfinite(f).all()) for f in found)
    close = abs(row["perplexity_gpu"] / row["perplexity_cpu"] - 1) <= PERPLEXITY
    row["met"] = row["finite"] and close and min(row["prefill_db"], row["decode_db"]) >= row["needed_db"]
    return row


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("gpu_engines", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("engines", nargs="+", type=Path)
    p.add_argument("--base", required=True, type=Path, help="the unquantized engine of the same model")
    p.add_argument("--data", required=True, type=Path, help="a UTF-8 text")
    p.add_argument("--output", type=Path, help="write the rows as JSON")
    add_argument(p)
    args = p.parse_args(argv)
    tokenizer = load_tokenizer(args.base)
    if tokenizer is None:
        p.error(f"--base {args.base} holds no tokenizer")
    tokens = tokenizer.encode(args.data.read_text(encoding="utf-8")[:60000])
    base = logits(Session(args.base, "cpu"), tokens)
    rows = [compare(directory, base, tokens) for directory in args.engines]
    table = Table("engine", "format", "KV cache", *COLUMNS, "met")
    for r in rows:
        figures = ["" if r[key] is None else f"{r[key]:.{digits}f}" for key, digits in COLUMNS.values()]
        table.add_row(r["engine"], r["format"], r["kv_cache_dtype"], *figures, "yes" if r["met"] else "NO")
    Console().print(table)
    if args.output:
        save_results(args.output, "gpu_engines", argv, args.commit, {"rows": rows})
    return 0 if all(r["met"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
