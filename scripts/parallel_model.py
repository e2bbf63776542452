"""What tensor and pipeline parallelism cost and bring: a model of a step's time, from a few measured figures.

    python -m fp8.scripts.parallel_model                        measured against modelled, and what to choose
    python -m fp8.scripts.parallel_model --model llama-2-70b --gpus 8        every way to divide one model
    python -m fp8.scripts.parallel_model --page docs/parallel.md             writes the page's tables

The model is made from nine figures of the record of two GPUs (docs/performance/h200x2.json), of Llama-7B on one GPU and
at tp 2: decode steps at batch 1 (the rate at which one launch streams its bytes, and the time of a layer that no byte
explains) and at batch 64 (the cache's rate, and that time where launches are separate); prompts on one GPU; an
all-reduce and a message of 8 KB and of 8 MB (latency and rate). What else has several ranks is predicted; the record's
other figures check it, Llama-2-70B among them. The network between hosts is assumed: HOSTS.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fp8.builder.engine import EngineError, write_atomically
from fp8.runtime.policy import Chunks
from fp8.scripts.argument_types import positive
from fp8.scripts.random_checkpoint import PRESETS
from fp8.scripts.record import load

RECORD = Path(__file__).resolve().parent.parent / "docs" / "performance" / "h200x2.json"
MARKED = re.compile(r"(<!-- model (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
INPUT, OUTPUT = 1024, 128  # tokens
MODELS, GPUS = ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"), (1, 2, 4, 8, 16)
CHUNK = 8192  # tokens of a step of prompts, at most
PER_GPU = 64  # sequences under way for each GPU, where tokens/s count
ACTIVATION = 2  # bytes


@dataclass(frozen=True)
class Link:
    """A message of `size` bytes takes latency + size / rate."""

    latency: float  # seconds
    rate: float  # bytes per second

    def seconds(self, size: float) -> float:
        return self.latency + size / self.rate


HOSTS = Link(20e-6, 45e9)  # assumed: a 400 Gb/s adapter for each GPU at 90%, NCCL's latency through it


@dataclass(frozen=True)
class Machine:
    """GPUs, `per_host` of them on a host. Rates are what engines reach, not what the card allows."""

    weight_rate: float  # bytes per second of weights in decode steps
    cache_rate: float  # and of the cache, of several sequences; of one it is streamed as the weights are
    flops: float  # of linears, in prompts
    layer: float  # seconds of a decode step's layer beside its bytes: launches, tails, small kernels
    merged: float  # and where one launch computes all layers: of one token
    reduce: Link  # one exchange of an all-reduce: what one GPU sends to another
    message: Link  # from stage to stage
    network: Link = HOSTS
    per_host: int = 8
    memory: float = 0.9 * 141e9

    def own(self, rows: int) -> float:
        """Seconds of a layer of a decode step of so many rows that neither bytes nor other ranks explain."""
        return self.merged if rows == 1 else self.layer

    def read(self, rows: int, weights: float, cache: float) -> float:
        """Seconds for so many bytes in a decode step of so many rows."""
        return weights / self.weight_rate + cache / (self.weight_rate if rows == 1 else self.cache_rate)

    def all_reduce(self, size: float, ranks: int) -> float:
        """One exchange of everything with everyone, or two of an n-th each, whatever is faster; among hosts a ring."""
        if ranks == 1:
            return 0.0
        link = self.reduce if ranks <= self.per_host else self.network
        once = link.seconds((ranks - 1) * size)
        return min(once, 2 * link.seconds((ranks - 1) / ranks * size))

    def hop(self, size: float, layout: Layout) -> float:
        """Seconds from a stage to the next, on the slowest of these ways."""
        crosses = layout.tp * layout.pp > self.per_host
        return 0.0 if layout.pp == 1 else (self.network if crosses else self.message).seconds(size)


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    copies: int = 1  # of the whole, each for a part of the requests

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.copies

    def __str__(self) -> str:
        copies = f", {self.copies} copies" if self.copies > 1 else ""
        return f"tp {self.tp}, pp {self.pp}{copies}"


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; weights of its linears and its cache in FP8, embeddings and lm_head in 16 bits."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> Shape:
        heads = config["num_attention_heads"]
        return Shape(
            config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], heads,
            config["num_key_value_heads"], config["hidden_size"] // heads, config["vocab_size"],
        )  # fmt: skip

    @property
    def layer_weights(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def lm_head(self) -> int:
        """Bytes; as many as the table of embeddings."""
        return 2 * self.hidden * self.vocab

    def kv(self, tp: int) -> int:
        """Bytes of a token in one layer, on a rank: KV heads are there several times if there are fewer than ranks."""
        return 2 * self.head_dim * max(1, self.kv_heads // tp)


@dataclass(frozen=True)
class Engine:
    """A model on GPUs."""

    shape: Shape
    layout: Layout
    machine: Machine

    @property
    def layers(self) -> int:
        """Layers of a stage."""
        return math.ceil(self.shape.layers / self.layout.pp)

    def token_seconds(self, batch: int, context: float) -> float:
        """Seconds of one decode step of every sequence: each stage has a part of the sequences, and passes it on."""
        pp = self.layout.pp
        rows = math.ceil(batch / self.layout.copies / pp)
        hop = self.machine.hop(rows * self.shape.hidden * ACTIVATION, self.layout)
        return pp * (self._stage_seconds(rows, context) + hop)

    def _stage_seconds(self, rows: int, context: float) -> float:
        """The last stage's, which has lm_head: the others wait for it."""
        shape, tp = self.shape, self.layout.tp
        weights = (self.layers * shape.layer_weights + shape.lm_head) / tp
        cache = self.layers * rows * context * shape.kv(tp)
        reduce = self.machine.all_reduce(rows * shape.hidden * ACTIVATION, tp)
        return self.layers * (self.machine.own(rows) + 2 * reduce) + self.machine.read(rows, weights, cache)

    def prompt_seconds(self, batch: int, length: int, step_tokens: int) -> float:
        """Seconds of all prompts: chunks follow each other through the stages, which are all busy except at both
        ends."""
        shape, tp, pp = self.shape, self.layout.tp, self.layout.pp
        tokens = math.ceil(batch / self.layout.copies) * length
        chunks = math.ceil(tokens / step_tokens)
        size = tokens / chunks
        flops = self.layers * size * 2 * shape.layer_weights / tp / self.machine.flops
        reduce = self.machine.all_reduce(size * shape.hidden * ACTIVATION, tp)
        chunk = flops + self.layers * 2 * reduce + self.machine.hop(size * shape.hidden * ACTIVATION, self.layout)
        return (chunks + pp - 1) * chunk

    def step_tokens(self, tokens: int) -> int:
        """Tokens of a step of prompts when so many are to be computed: as the runtime decides."""
        return CHUNK if self.layout.pp == 1 else Chunks(self.layout.pp).most(0, tokens, CHUNK)

    def tokens_per_second(self, batch: int) -> float:
        """Tokens per second of a batch that starts together: 1024 tokens in, 128 out."""
        decode = (OUTPUT - 1) * self.token_seconds(batch, INPUT + OUTPUT / 2)
        step_tokens = self.step_tokens(math.ceil(batch / self.layout.copies) * INPUT)
        return batch * OUTPUT / (self.prompt_seconds(batch, INPUT, step_tokens) + decode)

    def fits(self, batch: int) -> bool:
        """Whether it fits with the cache of all sequences at their end."""
        shape, layout = self.shape, self.layout
        weights = self.layers * shape.layer_weights / layout.tp + shape.lm_head * (1 + 1 / layout.tp)
        rows = math.ceil(batch / layout.copies)
        return weights + self.layers * rows * (INPUT + OUTPUT) * shape.kv(layout.tp) <= self.machine.memory


def calibrated(record: Mapping[str, Any]) -> Machine:
    """Raises EngineError if the record lacks a figure."""
    figures = {row["name"]: row["figure"] for row in record["rows"]}

    def figure(name: str) -> float:
        if figures.get(name) is None:
            raise EngineError(f"the record has no figure {name!r}; bash scripts/gpu_ranks.sh OUT_DIR measures it")
        return float(figures[name])

    length = "1024 in, 128 out, batch"
    one, two = f"llama-7b fp8 + fp8 kv, {length}", f"llama-7b fp8 + fp8 kv tp 2, {length}"
    time = "time per token ms"
    shape = Shape.of(PRESETS["llama-7b"])
    prompts = 64 * INPUT * 2 * shape.layers * shape.layer_weights / (figure(f"{one} 64: first token ms") / 1e3)
    reduce = _link({8: figure("all_reduce 8 KB: us"), 8192: figure("all_reduce 8 MB: us")})
    message = _link({8: figure("send 8 KB: us"), 8192: figure("send 8 MB: us")})
    nothing = Machine(math.inf, math.inf, prompts, 0.0, 0.0, reduce, message)
    per_byte, merged = _solved(
        (Engine(shape, Layout(), nothing), 1, figure(f"{one} 1: {time}") / 1e3),
        (Engine(shape, Layout(2), nothing), 1, figure(f"{two} 1: {time}") / 1e3),
    )
    streamed = replace(nothing, weight_rate=1 / per_byte)
    per_cache, layer = _solved(
        (Engine(shape, Layout(), streamed), 64, figure(f"{one} 64: {time}") / 1e3),
        (Engine(shape, Layout(2), streamed), 64, figure(f"{two} 64: {time}") / 1e3),
    )
    return replace(streamed, cache_rate=1 / per_cache, layer=layer, merged=merged)


def _solved(*steps: tuple[Engine, int, float]) -> tuple[float, float]:
    """Seconds per byte and per layer with which a decode step of each engine and batch takes so many seconds: per byte
    of all, or where the engines' machine reads weights in some time, of the cache. The machine takes none for these.
    Raises EngineError if there are none."""
    import numpy as np

    context, sizes, left = INPUT + OUTPUT / 2, [], []
    for engine, batch, seconds in steps:
        shape, tp = engine.shape, engine.layout.tp
        cache = shape.layers * batch * context * shape.kv(tp)
        weights = (shape.layers * shape.layer_weights + shape.lm_head) / tp
        sizes.append([cache + (weights if engine.machine.weight_rate == math.inf else 0), shape.layers])
        left.append(seconds - engine.token_seconds(batch, context))
    per_byte, per_layer = np.linalg.solve(sizes, left).tolist()
    if per_byte <= 0 or per_layer < 0:
        raise EngineError("the record's times of Llama-7B on one GPU and on two do not go together: no rates fit both")
    return per_byte, per_layer


def _link(us: Mapping[int, float]) -> Link:
    """The link through two points, {KiB: us}."""
    (small, low), (large, high) = ((kib * 1024, value * 1e-6) for kib, value in us.items())
    rate = (large - small) / (high - low)
    return Link(low - small / rate, rate)


def check(machine: Machine, record: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """(what, unit, measured, modelled) of every figure of the record that the model was not made from."""
    figures = {row["name"]: row["figure"] for row in record["rows"]}
    for model, layout, batch in (
        ("llama-2-70b", Layout(2), 1), ("llama-7b", Layout(2), 64), ("llama-7b", Layout(1, 2), 1),
        ("llama-7b", Layout(1, 2), 64),
    ):  # fmt: skip
        engine = Engine(Shape.of(PRESETS[model]), layout, machine)
        place = f"tp {layout.tp}" if layout.tp > 1 else f"pp {layout.pp}"
        key = f"{model} fp8 + fp8 kv {place}, 1024 in, 128 out, batch {batch}"
        context = INPUT + OUTPUT / 2
        modelled = {"time per token ms": engine.token_seconds(batch, context) * 1e3}
        if batch > 1:
            modelled["tokens/s"] = engine.tokens_per_second(batch)
        if (layout, batch) == (Layout(2), 64):  # of which the model was made
            del modelled["time per token ms"]
        for name, value in modelled.items():
            if figures.get(f"{key}: {name}") is not None:
                yield f"{model}, {place}, batch {batch}: {name}", name, float(figures[f"{key}: {name}"]), value


def layouts(gpus: int, shape: Shape) -> Iterator[Layout]:
    """Every tp x pp x copies of that many GPUs, by powers of two."""
    powers = [2**i for i in range(gpus.bit_length())]
    for tp in powers:
        for pp in powers:
            if gpus % (tp * pp) == 0 and tp <= shape.heads and pp <= shape.layers:
                yield Layout(tp, pp, gpus // (tp * pp))


def best(machine: Machine, shape: Shape, gpus: int) -> tuple[Engine | None, Engine | None]:
    """(the shortest time per token of a sequence alone, the most tokens/s of a full machine), None where none fits."""
    engines = [Engine(shape, layout, machine) for layout in layouts(gpus, shape)]
    alone = [e for e in engines if e.fits(e.layout.copies)]
    full = [e for e in engines if e.fits(PER_GPU * gpus)]
    fastest = min(alone, key=lambda e: (e.token_seconds(1, INPUT + OUTPUT / 2), e.layout.gpus), default=None)
    return fastest, max(full, key=lambda e: e.tokens_per_second(PER_GPU * gpus), default=None)


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """The page's, by name."""
    machine = calibrated(record)
    return {
        "machine": _machine(machine), "layer": _layer(machine), "check": _check(machine, record),
        "choice": _choice(machine),
    }  # fmt: skip


def render(page: str, made: Mapping[str, str]) -> str:
    """The page with these tables. Raises EngineError for one of another name."""

    def table(found: re.Match[str]) -> str:
        if found["name"] not in made:
            raise EngineError(f"the page has a table of the model {found['name']!r}; there are {', '.join(made)}")
        return f"{found[1]}{made[found['name']]}{found[3]}"

    return MARKED.sub(table, page)


def _machine(m: Machine) -> str:
    rows = [
        ["weights in decode steps", f"{m.weight_rate / 1e12:.2f} TB/s"],
        ["the cache in decode steps", f"{m.cache_rate / 1e12:.2f} TB/s"],
        ["a decode step's layer beside its bytes", f"{m.layer * 1e6:.1f} us"],
        ["and of one token, in one launch", f"{m.merged * 1e6:.1f} us"],
        ["linears of prompts, attention included", f"{m.flops / 1e12:.0f} TFLOP/s"],
        ["an exchange of an all-reduce", f"{m.reduce.latency * 1e6:.1f} us + {m.reduce.rate / 1e9:.0f} GB/s"],
        ["a message from stage to stage", f"{m.message.latency * 1e6:.1f} us + {m.message.rate / 1e9:.0f} GB/s"],
        ["between hosts (assumed)", f"{m.network.latency * 1e6:.0f} us + {m.network.rate / 1e9:.0f} GB/s"],
    ]
    return _markdown(["of one GPU", ""], rows)


def _layer(machine: Machine) -> str:
    """What a layer takes of a step, and what its ranks say to each other."""
    rows = []
    for model in MODELS:
        shape = Shape.of(PRESETS[model])
        for tp in (1, 2, 8):
            row = [model, str(tp)]
            for tokens in (1, 64):
                cache = tokens * (INPUT + OUTPUT / 2) * shape.kv(tp)
                own = machine.own(tokens) + machine.read(tokens, shape.layer_weights / tp, cache)
                row += _parts(own, 2 * machine.all_reduce(tokens * shape.hidden * ACTIVATION, tp))
            own = CHUNK * 2 * shape.layer_weights / tp / machine.flops
            row += _parts(own, 2 * machine.all_reduce(CHUNK * shape.hidden * ACTIVATION, tp))
            rows.append([*row, _number(CHUNK * shape.hidden * ACTIVATION / 2**20)])
    sizes = "decode of 1", "decode of 64", f"{CHUNK} of prompts"
    steps = [f"{what}, us" for size in sizes for what in (size, "all-reduces")]
    return _markdown(["model", "tp", *steps, "MiB"], rows)


def _parts(own: float, reduces: float) -> list[str]:
    return [_number(own * 1e6), _number(reduces * 1e6) if reduces else ""]


def _check(machine: Machine, record: Mapping[str, Any]) -> str:
    rows = [
        [what, _number(measured), _number(modelled), f"{modelled / measured - 1:+.0%}"]
        for what, _, measured, modelled in check(machine, record)
    ]
    return _markdown(["on two H200s", "measured", "modelled", ""], rows)


def _choice(machine: Machine) -> str:
    rows = []
    for model in MODELS:
        for gpus in GPUS:
            fastest, fullest = best(machine, Shape.of(PRESETS[model]), gpus)
            if fastest is None or fullest is None:
                rows.append([model, str(gpus), "does not fit", "", "", ""])
                continue
            ms = fastest.token_seconds(1, INPUT + OUTPUT / 2) * 1e3
            rate = fullest.tokens_per_second(PER_GPU * gpus)
            first = str(Layout(fastest.layout.tp, fastest.layout.pp))
            rows.append([model, str(gpus), first, f"{ms:.2f}", str(fullest.layout), _number(rate)])
    head = ["model", "GPUs", "one sequence", "ms per token", f"{PER_GPU} sequences per GPU", "tokens/s"]
    return _markdown(head, rows)


def _all(machine: Machine, model: str, gpus: int) -> str:
    rows = []
    for layout in layouts(gpus, Shape.of(PRESETS[model])):
        engine = Engine(Shape.of(PRESETS[model]), layout, machine)
        alone = f"{engine.token_seconds(1, INPUT + OUTPUT / 2) * 1e3:.2f}" if engine.fits(layout.copies) else ""
        full = _number(engine.tokens_per_second(PER_GPU * gpus)) if engine.fits(PER_GPU * gpus) else "does not fit"
        rows.append([str(layout), alone, full])
    head = [f"{model} on {gpus} GPUs", "ms per token, one sequence", f"tokens/s, {PER_GPU} sequences per GPU"]
    return _markdown(head, rows)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser("parallel_model", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--record", type=Path, default=RECORD, help="of two GPUs (default: docs/performance/h200x2.json)")
    p.add_argument("--page", type=Path, help="write the tables between its <!-- model NAME --> and <!-- end -->")
    p.add_argument("--model", choices=sorted(PRESETS), help="list every way to divide it")
    p.add_argument("--gpus", type=positive, default=8, help="of --model (default: 8)")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        record = load(args.record)
        if args.model:
            print(_all(calibrated(record), args.model, args.gpus))
            return 0
        made = tables(record)
        if args.page:
            write_atomically(args.page, [render(args.page.read_text(), made).encode()])
    except (EngineError, OSError) as error:
        print(f"parallel_model: {error}", file=sys.stderr)
        return 1
    print("\n".join(made.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
