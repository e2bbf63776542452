"""fp8-build: the engine directory, its memory plan, its tactics, its bytes, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint as tiny
import torch
from safetensors import safe_open

from fp8.builder import budget, build, engine, memory, plan, tune, weights
from fp8.builder.checkpoint import CheckpointError
from fp8.builder.engine import Buffer, Limits, Step
from fp8.builder.export import ExportError, export
from fp8.builder.interpret import Interpreter, empty_caches, step_inputs
from fp8.builder.measure import TuneError
from fp8.builder.plan import LegalityError
from fp8.builder.request import Reporter, Request
from fp8.builder.verify import sqnr
from fp8.builder.workplace import BuildError, check_output, workplace
from fp8.plugins import base
from fp8.plugins.gemm_swiglu.reference import deinterleave
from fp8.runtime.llm import LLM
from fp8.runtime.sampling_params import SamplingParams
from fp8.scripts import build as command
from fp8.scripts import inspect, quantize

SMALL = Request(max_batch_size=4, max_seq_len=128, max_num_tokens=64, target="cpu")


def built(tmp_path: Path, format: str = "fp8", kv: str = "fp8", request: Request = SMALL, **changes):
    """An engine directory and its plan."""
    source = tiny.source(tmp_path / "checkpoint", tiny.qformat(format, kv), **changes)
    compiled = build.compile(source, request, Reporter())
    return source, build.write(compiled, source, tmp_path / "engine", Reporter())


def test_the_engine_is_loadable_and_says_what_it_is(tmp_path):
    built(tmp_path)
    loaded = engine.load(tmp_path / "engine")
    assert loaded.plan.model.format == "fp8" and loaded.plan.model.kv_cache_dtype == "float8_e4m3fn"
    assert loaded.plan.limits == Limits(4, 128, 64)
    assert loaded.plan.model.eos_token_ids == (2,)
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["compatibility"]["target"] == "cpu" and config["model"]["num_layers"] == 2


def test_every_weight_of_the_plan_is_in_the_file(tmp_path):
    _, written = built(tmp_path)
    with safe_open(tmp_path / "engine" / "rank0.safetensors", "pt") as file:
        for buffer in (b for b in written.buffers if b.kind == "weight"):
            found = file.get_tensor(buffer.name)
            assert (str(found.dtype), tuple(found.shape)) == (f"torch.{buffer.dtype}", buffer.shape)


def test_gate_and_up_are_interleaved_with_their_scales(tmp_path):
    source, _ = built(tmp_path)
    name = "model.layers.1.mlp.{gate_proj,up_proj}"
    with safe_open(tmp_path / "engine" / "rank0.safetensors", "pt") as file:
        gate, up = deinterleave(file.get_tensor(f"{name}.weight").view(torch.uint8))
        scales = deinterleave(file.get_tensor(f"{name}.weight_scale"))
    for part, scale, module in ((gate, scales[0], "gate_proj"), (up, scales[1], "up_proj")):
        stored = source.checkpoint.entry(f"model.layers.1.mlp.{module}.weight").array()
        assert part.numpy().tobytes() == stored.tobytes()
        assert set(scale.tolist()) == set(source.checkpoint.scale(f"model.layers.1.mlp.{module}.weight_scale").tolist())


def test_tokenizer_files_are_copied_and_eos_comes_from_the_generation_config(tmp_path):
    source = tiny.source(tmp_path / "checkpoint", tiny.qformat("bf16"))
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("{}")
    (tmp_path / "checkpoint" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    written = build.write(build.compile(source, SMALL, Reporter()), source, tmp_path / "engine", Reporter())
    assert (tmp_path / "engine" / "tokenizer.json").read_text() == "{}"
    assert written.model.eos_token_ids == (2, 7)


def test_end_of_sequence_tokens_that_the_vocabulary_has_not_are_left_out(tmp_path):
    """A request with min_tokens would mask their logits, and there are none: its step would end for all in it."""
    _, written = built(tmp_path, "bf16", "auto", eos_token_id=[2, tiny.CONFIG["vocab_size"], -1], bos_token_id=10**12)
    assert written.model.eos_token_ids == (2,) and written.model.bos_token_id is None
    llm = LLM(tmp_path / "engine", "cpu")
    assert len(llm.generate([[1, 5]], SamplingParams(max_tokens=4, min_tokens=3))[0].token_ids) >= 3


@pytest.mark.parametrize("eos", ["</s>", {"id": 2}, [2, 1.5], True])
def test_an_end_of_sequence_token_that_is_no_token_is_refused(tmp_path, eos):
    with pytest.raises(CheckpointError, match=r"eos_token_id is .* expected a token id"):
        built(tmp_path, "bf16", "auto", eos_token_id=eos)


@pytest.fixture(scope="module")
def gpu_engine(tmp_path_factory):
    """Built for sm_90a, kernels compiled; twice, the second time over the first."""
    root = tmp_path_factory.mktemp("gpu")
    arguments = ["--checkpoint_dir", root / "checkpoint", "--output_dir", root / "engine", "--max_seq_len", 128]
    arguments += ["--max_num_tokens", 64, "--max_batch_size", 4, "--log_level", "warning"]
    tiny.write(root / "checkpoint", tiny.qformat("fp8", "fp8"))
    contents = []
    for _ in range(2):
        assert command.main([str(a) for a in arguments]) == 0
        contents.append({p.name: p.read_bytes() for p in (root / "engine").iterdir()})
    return root / "engine", *contents


def test_a_second_build_gives_the_same_bytes(gpu_engine):
    _, first, second = gpu_engine
    assert first == second and set(first) == {"config.json", "rank0.engine", "rank0.safetensors"}


def test_every_step_of_a_gpu_engine_has_kernels_for_every_number_of_rows(gpu_engine):
    loaded = engine.load(gpu_engine[0])
    for step in loaded.plan.steps:
        ends = [t.max_tokens for t in step.tactics]
        rows = loaded.plan.buffer(step.outputs[0]).shape[0]
        assert ends == sorted(set(ends)) and ends[-1] >= (64 if rows == "T" else 256)
        assert all(k in loaded.cubins and k in loaded.plan.kernels for t in step.tactics for k in t.kernels)
    assert {k["plugin"] for k in loaded.plan.kernels.values()} >= {"gemm", "attention", "sampling"}


def test_tactics_are_restored_from_the_plan(gpu_engine):
    for step in engine.load(gpu_engine[0]).plan.steps:
        plugin = base.load(step.plugin)(**step.attributes)
        for choice in step.tactics:
            assert dataclasses.asdict(plugin.tactic(choice.tactic)) == choice.tactic


def test_only_equal_launches_share_workspace(gpu_engine):
    loaded = engine.load(gpu_engine[0])
    regions = {}
    for step in loaded.plan.steps:
        for choice in step.tactics:
            if choice.workspace:
                assert choice.workspace_offset % 256 == 0
                assert choice.workspace_offset + choice.workspace <= loaded.plan.workspace_bytes
                regions.setdefault((choice.workspace_offset, choice.workspace), set()).add(choice.kernels)
    spans = sorted(regions)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))
    assert all(len(kernels) == 1 for kernels in regions.values())


def test_a_tactic_that_does_not_compile_is_dropped_with_a_warning(monkeypatch):
    plugin = base.load("gemm")("bfloat16")
    types = (base.Tensor("bfloat16", ("T", 64)), base.Tensor("bfloat16", (64, 64)), None, None, None)
    site = tune.Site(plugin, types, 64, "lm_head")
    first, second = site.candidates()[:2]
    refused = set(site.kernels(first)) - set(site.kernels(second))
    monkeypatch.setattr(
        tune, "_compiled",
        lambda k: f"{k.source}: ptxas serialized" if k in refused else tune.Cubin(str(k), k, b"", ""),
    )  # fmt: skip
    warnings = []
    assert tune.choose([site], {}, warn=warnings.append)[site].tactic == second
    assert warnings[0].endswith("ptxas serialized") and f"gemm: lm_head: dropped {first}" in warnings


def test_a_measured_tactic_goes_first_if_it_is_legal():
    plugin = base.load("gemm")("bfloat16")
    types = (base.Tensor("bfloat16", ("T", 64)), base.Tensor("bfloat16", (64, 64)), None, None, None)
    site = tune.Site(plugin, types, 64)
    last = site.candidates()[-1]
    assert site.candidates(tune.tactic_fields(last))[0] == last


# Memory


def test_activations_that_live_together_do_not_overlap(tmp_path):
    _, written = built(tmp_path, "fp8_rowwise")
    lives: dict[str, list[int]] = {}
    for i, step in enumerate(written.steps):
        for name in (*step.inputs, *step.outputs):
            if name and written.buffer(name).kind == "activation":
                lives.setdefault(name, [i, i])[1] = i
    spans = {
        n: (b.offset, b.offset + memory.buffer_bytes(b, written.limits)) for n in lives for b in [written.buffer(n)]
    }
    for a in lives:
        assert spans[a][0] % memory.ALIGNMENT == 0 and spans[a][1] <= written.arena_bytes
        for b in lives:
            if a != b and lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]:
                assert spans[a][1] <= spans[b][0] or spans[b][1] <= spans[a][0], (a, b)


def test_dead_activations_give_their_place_away():
    buffers = {n: Buffer(n, "float32", ("T", 64), "activation") for n in "abcd"}
    steps = [Step(o, "gemm", {}, (i,), (o,)) for i, o in (("a", "b"), ("b", "c"), ("c", "d"))]
    offsets, size = memory.place(buffers, steps, Limits(1, 64, 64))
    assert size == 2 * 64 * 64 * 4
    assert offsets["a"] == offsets["c"] != offsets["b"] == offsets["d"]


def test_the_budget_adds_up(tmp_path):
    _, written = built(tmp_path)
    found = budget.of(written)
    assert found.weights == sum(memory.buffer_bytes(b, written.limits) for b in written.buffers if b.kind == "weight")
    assert found.kv_block == 2 * 2 * 64 * 2 * 64  # layers, K and V, tokens, KV heads, head size; one byte each
    limits = written.limits
    rows = min(limits.logits_rows, limits.max_num_tokens)
    table, logprobs = 4 * limits.max_batch_size * limits.max_seq_len, 8 * rows * written.model.vocab_size
    assert found.sampling > table + logprobs, "and scratch"
    assert dict(budget.lines(written, 1))["options of sampling"] == budget.size_text(found.sampling)
    first = dataclasses.replace(written, compatibility=dataclasses.replace(written.compatibility, pp_size=2))
    assert budget.of(first).sampling == 0, "the last stage has the logits"
    assert found.blocks(found.fixed + 10 * found.kv_block) == 10
    assert found.blocks(0) < 0
    assert dict(budget.lines(written, 1 << 10))["KV blocks in 1.00 KiB"] == "does not fit"


# Refusals


def test_a_shape_that_no_kernel_takes_is_told_by_module_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "compile_kernel", lambda kernel: pytest.fail("compiled"))
    source = tiny.source(tmp_path, tiny.qformat("fp8"), hidden_size=200)
    with pytest.raises(LegalityError) as caught:
        build.compile(source, dataclasses.replace(SMALL, target="sm_90a"), Reporter())
    assert "gemm: model.layers.0.self_attn.{q_proj,k_proj,v_proj}: K=200 is not a multiple of 16" in str(caught.value)
    build.compile(source, SMALL, Reporter())  # the references take it


def test_tuning_without_a_gpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    source = tiny.source(tmp_path, tiny.qformat("fp8"))
    with pytest.raises(TuneError, match="torch sees none; build without --tune"):
        build.compile(source, dataclasses.replace(SMALL, target="sm_90a", tune=True), Reporter())


def test_a_dry_run_checks_and_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "compile_kernel", lambda kernel: pytest.fail("compiled"))
    source = tiny.source(tmp_path, tiny.qformat("fp8"))
    compiled = build.compile(source, dataclasses.replace(SMALL, target="sm_90a"), Reporter(), dry_run=True)
    assert len(compiled.plan.steps) == 17 and compiled.plan.arena_bytes > 0


def test_a_node_that_no_plugin_takes_is_an_error(tmp_path):
    source = tiny.source(tmp_path, tiny.qformat("fp8"))
    graph = source.emit(source.limits(SMALL))
    with pytest.raises(LegalityError, match=r"taken by no plugin, the first is model\.embed_tokens/gather"):
        plan.nodes(graph)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_seq_len": 257}, "max_seq_len 257 exceeds the model's max_position_embeddings 256"),
        ({"max_batch_size": 65}, "max_num_tokens 64 is below max_batch_size 65"),
        ({"max_num_tokens": 0}, "max_num_tokens is 0, expected at least 1"),
        ({"max_num_tokens": 1 << 20, "max_batch_size": 1 << 16}, "max_batch_size is 65536, expected at most 65535"),
        ({"max_seq_len": -1}, "max_seq_len is -1"),
        ({"target": "sm_80"}, "target 'sm_80' is not known; expected sm_90a or cpu"),
    ],
)
def test_limits_that_make_no_sense_are_refused(tmp_path, changes, says):
    source = tiny.source(tmp_path, tiny.qformat("bf16"))
    with pytest.raises(BuildError) as caught:
        source.limits(dataclasses.replace(SMALL, **changes))
    assert says in str(caught.value)


def test_a_directory_that_is_no_engine_is_not_replaced(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "thesis.tex").write_text("years")
    with pytest.raises(BuildError, match="is no engine directory"):
        built(tmp_path)
    assert (tmp_path / "engine" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, os.strerror(28))])
def test_an_interrupted_build_leaves_nothing_and_keeps_the_older_engine(tmp_path, monkeypatch, error):
    built(tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "engine").iterdir()}

    def fail(*_):
        raise error

    monkeypatch.setattr(weights, "write", fail)
    with pytest.raises(BuildError if isinstance(error, OSError) else KeyboardInterrupt):
        built(tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "engine").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "engine"]


@pytest.mark.parametrize("killed", ["after it moved the older engine away", "before it removed that"])
def test_what_a_killed_build_left_hinders_no_other(tmp_path, killed):
    _, before = built(tmp_path)
    (tmp_path / "engine.partial" / "deeper").mkdir(parents=True)
    if killed == "before it removed that":
        (tmp_path / "engine.replaced").mkdir()
        (tmp_path / "engine.replaced" / "rank0.engine").write_text("half removed")
    else:
        (tmp_path / "engine").rename(tmp_path / "engine.replaced")
    assert built(tmp_path)[1] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "engine"]


def test_a_link_to_an_engine_stays_and_leads_to_the_new_one(tmp_path):
    built(tmp_path)
    (tmp_path / "far").mkdir()
    (tmp_path / "engine").rename(tmp_path / "far" / "real")
    (tmp_path / "engine").symlink_to("far/real")
    (tmp_path / "far" / "real" / "old").touch()
    built(tmp_path)
    assert (tmp_path / "engine").is_symlink() and not (tmp_path / "far" / "real" / "old").exists()
    assert [p.name for p in (tmp_path / "far").iterdir()] == ["real"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "engine", "far"]


def test_two_builds_do_not_write_into_one_directory(tmp_path):
    with workplace(tmp_path / "engine") as partial:
        (partial / "rank0.engine").write_text("half")
        with pytest.raises(BuildError, match="another process is writing it"):
            built(tmp_path)
        assert (partial / "rank0.engine").read_text() == "half"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "engine"]


def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "engine").mkdir()
    monkeypatch.chdir(tmp_path / "engine")
    for name in (".", tmp_path / "engine"):
        with pytest.raises(BuildError, match="is the current directory"):
            check_output(Path(name))


# Command line


def test_names_with_brackets_are_told_as_they_are(tmp_path, capsys, monkeypatch):
    """Not as the markup of a console, which ends in an error or takes them away."""
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "model [v2]", tiny.qformat("bf16"))
    for name in ("engine [v2]", "a[", "ünï [/b] x"):
        limits = ["--max_batch_size", "2", "--max_seq_len", "64", "--max_num_tokens", "64", "--target", "cpu"]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        assert command.main(["--checkpoint_dir", "model [v2]", "--output_dir", name, *limits]) == 0
        assert f"{name}: bf16 engine for cpu" in capsys.readouterr().err
        assert inspect.main([name]) == 0
        assert name in capsys.readouterr().out
    ckpt = "checkpoint [v2]"
    assert quantize.main(["--model_dir", "model [v2]", "--output_dir", ckpt, "--qformat", "fp8_rowwise"]) == 0
    assert f"{ckpt}: fp8_rowwise" in capsys.readouterr().err


def test_a_directory_is_no_onnx_file(tmp_path, capsys):
    tiny.write(tmp_path / "ckpt", tiny.qformat("bf16"))
    with pytest.raises(SystemExit, match="2"):
        command.main(["--checkpoint_dir", str(tmp_path / "ckpt"), "--export_onnx", str(tmp_path)])
    assert "is a directory" in capsys.readouterr().err


def test_the_command_prints_the_memory_budget(tmp_path, capsys):
    tiny.write(tmp_path, tiny.qformat("fp8"))
    assert command.main(["--checkpoint_dir", str(tmp_path), "--dry_run", "--gpu_memory", "80G"]) == 0
    text = capsys.readouterr().err
    assert "KV blocks in 80.00 GiB" in text and "28 quantize/dequantize pairs, 0 left unfolded" in text
    assert command.main(["--checkpoint_dir", str(tmp_path), "--dry_run", "--gpu_memory", "1M"]) == 1
    assert "more than the 1.00 MiB of --gpu_memory; divide the model" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("80G", 80 << 30), ("141GiB", 141 << 30), ("0.5M", 1 << 19), ("7", 7)])
def test_memory_sizes(text, size):
    assert command.memory_size(text) == size


def test_a_memory_size_that_is_none_is_refused():
    with pytest.raises(BuildError, match="is no size"):
        command.memory_size("much")


# Export


@pytest.mark.parametrize(("format", "kv"), [("fp8", "fp8"), ("fp8_rowwise", "auto"), ("bf16", "auto"), ("bf16", "fp8")])
def test_onnxruntime_agrees_with_the_interpreter_on_the_exported_graph(tmp_path, format, kv):
    onnxruntime = pytest.importorskip("onnxruntime")
    source = tiny.source(tmp_path, tiny.qformat(format, kv))
    export(source, tmp_path / "model.onnx", "float32", 128)
    assert (tmp_path / "model.onnx").stat().st_size < 200_000  # weights stay in the checkpoint
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # others mis-fuse FP8
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    graph = source.model.emit(source.config, source.checkpoint, source.format, "float32", max_positions=128)
    generator = np.random.default_rng(0)
    feeds = step_inputs([(generator.integers(320, size=n).tolist(), 0) for n in (33, 9, 1)])
    feeds |= empty_caches(graph, feeds)
    expected = Interpreter(graph)(feeds)
    found = session.run(["logits"], {i.name: feeds[i.name].numpy() for i in session.get_inputs()})[0]
    assert sqnr(torch.from_numpy(found), expected["logits"]) >= (80 if (format, kv) == ("bf16", "auto") else 45)


def test_an_export_from_which_the_weights_cannot_be_reached_is_refused(tmp_path):
    source = tiny.source(tmp_path / "checkpoint", tiny.qformat("bf16"))
    with pytest.raises(ExportError, match="must lie in the checkpoint's directory or above it"):
        export(source, tmp_path / "elsewhere" / "model.onnx", "float32", 128)
    export(source, tmp_path / "model.onnx", "float32", 128)
