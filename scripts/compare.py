"""fp8-inspect compare: two engines, or an engine and its Hugging Face model, tensor by tensor on the same tokens."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.table import Table

from fp8.builder.engine import Plan
from fp8.builder.rewrite import apart
from fp8.plugins.base import BLOCK_SIZE
from fp8.runtime.llm import check_prompt
from fp8.runtime.record import E4M3, Recorded, Recorder
from fp8.runtime.request import Request, RequestError, SamplingParams
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session
from fp8.runtime.tokenizer import Tokenizer, load_tokenizer
from fp8.scripts.argument_types import positive
from fp8.scripts.hugging_face import HuggingFaceError, load_model
from fp8.scripts.moved_flags import CommandParser
from fp8.scripts.run import ERRORS, token_ids
from fp8.scripts.teaching import Teaching

MAX_CODE = 0x7E  # of e4m3, without its sign: 448
TOKENS = 64  # of the default prompt
THRESHOLD = 15.0  # dB; e4m3 codes of a well-scaled tensor have about 30


class CompareError(ValueError):
    """Two models that cannot be held against each other: says what differs."""


class Values(NamedTuple):
    """A tensor on both sides' common ground: f32 [T, N], and the fraction of codes at +-448 (None: no codes)."""

    value: torch.Tensor
    saturated: float | None


class Side(Protocol):
    """A model that shows its tensors by module."""

    tokenizer: Tokenizer | None
    limit: int  # tokens in one prompt

    def check(self, tokens: Sequence[int], index: int) -> None:
        """Raises RequestError for a prompt that it cannot take."""

    def record(self, tokens: Sequence[int], names: Sequence[str]) -> dict[str, Values]:
        """In the order of execution; `names` are those of the other side, for who can show anything."""


@dataclass
class Tally:
    """Sums over the prompts for one tensor; b is the reference."""

    name: str
    signal: float = 0.0
    noise: float = 0.0
    rows: int = 0
    saturated_a: float | None = None
    saturated_b: float | None = None
    amax_a: float = 0.0
    amax_b: float = 0.0

    def add(self, a: Values, b: Values) -> None:
        if a.value.shape != b.value.shape:
            raise CompareError(
                f"{self.name} is {list(a.value.shape)} in A, {list(b.value.shape)} in B; they are of two architectures"
            )
        x, y = a.value.double(), b.value.double()
        self.signal += float(y.square().sum())
        self.noise += float((x - y).square().sum())
        self.saturated_a = _mean(self.saturated_a, self.rows, a.saturated, len(x))
        self.saturated_b = _mean(self.saturated_b, self.rows, b.saturated, len(x))
        self.rows += len(x)
        self.amax_a = max(self.amax_a, float(x.abs().max()))
        self.amax_b = max(self.amax_b, float(y.abs().max()))

    @property
    def sqnr(self) -> float:
        """10 log10(|b|^2 / |a - b|^2) in dB: inf if equal, -inf if anything is not finite."""
        if self.noise == 0:
            return math.inf
        if not math.isfinite(self.noise) or not self.signal:
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)

    def as_dict(self) -> dict[str, Any]:
        """`sqnr` in dB, None where it is not finite (see `equal`)."""
        return {
            "tensor": self.name, "sqnr": self.sqnr if math.isfinite(self.sqnr) else None, "equal": self.noise == 0,
            "saturation": {"a": self.saturated_a, "b": self.saturated_b}, "amax": {"a": self.amax_a, "b": self.amax_b},
        }  # fmt: skip


def _mean(before: float | None, rows: int, now: float | None, more: int) -> float | None:
    return now if before is None or now is None else (before * rows + now * more) / (rows + more)


class EngineSide:
    """An engine through its Session: the reference executor on a CPU, its kernels on a GPU."""

    def __init__(self, directory: Path, device: str, blocks: int | None = None) -> None:
        self.session = Session(directory, device, blocks)
        self.tokenizer = load_tokenizer(directory)
        self.limit = min(self.session.max_logits_rows, self.session.limits.max_seq_len - 1, self.session.max_kv_tokens)

    def check(self, tokens: Sequence[int], index: int) -> None:
        check_prompt(tokens, index, self.session.limits.max_seq_len, self.session.model.vocab_size)

    def record(self, tokens: Sequence[int], names: Sequence[str] = ()) -> dict[str, Values]:
        plan = self.session.plan
        recorder = self.session.recorder = Recorder(plan, self.session.executor.weight)
        blocks = list(range(-(-len(tokens) // plan.limits.block_size)))
        request = Request(0, tokens, SamplingParams(), 1, blocks=blocks, slot=0)
        self.session.token_logits([Row(request, 0, len(tokens), False, 0)])
        found: dict[str, Values] = {}
        for buffer, recorded in recorder.buffers():
            for name, part in _parts(plan, buffer, recorded):
                if part.raw.is_floating_point() and part.raw.ndim == 2:
                    found[name] = Values(part.value, _saturated(part))
        return found


class HuggingFaceSide:
    """A model directory through transformers, in the dtype given; hooks see what goes in and out of each module."""

    limit = 1 << 30

    def __init__(self, directory: Path, dtype: str) -> None:
        try:
            self.model = load_model(directory, getattr(torch, dtype))
        except HuggingFaceError as error:
            raise CompareError(str(error)) from error
        self.tokenizer = load_tokenizer(directory)

    def check(self, tokens: Sequence[int], index: int) -> None:
        config = self.model.config
        check_prompt(tokens, index, config.max_position_embeddings + 1, config.vocab_size)

    def record(self, tokens: Sequence[int], names: Sequence[str]) -> dict[str, Values]:
        found: dict[str, Values] = {}
        modules = dict(self.model.named_modules())
        hooks = []
        for name in names:
            module, side = name.rsplit(".", 1)
            if module in modules and side == "input":
                hooks.append(modules[module].register_forward_pre_hook(_keep_input(found, name)))
            elif module in modules:
                hooks.append(modules[module].register_forward_hook(_keep_output(found, name)))
        try:
            with torch.inference_mode():
                self.model(torch.tensor([list(tokens)]), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _keep_input(found: dict[str, Values], name: str) -> Callable[[Any, tuple], None]:
    def keep(module: Any, inputs: tuple) -> None:
        found[name] = Values(inputs[0][0].float().clone(), None)

    return keep


def _keep_output(found: dict[str, Values], name: str) -> Callable[[Any, tuple, Any], None]:
    def keep(module: Any, inputs: tuple, output: Any) -> None:
        found[name] = Values((output[0] if isinstance(output, tuple) else output)[0].float().clone(), None)

    return keep


def module_name(buffer: str) -> str:
    """`<module>.input` or `.output` of Hugging Face's module, for a buffer of the contract's roles; else as it is."""
    module, _, role = buffer.partition("/")
    if buffer == "logits":
        return "lm_head.output"
    if role in ("output", "gather"):
        return f"{module}.output"
    if role in ("quantize", "round"):
        return f"{module}.input"
    if role == "attention_residual":
        return f"{module}.post_attention_layernorm.input"
    return f"{module}.output" if role == "mlp_residual" else buffer


def _parts(plan: Plan, buffer: str, recorded: Recorded) -> Iterator[tuple[str, Recorded]]:
    """A buffer by module; one of merged linears in its parts."""
    name = module_name(buffer)
    module, _, side = name.rpartition(".")
    parts = apart(module)
    if len(parts) == 1 or recorded.raw.ndim != 2:
        yield name, recorded
        return
    begin = 0
    for part, width in zip(parts, _widths(plan, len(parts), recorded.raw.shape[1]), strict=True):
        yield f"{part}.{side}", recorded.columns(begin, begin + width)
        begin += width


def _widths(plan: Plan, count: int, width: int) -> list[int]:
    """q, k and v by their heads; gate and up are alike."""
    m = plan.model
    heads = [m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.num_kv_heads * m.head_dim]
    return heads if count == 3 and sum(heads) == width else [width // count] * count


def _saturated(recorded: Recorded) -> float | None:
    if str(recorded.raw.dtype) != f"torch.{E4M3}":
        return None
    return float(((recorded.raw.view(torch.uint8) & 0x7F) == MAX_CODE).double().mean())


def compare(a: Side, b: Side, prompts: Sequence[Sequence[int]]) -> list[Tally]:
    """A tally per tensor that both have, in the order of execution. Raises CompareError, RequestError."""
    tallies: dict[str, Tally] = {}
    for index, tokens in enumerate(prompts):
        for side in (a, b):
            side.check(tokens, index)
        if isinstance(a, HuggingFaceSide):
            of_b = b.record(tokens, ())
            of_a = a.record(tokens, list(of_b))
        else:
            of_a = a.record(tokens, ())
            of_b = b.record(tokens, list(of_a))
        order = of_b if isinstance(a, HuggingFaceSide) else of_a
        for name in (n for n in order if n in of_a and n in of_b):
            tallies.setdefault(name, Tally(name)).add(of_a[name], of_b[name])
    if not tallies:
        raise CompareError("A and B have no tensor of the same name; are they of the same model?")
    return list(tallies.values())


def first_under(tallies: Sequence[Tally], threshold: float) -> str | None:
    """The first tensor whose SQNR is below `threshold` dB."""
    return next((t.name for t in tallies if not t.sqnr >= threshold), None)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    p = CommandParser("fp8-inspect compare", description=__doc__, formatter_class=Teaching)
    p.add_argument("a", type=Path, help="engine or Hugging Face model directory")
    p.add_argument("b", type=Path, help="the reference: engine or Hugging Face model directory")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--input_text", nargs="+", help=f"prompts (default: {TOKENS} random tokens)")
    what.add_argument("--input_tokens", nargs="+", help="prompts as token ids, such as 1,306,4658")
    what.add_argument("--input_file", type=Path, help="a UTF-8 text, of which the first --max_tokens are used")
    p.add_argument("--max_tokens", type=positive, default=128, help="tokens of each prompt, at most")
    p.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help=f"name the first tensor below so many dB (default: {THRESHOLD:g})",
    )
    p.add_argument("--device", default="cpu", help="where engines run: cpu (default), cuda or auto")
    p.add_argument(
        "--max_kv_blocks",
        type=positive,
        help="size of each KV pool in blocks of 64 tokens (default: enough for --max_tokens)",
    )
    p.add_argument(
        "--reference_dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="type that a model runs in",
    )
    p.add_argument("--json", action="store_true", help="print the comparison as JSON")
    return p.parse_args(arguments)


def open_side(directory: Path, options: argparse.Namespace) -> Side:
    if (directory / "rank0.engine").is_file():
        return EngineSide(directory, options.device, options.max_kv_blocks or -(-options.max_tokens // BLOCK_SIZE))
    if not (directory / "config.json").is_file():
        raise CompareError(f"{directory} is neither an engine directory nor a Hugging Face model directory")
    return HuggingFaceSide(directory, options.reference_dtype)


def prompts(options: argparse.Namespace, a: Side, b: Side) -> list[list[int]]:
    """Token ids, cut to what both sides take in one step."""
    if options.input_tokens:
        found = [token_ids(text) for text in options.input_tokens]
    elif options.input_text or options.input_file:
        tokenizer = a.tokenizer or b.tokenizer
        if tokenizer is None:
            raise RequestError("neither A nor B has a tokenizer; give --input_tokens")
        texts = options.input_text or [options.input_file.read_text(encoding="utf-8")]
        found = [tokenizer.encode(text) for text in texts]
    else:
        generator, vocabulary = random.Random(0), min(_vocabulary(s) for s in (a, b))
        found = [[generator.randrange(vocabulary) for _ in range(TOKENS)]]
    most = min(options.max_tokens, a.limit, b.limit)
    return [tokens[:most] for tokens in found]


def _vocabulary(side: Side) -> int:
    return side.model.config.vocab_size if isinstance(side, HuggingFaceSide) else side.session.model.vocab_size  # type: ignore[attr-defined]


def as_table(tallies: Sequence[Tally], threshold: float) -> Table:
    table = Table(title="A against B, in the order of execution")
    for column in ("tensor", "SQNR dB", "saturated A", "saturated B", "amax A", "amax B"):
        table.add_column(column, overflow="fold")
    for t in tallies:
        saturated = ("" if s is None else f"{s:.3%}" for s in (t.saturated_a, t.saturated_b))
        sqnr = "equal" if t.noise == 0 else f"{t.sqnr:.1f}"
        table.add_row(
            t.name, sqnr, *saturated, f"{t.amax_a:.4g}", f"{t.amax_b:.4g}",
            style=None if t.sqnr >= threshold else "red",
        )  # fmt: skip
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        a, b = open_side(options.a, options), open_side(options.b, options)
        if isinstance(a, HuggingFaceSide) and isinstance(b, HuggingFaceSide):
            raise CompareError("neither A nor B is an engine directory; give at least one")
        tallies = compare(a, b, prompts(options, a, b))
    except (CompareError, UnicodeDecodeError, *ERRORS) as error:
        print(f"fp8-inspect compare: {error}", file=sys.stderr)
        return 1
    first = first_under(tallies, options.threshold)
    if options.json:
        facts = {"a": str(options.a), "b": str(options.b), "threshold": options.threshold, "first_under": first}
        print(json.dumps({**facts, "tensors": [t.as_dict() for t in tallies]}, indent=2))
        return 0
    console = Console() if sys.stdout and sys.stdout.isatty() else Console(width=140)
    console.print(as_table(tallies, options.threshold))
    bound = f"{options.threshold:g} dB"
    console.print(f"first tensor under {bound}: {first}" if first else f"no tensor is under {bound}", markup=False)
    return 0
