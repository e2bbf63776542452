"""A rank fails in the middle of decode steps: the job ends in time, and says which one, though a kernel of another rank
waits for words that never come.

    python -m fp8.scripts.gpu_faults --engine_dir ENGINE_OF_SEVERAL_RANKS --output faults.json

Jobs under mpirun, side by side, each of endless decode steps of one sequence (one launch of all layers, where the
engine has it). Once steps are under way, a rank is stopped or killed, or rank 0 stands still when the others have begun
a step. Asked for: every process gone within --rank_timeout and a few seconds, a status other than 0, and an error that
names the rank. $MPIRUN names another mpirun than the one on PATH, with its options. Exits with 1 if what is asked for
is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp8.plugins.base import StepShape
from fp8.runtime.comm import World
from fp8.runtime.launcher import launched
from fp8.runtime.session import Session
from fp8.scripts.argument_types import new_file, seconds
from fp8.scripts.benchmarks.arguments import make_weight
from fp8.scripts.benchmarks.roofline import step_rows
from fp8.scripts.provenance import add_argument, save_results

FAULTS = ("rank 1 stopped", "rank 0 stopped", "rank 1 killed", "rank 0 stands still")
LIMIT = 5.0  # seconds of --rank_timeout
MORE = 6.0  # seconds that an end may take beside it: the watch's interval, the driver's, mpirun's
START = 120.0  # seconds until steps are under way
STEPS, CONTEXT = 300, 64
UNDER_WAY = "steps are under way:"
MPIRUN = "mpirun --allow-run-as-root --bind-to none --oversubscribe"


def decode(args: argparse.Namespace) -> int:
    """One rank of a job: decode steps without an end."""
    world = World(launched(), args.rank_timeout, "gpu_faults")
    pids = world.exchange(str(os.getpid()))
    session = Session(args.engine_dir, args.device, 64, world=world, make_weight=make_weight)
    if world.rank:
        session.follow()
        return 0
    count = 0

    @contextlib.contextmanager
    def stands_still(_: StepShape) -> Iterator[None]:
        if count > STEPS:
            print(UNDER_WAY, *pids, flush=True)
            time.sleep(START)
        yield

    if args.stand_still:
        session.around_step = stands_still
    rows = step_rows(session, [(CONTEXT, 1)], 0)
    ticket = session.enqueue(rows)
    while True:
        following = session.enqueue(rows)
        session.read(ticket)
        ticket, count = following, count + 1
        if count == STEPS and not args.stand_still:
            print(UNDER_WAY, *pids, flush=True)


def job(args: argparse.Namespace, fault: str) -> dict[str, Any]:
    """What became of a job in which a rank fails so."""
    _, rank, how = fault.split(" ", 2)
    line = [*shlex.split(os.environ.get("MPIRUN", MPIRUN)), "-n", str(args.ranks), sys.executable, "-m", __spec__.name]
    line += ["--engine_dir", args.engine_dir, "--device", args.device, "--rank_timeout", str(args.rank_timeout)]
    line += ["--decode", *(["--stand_still"] if how == "stands still" else [])]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    row: dict[str, Any] = {"fault": fault, "allowed_seconds": args.rank_timeout + MORE, "seconds": None, "says": ""}
    try:
        assert process.stdout is not None
        told = next((text for text in process.stdout if text.startswith(UNDER_WAY)), "")
        begin, pids = time.monotonic(), [int(pid) for pid in told.removeprefix(UNDER_WAY).split()]
        if pids and how in ("stopped", "killed"):
            os.kill(pids[int(rank)], signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        _, errors = process.communicate(timeout=START)
        row["seconds"], row["status"] = time.monotonic() - begin, process.returncode
        row["says"] = next((text for text in errors.splitlines() if text.startswith("gpu_faults: ")), errors[-500:])
        row["left"] = sum(map(alive, pids))
        in_time = bool(pids) and row["seconds"] <= row["allowed_seconds"]
        row["met"] = in_time and not row["left"] and process.returncode != 0 and f"rank {rank} " in row["says"]
    except subprocess.TimeoutExpired:
        row |= {"says": f"the job was still there after {START:g} s", "met": False}
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return row


def alive(pid: int) -> bool:
    """Whether such a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m fp8.scripts.gpu_faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--engine_dir", required=True, help="of several ranks; random_engine makes them")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda")
    p.add_argument("--rank_timeout", type=seconds, default=LIMIT, metavar="SECONDS", help=f"the jobs' ({LIMIT:g})")
    p.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, help="default: all of them")
    p.add_argument("--output", type=new_file, help="write the rows as JSON")
    p.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)  # as one rank of a job
    p.add_argument("--stand_still", action="store_true", help=argparse.SUPPRESS)
    add_argument(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.decode:
        return decode(args)
    try:
        facts = json.loads((Path(args.engine_dir) / "config.json").read_text())
        args.ranks = int(facts["compatibility"]["world_size"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"gpu_faults: {args.engine_dir} is no engine: {error}", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(len(args.faults)) as pool:
        rows = list(pool.map(partial(job, args), args.faults))
    table = Table("fault", "seconds", "allowed", "met", "says", box=None)
    for row in rows:
        taken = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
        table.add_row(row["fault"], taken, f"{row['allowed_seconds']:g}", str(row["met"]), row["says"])
    Console(width=160).print(table)
    if args.output:
        save_results(args.output, "gpu_faults", argv, args.commit, {"rows": rows})
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
