"""A command on all ranks that mpirun, srun or torchrun started: rank 0 runs it, the others run its session's steps."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from fp8.builder.engine import EngineError
from fp8.plugins.base import PluginError
from fp8.runtime.comm import RANK_TIMEOUT, World
from fp8.runtime.launcher import RankError, launched
from fp8.runtime.peers import Peers
from fp8.runtime.ranks import stop
from fp8.runtime.session import Session
from fp8.scripts.argument_types import seconds

OPENING_ERRORS = (EngineError, RankError, PluginError, OSError)


def add_rank_arguments(p: argparse.ArgumentParser) -> None:
    """`--rank_timeout`; and `world`, the ranks that an engine is divided among, None without a launcher; `prepare` is
    called with the arguments and the session of every rank but 0, which sees to its own."""
    p.add_argument(
        "--rank_timeout", type=seconds, default=RANK_TIMEOUT, metavar="SECONDS",
        help="under mpirun: end all ranks if one is silent, or makes no progress in a step, for so long (default: 20)",
    )  # fmt: skip
    p.set_defaults(world=None, make_weight=None, prepare=None)


def on_all_ranks(name: str, args: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """The exit status: of `command`, run where `args.world` is rank 0 or None; of all ranks, where it is not zero."""
    try:
        args.world = _world(name, args)
    except RankError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    world: World | None = args.world
    if world is None:
        return command(args)
    try:
        return _lead(world, command(args)) if world.rank == 0 else _follow(args)
    except BaseException as error:  # the other ranks wait for this one
        traceback.print_exc()
        world.fail(f"{type(error).__name__}: {error}")


def among_peers(name: str, args: argparse.Namespace, command: Callable[[argparse.Namespace, Peers], int]) -> int:
    """The exit status of `command` on ranks that each have a whole engine, or none: it runs on all of them, and finds
    them as `args.world` too."""
    try:
        world = args.world = _world(name, args)
    except RankError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    if world is None:
        return command(args, Peers())
    try:
        status = command(args, Peers(world))
    except BaseException as error:
        traceback.print_exc()
        world.fail(f"{type(error).__name__}: {error}")
    world.close()
    return status


def is_divided(engine_dir: str | Path) -> bool:
    """Whether the engine is one of several ranks, by its config.json; where there is none, opening it will tell."""
    try:
        facts = json.loads((Path(engine_dir) / "config.json").read_text())
        return bool(facts["compatibility"]["world_size"] > 1)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _world(name: str, args: argparse.Namespace) -> World | None:
    launch = launched()
    return World(launch, args.rank_timeout, name) if launch.world > 1 else None


def _lead(world: World, status: int) -> int:
    if status or not world.opened:
        world.abandon(status)
    else:
        stop(world)
        world.close()
    return status


def _follow(args: argparse.Namespace) -> int:
    # A launcher that is asked to end tells all ranks, and rank 0, which may have requests to finish, tells the others.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        session = Session(
            args.engine_dir,
            args.device,
            args.max_kv_blocks,
            args.kv_cache_free_gpu_memory_fraction,
            args.world,
            args.make_weight,
        )
    except OPENING_ERRORS:  # rank 0 has it too, and prints it
        return int(args.world.await_end())
    if args.prepare is not None:
        args.prepare(args, session)
    session.follow()
    args.world.close()
    return 0
