"""Jobs of several processes, as users start them: under mpirun or torchrun, and what is left of them afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "FP8_TEST_JOB"  # every process of a job has it in its environment
RANK = "OMPI_COMM_WORLD_RANK"


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str
    seconds: float


def module(name: str, *arguments: object) -> list[str]:
    """A command line of ours."""
    return [sys.executable, "-m", f"fp8.scripts.{name}", *map(str, arguments)]


def mpirun(*parts: tuple[int, Sequence[str]]) -> list[str]:
    """So many processes of each command, in one job. An mpirun comes with the tests' packages: its absence is
    a failure, not a reason to test less."""
    beside = Path(sys.executable).parent / "mpirun"
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    assert program, "no mpirun beside this Python or on PATH; pip install 'fp8-engine[test]'"
    line = [program, "--allow-run-as-root", "--oversubscribe"]
    for i, (count, command) in enumerate(parts):
        line += [":"] * (i > 0) + ["-n", str(count), *command]
    return line


class Job:
    """A running job. `kill` reaches a rank's process by its number."""

    def __init__(self, line: Sequence[str]) -> None:
        self.mark = uuid.uuid4().hex
        self._shared = set(os.listdir("/dev/shm"))
        self._begin = time.monotonic()
        # A job in a session of its own, so that nothing of it outlives a test that fails.
        self.process = subprocess.Popen(
            line, env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def wait_for_output(self) -> None:
        """Until rank 0 prints: then steps are under way."""
        assert self.process.stdout is not None
        assert self.process.stdout.read(1), self.end().err

    def wait_for_error(self, pattern: str, limit: float = 60.0) -> re.Match[str]:
        """Until a line on stderr holds it."""
        assert self.process.stderr is not None
        timer, lines = threading.Timer(limit, self.destroy), []
        timer.start()
        for line in self.process.stderr:
            lines.append(line.decode())
            if found := re.search(pattern, lines[-1]):
                timer.cancel()
                return found
        raise AssertionError(f"the job did not say {pattern!r} within {limit:g} s: {''.join(lines)}")

    def kill(self, rank: int, number: int) -> None:
        (pid,) = [pid for pid, environment in self._processes() if f"{RANK}={rank}".encode() in environment]
        self._begin = time.monotonic()
        os.kill(pid, number)

    def end(self, limit: float = 60.0) -> Ended:
        """Waits for the end. Asserts that no process and no shared memory of the job is left."""
        out, err = self.process.communicate(timeout=limit)
        seconds = time.monotonic() - self._begin
        deadline = time.monotonic() + 2
        while (left := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"processes left behind: {[pid for pid, _ in left]}"
        assert not (shared := set(os.listdir("/dev/shm")) - self._shared - _others()), f"shared memory left: {shared}"
        return Ended(self.process.returncode, out.decode(), err.decode(), seconds)

    def destroy(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid, _ in self._processes():
            os.kill(pid, signal.SIGKILL)

    def _processes(self) -> list[tuple[int, bytes]]:
        """(pid, environment) of the job's processes that live."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                environment = (folder / "environ").read_bytes() if folder.name.isdecimal() else b""
                if self.mark.encode() in environment and not re.search(r"\) [ZX] ", (folder / "stat").read_text()):
                    found.append((int(folder.name), environment))
        return found


def _others() -> set[str]:
    """Shared memory of processes that have nothing to do with a job that ended: other jobs beside this one."""
    held = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            held |= set(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
    return held


@contextlib.contextmanager
def job(line: Sequence[str]) -> Iterator[Job]:
    started = Job(line)
    try:
        yield started
    finally:
        started.destroy()


def run(line: Sequence[str]) -> Ended:
    with job(line) as started:
        return started.end()
