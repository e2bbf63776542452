"""Flags of commands that sample, and the SamplingParams that they stand for."""

from __future__ import annotations

import argparse
from typing import Any

from fp8.runtime.sampling_params import RequestError, SamplingParams


def add_sampling_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--max_output_len", "--max_tokens", type=int, default=64, help="generate at most so many tokens")
    p.add_argument(
        "--min_output_len",
        "--min_tokens",
        type=int,
        default=0,
        help="ignore stop tokens and strings before so many tokens",
    )
    p.add_argument(
        "--n", type=int, default=1, help="outputs per prompt; more than 1 needs a temperature above 0, or beams"
    )
    choice = p.add_argument_group(
        "choice of tokens",
        "Applied in this order: bias, penalties, temperature, then what is unlikely is left out (top_k, top_p, min_p, "
        "typical_p). A usual choice for prose: --temperature 0.7 --top_p 0.9. At temperature 0 nothing is left out.",
    )
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    choice.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy; above 1 is more random")
    choice.add_argument(
        "--seed", type=int, help="makes the text repeatable at a temperature above 0, whatever else is in the batch"
    )
    choice.add_argument(
        "--top_k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0 (default): all"
    )
    choice.add_argument(
        "--top_p", default=1.0, help="only the likeliest tokens that together reach probability X, 0 < X <= 1", **number
    )
    choice.add_argument(
        "--min_p", default=0.0, help="only tokens that are at least X times as likely as the best one, 0 to 1", **number
    )
    choice.add_argument(
        "--typical_p",
        default=1.0,
        help="only the most typical tokens that together reach probability X, 0 < X <= 1",
        **number,
    )
    choice.add_argument(
        "--repetition_penalty",
        default=1.0,
        help="above 1 disfavours tokens that are in the prompt or output; try 1.1",
        **number,
    )
    choice.add_argument(
        "--presence_penalty",
        default=0.0,
        help="subtracted from the logit of every token that is in the output, -2 to 2",
        **number,
    )
    choice.add_argument(
        "--frequency_penalty", default=0.0, help="the same, for each time that it occurs, -2 to 2", **number
    )
    choice.add_argument(
        "--logit_bias", nargs="*", default=[], metavar="TOKEN:X", help="added to a token's logit, such as 13:-100"
    )
    beams = p.add_argument_group(
        "beam search", "Instead of sampling: --beam_width 4 --n 4 gives the four best outputs that four beams find."
    )
    beams.add_argument("--beam_width", type=int, default=1, metavar="K", help="beams per prompt; 1 (default): none")
    beams.add_argument(
        "--length_penalty",
        default=1.0,
        help="outputs are ranked by the sum of log-probabilities / length ** X; above 0 favours long ones",
        **number,
    )
    beams.add_argument(
        "--early_stopping",
        choices=("true", "false", "never"),
        default="false",
        help="end once K outputs are finished (true), once the best beam would not enter them as it is (false, the "
        "default), or once it could not at any length (never)",
    )
    end = p.add_argument_group("end and report")
    end.add_argument("--stop", nargs="*", default=[], metavar="TEXT", help="end the output before any of these texts")
    end.add_argument(
        "--stop_token_ids",
        type=int,
        nargs="*",
        default=[],
        help="end at these tokens, too, not only at the model's end-of-sequence tokens",
    )
    end.add_argument("--ignore_eos", action="store_true", help="do not end at the model's end-of-sequence tokens")
    end.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="log-probability of every output token and of the K likeliest, 0 to 20",
    )
    end.add_argument("--prompt_logprobs", type=int, metavar="K", help="the same for the tokens of the prompt")


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Raises RequestError for a value out of its range."""
    same = (
        "temperature", "seed", "stop_token_ids", "ignore_eos", "top_k", "top_p", "min_p", "typical_p",
        "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "n", "logprobs", "prompt_logprobs",
        "beam_width", "length_penalty",
    )  # fmt: skip
    return SamplingParams(
        max_tokens=args.max_output_len,
        min_tokens=args.min_output_len,
        logit_bias=dict(map(_bias, args.logit_bias)),
        early_stopping="never" if args.early_stopping == "never" else args.early_stopping == "true",
        **{name: getattr(args, name) for name in same},
    )


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise RequestError(f"--logit_bias {text!r} is not a token id and a number, such as 13:-100") from error
