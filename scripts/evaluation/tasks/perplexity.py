"""how well a UTF-8 text is predicted, over overlapping windows"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fp8.runtime.request import RequestError
from fp8.runtime.scoring import Window, windows
from fp8.scripts.argument_types import positive
from fp8.scripts.evaluation.data import read_text
from fp8.scripts.evaluation.models import Engine, Model, Progress, encode
from fp8.scripts.evaluation.statistics import Z95, paired_bootstrap, ratio

ALIASES = ("ppl",)
COMMON = frozenset({"data", "max_ppl_increase"})
EXAMPLE = "--task perplexity --data heldout.txt --reference HF_DIR --max_ppl_increase 0.01"
Outcome = tuple[np.ndarray, np.ndarray]  # (loss, argmax) of the scored tokens of a window


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--window",
        type=positive,
        help="tokens that the model sees at once (default: the engine's max_seq_len, at most 2048)",
    )
    p.add_argument("--stride", type=positive, help="tokens from one window to the next (default: half a window)")
    p.add_argument("--max_tokens", type=positive, help="use only so many tokens from the beginning of the text")


class Task:
    unit = "windows"

    def __init__(self, args: argparse.Namespace, engine: Engine) -> None:
        self.tokens, self.bytes = _read_tokens(args, engine)
        self.items = _windows(args, engine.longest, len(self.tokens))

    def run(self, model: Model, items: Sequence[Window], progress: Progress) -> list[Outcome]:
        out = []
        for begin, scored, end in items:
            loss, best = model.losses(self.tokens[begin:end])
            out.append((loss[scored - begin - 1 :], best[scored - begin - 1 :]))
            progress(1)
        return out

    def figures(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        total = math.fsum(x for loss, _ in outcomes for x in loss)
        return {
            **perplexity([loss for loss, _ in outcomes]), "tokens": sum(len(loss) for loss, _ in outcomes),
            "bits_per_byte": total / math.log(2) / self.bytes, "bytes": self.bytes, "windows": len(self.items),
            "window": self.items[0].end - self.items[0].begin,
        }  # fmt: skip

    def against(self, ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> dict[str, Any]:
        pairs = list(zip(ours, theirs, strict=True))
        differences = [float((a[0] - b[0]).sum()) for a, b in pairs]
        mean, error = ratio(differences, [len(a[0]) for a, _ in pairs])
        interval = None if error is None else [math.expm1(mean - Z95 * error), math.expm1(mean + Z95 * error)]
        agree = sum(int((a[1] == b[1]).sum()) for a, b in pairs) / sum(len(a[1]) for a, _ in pairs)
        return {
            **perplexity([b[0] for b in theirs]), "increase": math.expm1(mean), "increase_interval": interval,
            "greedy_agreement": agree, "p_value": paired_bootstrap(differences),
        }  # fmt: skip

    @staticmethod
    def report(result: dict[str, Any]) -> list[str]:
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
        return lines


def perplexity(losses: Sequence[np.ndarray]) -> dict[str, Any]:
    """exp(mean loss) with a 95% interval, the windows taken as independent samples of (sum of losses, tokens)."""
    mean, error = ratio([float(w.sum()) for w in losses], [len(w) for w in losses])
    interval = None if error is None else [math.exp(mean - Z95 * error), math.exp(mean + Z95 * error)]
    return {"perplexity": math.exp(mean), "confidence_interval": interval, "loss": mean}


def _read_tokens(args: argparse.Namespace, engine: Engine) -> tuple[list[int], int]:
    """The text's tokens, and how many UTF-8 bytes all but the first stand for (its share of the text)."""
    text = read_text(args.data)
    every = encode(engine.tokenizer, text, engine.vocab_size, f"--data {args.data}")
    tokens = every[: args.max_tokens]
    if len(tokens) < 2:
        raise RequestError(f"--data {args.data} has {len(tokens)} tokens; at least 2 are needed")
    return tokens, round(len(text.encode()) * (len(tokens) - 1) / len(every))


def _windows(args: argparse.Namespace, longest: int, tokens: int) -> list[Window]:
    length = args.window or min(longest, 2048)
    stride = args.stride or max(length // 2, 1)
    if not 2 <= length <= longest:
        raise RequestError(
            f"--window is {length}; it must lie between 2 and {longest}, what the engine holds of a sequence"
        )
    if not 1 <= stride < length:
        raise RequestError(f"--stride is {stride}; it must lie between 1 and the window less one, {length - 1}")
    return windows(tokens, length, stride)
