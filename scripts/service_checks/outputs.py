"""Debug tensors and Hugging Face's numbers: checks as in fp8.scripts.service_checks.load."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from typing import Any

from fp8.runtime.record import Dump
from fp8.scripts import compare
from fp8.scripts.service_checks.engine import Engine, greedy

COMPARE_DB = {"bf16": 25.0, "fp8": 10.0}  # of any tensor, against transformers in float32


def debug_outputs(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """Tapped engines, quiet and dumping, against the one without taps; what the dumps hold."""
    from safetensors.torch import load_file

    source = random.Random(5)
    prompts, params = [engine.prompt(source, 60) for _ in range(8)], [greedy(16)] * 8
    expected, figures, sound = engine.open().generate(prompts, params), dict[str, Any](), True
    shutil.rmtree(engine.dumps, ignore_errors=True)
    for kind, directory in engine.tapped.items():
        llm = engine.open(directory=directory)
        quiet = llm.generate(prompts, params)
        dump = Dump(llm.session.plan, llm.session.executor.weight, engine.dumps / kind)
        llm.session.recorder = dump
        dumping, texts = llm.generate(prompts, params), engine.texts()
        for plain, *others in zip(expected, quiet, dumping, strict=True):
            for other in others:
                texts.add(plain, other.token_ids)
        same = [c.token_ids for c in expected] == [c.token_ids for c in quiet]
        files = [load_file(f) for f in sorted(dump.directory.glob("step_*.safetensors"))]
        wrong = sum(inconsistent(tensors, tap.name) for tensors in files for tap in llm.session.plan.taps)
        figures[kind] = {**texts.figures, "taps": len(llm.session.plan.taps), "dumps": len(files),
                         "inconsistent_tensors": wrong, "quiet_texts_all_equal": same}  # fmt: skip
        sound = sound and not wrong and len(files) == dump.steps > 0 and not texts.without_cause
        sound = sound and (same or kind != "stored")  # the same kernels in the same graph: equal to the bit
    return sound, figures


def inconsistent(tensors: dict[str, Any], name: str) -> bool:
    """Whether a dump's raw values times their scale are not what it says they are."""
    raw, value, scale = tensors[name].float(), tensors[f"{name}.dequantized"], tensors.get(f"{name}.scale")
    known = raw if scale is None else raw * scale.reshape(-1, 1)
    return not (known.equal(value) and bool(value.isfinite().all()) and bool(value.any()))


def against_hugging_face(engine: Engine) -> tuple[bool, dict[str, Any]]:
    """`fp8-inspect compare ENGINE HF_DIR` on the device."""
    printed, needed = io.StringIO(), COMPARE_DB[engine.name]
    text = ["--input_text", "def main():\n    parser = argparse.ArgumentParser(description=__doc__)\n"]
    flags = ["--device", engine.device, "--threshold", str(needed), "--json", *text]
    with contextlib.redirect_stdout(printed):
        status = compare.main([str(engine.directory), str(engine.model_dir), *flags])
    facts = json.loads(printed.getvalue() or "{}")
    tensors = facts.get("tensors", [])
    lowest = min((t["sqnr"] for t in tensors if t["sqnr"] is not None), default=None)
    figures = {
        "status": status, "tensors": len(tensors), "lowest_sqnr_db": lowest, "needed_db": needed,
        "first_under": facts.get("first_under"), "logits_db": tensors[-1]["sqnr"] if tensors else None,
    }  # fmt: skip
    return status == 0 and len(tensors) > 20 and facts["first_under"] is None, figures
