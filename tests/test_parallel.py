"""Tensor and pipeline parallelism: all ranks together compute what one does, from the same bytes."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import rank_group
import tiny_checkpoint as tiny
import torch
import worker_tasks

from fp8.builder import budget, build, engine, pipeline
from fp8.builder.checkpoint import Checkpoint
from fp8.builder.parallel import ranks, workers
from fp8.builder.parallel.lockstep import Group
from fp8.builder.parallel.split import SplitError
from fp8.builder.parallel.tensor import TensorParallel, split
from fp8.builder.request import Reporter, Request, Source
from fp8.builder.target import Target
from fp8.builder.verify import sqnr
from fp8.builder.weights import to_torch
from fp8.builder.workplace import BuildError
from fp8.models import config as models
from fp8.plugins.all_reduce.reference import all_reduce
from fp8.scripts import build as command

STEPS = [[(list(range(3, 40)), 0), ([7, 300, 11], 0)], [([5], 37), ([9], 3)]]
UNEVEN = {
    "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 208, "vocab_size": 321,
    "attention_bias": True, "mlp_bias": True,
}  # fmt: skip
SHAPES = {
    "even": {}, "uneven": UNEVEN, "MQA": {"num_key_value_heads": 1},
    "tied": {**UNEVEN, "tie_word_embeddings": True},
    "tied float32": {"tie_word_embeddings": True, "torch_dtype": "float32"},
}  # fmt: skip
SPLITS = [(2, 1), (4, 1), (2, 2), (1, 2)]
FORMATS = ["bf16", "fp8", "fp8_rowwise"]
KV = ["auto", "fp8"]


def request(tp: int = 1, pp: int = 1, **more) -> Request:
    limits = {"max_batch_size": 4, "max_seq_len": 128, "max_num_tokens": 64}
    return Request(**{**limits, "target": "cpu", **more}, tp_size=tp, pp_size=pp)


def logits(source: Source, wanted: Request, fused: bool = False) -> list[torch.Tensor]:
    """Of the steps: unfused in float32, or fused in the checkpoint's type."""
    if fused:
        graphs = [rank_group.fused(source, wanted, place) for place in wanted.places]
    else:
        graphs = [rank_group.emitted(source, wanted, place, "float32") for place in wanted.places]
    return rank_group.run(graphs, wanted.tp_size, STEPS)


@functools.cache
def alone(directory: Path, format: str, kv: str, shape: str) -> tuple[Source, list[torch.Tensor]]:
    source = tiny.source(directory / f"{format} {kv} {shape}", tiny.qformat(format, kv), **SHAPES[shape])
    return source, logits(source, request())


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


# Numbers


@pytest.mark.parametrize(("tp", "pp"), SPLITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_ranks_compute_what_one_does(directory, shape, tp, pp):
    source, one = alone(directory, "bf16", "auto", shape)
    for a, b in zip(one, logits(source, request(tp, pp)), strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize(("tp", "pp"), SPLITS)
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("format", FORMATS)
def test_quantized_models_too(directory, format, kv, tp, pp):
    """In float32, where no code flips with this checkpoint; see below for what a flip cannot hide."""
    source, one = alone(directory, format, kv, "even")
    for a, b in zip(one, logits(source, request(tp, pp)), strict=True):
        assert sqnr(b, a) >= 45


@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("format", FORMATS)
def test_no_quantized_value_depends_on_the_number_of_ranks(directory, format, kv, tp, pp):
    """Every type but e4m3 in float64, the uneven model, before and after every pass: equal to some 1e-14, so every code
    and every scale, dynamic ones too, are those of one rank."""
    source, _ = alone(directory, format, kv, "uneven")
    found: list[str] = []
    ranks.verify_ranks(source, request(tp, pp), Reporter(remark=found.append))
    assert [line.split()[1] for line in found] == [
        "tensor_parallel:", *(f"{rewrite.__name__}:" for rewrite in pipeline.PASSES), "fuse_all_reduce:"
    ]  # fmt: skip
    assert min(float(line.split("SQNR ")[1].removesuffix(" dB")) for line in found) > 250


BLOCKS = {"head_dim": 128, "hidden_size": 256, "intermediate_size": 640}  # 640 is 5 blocks of 128


@pytest.mark.parametrize(
    ("tp", "changes"), [(2, {}), (4, {}), (2, {**UNEVEN, "intermediate_size": 384, "head_dim": 64})]
)
def test_blocks_of_128_stay_whole(tmp_path, tp, changes):
    source = tiny.source(tmp_path, tiny.qformat("fp8_block", "fp8"), **{**BLOCKS, **changes})
    found: list[str] = []
    ranks.verify_ranks(source, request(tp), Reporter(remark=found.append))
    assert min(float(line.split("SQNR ")[1].removesuffix(" dB")) for line in found) > 250
    plans = [build.compile(source, request(tp), Reporter(), place=place).plan for place in request(tp).places]
    assert all(pair["folded"] for plan in plans for pair in plan.fusion_report)


def test_a_part_of_a_block_is_refused(tmp_path):
    """Heads of 64: the third rank's begin in the middle of 128 columns of o_proj."""
    source = tiny.source(tmp_path, tiny.qformat("fp8_block"), **{**BLOCKS, "head_dim": 64})
    with pytest.raises(SplitError, match=r"self_attn\.o_proj/.*\[64, 128\)"):
        build.compile(source, request(4), Reporter(), place=request(4).place(1))


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("format", FORMATS)
def test_stages_compute_the_same_bits(tmp_path, format, kv):
    """Also fused, in bfloat16: the cut changes no rounding."""
    source = tiny.source(tmp_path, tiny.qformat(format, kv), num_hidden_layers=3)
    for fused in (False, True):
        one = logits(source, request(), fused)
        for layers in ((), (1, 2)):
            many = logits(source, request(pp=2, pp_layers=layers), fused)
            assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_stages_of_ranks_compute_the_same_bits(tmp_path):
    source = tiny.source(tmp_path, tiny.qformat("fp8", "fp8"))
    for fused in (False, True):
        two, four = logits(source, request(2), fused), logits(source, request(2, 2), fused)
        assert all(torch.equal(a, b) for a, b in zip(two, four, strict=True))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_float32_engine_rounds_nothing_but_to_fp8(directory, tp, format):
    """Its fused graph is equal to the float32 graph, which has no roundings to leave out."""
    source, one = alone(directory, format, "auto", "even")
    graphs = []
    for place in (wanted := request(tp, dtype="float32")).places:
        compiled = build.compile(source, wanted, Reporter(), place=place)
        assert {b.dtype for b in compiled.plan.buffers} <= {"float32", "int32", "float8_e4m3fn"}
        assert compiled.plan.model.dtype == compiled.plan.model.kv_cache_dtype == "float32"
        graphs.append(compiled.graph)
    for a, b in zip(one, rank_group.run(graphs, tp, STEPS), strict=True):
        assert sqnr(b, a) >= 80


def test_a_sum_over_ranks_is_taken_in_their_order_and_rounded_once():
    """2^-8 + 2^-8 counts beside 1 only if it is not rounded away in between, and float32 sees the order of 2^30."""
    parts = [torch.tensor([v], dtype=torch.bfloat16) for v in (1.0, 2.0**-8, 2.0**-8)]
    ordered = [torch.tensor([v]) for v in (2.0**30, -(2.0**30), 1.0)]
    for values, expected in ((parts, 1 + 2.0**-7), (ordered, 1.0)):
        group = Group(3)
        tasks = [functools.partial(all_reduce, v, "sum", m) for v, m in zip(values, group.members, strict=True)]
        assert [float(r) for r in group.run(tasks)] == [expected] * 3


def test_a_rank_that_fails_ends_the_others():
    group = Group(2)

    def fails() -> None:
        raise RuntimeError("rank 1 is out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        group.run([lambda: group.members[0].all_gather(torch.zeros(1)), fails])


# Graphs


def weights_of(graph: gs.Graph) -> dict[str, torch.Tensor]:
    return {n: to_torch(t) for n, t in graph.tensors().items() if isinstance(t, gs.Constant) and "weight" in n}


@pytest.mark.parametrize("format", ["fp8", "fp8_rowwise"])
@pytest.mark.parametrize("tp", [2, 4])
def test_the_ranks_weights_are_slices_of_the_one_ranks(directory, tp, format):
    """Byte for byte, scales included; what is divided is whole again side by side."""
    source, _ = alone(directory, format, "fp8", "uneven")
    wanted = request(tp)
    whole = weights_of(rank_group.emitted(source, request(), request().place(), "float32"))
    parts = [weights_of(rank_group.emitted(source, wanted, place, "float32")) for place in wanted.places]
    for name, tensor in whole.items():
        if not tensor.ndim or all(p[name].shape == tensor.shape for p in parts):
            assert all(torch.equal(p[name], tensor) for p in parts), name
            continue
        bits = [p[name].contiguous().view(torch.uint8) for p in parts]
        dim = next(i for i in range(tensor.ndim) if parts[0][name].shape[i] != tensor.shape[i])
        if "k_proj" in name or "v_proj" in name:  # KV heads may be there twice
            bits = [b for i, b in enumerate(bits) if i == 0 or not torch.equal(b, bits[i - 1])]
        assert torch.equal(torch.cat(bits, dim), tensor.contiguous().view(torch.uint8)), name
    divided = {n.split(".")[-2] for n in whole if parts[0][n].shape != whole[n].shape}
    assert divided == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")} | {"lm_head"}


def test_a_tied_lm_head_is_stored_beside_the_whole_table(directory):
    for shape in ("tied", "tied float32"):
        source, _ = alone(directory, "bf16", "auto", shape)
        compiled = build.compile(source, request(2), Reporter(), place=request(2).place(1))
        table, head = (compiled.constants[n] for n in ("model.embed_tokens.weight", "lm_head.weight"))
        assert table.shape[0] == source.config.vocab_size
        first = 16 * -(-(source.config.vocab_size // 16) // 2)
        assert torch.equal(to_torch(head), to_torch(table)[first:])


def test_fusion_goes_on_around_the_all_reduces(directory):
    summed = "all_reduce_norm_quant"
    sent = "gemm_send"  # but the last, whose sum the norm of all rows does not read
    fp8 = ["gemm", "attention", sent, summed, "gemm_swiglu", sent]
    rowwise = [
        "gemm", "attention", "row_amax", "all_reduce", "quantize", sent,
        summed, "gemm", "row_amax", "all_reduce", "act_quant", sent,
    ]  # fmt: skip
    for format, layer in (("bf16", fp8), ("fp8", fp8), ("fp8_rowwise", rowwise)):
        source, _ = alone(directory, format, "fp8", "uneven")
        compiled = build.compile(source, request(2), Reporter())
        plan = build.compile(source, request(2), Reporter(), place=request(2).place(1)).plan
        last = ["all_reduce", "norm_quant", "gemm", "all_gather"]  # that norm is of the rows that sample alone
        layers = [*layer, summed, *layer[:-1], "gemm"]
        assert [s.plugin for s in plan.steps] == ["embedding", "norm_quant", *layers, *last]
        slots = [s.attributes["slot"] for s in plan.steps if s.plugin in (sent, summed)]
        assert slots == [0, 0, 1, 1, 2, 2]
        assert all(pair["folded"] for pair in compiled.plan.fusion_report)


def test_a_linears_bias_is_added_by_one_rank(directory):
    source, _ = alone(directory, "fp8", "auto", "uneven")
    for rank in (0, 1):
        plan = build.compile(source, request(2), Reporter(), place=request(2).place(rank)).plan
        step = next(s for s in plan.steps if s.name == "model.layers.0.self_attn.o_proj")
        assert bool(step.inputs[4:5] and step.inputs[4]) == (rank == 0)


@pytest.mark.parametrize("format", [*FORMATS, "fp8_block"])
@pytest.mark.parametrize("shape", ["even", "uneven"])
def test_steps_have_the_same_names_on_all_ranks_of_a_stage(tmp_path, format, shape):
    """Also those around a linear layer whose bias one rank adds."""
    source = tiny.source(tmp_path, tiny.qformat(format, "fp8"), **{**SHAPES[shape], "intermediate_size": 512})
    plans = [build.compile(source, request(2), Reporter(), place=place).plan for place in request(2).places]
    ranks.check_collectives(plans, 2)
    names = [[step.name for step in plan.steps] for plan in plans]
    assert names[0] == names[1] and "model.layers.1.self_attn.o_proj" in names[0]


def test_an_operator_without_a_rule_is_refused_by_name(directory):
    source, _ = alone(directory, "bf16", "auto", "even")
    graph = source.emit(source.limits(request()))
    node = next(n for n in graph.nodes if n.op == "Sigmoid")
    node.op = "Softplus"
    with pytest.raises(SplitError, match=r"mlp/sigmoid: tensor parallelism has no rule for the operator Softplus"):
        split(graph, TensorParallel(source.info(), 0, 2))


def test_a_norm_over_a_divided_row_is_refused(directory):
    source, _ = alone(directory, "bf16", "auto", "even")
    graph = source.emit(source.limits(request()))
    node = next(n for n in graph.nodes if n.op == "Sigmoid")
    node.op, node.attrs["axis"] = "Softmax", -1
    with pytest.raises(SplitError, match=r"mlp/sigmoid \(Softmax\): it normalizes over a dimension that is split"):
        split(graph, TensorParallel(source.info(), 0, 2))


def test_one_rank_has_the_passes_that_it_had(directory):
    assert pipeline.passes(Target("cpu", engine.Limits(1, 64, 64))) == pipeline.PASSES


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tp": 5}, "4 heads are too few for 5 ranks"),
        ({"pp": 3}, "pp_size is 3, but the model has 2 layers"),
        ({"pp": 2, "pp_layers": (2,)}, "pp_layers names 1 stages, but pp_size is 2"),
        ({"tp": 0}, "tp_size is 0, expected at least 1"),
        ({"dtype": "float32", "target": "sm_90a"}, "only float32 for target cpu"),
    ],
)
def test_ranks_that_cannot_be_are_refused(directory, tmp_path, changes, says):
    source, _ = alone(directory, "bf16", "auto", "even")
    with pytest.raises((BuildError, SplitError), match=says):
        ranks.build_ranks(lambda: source, request(**changes), tmp_path / "engine", Reporter())
    assert not list(tmp_path.iterdir())


def test_tuning_side_by_side_is_refused(directory, tmp_path):
    source, _ = alone(directory, "bf16", "auto", "even")
    with pytest.raises(BuildError, match="build with --workers 1"):
        ranks.build_ranks(lambda: source, request(2, target="sm_90a", tune=True), tmp_path / "e", Reporter(), 2)


def test_an_mlp_too_narrow_for_its_ranks_is_refused_by_its_weight(tmp_path):
    source = tiny.source(tmp_path, tiny.qformat("bf16"), intermediate_size=48)
    with pytest.raises(SplitError, match=r"mlp\.gate_proj\.weight: 48 columns in units of 16 are too few for 4 ranks"):
        build.compile(source, request(4), Reporter())


# Engines


def opened(directory: Path) -> Source:
    checkpoint = Checkpoint(directory)
    return Source(models.load(checkpoint.config), checkpoint)


def test_ranks_built_side_by_side_are_the_same_bytes(tmp_path):
    tiny.write(tmp_path / "checkpoint", tiny.qformat("fp8", "fp8"), **UNEVEN)
    arguments = ["--checkpoint_dir", tmp_path / "checkpoint", "--max_seq_len", 128, "--max_num_tokens", 64]
    arguments += ["--max_batch_size", 4, "--target", "cpu", "--tp_size", 2, "--log_level", "error"]
    for name, count in (("one", 1), ("two", 2)):
        more = ["--output_dir", tmp_path / name, "--workers", count]
        assert command.main(list(map(str, [*arguments, *more]))) == 0
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    assert set(files) == {"config.json", *(f"rank{r}.{kind}" for r in (0, 1) for kind in ("engine", "safetensors"))}
    loaded = [engine.load(tmp_path / "two", rank) for rank in (0, 1)]
    assert [e.plan.compatibility.rank for e in loaded] == [0, 1]
    assert {e.plan.compatibility.world_size for e in loaded} == {e.plan.compatibility.tp_size for e in loaded} == {2}
    axes = [e.plan.share.axes for e in loaded if e.plan.share]
    assert [a["heads"] for a in axes] == [(0, 4), (4, 6)] and [a["mlp"] for a in axes] == [(0, 112), (112, 208)]
    with pytest.raises(engine.EngineError, match="the ranks of this engine are 0 to 1"):
        engine.load(tmp_path / "two", 2)


def test_a_worker_that_fails_or_is_killed_fails_the_build():
    heard: list[tuple] = []
    tasks = [functools.partial(worker_tasks.echo, "a"), functools.partial(worker_tasks.echo, "b")]
    assert workers.run(tasks, 2, lambda *told: heard.append(told), ()) == ["a", "b"]
    assert sorted(heard) == [(0, "remark", "a"), (1, "remark", "b")]
    with pytest.raises(BuildError, match="rank 1: no such thing"):
        workers.run([tasks[0], worker_tasks.refused], 2, lambda *told: None, (BuildError,))
    with pytest.raises(BuildError, match="rank 0: its process was ended by SIGKILL; if memory ran out"):
        workers.run([worker_tasks.killed], 1, lambda *told: None, ())


def test_a_dry_run_tells_the_memory_of_the_largest_rank(tmp_path, capsys):
    tiny.write(tmp_path, tiny.qformat("fp8"), **UNEVEN)
    arguments = ["--checkpoint_dir", str(tmp_path), "--dry_run", "--tp_size", "2", "--pp_size", "2", "--target", "cpu"]
    plans = [b.plan for b in ranks.dry_run(opened(tmp_path), Request(target="cpu", tp_size=2, pp_size=2), Reporter())]
    sizes = [budget.of(p).fixed + 64 * 4 * budget.of(p).kv_block for p in plans]  # 64 sequences of 4 blocks
    assert len(set(sizes)) == 4
    assert command.main(arguments) == 0
    text = capsys.readouterr().err
    assert f"memory of rank {sizes.index(max(sizes))}, the largest" in text and "112-207" in text
    assert [p.name for p in tmp_path.iterdir() if "rank" in p.name] == []


def test_passes_are_dumped_and_explained_per_rank(tmp_path, capsys):
    tiny.write(tmp_path / "checkpoint", tiny.qformat("fp8_rowwise"), num_hidden_layers=1)
    arguments = ["--checkpoint_dir", tmp_path / "checkpoint", "--target", "cpu", "--tp_size", 2, "--max_num_tokens", 64]
    more = ["--dry_run", "--dump_passes", tmp_path / "dump", "--log_level", "error"]
    assert command.main(list(map(str, [*arguments, *more]))) == 0
    for rank in (0, 1):
        names = sorted(p.name for p in (tmp_path / "dump" / f"rank{rank}").iterdir())
        assert names[:3] == ["0_emit.txt", "1_tensor_parallel.txt", "2_fold.txt"]
    text = (tmp_path / "dump" / "rank1" / "1_tensor_parallel.txt").read_text()
    assert "model.layers.0.self_attn.o_proj/all_reduce: all_reduce(" in text
    capsys.readouterr()
    node = "model.layers.0.mlp.down_proj/row_amax"
    assert command.main(list(map(str, [*arguments, "--explain", node, "--rank", 1]))) == 0
    assert "taken by: model.layers.0.mlp/row_amax" in capsys.readouterr().out
    assert command.main(list(map(str, [*arguments, "--explain", node, "--rank", 2]))) == 1
    assert "rank is 2, expected 0 to 1" in capsys.readouterr().err


def test_debug_tensors_of_a_rank_are_its_own_parts(directory):
    source, _ = alone(directory, "fp8", "auto", "uneven")
    wanted = request(2, debug_tensors=("model.layers.0.self_attn.o_proj*", "model.layers.0.mlp*"))
    plan = build.compile(source, wanted, Reporter(), place=wanted.place(1)).plan
    taps = {t.name: plan.buffer(t.buffer).shape[1] for t in plan.taps}
    assert taps["model.layers.0.self_attn.o_proj/output"] == 192  # whole again
    assert taps["model.layers.0.self_attn.o_proj/output.part"] == 192
    assert np.isin(96, list(taps.values()))  # MLP columns of rank 1
