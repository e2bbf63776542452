"""What the ranks of an engine must agree on before any of them runs a step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fp8.builder import engine as engine_format
from fp8.builder.engine import Engine, EngineError
from fp8.runtime.comm import World
from fp8.runtime.launcher import RankError

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger(__name__)
T = TypeVar("T")


def all_or_none(world: World | None, action: Callable[[], T]) -> T:
    """The action's result, once it has succeeded on every rank. Raises RankError on all if it fails on one, with the
    causes and whose they are; alone, whatever the action raises."""
    if world is None:
        return action()
    cause: Exception | None = None
    try:
        result = action()
    except Exception as error:
        cause = error
    texts = world.exchange("" if cause is None else str(cause) or type(cause).__name__)
    if any(texts):
        raise RankError(by_rank(texts)) from cause
    return result


def by_rank(texts: Sequence[str]) -> str:
    """ "rank 1: this; ranks 2, 3: that" of one text per rank, empty ones left out."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text:
            ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{'rank' if len(r) == 1 else 'ranks'} {', '.join(map(str, r))}: {t}" for t, r in ranks.items())


def load(engine_dir: str | Path, world: World | None) -> Engine:
    """This rank's engine. Raises EngineError if it cannot be read, RankError if that is so, or if some rank's engine is
    not of the one that was built for so many ranks."""
    if world is None:
        engine = engine_format.load(engine_dir, verify_weights=False)
        _check_count(engine_dir, [manifest(engine)], 1)
        return engine
    try:
        engine = engine_format.load(engine_dir, world.rank, verify_weights=False)
    except EngineError as error:
        facts = {**_manifest_0(engine_dir), "error": str(error)}
    else:
        facts = manifest(engine) | _foreign(engine)
    every = [json.loads(text) for text in world.exchange(json.dumps(facts))]
    _check_count(engine_dir, every, world.world)
    if errors := by_rank([f.get("error", "") for f in every]):
        raise RankError(errors)
    _check_equal(every)
    return engine


def check_devices(world: World | None, device: torch.device) -> None:
    """Raises RankError if some ranks run on a CPU and others on a GPU, on GPUs of several kinds, or on the same one."""
    if world is None:
        return
    import torch

    facts = ["cpu", "", ""]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = ["cuda", properties.name, f"{device} ({properties.uuid}) of {socket.gethostname()}"]
    every = [json.loads(text) for text in world.exchange(json.dumps(facts))]
    kinds = [f"{kind} {name}".strip() for kind, name, _ in every]
    if len(set(kinds)) > 1:
        raise RankError(f"the ranks run on different devices ({by_rank(kinds)}); give all of them the same --device")
    cards = [card for _, _, card in every]
    if device.type == "cuda" and len(set(cards)) < len(cards):
        raise RankError(f"ranks share a GPU ({by_rank(cards)}); give each one of its own (--device auto does)")


def common_blocks(world: World | None, available: int) -> int:
    """KV blocks that every rank has room for; says so where a rank's memory makes the pool of all much smaller."""
    if world is None:
        return available
    every = [int(text) for text in world.exchange(str(available))]
    if world.rank == 0 and (text := uneven(every)):
        LOG.warning(text)
    return min(every)


def uneven(blocks: Sequence[int]) -> str | None:
    """What is wrong with ranks that have room for so many KV blocks each."""
    if 2 * min(blocks) >= max(blocks):
        return None
    room = by_rank([f"{n} blocks" for n in blocks])
    return (
        f"the KV pool has {min(blocks)} blocks, as the ranks have room for {room}; does something else use that memory?"
    )


def manifest(engine: Engine) -> dict[str, str]:
    """What must be the same on every rank; for rank-dependent files, that they belong to the common description."""
    c = engine.plan.compatibility
    config = engine.directory / "config.json"
    text = config.read_bytes() if config.is_file() else b""
    common = [dataclasses.asdict(engine.plan.model), dataclasses.asdict(engine.plan.limits)]
    return {
        "ranks": str(c.world_size), "tp_size": str(c.tp_size), "pp_size": str(c.pp_size), "target": c.target,
        "package": c.package_version, "model and limits": _digest(json.dumps(common, sort_keys=True).encode()),
        "config.json": _digest(text), "rank": str(c.rank), "directory": str(engine.directory),
    }  # fmt: skip


def _foreign(engine: Engine) -> dict[str, str]:
    """An error where the directory's config.json describes another engine's rank."""
    config, rank = engine.directory / "config.json", engine.plan.compatibility.rank
    try:
        ranks = json.loads(config.read_text()).get("ranks")
        same = not ranks or ranks[rank]["weights_digest"] == engine.plan.weights_digest
    except (OSError, ValueError, LookupError, AttributeError) as error:
        if engine.plan.compatibility.world_size == 1:
            return {}
        return {
            "error": f"{config} does not describe the ranks ({type(error).__name__}: {error}); build the engine again"
        }
    return {} if same else {"error": f"rank{rank}.engine is of another engine than {config}; build the engine again"}


def _manifest_0(engine_dir: str | Path) -> dict[str, str]:
    """Rank 0's: it tells a rank whose own file is missing how many ranks there should be."""
    try:
        return manifest(engine_format.load(engine_dir, 0, verify_weights=False))
    except EngineError:
        return {}


def _check_count(engine_dir: str | Path, every: Sequence[dict[str, str]], started: int) -> None:
    for facts in every:
        if "ranks" in facts and int(facts["ranks"]) != started:
            built = f"{facts['ranks']} rank{'s' * (facts['ranks'] != '1')}"
            raise RankError(
                f"{engine_dir} is built for {built} (tp {facts['tp_size']}, pp {facts['pp_size']}), and "
                f"{started} {'was' if started == 1 else 'were'} started; use mpirun -n {facts['ranks']}"
            )


def _check_equal(every: Sequence[dict[str, str]]) -> None:
    for key in every[0]:
        if key in ("rank", "directory"):
            continue
        found = by_rank([facts[key] for facts in every])
        if any(facts[key] != every[0][key] for facts in every):
            where = by_rank([facts["directory"] for facts in every])
            raise RankError(f"the ranks' engines do not belong together: {key} differs ({found}; read from {where})")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
