"""Sums over ranks: FP8 on the wire, the order of exchanges over peer memory, and when NCCL takes their place."""

from __future__ import annotations

import functools
import json
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import rank_group
import tiny_checkpoint as tiny
import torch

from fp8.builder import build
from fp8.builder.parallel import ranks
from fp8.builder.parallel.lockstep import Group, Member
from fp8.builder.request import Reporter, Request
from fp8.builder.verify import sqnr
from fp8.plugins.all_gather.plugin import AllGather
from fp8.plugins.all_reduce import launch, region
from fp8.plugins.all_reduce.plugin import AllReduce
from fp8.plugins.all_reduce.tactics import AllReduceTactic, candidates, kernels
from fp8.plugins.all_reduce_norm_quant.plugin import AllReduceNormQuant
from fp8.plugins.base import PluginError, StepShape, Tensor
from fp8.plugins.compile import compile_all, compile_kernel
from fp8.plugins.gemm import few_tokens
from fp8.plugins.gemm_send.plugin import GemmSend
from fp8.plugins.norm_quant import plugin as norm_plugin
from fp8.plugins.norm_quant.plugin import NormQuant
from fp8.runtime import peer_memory
from fp8.runtime.launcher import RankError
from fp8.scripts import build as command
from fp8.scripts.benchmarks import all_reduce as bench

SPILLS = 64  # bytes that two blocks of a multiprocessor may cost in registers, where a thread holds most
WIDE = {"hidden_size": 128, "head_dim": 32}
STEPS = [[(list(range(3, 40)), 0)]]


def request(tp: int, **more: int) -> Request:
    return Request(4, 128, 64, "cpu", tp_size=tp, **more)  # type: ignore[arg-type]


def summed(plugin: AllReduce, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What each rank gets."""
    group, step = Group(len(parts)), StepShape.prefill(len(parts[0]))
    run = [
        functools.partial(plugin.reference, part, step=step, comm=member)
        for part, member in zip(parts, group.members, strict=True)
    ]
    return [result for (result,) in group.run(run)]


def parts_of(world: int, rows: int = 5, width: int = 384) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(world)
    return [3 * torch.randn(rows, width, generator=generator).bfloat16() for _ in range(world)]


# FP8 on the wire


def rounded(x: torch.Tensor) -> torch.Tensor:
    """By torch's own conversion, group by group."""
    groups = x.float().reshape(-1, 128)
    scale = (groups.abs().amax(1, keepdim=True) / torch.tensor(448.0)).clamp(min=1 / (448 * 512))
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape)


@pytest.mark.parametrize("world", [2, 4])
def test_parts_travel_in_e4m3_and_add_up_in_float32(world: int) -> None:
    parts = parts_of(world)
    results = summed(AllReduce("sum", world, 1), parts)
    total = functools.reduce(torch.add, map(rounded, parts))
    expected = (rounded(total) if world > 2 else total).bfloat16()
    assert all(torch.equal(result, expected) for result in results)
    plain = summed(AllReduce("sum", world), parts)[0]
    assert 28 < sqnr(expected, plain) < 40


def test_steps_of_few_rows_travel_as_they_are() -> None:
    plugin = AllReduce("sum", 2, 6)
    parts = parts_of(2, 5)
    assert torch.equal(summed(plugin, parts)[0], (parts[0].float() + parts[1].float()).bfloat16())
    assert plugin.buckets(2048) == [5, 16, 64, 256, 512, 1024, 2048]
    x = Tensor("bfloat16", ("T", 384))
    assert not any(t.fp8 for t in plugin.tactics([x], 5)) and all(t.fp8 for t in plugin.tactics([x], 16))


@pytest.mark.parametrize("tp", [2, 4])
def test_an_engine_built_so_gives_nearly_the_same(tmp_path: Path, tp: int) -> None:
    """A tiny model's logits; every rank has the same bits, which `run` asserts."""
    source = tiny.source(tmp_path, tiny.qformat("bf16"), **WIDE)
    logits = []
    for kib in (0, 1):
        wanted = request(tp, fp8_all_reduce=kib)
        graphs = [rank_group.fused(source, wanted, place) for place in wanted.places]
        logits.append(torch.cat(rank_group.run(graphs, tp, STEPS)))
    assert 20 < sqnr(logits[1], logits[0]) < 60


def test_verification_tells_what_it_costs(tmp_path: Path) -> None:
    source = tiny.source(tmp_path, tiny.qformat("fp8"), **WIDE)
    found: list[str] = []
    ranks.verify_ranks(source, request(2, fp8_all_reduce=1), Reporter(remark=found.append))
    costs = {line.split()[1]: float(line.split("SQNR ")[1].removesuffix(" dB")) for line in found}
    assert 15 < costs.pop("fp8_all_reduce:") < 60 and min(costs.values()) > 250


def test_rows_that_no_128_divides_are_refused_by_name(tmp_path: Path) -> None:
    source = tiny.source(tmp_path, tiny.qformat("bf16"), hidden_size=64)
    with pytest.raises(PluginError, match=r"layers\.0\.self_attn\.o_proj/all_reduce: .* multiple of 128"):
        build.compile(source, request(2, fp8_all_reduce=1), Reporter())


def test_the_command_line_takes_a_size_or_none() -> None:
    given = ["--checkpoint_dir", "c", "--output_dir", "e"]
    for more, expected in (([], 0), (["--fp8_all_reduce"], 4096), (["--fp8_all_reduce", "64"], 64)):
        assert command.parse([*given, *more]).fp8_all_reduce == expected


# With the norm


def test_the_joined_plugin_is_the_sum_and_then_the_norm() -> None:
    parts, residual, weight = parts_of(2), parts_of(3)[2], torch.rand(384).bfloat16()
    step, group = StepShape.prefill(5), Group(2)
    scale = torch.tensor([0.02])
    plugin = AllReduceNormQuant(quant="static", world=2)
    run = [
        functools.partial(plugin.reference, part, residual, weight, None, scale, step=step, comm=member)
        for part, member in zip(parts, group.members, strict=True)
    ]
    total = summed(AllReduce("sum", 2), parts)[0]
    expected = NormQuant(quant="static", residual=True).reference(total, residual, weight, None, scale, step=step)
    for found in group.run(run):
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


def test_a_tapped_sum_is_left_to_itself(tmp_path: Path) -> None:
    source = tiny.source(tmp_path, tiny.qformat("fp8"))
    tapped = "model.layers.0.self_attn.o_proj/all_reduce"
    graph = rank_group.fused(source, request(2), request(2).place())
    names = {n.name for n in graph.nodes if n.op == "all_reduce_norm_quant"}
    assert tapped not in {n.name for n in graph.nodes} and len(names) == 3
    sums = [n.inputs[0].name.removesuffix(".part") for n in graph.nodes if n.op == "all_reduce_norm_quant"]
    wanted = Request(4, 128, 64, "cpu", tp_size=2, debug_tensors=(sums[0],))
    compiled = build.compile(source, wanted, Reporter())
    assert [tap.buffer for tap in compiled.plan.taps] == [sums[0]]
    assert any("all_reduce_norm_quant" in line and "fusion disabled" in line for line in compiled.taps.disabled)


# Exchanges over peer memory


Operation = tuple[str, int, int]  # what, place, value


def stream(phases: int, tiles: Sequence[int], slots: int) -> list[Operation]:
    """What a block of stream.cu does, in launches of so many tiles. With two phases, sums follow the parts' slots."""
    program: list[Operation] = []
    epoch = 0
    for count in tiles:
        last = epoch + count - 1
        program += [("fill", epoch % slots, epoch), ("flag", 0, epoch + 1)]
        for e in range(epoch, last + 1):
            if e < last:
                program += [("fill", (e + 1) % slots, e + 1), ("flag", 0, e + 2)]
            program += [("wait", 0, e + 1), ("read", e % slots, e), ("read", e % slots, e)]
            if phases == 2:
                program += [("fill", slots + e % slots, e), ("flag", 1, e + 1)]
                program += [("wait", 1, e + 1), ("read", slots + e % slots, e), ("read", slots + e % slots, e)]
        epoch = last + 1
    return program


def push(tiles: Sequence[int], slots: int) -> list[Operation]:
    """push.cuh: words are their own flags, and the reader clears them."""
    return [op for e in range(sum(tiles)) for op in (("put", e % slots, e), ("take", e % slots, e))]


State = tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]  # places, slots, flags


def moves(state: State, program: Sequence[Operation], world: int) -> Iterator[State]:
    """Every next state, one rank going on. Raises AssertionError where a rank reads what it should not."""
    for rank in range(world):
        places, slots, flags = ([list(p) if isinstance(p, tuple) else p for p in part] for part in state)
        if places[rank] == len(program):
            continue
        what, place, value = program[places[rank]]
        others = [r for r in range(world) if r != rank]
        width = len(slots[rank]) // world  # a slot for each source
        own = [width * r + place for r in others]
        if what == "wait" and any(flags[rank][2 * r + place] < value for r in others):
            continue
        if what == "take" and any(slots[rank][i] == EMPTY for i in own):
            continue
        if what in ("read", "take"):
            assert all(slots[rank][i] == value for i in own), f"rank {rank} reads {slots[rank]}, expected {value}"
        for r in others:
            if what == "put":
                assert slots[r][width * rank + place] == EMPTY, f"rank {rank} overwrites what {r} has not read"
            if what in ("put", "fill"):
                slots[r][width * rank + place] = value
            if what == "flag":
                flags[r][2 * rank + place] = value
            if what == "take":
                slots[rank][width * r + place] = EMPTY
        places[rank] += 1
        yield tuple(places), tuple(map(tuple, slots)), tuple(map(tuple, flags))


EMPTY = -1


def explore(program: Sequence[Operation], world: int, slots: int) -> int:
    """Goes through all orders in which ranks can get on; returns how many states there are. Raises AssertionError where
    one reads what it should not, or nobody gets on."""
    start: State = ((0,) * world, ((EMPTY,) * slots * world,) * world, ((0,) * 2 * world,) * world)
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        following = list(moves(state, program, world))
        assert following or all(p == len(program) for p in state[0]), f"stuck at {state}"
        new = set(following) - seen
        seen |= new
        waiting += new
    return len(seen)


def slots_of(phases: int) -> int:
    return int(dict(region.stream_constants(2, phases))["SLOTS"])


def sent(exchanges: int, slot: Callable[[int, int], int]) -> list[Operation]:
    """sent.cuh, in two steps of an engine."""
    slots = [slot(e, exchanges) for e in range(exchanges)] * 2
    return [op for e, place in enumerate(slots) for op in (("put", place, e), ("take", place, e))]


@pytest.mark.parametrize("exchanges", [2, 3, 4, 5])
def test_no_linear_sends_into_rows_that_are_not_read(exchanges: int) -> None:
    assert explore(sent(exchanges, region.sent_slot), 2, region.SENT_AREAS) > exchanges
    if (
        exchanges % 2
    ):  # two areas in turn would be taken twice in a row, by the last of a step and the first of the next
        with pytest.raises(AssertionError):
            explore(sent(exchanges, lambda e, _: e % 2), 2, region.SENT_AREAS)


ABSENT, HERE, LET_GO, ENDED = range(4)  # a linear lets the next kernel start at once, a norm when its linear has begun


def resident_norms(places: Sequence[int], early: bool) -> set[tuple[int, ...]]:
    """The places of norms that can be on the GPU at a time, where linear and norm take turns, one of each for every
    place, and a linear begins when the norm before it has ended. `early`: norms let the next kernel start at once."""
    start = (ABSENT,) * 2 * len(places)
    seen, waiting, found = {start}, [start], set()
    while waiting:
        state = waiting.pop()
        found.add(tuple(places[k // 2] for k in range(1, len(state), 2) if state[k] in (HERE, LET_GO)))
        for k, now in enumerate(state):
            before = state[k - 1] if k else ENDED
            follows = before >= (HERE if (k - 1) % 2 == 0 or early else LET_GO)
            ready = (follows, before == ENDED if k % 2 == 0 else before >= LET_GO, True, False)[now]
            following = (*state[:k], now + 1, *state[k + 1 :])
            if ready and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def test_no_two_norms_wait_for_rows_of_one_place() -> None:
    """However early kernels start: each would take the other's."""
    places = [region.sent_slot(e, 3) for e in range(3)] * 2
    assert all(len(set(norms)) == len(norms) for norms in resident_norms(places, early=False))
    assert any(len(set(norms)) < len(norms) for norms in resident_norms([0, 1, 0, 1], early=True))


@pytest.mark.parametrize(
    ("block", "slots", "kinds", "tiles", "world"),
    [
        (push, 2, 1, (1,) * 6, 2),
        (push, 2, 1, (1,) * 4, 3),
        (functools.partial(stream, 1), slots_of(1), 1, (1, 4, 1, 3), 2),
        (functools.partial(stream, 1), slots_of(1), 1, (5, 2), 2),
        (functools.partial(stream, 2), slots_of(2), 2, (1, 3, 1), 2),
    ],
)
def test_no_rank_overtakes_another_by_more_than_the_slots(block, slots, kinds, tiles, world) -> None:
    assert explore(block(tiles, slots), world, slots * kinds) > len(tiles)
    with pytest.raises(AssertionError):  # the model finds what too few would do
        explore(block(tiles, slots - 1), world, (slots - 1) * kinds)


def test_families_of_exchanges_share_no_memory() -> None:
    for world in range(2, region.MOST_WORLD + 1):
        push_area = dict(region.push_constants(world))["PUSH_AREA"]
        areas = [int(str(dict(region.stream_constants(world, p))["STREAM_AREA"]).removesuffix("ull")) for p in (1, 2)]
        push = 2 * region.MOST_BLOCKS * world * (region.PUSH_SLOT + region.PUSH_SCALES)
        slot = region.MOST_BLOCKS * world * (region.STREAM_SLOT + region.STREAM_SCALES)
        assert push_area == region.HEADER and push_area + push == areas[0]
        assert areas[0] + slots_of(1) * slot == areas[1]
        sent = [region.sent_area(world, i).value for i in range(region.SENT_AREAS)]
        assert areas[1] + 2 * slots_of(2) * slot == sent[0]
        rows = region.SENT_ROWS * world * dict(region.sent_constants(world))["SENT_BYTES"]
        layers = int(str(dict(region.layers_constants(world))["LAYERS_AREA"]).removesuffix("ull"))
        assert [*(a + rows for a in sent)] == [*sent[1:], layers]
        places = region.LAYERS_PLACES * world * region.MOST_HIDDEN * 4
        assert layers + region.LAYERS_SUMS + places == region.region_bytes(world)


@pytest.mark.parametrize("world", [2, 8])
def test_every_tactic_compiles_clean(world: int) -> None:
    x = Tensor("bfloat16", ("T", 4096))
    found = [t for fp8 in (False, True) for t in candidates(x, 64, world, fp8)]
    assert {t.method for t in found} >= {"nccl", "push", "two_phases"}
    cubins = compile_all(k for t in found for k in kernels(t, "bfloat16", "sum", world)).values()
    assert not [(c.kernel, c.spill_bytes) for c in cubins if c.spill_bytes > SPILLS]


@pytest.mark.parametrize("world", [2, 8])
def test_linears_that_send_and_their_norms_compile_clean(world: int) -> None:
    x, w, part = Tensor("bfloat16", ("T", 256)), Tensor("bfloat16", (4096, 256)), Tensor("bfloat16", ("T", 4096))
    linear, norm = GemmSend(world=world), AllReduceNormQuant(quant="static", world=world, slot=0)
    inputs = [part, part, Tensor("bfloat16", (4096,)), None, Tensor("float32", (1,))]
    kernels = [k for t in norm.tactics(inputs, 8) for k in norm.kernels(t, inputs)]
    given = [x, w, None, None, None]
    cubins = compile_all([*kernels, *linear.kernels(linear.tactics(given, 8)[0], given)]).values()
    assert {c.kernel.entry for c in cubins} == {"few_tokens", "sent_norm", "norm_quant"}
    assert not [(c.kernel, c.spill_bytes) for c in cubins if c.spill_bytes > SPILLS]


def test_a_linear_sends_few_rows_alone_and_nothing_without_peer_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[tuple] = []
    monkeypatch.setattr(few_tokens, "bind", lambda *given: bound.append(given))
    plugin = GemmSend(world=2, slot=1)
    inputs = [Tensor("bfloat16", ("T", 512)), Tensor("bfloat16", (64, 512)), *[None] * 3]
    assert {t.kind for t in plugin.tactics(inputs, 8)} == {"few_tokens"}
    assert {t.kind for t in plugin.tactics(inputs, 64)} > {"few_tokens"}
    assert not plugin.legal(plugin.tactics(inputs, 64)[-1], inputs, 8)
    few, more = plugin.tactics(inputs, 8)[0], plugin.tactics(inputs, 16)[0]
    assert [len(plugin.kernels(t, inputs)) for t in (few, more)] == [2, 1]
    peers = types.SimpleNamespace(regions=region.Regions(1, (64, 128)))
    for tactic, functions, comm in ((few, "sp", peers), (few, "sp", Calls()), (few, "sp", None), (more, "p", peers)):
        plugin.bind(tactic, list(functions), [], None, comm=comm)  # type: ignore[arg-type]
    assert [(given[2], len(given[7:])) for given in bound] == [(["s"], 1), *[(["p"], 0)] * 3]
    assert bound[0][7][2].value == region.sent_area(2, 1).value
    with pytest.raises(PluginError, match="expected 16-bit rows of whole groups of 8; use gemm"):
        GemmSend("float32", world=2).infer(inputs)


def test_a_share_of_one_stage_s_columns_is_sent_too() -> None:
    """What a rank sends is decided by y alone, so that all ranks agree; K is the rank's own."""
    for k in (16, 128):
        inputs = [
            Tensor("float8_e4m3fn", ("T", k)),
            Tensor("float8_e4m3fn", (336, k)),
            Tensor("float32", (1,)),
            None,
            None,
        ]
        assert {t.kind for t in GemmSend(world=4).tactics(inputs, 8)} == {"few_tokens"}


def test_columns_of_uneven_parts_are_pushed_in_units_or_left_to_nccl() -> None:
    x = Tensor("float32", ("L", 160))
    assert [t.over_peers for t in AllGather((160, 164)).tactics([x], 16)] == [True] * 4 + [False]
    assert not AllGather((160, 161)).tactics([x], 16)[0].over_peers  # 161 float32 are no whole units
    wide = Tensor("float32", ("L", 64128))
    pushes = [t for t in AllGather((64128, 64128)).tactics([wide], 64) if t.over_peers]
    assert not pushes  # 64 rows are more than a launch exchanges
    (kernel, *_) = AllGather((160, 164)).kernels(AllGather((160, 164)).tactics([x], 16)[0], [x])
    assert dict(kernel.constants)["PARTS"] == "40, 41" and not compile_kernel(kernel).spill_bytes


def test_launches_are_no_larger_than_their_slots() -> None:
    x = Tensor("bfloat16", ("T", 4096))
    for tokens in (1, 16, 64, 256, 1024, 8192):
        for tactic in candidates(x, tokens, 2, False):
            grid = tactic.grid(tokens * 8192, 2) if tactic.over_peers else 0
            assert 0 <= grid <= region.MOST_BLOCKS
            if tactic.method == "push":
                assert grid * tactic.threads * tactic.units * 16 >= tokens * 8192
                assert tactic.threads * tactic.units * 16 <= region.PUSH_SLOT


class Calls:
    """A GPU's communicator of ranks that share no memory."""

    regions = None
    rank, world = 0, 2

    def __init__(self) -> None:
        self.log: list[tuple[int, str]] = []

    def nccl_all_reduce(self, x: torch.Tensor, y: torch.Tensor, operation: str) -> None:
        self.log.append((len(x), operation))

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor, tensor]


def test_without_peer_memory_the_sum_is_nccls_and_in_fp8_the_reference_s() -> None:
    x, y, calls = torch.ones(8, 128).bfloat16(), torch.zeros(8, 128).bfloat16(), Calls()
    launch.bind(AllReduceTactic("push", 256, 1, 264), [], x, y, "sum", calls)(StepShape.prefill(3))
    assert calls.log == [(3, "sum")]
    launch.bind(AllReduceTactic("one_phase", 512, 2, 264, True), [], x, y, "sum", calls)(StepShape.prefill(3))
    assert y[:3].eq(2).all() and not y[3:].any()


def test_the_joined_plugin_too_falls_back_on_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounded sum waits in the place of residual_out."""
    launched: list[tuple] = []
    monkeypatch.setattr(norm_plugin, "row_launch", lambda *given: launched.append(given) or (lambda step: None))
    plugin = AllReduceNormQuant(quant="static", world=2)
    x, residual, y, total = (torch.zeros(4, 128) for _ in range(4))
    tensors = [x, residual, torch.zeros(128), None, torch.zeros(1), y, total]
    rows, weight = Tensor("bfloat16", ("T", 128)), Tensor("bfloat16", (128,))
    for tactic in plugin.tactics([rows, rows, weight, None, Tensor("float32", (1,))], 4):
        calls = Calls()
        functions = ["sum", "norm"] if tactic.over_peers else ["norm"]
        plugin.bind(tactic, functions, tensors, None, comm=calls)(StepShape.prefill(3))  # type: ignore[arg-type]
        assert calls.log == [(3, "sum")]
        function, _, arguments, _ = launched.pop()
        assert function == "norm" and arguments[0] is total and arguments[1] is residual and arguments[-1] is total


class Card:
    """What a process does to its GPU and the other's."""

    def __init__(self, opens: bool) -> None:
        self.opens, self.log = opens, list[str]()

    def allocated(self, size: int) -> tuple[int, str]:
        self.log.append("allocated")
        return 16, "ab"

    def opened(self, rank: int, own: int, handles: Sequence[bytes]) -> tuple[list[int], str]:
        addresses = [own if r == rank else 32 for r in range(len(handles))]
        self.log.append("opened")
        return (addresses, "") if self.opens else ([own if r == rank else 0 for r in range(2)], "not to be opened")


@pytest.mark.parametrize("second_opens", [True, False])
def test_regions_are_closed_before_they_are_freed_and_on_all_ranks_or_none(monkeypatch, second_opens) -> None:
    group, cards = Group(2), [Card(True), Card(second_opens)]
    mine = threading.local()
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(peer_memory, "_place", lambda device: ["host", "bus"])
    monkeypatch.setattr(peer_memory, "_obstacle", lambda places, device: "")
    monkeypatch.setattr(peer_memory, "_allocated", lambda size: mine.card.allocated(size))
    monkeypatch.setattr(peer_memory, "_opened", lambda *given: mine.card.opened(*given))
    monkeypatch.setattr(peer_memory, "_close", lambda rank, addresses: mine.card.log.append(f"closed {addresses}"))
    monkeypatch.setattr(peer_memory, "_free", lambda own: mine.card.log.append(f"freed {own}"))

    def rank(member: Member) -> object:
        mine.card = cards[member.rank]
        found = peer_memory.share(member, torch.device("cpu"), 1 << 20)  # type: ignore[arg-type]
        if isinstance(found, peer_memory.PeerMemory):
            addresses = found.regions.addresses
            found.close()
            return addresses
        return found

    found = group.run([functools.partial(rank, member) for member in group.members])
    assert found == ([(16, 32), (32, 16)] if second_opens else ["not to be opened"] * 2)
    for card in cards:
        assert [entry.split()[0] for entry in card.log] == ["allocated", "opened", "closed", "freed"]


def test_ranks_on_several_hosts_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [["host a", "0000:01:00.0"], ["host b", "0000:01:00.0"]]
    group = Group(2)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(peer_memory, "_place", lambda device: places[device])
    run = [functools.partial(peer_memory.share, member, rank, 1) for rank, member in enumerate(group.members)]  # type: ignore[arg-type]
    assert group.run(run) == ["the ranks are on several hosts"] * 2


# fp8-bench all_reduce


class World:
    """One process that speaks for two ranks, of which the other dropped a tactic, too."""

    rank = 0

    def exchange(self, text: str) -> list[str]:
        return [text, json.dumps(["push 512x4 b264"])]


def bench_ranks() -> bench.Ranks:
    return bench.Ranks(World(), None, None)  # type: ignore[arg-type]


def test_a_tactic_that_fails_on_any_rank_is_told_and_left_out_of_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    group = bench_ranks()
    work = bench.Work("sum", AllReduce("sum", 2), 4, [torch.zeros(4, 64).bfloat16()], group)
    every = [bench.label(t) for t in work.tactics()]

    def check(_: bench.Work, tactic: AllReduceTactic) -> str:
        if tactic.method == "two_phases":
            raise RuntimeError("an illegal address")
        return "other bits" if tactic.threads == 256 and tactic.method == "push" else ""

    begun: list[str] = []
    monkeypatch.setattr(bench, "every", lambda *_: [lambda: work])
    monkeypatch.setattr(bench, "check", check)
    monkeypatch.setattr(bench, "check_graph", lambda *_: "")
    found = bench.checks(group, [8], lambda name, _: begun.append(name), {"failures": ["before"]})
    left = [bench.label(t) for t in work.tactics()]
    failing = {name for name in every if name.startswith(("two_phases", "push 256x1"))}
    assert begun == every and found["checked"] == len(every)
    assert set(left) == set(every) - failing - {"push 512x4 b264"} and "nccl" in left
    assert found["failures"][0] == "before" and len(found["failures"]) == 1 + len(failing)
    assert any("RuntimeError: an illegal address" in text for text in found["failures"])


def test_the_next_run_blames_the_tactic_that_was_under_way(tmp_path: Path) -> None:
    output = tmp_path / "all_reduce.json"
    checks = {"failures": ["one"], "dropped": ["push 256x1 b264"], "under_way": "one_phase 512x1 b132"}
    output.write_text(json.dumps({"checks": checks}))
    found = bench.blamed(output)
    assert found["dropped"] == ["one_phase 512x1 b132", "push 256x1 b264"]
    assert found["failures"] == ["one", "one_phase 512x1 b132: the job ended while it was checked"]
    for text in ("", "[]", "{}"):
        output.write_text(text)
        with pytest.raises(RankError, match="--again goes on after a run that wrote"):
            bench.blamed(output)
    with pytest.raises(RankError, match="--output None"):
        bench.blamed(None)
