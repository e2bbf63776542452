"""fp8-eval: how well an engine predicts a text, alone or against the Hugging Face model in float32."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from fp8.builder.engine import write_atomically
from fp8.runtime.request import RequestError
from fp8.runtime.scoring import Window, logit_losses, token_losses, windows
from fp8.runtime.session import Session
from fp8.runtime.tokenizer import load_tokenizer
from fp8.scripts.run import ERRORS, add_session_arguments

Losses = Callable[[list[int]], tuple[np.ndarray, np.ndarray]]  # tokens -> (loss, argmax) of all but the first
Z95 = 1.959963984540054  # two-sided 95% of a normal


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("fp8-eval", description="Evaluates an engine.")
    p.add_argument("--engine_dir", required=True)
    p.add_argument("--task", choices=("perplexity",), default="perplexity")
    p.add_argument("--data", required=True, type=Path, help="a UTF-8 text")
    p.add_argument("--reference", type=Path, help="Hugging Face model directory, run in float32 on the same windows")
    p.add_argument(
        "--window", type=int, help="tokens that the model sees at once; default: the engine's max_seq_len, 2048 at most"
    )
    p.add_argument("--stride", type=int, help="tokens between windows; default: half a window")
    p.add_argument("--max_tokens", type=int, help="take only the beginning of the text")
    p.add_argument(
        "--max_ppl_increase", type=float, help="fail if perplexity exceeds the reference's by more; 0.01 is 1%%"
    )
    p.add_argument("--output", type=Path, help="write the result as JSON")
    add_session_arguments(p)
    return p


def perplexity(losses: Sequence[np.ndarray]) -> dict[str, Any]:
    """exp(mean loss) with a 95% interval, the windows taken as independent samples of (sum of losses, tokens)."""
    mean, error = ratio([float(w.sum()) for w in losses], [len(w) for w in losses])
    interval = None if error is None else [math.exp(mean - Z95 * error), math.exp(mean + Z95 * error)]
    return {"perplexity": math.exp(mean), "confidence_interval": interval, "loss": mean}


def ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """sum(sums) / sum(counts) and its standard error (linearized ratio estimator); None for a single sample."""
    y, n = np.array(sums, np.float64), np.array(counts, np.float64)
    mean = math.fsum(sums) / n.sum()
    if len(y) < 2:
        return mean, None
    return mean, float(np.sqrt(((y - mean * n) ** 2).sum() * len(y) / (len(y) - 1)) / n.sum())


def compare(ours: list, reference: list) -> dict[str, Any]:
    """The reference's own figures, and how far the engine is from them on the same tokens (paired by window)."""
    pairs = list(zip(ours, reference, strict=True))
    mean, error = ratio([float((a[0] - b[0]).sum()) for a, b in pairs], [len(a[0]) for a, _ in pairs])
    interval = None if error is None else [math.expm1(mean - Z95 * error), math.expm1(mean + Z95 * error)]
    agree = sum(int((a[1] == b[1]).sum()) for a, b in pairs) / sum(len(a[1]) for a, _ in pairs)
    return {
        **perplexity([b[0] for b in reference]), "increase": math.expm1(mean), "increase_interval": interval,
        "greedy_agreement": agree,
    }  # fmt: skip


def score(
    title: str, losses: Losses, tokens: list[int], spans: Sequence[Window]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(loss, argmax) of the scored tokens of every window."""
    out = []
    for begin, scored, end in progress(spans, title):
        loss, best = losses(tokens[begin:end])
        out.append((loss[scored - begin - 1 :], best[scored - begin - 1 :]))
    return out


def progress(items: Sequence[Window], title: str) -> Iterable[Window]:
    return track(items, title, console=Console(stderr=True), transient=True)


def reference_losses(directory: Path, device: str) -> Losses:
    """Hugging Face's own forward pass in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        raise RequestError(f"--reference {directory} has no config.json; give a Hugging Face model directory")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.to(torch.device(device))

    def losses(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            logits = model(torch.tensor([tokens[:-1]], device=device), use_cache=False).logits[0]
            return logit_losses(logits, tokens[1:])

    return losses


def read_tokens(args: argparse.Namespace, session: Session) -> tuple[list[int], int]:
    """The text's tokens, and how many UTF-8 bytes all but the first stand for (its share of the text)."""
    tokenizer = load_tokenizer(args.engine_dir)
    if tokenizer is None:
        raise RequestError(f"{args.engine_dir} holds no tokenizer; perplexity on a text needs one")
    try:
        text = args.data.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"--data {args.data} is not UTF-8 text ({error})") from error
    every = tokenizer.encode(text)
    tokens = every[: args.max_tokens]
    if len(tokens) < 2:
        raise RequestError(f"--data {args.data} has {len(tokens)} tokens; at least 2 are needed")
    if max(tokens) >= session.model.vocab_size:
        raise RequestError(
            f"--data {args.data}: the tokenizer gives token {max(tokens)}, the model's vocabulary ends at "
            f"{session.model.vocab_size - 1}; the tokenizer does not belong to this model"
        )
    return tokens, round(len(text.encode()) * (len(tokens) - 1) / len(every))


def spans_of(args: argparse.Namespace, session: Session, tokens: int) -> list[Window]:
    longest = min(session.limits.max_seq_len, session.max_kv_tokens)
    length = args.window or min(longest, 2048)
    stride = args.stride or max(length // 2, 1)
    if not 2 <= length <= longest:
        raise RequestError(
            f"--window is {length}; it must lie between 2 and {longest}, what the engine holds of a sequence"
        )
    if not 1 <= stride < length:
        raise RequestError(f"--stride is {stride}; it must lie between 1 and the window less one, {length - 1}")
    return windows(tokens, length, stride)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    if args.max_ppl_increase is not None and args.reference is None:
        raise RequestError("--max_ppl_increase compares with --reference HF_DIR; give it")
    session = Session(args.engine_dir, args.device, args.max_kv_blocks, args.kv_cache_free_gpu_memory_fraction)
    tokens, size = read_tokens(args, session)
    spans = spans_of(args, session, len(tokens))
    begin = time.perf_counter()
    ours = score("engine", lambda t: token_losses(session, t), tokens, spans)
    seconds = time.perf_counter() - begin
    count = sum(len(loss) for loss, _ in ours)
    result = {
        "task": args.task, **perplexity([loss for loss, _ in ours]), "tokens": count,
        "bits_per_byte": math.fsum(x for loss, _ in ours for x in loss) / math.log(2) / size, "bytes": size,
        "windows": len(spans), "window": spans[0].end - spans[0].begin, "engine_dir": str(args.engine_dir),
        "format": session.model.format, "kv_cache_dtype": session.model.kv_cache_dtype, "device": str(session.device),
        "seconds": seconds, "tokens_per_second": count / seconds, "reference": None,
    }  # fmt: skip
    if args.reference:
        theirs = score("reference", reference_losses(args.reference, str(session.device)), tokens, spans)
        result["reference"] = {"model": str(args.reference), **compare(ours, theirs)}
    return result


def report(result: dict[str, Any]) -> str:
    interval = result["confidence_interval"]
    between = f" (95%: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
    lines = [
        f"perplexity {result['perplexity']:.4f}{between}, {result['bits_per_byte']:.4f} bits per byte, "
        f"{result['tokens']} tokens, {result['tokens_per_second']:.0f} tokens/s on {result['device']}"
    ]
    if reference := result["reference"]:
        lines.append(
            f"reference  {reference['perplexity']:.4f}: {reference['increase']:+.3%}, same likeliest token at "
            f"{reference['greedy_agreement']:.2%} of the positions"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        result = evaluate(args)
        if args.output:
            write_atomically(args.output, [json.dumps(result, indent=2).encode() + b"\n"])
    except ERRORS as error:
        print(f"fp8-eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fp8-eval: interrupted", file=sys.stderr)
        return 130
    print(report(result))
    limit = args.max_ppl_increase
    if limit is not None and not result["reference"]["increase"] <= limit:
        print(
            f"fp8-eval: perplexity rose by {result['reference']['increase']:.3%}, more than {limit:.3%}",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
