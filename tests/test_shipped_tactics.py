"""Every kernel that an engine of a real shape ships compiles for sm_90a: none serialized, none dropped, no spills.
The table of tactics that ships is of ops and tactics that there are."""

import random
from pathlib import Path
from typing import Any

import pytest

from fp8.builder import build, tactic_table, tune
from fp8.builder.checkpoint import Checkpoint
from fp8.builder.formats.base import load as load_format
from fp8.builder.request import Reporter, Request, Source
from fp8.models.config import load as load_model
from fp8.plugins.compile import compile_kernel
from fp8.scripts.random_checkpoint import PRESETS, write_random_checkpoint

ENGINES = [
    ("llama-7b", "fp8", "fp8"),
    ("llama-7b", "fp8_rowwise", "fp8"),
    ("llama-7b", "fp8_block", "fp8"),
    ("llama-7b", "bf16", "auto"),
    ("llama-3.1-8b", "fp8", "fp8"),
]


@pytest.mark.parametrize(("model", "qformat", "kv_cache_dtype"), ENGINES)
def test_every_kernel_of_an_engine_compiles_clean(
    model: str, qformat: str, kv_cache_dtype: str, tmp_path: Path
) -> None:
    # One layer and a short vocabulary: the kernels of the layers are those of the whole model.
    config: dict[str, Any] = {**PRESETS[model], "num_hidden_layers": 1, "vocab_size": 1000}
    format = load_format(qformat)(kv_cache_dtype=kv_cache_dtype)
    write_random_checkpoint(tmp_path / "checkpoint", config, format, 0)
    source = Source(load_model(config), Checkpoint(tmp_path / "checkpoint"))
    warnings: list[str] = []
    compiled = build.compile(source, Request(max_seq_len=2048), Reporter(warn=warnings.append))
    facts = compiled.plan.kernels.values()
    spills = {f"{k['plugin']}/{k['source']} {k['constants']}": k["spill_bytes"] for k in facts if k["spill_bytes"]}
    assert not warnings  # a tactic that does not compile, or that ptxas serializes, is dropped with one
    assert not spills, spills
    assert len(compiled.cubins) == len(facts) >= 20


def entries() -> list[tuple[tune.Site, dict[str, Any]]]:
    """Every place of the shipped table, and its tactic's fields. Raises what `parse_op` raises for a name of old."""
    ops = {op: tactic_table.parse_op(op) for op in tactic_table.shipped().entries}
    ranges = tactic_table.shipped().entries.items()
    return [(tune.Site(*ops[op], rows, op), e.tactic) for op, found in ranges for rows, e in found.items()]


def test_every_shipped_entry_is_a_legal_tactic_of_its_op() -> None:
    found = entries()
    stale = [f"{site.label}: {fields}" for site, fields in found if site.restored(fields) is None]
    remedy = "python -m fp8.scripts.tune_table --output builder/tactics_h200.json [--prune]"
    assert not stale, f"{remedy} puts others in their place, or drops them: {stale[:3]} of {len(stale)}"
    assert len(found) > 250
    assert all(tactic_table.op_name(site.plugin, site.types) == site.module for site, _ in found)
    assert tactic_table.shipped().facts["GPU"] == "NVIDIA H200"


def test_shipped_entries_compile() -> None:
    """A few; an engine that takes another drops it with a warning if it does not."""
    for site, fields in random.Random(0).sample(entries(), 8):
        for kernel in site.kernels(site.restored(fields)):
            assert not compile_kernel(kernel).serialized, (site.label, fields)
