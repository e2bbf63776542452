"""The figures that results files hold, by name: what a record is made of.

A results file is what fp8-bench, gpu_round and gpu_engines write. Figures of an engine have the shape's name, which the
file's name begins with: llama-7b.json, llama-3.1-8b-throughput.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fp8.builder.engine import EngineError
from fp8.scripts.benchmarks.kernel_cases import BURSTS, PRODUCTS, timed_cases
from fp8.scripts.benchmarks.targets import CHECKED, REPEATED, WRONG
from fp8.scripts.random_checkpoint import PRESETS

Document = dict[str, Any]
Figures = Iterator[tuple[str, float]]
FACTS = {
    "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "vocab_size": "vocab_size", "mlp_size": "intermediate_size",
}  # fmt: skip
CLOCKS = {
    "tokens/s": "mhz", "of the bound": "mhz", "first token ms": "first_token_mhz", "time per token ms": "decode_mhz",
}  # fmt: skip


def read(directory: Path) -> dict[str, Document]:
    """The results files of a folder by their names. Raises EngineError for one that is none."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        try:
            document = json.loads(path.read_text())
        except ValueError as error:
            raise EngineError(f"{path} is not JSON ({error}); give a folder of results files alone") from error
        if isinstance(document, dict) and "command" in document and _kind(document):
            found[path.stem] = document
    if not found:
        raise EngineError(f"{directory} holds no results of fp8-bench, gpu_round or gpu_engines")
    return found


def figures(documents: dict[str, Document]) -> dict[str, float]:
    """All figures by name. Where two files hold the same figure, fp8-bench's is taken; counts of steps are added up."""
    found: dict[str, float] = {}
    for name, document in sorted(documents.items(), key=lambda item: _kind(item[1]) == "gpu_round"):
        for key, value in READERS[_kind(document)](name, document):
            if key.endswith((f": {REPEATED}", f": {WRONG}")):
                found[key] = found.get(key, 0) + value
            found.setdefault(key, value)
    return found


def _kind(document: Document) -> str:
    kind = document.get("mode") or str(document["command"]).split()[0]
    return kind if kind in READERS else ""


def _kernel(_: str, document: Document) -> Figures:
    for row in document["results"]:
        if "us" not in row:
            continue
        yield f"{row['name']}: us", row["us"]
        yield f"{row['name']}: TB/s", row["tb_per_second"]
        yield f"{row['name']}: TFLOP/s", row["tflops"]
        yield f"{row['name']}: of the ceiling", row["fraction"]
        if row.get("bound_by") == "memory":
            yield f"{row['name']}: us, bound by memory", row["us"]
        if row.get("burst_us"):
            yield f"{row['name']}{BURSTS}: us", row["burst_us"]
            yield f"{row['name']}{BURSTS}: TFLOP/s", row["tflops"] * row["us"] / row["burst_us"]
        if row.get("peer_burst_us"):
            yield f"{row['name']}{BURSTS}: ratio to {row['peer']}", row["peer_burst_us"] / row["burst_us"]
        if row["peer_us"]:
            yield f"{row['name']}: ratio to {row['peer']}", row["ratio"]
            if "write_us" in row:
                alone = row["us"] - row["write_us"]
                yield f"{row['name']}{PRODUCTS}: ratio to {row['peer']}", row["peer_us"] / alone
    for name, value in document["ceilings"].items():
        yield f"ceiling {name}", value / 1e12


def _gpu_round(_: str, document: Document) -> Figures:
    """How much of a whole round was right; of every tactic's time, the best: these have no peer in the same run."""
    if not {"--plugin", "--case", "--small", "--share"} & set(str(document["command"]).split()):
        yield f"{CHECKED}: cases", len({(row["plugin"], row["case"]) for row in document["rows"]})
        yield f"{CHECKED}: runs", len(document["rows"])
        yield f"{CHECKED}: failures", sum(bool(row["failure"]) for row in document["rows"])
    best: dict[tuple[str, str], float] = {}
    for row in document["rows"]:
        if row["us"]:
            key = row["plugin"], row["case"]
            best[key] = min(row["us"], best.get(key, row["us"]))
    for timed in timed_cases():
        us = best.get((timed.plugin, timed.case.name))
        if us:
            yield f"{timed.name}: us", us
            yield f"{timed.name}: TB/s", timed.case.bytes / us / 1e6
            yield f"{timed.name}: TFLOP/s", timed.case.flops / us / 1e6


def _latency(name: str, document: Document) -> Figures:
    for row in document["results"]:
        key = f"{shape(name, document)}, {row['input_len']} in, {row['output_len']} out, batch {row['batch_size']}"
        yield f"{key}: tokens/s", row["tokens_per_second"]
        yield f"{key}: first token ms", row["first_token_ms"]
        yield f"{key}: time per token ms", row["time_per_output_token_ms"]
        if row["fraction_of_bound"]:
            yield f"{key}: of the bound", row["fraction_of_bound"]
        for what, clock in CLOCKS.items():
            yield from _clock(f"{key}: {what}", row.get(clock))
    yield from _values(name, document)


def _clock(figure: str, mhz: float | None) -> Figures:
    """The mean clock of the multiprocessors while a figure was measured; of rank 0's card where there are several
    ranks."""
    if mhz:
        yield f"{figure}, MHz", mhz


def _values(name: str, document: Document) -> Figures:
    for row in document["results"]:
        if "repeated_steps" in row:
            yield f"{shape(name, document)}: {REPEATED}", row["repeated_steps"]
            yield f"{shape(name, document)}: {WRONG}", row["unsteady_steps"] + row["not_finite_steps"]


def _throughput(name: str, document: Document) -> Figures:
    for row in document["results"]:
        key = f"{shape(name, document)}, {row['input_len']}/{row['output_len']}, {row['measured']}"
        yield f"{key}: output tokens/s", row["output_tokens_per_second"]
        yield from _clock(f"{key}: output tokens/s", row.get("mhz"))


def _startup(name: str, document: Document) -> Figures:
    for row in document["results"]:
        yield f"{shape(name, document)}, {row['what']}: s", row["seconds"]
        yield f"{shape(name, document)}, {row['what']}: peak memory of the weights", row["peak_of_weights"]


def _engines(_: str, document: Document) -> Figures:
    rows = {types(row): row for row in document["rows"]}
    base = rows.get("bf16")
    for kind, row in rows.items():
        if base is not None and row is not base:
            yield f"example {kind}: perplexity over BF16", row["perplexity_gpu"] / base["perplexity_gpu"] - 1


def _ranks(_: str, document: Document) -> Figures:
    for row in document["rows"]:
        key = f"example {types(row)},{place(row)}"
        yield f"{key}: logits, SQNR to one rank's", min(row["prefill_db"], row["decode_db"])
        yield f"{key}: perplexity, off one rank's", abs(row["perplexity"] / row["perplexity_one"] - 1)


def _wide(_: str, document: Document) -> Figures:
    for directory in dict.fromkeys(row["engine"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["engine"] == directory]
        model = next((m for m in PRESETS if m in Path(directory).name), Path(directory).name)
        key = f"{model} of few layers,{place(rows[0])}"
        yield f"{key}: steps", sum(row["steps"] for row in rows)
        wrong = (row["steps"] if row["ranks_differ"] else row["unsteady"] + row["not_finite"] for row in rows)
        yield f"{key}: steps with other bits, or not finite", sum(wrong)
        for way in dict.fromkeys(row["way"] for row in rows):
            yield f"{key}, {way}: logits, SQNR to NCCL's", min(r["worst_db"] for r in rows if r["way"] == way)


def _all_reduce(_: str, document: Document) -> Figures:
    for row in document["rows"]:
        yield f"{row['name']}: us", row["us"]
    for row in document["results"]:
        if row.get("sqnr_db"):
            size = f"{row['kib']} KB" if row["kib"] < 1024 else f"{row['kib'] // 1024} MB"
            yield f"{row['name']} {size}: SQNR", row["sqnr_db"]
    if "checked" in document["checks"]:
        yield "all_reduce, every tactic: checks", document["checks"]["checked"]
        yield "all_reduce, every tactic: failures", len(document["checks"]["failures"])
    if "launches" in document["checks"]:
        yield "all_reduce, in turn: launches at varied sizes", document["checks"]["launches"]
        yield "all_reduce, in turn: wrong results", document["checks"]["wrong"]


def _nothing(_: str, __: Document) -> Figures:
    return iter(())


READERS: dict[str, Callable[[str, Document], Figures]] = {
    "kernel": _kernel, "gpu_round": _gpu_round, "latency": _latency, "throughput": _throughput, "startup": _startup,
    "gpu_engines": _engines, "gpu_ranks": _ranks, "all_reduce": _all_reduce, "roofline": _values, "host": _nothing,
    "gpu_wide": _wide, "gpu_faults": _nothing,
}  # fmt: skip


def losses(documents: dict[str, Document], most: int = 4) -> list[dict[str, Any]]:
    """For every step that a roofline file holds: the step, and the kernels that lose the most time against the
    bound."""
    found = []
    for name, document in documents.items():
        if _kind(document) != "roofline":
            continue
        for step in dict.fromkeys(row["step"] for row in document["results"]):
            whole, *kernels = [row for row in document["results"] if row["step"] == step]
            kept = ("step", "kernel", "us", "bound_us", "fraction", "loss_us")
            found += [
                {"engine": shape(name, document), **{key: row[key] for key in kept}} for row in (whole, *kernels[:most])
            ]
    return found


def engines(documents: dict[str, Document]) -> list[dict[str, Any]]:
    """How far each engine is from itself interpreted: its logits in decibels, and both perplexities."""
    kept = ("prefill_db", "decode_db", "own_db", "perplexity_cpu", "perplexity_gpu")
    found = [row for document in documents.values() if _kind(document) == "gpu_engines" for row in document["rows"]]
    return [{"engine": types(row), **{key: row[key] for key in kept}} for row in found]


def shape(name: str, document: Document) -> str:
    """`llama-7b fp8 + fp8 kv tp 2`: the shape that the file's name begins with, the engine's types and ranks.

    Raises EngineError if the file is about an engine of another shape."""
    model = next((m for m in sorted(PRESETS, key=len, reverse=True) if name.startswith(m)), None)
    if model is None:
        raise EngineError(f"{name}.json: its name begins with none of {', '.join(PRESETS)}: whose figures are these?")
    engine = document.get("engine")
    if engine is None:  # written before engines were described: they were of this kind
        return f"{model} fp8 + fp8 kv"
    for fact, key in FACTS.items():
        if engine[fact] != PRESETS[model][key]:
            raise EngineError(f"{name}.json: its engine has {fact} {engine[fact]}, but {model} {PRESETS[model][key]}")
    return f"{model} {types(engine)}{place(engine)}"


def types(facts: Document) -> str:
    """`fp8 + fp8 kv`: of weights and activations, and of the KV cache where it is in FP8."""
    return f"{facts['format']}{' + fp8 kv' if facts['kv_cache_dtype'] == 'float8_e4m3fn' else ''}"


def place(facts: Document) -> str:
    """` tp 2` of an engine of several ranks."""
    return "".join(f" {axis} {facts[f'{axis}_size']}" for axis in ("tp", "pp") if facts.get(f"{axis}_size", 1) > 1)
