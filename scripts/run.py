"""fp8-run: texts from an engine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8.builder.engine import EngineError
from fp8.plugins.base import PluginError
from fp8.runtime.kv_cache import KVCacheError
from fp8.runtime.llm import LLM, Completion
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.record import Dump
from fp8.runtime.sampling_params import RequestError
from fp8.scripts.sampling_arguments import add_sampling_arguments, sampling_params

ERRORS = (EngineError, RequestError, KVCacheError, PluginError, OSError)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("fp8-run", description="Generates text with an engine.")
    p.add_argument("--engine_dir", required=True)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--input_text", nargs="+", help="one or several prompts")
    what.add_argument("--input_tokens", nargs="+", help="one or several prompts as token ids, such as 1,306,4658")
    add_sampling_arguments(p)
    add_session_arguments(p)
    p.add_argument(
        "--debug_mode", action="store_true", help="write every step's debug tensors (fp8-build --enable_debug_output)"
    )
    p.add_argument("--debug_dir", type=Path, default=Path("debug"), help="where to (default: debug)")
    p.add_argument("--output", choices=("text", "json"), default="text")
    return p


def add_session_arguments(p: argparse.ArgumentParser) -> None:
    """What every command that opens a session takes."""
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    p.add_argument(
        "--max_kv_blocks", type=positive, help="size of the KV pool in blocks of 64 tokens; default: what fits"
    )
    p.add_argument("--kv_cache_free_gpu_memory_fraction", type=fraction, default=0.9)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and at most 1")
    return value


def token_ids(text: str) -> list[int]:
    try:
        return [int(t) for t in text.replace(",", " ").split()]
    except ValueError as error:
        raise RequestError(f"--input_tokens {text!r} is not a list of token ids such as 1,306,4658") from error


def open_llm(args: argparse.Namespace) -> LLM:
    return LLM(args.engine_dir, args.device, args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction)


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the prompts; returns what `--output json` prints."""
    prompts = args.input_text or [token_ids(t) for t in args.input_tokens]
    params = sampling_params(args)
    llm = open_llm(args)
    if args.debug_mode:
        llm.session.recorder = Dump(llm.session.plan, llm.session.executor.weight, args.debug_dir)
    begin = time.perf_counter()
    completions = llm.generate(prompts, params)
    seconds = time.perf_counter() - begin
    count = sum(len(c.token_ids) for c in completions)
    return {
        "engine_dir": str(args.engine_dir), "device": str(llm.session.device), "seconds": seconds,
        "output_tokens": count, "tokens_per_second": count / seconds, "completions": completions,
    }  # fmt: skip


def as_text(result: dict[str, Any]) -> str:
    completions: list[Completion] = result["completions"]
    samples, parts = 1 + max(c.index for c in completions), []
    for c in completions:
        prompt = c.prompt if isinstance(c.prompt, str) else ",".join(map(str, c.prompt))
        out = f" -> {','.join(map(str, c.token_ids))}" if c.text is None else c.text
        sample = f", sample {c.index}" if samples > 1 else ""
        parts.append(f"{prompt}{out}\n[{c.finish_reason}, {len(c.token_ids)} tokens{sample}]")
        for title, entries in (("prompt", c.prompt_logprobs), ("output", c.logprobs)):
            parts += [f"{title} token, ln p, likeliest:\n" + "\n".join(map(_logprob, entries))] if entries else []
    rate = f"{result['output_tokens']} tokens in {result['seconds']:.2f} s, {result['tokens_per_second']:.1f} tokens/s"
    return "\n\n".join([*parts, f"{rate} on {result['device']}"])


def _logprob(entry: TokenLogprobs | None) -> str:
    if entry is None:
        return "  (the first token has none)"
    top = " ".join(f"{token}:{value:.4f}" for token, value in entry.top)
    return f"  {entry.token:>7} {entry.logprob:9.4f}  {top}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        result = generate(args)
    except ERRORS as error:
        print(f"fp8-run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fp8-run: interrupted", file=sys.stderr)
        return 130
    if args.output == "json":
        print(json.dumps({**result, "completions": [c.as_dict() for c in result["completions"]]}, indent=2))
    else:
        print(as_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
