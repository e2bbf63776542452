"""fp8-run: generates text with an engine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fp8.builder.engine import EngineError
from fp8.plugins.base import PluginError
from fp8.runtime.kv_cache import KVCacheError
from fp8.runtime.launcher import RankError
from fp8.runtime.llm import LLM, Completion, Prompt
from fp8.runtime.logprobs import TokenLogprobs
from fp8.runtime.record import Dump
from fp8.runtime.sampling_params import RequestError
from fp8.runtime.service import ServiceError
from fp8.scripts.argument_types import fraction, positive
from fp8.scripts.moved_flags import CommandParser
from fp8.scripts.printing import printing
from fp8.scripts.prompts import read_prompts
from fp8.scripts.ranks import add_rank_arguments, on_all_ranks
from fp8.scripts.sampling_arguments import add_sampling_arguments, sampling_params
from fp8.scripts.teaching import Teaching

ERRORS = (EngineError, RequestError, KVCacheError, PluginError, RankError, ServiceError, OSError)
EXAMPLES = """\
examples:
  fp8-run --engine_dir engine --input_text "def main():" --max_output_len 64
  fp8-run --engine_dir engine --input_text "Once upon a time" --temperature 0.7 --top_p 0.9 --n 3
  fp8-run --engine_dir engine --input_text "Why is the sky blue?" --chat --streaming
  fp8-run --engine_dir engine --input_file prompts.jsonl --output jsonl
  mpirun -n 2 fp8-run --engine_dir engine_tp2 --input_text "def main():"
"""


def parser() -> argparse.ArgumentParser:
    p = CommandParser("fp8-run", description=__doc__, epilog=EXAMPLES, formatter_class=Teaching)
    p.add_argument("--engine_dir", required=True, help="as fp8-build writes it")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--input_text", nargs="+", help="one or several prompts")
    what.add_argument("--input_tokens", nargs="+", help="one or several prompts as token ids, such as 1,306,4658")
    what.add_argument("--input_file", type=Path, help="prompts in .txt, .jsonl or .csv")
    p.add_argument("--chat", action="store_true", help="prompts are a user's messages: apply the chat template")
    p.add_argument("--streaming", action="store_true", help="print text as it comes, one prompt after the other")
    add_sampling_arguments(p)
    add_session_arguments(p)
    p.add_argument(
        "--debug_mode", action="store_true", help="write every step's debug tensors (fp8-build --enable_debug_output)"
    )
    p.add_argument("--debug_dir", type=Path, help="where --debug_mode writes (default: debug)")
    p.add_argument("--output", choices=("text", "json", "jsonl"), default="text", help="how results are printed")
    return p


def add_session_arguments(p: argparse.ArgumentParser) -> None:
    """What every command that opens a session takes."""
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    p.add_argument(
        "--max_kv_blocks", type=positive, help="size of the KV pool in blocks of 64 tokens (default: what fits)"
    )
    p.add_argument(
        "--kv_cache_free_gpu_memory_fraction", type=fraction, default=0.9,
        help="share of the GPU memory left after weights, activations and sampling that the KV pool takes",
    )  # fmt: skip
    add_rank_arguments(p)


def token_ids(text: str) -> list[int]:
    try:
        return [int(t) for t in text.replace(",", " ").split()]
    except ValueError as error:
        raise RequestError(f"--input_tokens {text!r} is not a list of token ids such as 1,306,4658") from error


def open_llm(args: argparse.Namespace) -> LLM:
    return LLM(
        args.engine_dir, args.device, args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction, world=args.world
    )


def read_input(args: argparse.Namespace) -> list[Any]:
    """The prompts that the arguments name: texts, token ids, or messages of a chat."""
    if args.input_tokens:
        return [token_ids(t) for t in args.input_tokens]
    return args.input_text or read_prompts(args.input_file)


def as_prompt(llm: LLM, given: Any, chat: bool) -> Prompt:
    """What the engine takes in: `given`, or a chat through the tokenizer's template."""
    if isinstance(given, str) and chat:
        given = [{"role": "user", "content": given}]
    if isinstance(given, list) and given and isinstance(given[0], dict):
        return llm.chat_template.encode(given)
    return given


def _record(llm: LLM, args: argparse.Namespace) -> None:
    if args.debug_mode:
        if args.world is not None:
            raise RequestError("--debug_mode dumps the tensors of engines of one rank only; this one has several")
        llm.session.recorder = Dump(llm.session.plan, llm.session.executor.weight, args.debug_dir or Path("debug"))


def generate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the prompts; returns what `--output json` prints."""
    given, params = read_input(args), sampling_params(args)
    llm = open_llm(args)
    _record(llm, args)
    prompts = [as_prompt(llm, g, args.chat) for g in given]
    begin = time.perf_counter()
    found = llm.generate(prompts, params)
    asked = [g for g in given for _ in range(params.n)]
    completions = [replace(c, prompt=g) for c, g in zip(found, asked, strict=True)]
    seconds = time.perf_counter() - begin
    count = sum(len(c.token_ids) for c in completions)
    return {
        "engine_dir": str(args.engine_dir), "device": str(llm.session.device), "seconds": seconds,
        "output_tokens": count, "tokens_per_second": count / seconds, "completions": completions,
    }  # fmt: skip


def stream(args: argparse.Namespace) -> None:
    """Prints texts piece by piece; with `--output jsonl` an object per piece, `index` telling the prompt."""
    given, params = read_input(args), sampling_params(args)
    if params.n > 1 or params.prompt_logprobs is not None or (params.logprobs is not None and args.output == "text"):
        raise RequestError(
            "--streaming prints one text per prompt as it comes; leave out --n and log-probabilities "
            "(those of the output come with --output jsonl)"
        )
    llm = open_llm(args)
    _record(llm, args)
    for index, item in enumerate(given):
        deltas = llm.stream(as_prompt(llm, item, args.chat), params)
        if args.output == "text":
            print(prompt_text(item), end="" if llm.tokenizer else " -> ", flush=True)
        for delta in deltas:
            if args.output == "text":
                print(
                    "".join(f"{t}," for t in delta.token_ids) if delta.text is None else delta.text, end="", flush=True
                )
            else:
                print(json.dumps({"index": index, **asdict(delta)}), flush=True)
        if args.output == "text":
            print(f"\n[{delta.finish_reason}]\n")
    llm.close()


def prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], dict):
        return "".join(f"{m.get('role')}: {m.get('content')}\n" for m in prompt)
    return ",".join(map(str, prompt))


def as_text(result: dict[str, Any]) -> str:
    completions: list[Completion] = result["completions"]
    samples, parts = 1 + max(c.index for c in completions), []
    for c in completions:
        prompt = prompt_text(c.prompt)
        out = f" -> {','.join(map(str, c.token_ids))}" if c.text is None else c.text
        sample = f", output {c.index}" if samples > 1 else ""
        sample += "" if c.cumulative_logprob is None else f", ln p {c.cumulative_logprob:.4f}"
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
    p = parser()
    args = p.parse_args(argv)
    if args.debug_dir is not None and not args.debug_mode:
        p.error("--debug_dir needs --debug_mode, which writes there")
    return on_all_ranks("fp8-run", args, command)


@printing("fp8-run")
def command(args: argparse.Namespace) -> int:
    if args.streaming and args.output == "json":
        print("fp8-run: --streaming prints as it goes; use --output text or jsonl", file=sys.stderr)
        return 1
    try:
        if args.streaming:
            stream(args)
            return 0
        result = generate(args)
    except ERRORS as error:
        print(f"fp8-run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fp8-run: interrupted", file=sys.stderr)
        return 130
    if args.output == "json":
        print(json.dumps({**result, "completions": [c.as_dict() for c in result["completions"]]}, indent=2))
    elif args.output == "jsonl":
        print("".join(json.dumps(c.as_dict()) + "\n" for c in result["completions"]), end="")
    else:
        print(as_text(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
