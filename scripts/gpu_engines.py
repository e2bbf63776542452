"""Engines on the GPU against the same engines interpreted: logits of prefill chunks and of decode steps.

    python -m fp8.scripts.gpu_engines --base bf16_engine --data heldout.txt --output engines.json ENGINE_DIR...

Every engine takes the same text twice, through the CUDA kernels and through the plugins' references on the CPU: some
sequences of different lengths as one packed prefill in chunks, then single decode steps that are fed the text's own
tokens. Asked for: SQNR of the logits >= 35 dB without FP8; with FP8 >= 25 dB and 6 dB more than the engine's own
distance from the `--base` engine (its cost of quantization). Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fp8.builder.engine import write_atomically
from fp8.runtime.kv_cache import blocks_for
from fp8.runtime.request import Request, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.runtime.tokenizer import load_tokenizer
from fp8.scripts.provenance import add_argument, provenance

if TYPE_CHECKING:
    import torch

LENGTHS = (1, 63, 64, 65, 130, 301)  # tokens of the sequences' prompts: around the KV blocks' edges
CHUNK = 40  # the longest prompt enters in chunks of this many tokens, so that later ones attend to cached ones
DECODE_STEPS = 24
HIGH_PRECISION_DB, FP8_DB, ABOVE_OWN_DB = 35.0, 25.0, 6.0


def sqnr(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Signal to quantization-noise ratio in dB, in float64."""
    noise = (reference.double() - found.double()).pow(2).sum().item()
    return math.inf if noise == 0 else 10 * math.log10(reference.double().pow(2).sum().item() / noise)


def logits(session: Session, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(prefill logits, decode logits) f32 of sequences cut from `tokens`, on the CPU."""
    import torch

    requests, block = [], 0
    for i, length in enumerate(LENGTHS):
        prompt = tokens[i * 17 :][: length + DECODE_STEPS]
        count = blocks_for(len(prompt), session.limits.block_size)
        requests.append(
            Request(i, prompt, SamplingParams(), 1, blocks=list(range(block, block + count)), slot=i)
        )  # fmt: skip
        block += count
    prefill, decode = [], []
    for start in range(0, max(LENGTHS), CHUNK):
        parts = [(r, min(CHUNK, n - start)) for r, n in zip(requests, LENGTHS, strict=True) if n > start]
        rows = [Row(r, start, count, False, 0) for r, count in sorted(parts, key=lambda p: p[1] > 1)]
        prefill.append(session.token_logits(rows).cpu().clone())
    for step in range(DECODE_STEPS):
        rows = [Row(r, n + step, 1, False, 0) for r, n in zip(requests, LENGTHS, strict=True)]
        decode.append(session.token_logits(rows).cpu().clone())
    return torch.cat(prefill), torch.cat(decode)


def compare(directory: Path, base: tuple[torch.Tensor, torch.Tensor] | None, tokens: list[int]) -> dict[str, Any]:
    """One row of the table; without `base` the engine is the base itself."""
    import torch

    session = Session(directory, "cpu")
    expected = logits(session, tokens)
    found = logits(Session(directory, "cuda", max_kv_blocks=64), tokens)
    model = session.model
    fp8 = model.format.startswith("fp8") or model.kv_cache_dtype == "float8_e4m3fn"
    row: dict[str, Any] = {"engine": directory.name, "format": model.format, "kv_cache_dtype": model.kv_cache_dtype}
    row["prefill_db"], row["decode_db"] = (sqnr(e, f) for e, f in zip(expected, found, strict=True))
    row["finite"] = all(bool(torch.isfinite(f).all()) for f in found)
    row["own_db"] = sqnr(torch.cat(base), torch.cat(expected)) if base and fp8 else None
    floor = max(FP8_DB, row["own_db"] + ABOVE_OWN_DB) if row["own_db"] is not None else FP8_DB
    row["needed_db"] = floor if fp8 else HIGH_PRECISION_DB
    row["met"] = row["finite"] and min(row["prefill_db"], row["decode_db"]) >= row["needed_db"]
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
    tokens = tokenizer.encode(args.data.read_text(encoding="utf-8")[:20000])
    base = logits(Session(args.base, "cpu"), tokens)
    rows = [compare(directory, base, tokens) for directory in args.engines]
    table = Table("engine", "format", "KV cache", "prefill dB", "decode dB", "needed", "own distance", "met")
    for r in rows:
        figures = [
            f"{r[k]:.1f}" if r[k] is not None else "" for k in ("prefill_db", "decode_db", "needed_db", "own_db")
        ]
        table.add_row(r["engine"], r["format"], r["kv_cache_dtype"], *figures, "yes" if r["met"] else "NO")
    Console().print(table)
    if args.output:
        write_atomically(
            args.output, [json.dumps({**provenance("gpu_engines", argv, args.commit), "rows": rows}, indent=1).encode()]
        )
    return 0 if all(r["met"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
