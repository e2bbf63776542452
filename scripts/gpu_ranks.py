"""Engines of several ranks against the engine of one rank of the same model: logits, perplexity, greedy texts.

    mpirun -n 2 python -m fp8.scripts.gpu_ranks --data heldout.txt --output ranks.json tp2/engine=one/engine ...

Rank 0 also opens the engine of one rank, on its own device. Both take the same text: some sequences as packed prefill
in chunks, then decode steps (fp8.scripts.gpu_engines); windows for the perplexity; greedy texts of several prompts at
once, through CUDA graphs, sampling and, in a pipeline, tokens that go from the last stage to the first. Asked for: SQNR
of the logits >= 35 dB without FP8, >= 25 dB with; perplexity within 0.3%; texts that part only where the best two
tokens were nearer than five deviations of the logits' difference. Exits with 1 if what is asked for is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp8.builder.verify import sqnr
from fp8.runtime.comm import RANK_TIMEOUT, World
from fp8.runtime.launcher import RankError, launched
from fp8.runtime.llm import LLM, Completion
from fp8.runtime.ranks import stop
from fp8.runtime.sampling_params import SamplingParams
from fp8.runtime.session import Session
from fp8.scripts.argument_types import positive
from fp8.scripts.gpu_engines import FP8_DB, HIGH_PRECISION_DB, PERPLEXITY, WINDOW, logits, perplexity
from fp8.scripts.provenance import add_argument, save_results
from fp8.scripts.ranks import OPENING_ERRORS

PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 7, 40, 48
NEAR, NEAR_FP8 = 0.05, 0.4  # ln p of the best two tokens: nearer ones may change places with the batch's size alone
EQUAL_DB = 300.0  # stands for no difference at all, which JSON cannot say
DEVIATIONS = 5  # of some thousand tokens, none is farther off
KV_BLOCKS = 64
COLUMNS = (
    "prefill_db",
    "decode_db",
    "needed_db",
    "perplexity_one",
    "perplexity",
    "same_texts",
    "widest_gap",
    "gap_allowed",
    "met",
)


def parts(ours: Completion, base: Completion) -> float | None:
    """None if the texts are the same; else how far apart the base's best two tokens were where they part."""
    for i, (a, b) in enumerate(zip(ours.token_ids, base.token_ids, strict=False)):
        if a != b:
            assert base.logprobs is not None
            first, second = (p for _, p in base.logprobs[i].top[:2])
            return float(first - second)
    return None if len(ours.token_ids) == len(base.token_ids) else float("inf")


def greedy(llm: LLM, tokens: Sequence[int]) -> list[Completion]:
    prompts = [tokens[i * 997 :][:PROMPT_TOKENS] for i in range(PROMPTS)]
    return llm.generate(prompts, SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, logprobs=2))


def compare(divided: LLM, one: LLM, tokens: list[int], windows: int) -> dict[str, Any]:
    """The figures of a row."""
    import torch

    ours, base = divided.session, one.session
    model = base.model
    fp8 = model.format.startswith("fp8") or model.kv_cache_dtype == "float8_e4m3fn"
    place = ours.plan.compatibility
    row: dict[str, Any] = {
        "format": model.format, "kv_cache_dtype": model.kv_cache_dtype, "tp_size": place.tp_size,
        "pp_size": place.pp_size, "device": ours.device.type, "needed_db": FP8_DB if fp8 else HIGH_PRECISION_DB,
    }  # fmt: skip
    expected, found = logits(base, tokens), logits(ours, tokens)
    pairs = zip(expected, found, strict=True)
    row["prefill_db"], row["decode_db"] = (min(sqnr(f, e), EQUAL_DB) for e, f in pairs)
    row["perplexity_one"], row["perplexity"] = (perplexity(session, tokens, windows) for session in (base, ours))
    deviation = float((torch.cat(found) - torch.cat(expected)).square().mean().sqrt())
    gaps = [parts(a, b) for a, b in zip(greedy(divided, tokens), greedy(one, tokens), strict=True)]
    apart = [gap for gap in gaps if gap is not None]
    row["texts"], row["same_texts"], row["widest_gap"] = len(gaps), len(gaps) - len(apart), max(apart, default=0.0)
    row["gap_allowed"] = max(NEAR_FP8 if fp8 else NEAR, DEVIATIONS * 2**0.5 * deviation)
    row["met"] = (
        min(row["prefill_db"], row["decode_db"]) >= row["needed_db"]
        and abs(row["perplexity"] / row["perplexity_one"] - 1) <= PERPLEXITY
        and row["widest_gap"] <= row["gap_allowed"]
    )
    return row


def lead(args: argparse.Namespace, world: World) -> list[dict[str, Any]]:
    """On rank 0: a row per pair, printed as it comes."""
    rows = []
    for divided, one in args.engines:
        begin = time.perf_counter()
        ours = LLM(divided, args.device, KV_BLOCKS, world=world)
        base = LLM(one, args.device, KV_BLOCKS)
        assert base.tokenizer is not None, f"{one} holds no tokenizer"
        tokens = base.tokenizer.encode(args.data.read_text(encoding="utf-8"))
        windows = min(len(tokens) // WINDOW, args.max_windows or len(tokens))
        row = {"engine": divided, **compare(ours, base, tokens, windows), "seconds": time.perf_counter() - begin}
        stop(world)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
    return rows


def follow(args: argparse.Namespace, world: World) -> None:
    for divided, _ in args.engines:
        Session(divided, args.device, KV_BLOCKS, world=world).follow()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("gpu_ranks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("engines", nargs="+", type=pair, metavar="DIVIDED=ONE", help="engine directories of one model")
    p.add_argument("--data", required=True, type=Path, help="a UTF-8 text")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    p.add_argument(
        "--max_windows", type=positive, help=f"of {WINDOW} tokens, for the perplexity; default: the whole text"
    )
    p.add_argument("--rank_timeout", type=float, default=RANK_TIMEOUT, metavar="SECONDS")
    p.add_argument("--output", type=Path, help="write the rows as JSON")
    add_argument(p)
    return p


def pair(text: str) -> tuple[str, str]:
    divided, _, one = text.partition("=")
    if not one:
        raise argparse.ArgumentTypeError(f"{text} is not DIVIDED=ONE, two engine directories")
    return divided, one


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        launch = launched()
        if launch.world == 1:
            raise RankError("start it with mpirun -n RANKS")
        world = World(launch, args.rank_timeout, "gpu_ranks")
    except RankError as error:
        print(f"gpu_ranks: {error}", file=sys.stderr)
        return 1
    try:
        if world.rank:
            follow(args, world)
        rows = None if world.rank else lead(args, world)
    except OPENING_ERRORS as error:
        world.fail(str(error))
    except BaseException as error:
        world.fail(f"{type(error).__name__}: {error}")
    world.close()
    if rows is None:
        return 0
    table = Table("engine", "format", "KV cache", *(name.replace("_", " ") for name in COLUMNS))
    for row in rows:
        figures = [f"{v:.4f}" if isinstance(v := row[name], float) else str(v) for name in COLUMNS]
        table.add_row(row["engine"], row["format"], row["kv_cache_dtype"], *figures)
    Console(width=160).print(table)
    if args.output:
        save_results(args.output, "gpu_ranks", argv, args.commit, {"rows": rows})
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
