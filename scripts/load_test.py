"""Loads a running fp8-serve as many clients would, and looks whether it loses anything.

    fp8-serve --engine_dir engine --port 8000 &
    python -m fp8.scripts.load_test --url http://127.0.0.1:8000 --clients 64 --seconds 600 --output load.json

Clients of the `openai` package ask for completions and chats (if the engine has a template) of random lengths, streamed
or whole, greedy or sampled; some leave in the middle. Answers are checked: finish reason, usage, the length asked for.
/metrics tells the rest: once all is quiet, every KV block must be free and no file descriptor left over; memory must
not grow after a fifth of the time; blocks of connections that are cut must be free within a second. Exits with 1
otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import linear_regression
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fp8.scripts.argument_types import new_file, positive, seconds
from fp8.scripts.provenance import add_argument, save_results

WARM_UP = 0.2  # of the time
FREED_SECONDS = 1.0
WORDS = ["def ", "class ", "return ", "import ", "self.", "for ", " in ", "if ", "not ", "None", "0", "(", "):", "\n"]


@dataclass
class Sample:
    """The server as /metrics describes it."""

    seconds: float
    rss: float
    fds: float
    free: float
    blocks: float
    open: float  # requests, waiting ones included


@dataclass
class Record:
    """What happened so far. `seconds`: of answers that came whole."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first event of a stream
    tokens: int = 0
    samples: list[Sample] = field(default_factory=list)


class Load:
    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import httpx
            import openai
        except ImportError as error:
            raise SystemExit(f"load_test: {error.name} is missing; pip install openai") from error
        self.args, self.record, self.begin = args, Record(), time.monotonic()
        url = args.url.rstrip("/")
        key = args.api_key or "none"
        self.client: Any = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=args.timeout)
        self.http = httpx.AsyncClient(base_url=url, timeout=10)
        self.model, self.chat = "", False

    async def run(self) -> dict[str, Any]:
        """All of it; the result as it is written. Raises OSError or an error of the client if nobody answers."""
        self.model = (await self.client.models.list()).data[0].id
        self.chat = await self._has_template()
        idle = await self._quiet()
        self.begin = time.monotonic()
        watcher = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._client_loop(random.Random(i)) for i in range(self.args.clients)))
        watcher.cancel()
        await self.client.close()
        quiet = await self._quiet()
        freed = [await self._cut(4) for _ in range(5)]
        quiet = await self._quiet() if freed else quiet
        await self.http.aclose()
        return self._result(idle, quiet, freed)

    async def _has_template(self) -> bool:
        import openai

        try:
            await self.client.chat.completions.create(model=self.model, messages=[_message("a")], max_tokens=1)
        except openai.BadRequestError:
            return False
        return True

    async def _client_loop(self, source: random.Random) -> None:
        while time.monotonic() - self.begin < self.args.seconds:
            stream, chat = source.random() < 0.5, self.chat and source.random() < 0.4
            kind = f"{'chat' if chat else 'completion'}{', streamed' if stream else ''}"
            try:
                left = await self._one(source, stream, chat)
                self.record.outcomes[f"{kind}, left" if left else kind] += 1
            except Exception as error:  # whatever the client raises is what the user would see
                self.record.errors.append(f"{kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.5)

    async def _one(self, source: random.Random, stream: bool, chat: bool) -> bool:
        """One request; True if it left in the middle. Raises ValueError for an answer that is not as asked for."""
        text = "".join(source.choices(self.args.words, k=source.randint(1, self.args.prompt_words)))
        most, leaves = source.randint(1, self.args.max_tokens), source.random() < self.args.leave
        order: dict[str, Any] = {"model": self.model, "max_tokens": most, "seed": source.randrange(1000)}
        order |= {"temperature": source.choice([0.0, 0.8]), "top_p": source.choice([1.0, 0.9])}
        order |= {"messages": [_message(text)]} if chat else {"prompt": text}
        create = self.client.chat.completions.create if chat else self.client.completions.create
        begin = time.monotonic()
        if stream:
            options = {"include_usage": True}
            answer = await create(**order, stream=True, stream_options=options)
            return await self._read(answer, most, source.randint(1, most) if leaves else None, begin)
        task = asyncio.ensure_future(create(**order))
        if leaves:
            done, _ = await asyncio.wait((task,), timeout=source.random() * 0.5)
            if not done:
                task.cancel()
                await asyncio.wait((task,))
                return True
        whole = await task
        self._check([c.finish_reason for c in whole.choices], whole.usage, most)
        self._count(whole.usage, begin)
        return False

    async def _read(self, stream: Any, most: int, leave_after: int | None, begin: float) -> bool:
        reasons, usage, events = [], None, 0
        async with stream:
            async for chunk in stream:
                if not events:
                    self.record.first.append(time.monotonic() - begin)
                events += 1
                reasons += [c.finish_reason for c in chunk.choices if c.finish_reason]
                usage = chunk.usage or usage
                if leave_after is not None and events >= leave_after:
                    return True
        self._check(reasons, usage, most)
        self._count(usage, begin)
        return False

    @staticmethod
    def _check(reasons: Sequence[str | None], usage: Any, most: int) -> None:
        if len(reasons) != 1 or reasons[0] not in ("stop", "length"):
            raise ValueError(f"finish reasons {list(reasons)}; expected one of stop, length")
        if usage is None or usage.total_tokens != usage.prompt_tokens + usage.completion_tokens:
            raise ValueError(f"usage {usage} does not add up")
        if usage.completion_tokens > most:
            raise ValueError(f"{usage.completion_tokens} tokens came, {most} were asked for")

    def _count(self, usage: Any, begin: float) -> None:
        self.record.seconds.append(time.monotonic() - begin)
        self.record.tokens += usage.completion_tokens

    async def _watch(self) -> None:
        """Samples /metrics, at most 240 times; shows how far it is."""
        with Progress(console=Console(stderr=True)) as bars:
            bar = bars.add_task("load", total=self.args.seconds)
            while True:
                self.record.samples.append(await self.sample())
                bars.update(bar, completed=min(time.monotonic() - self.begin, self.args.seconds))
                await asyncio.sleep(max(0.25, self.args.seconds / 240))

    async def sample(self) -> Sample:
        lines = (await self.http.get("/metrics")).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        rss, fds, free, blocks, running, waiting = (
            float(values[name]) for name in (
                "process_resident_memory_bytes", "process_open_fds", "fp8_kv_blocks_free", "fp8_kv_blocks",
                "fp8_requests_running", "fp8_requests_waiting",
            )
        )  # fmt: skip
        return Sample(time.monotonic() - self.begin, rss, fds, free, blocks, running + waiting)

    async def _quiet(self, seconds: float = 30.0) -> Sample:
        """The server once nothing runs on it and closed connections are gone, or after so many seconds."""
        deadline, before = time.monotonic() + seconds, await self.sample()
        while time.monotonic() < deadline:
            await asyncio.sleep(0.5)
            now = await self.sample()
            if not now.open and now.free == now.blocks and now.fds == before.fds:
                return now
            before = now
        return before

    async def _cut(self, count: int) -> float:
        """Seconds until all blocks are free after `count` connections in the middle of a stream were cut."""
        address = urlsplit(self.args.url)
        order = {"model": self.model, "prompt": "def", "max_tokens": 4096, "stream": True, "ignore_eos": True}
        body, writers = json.dumps(order).encode(), []
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {self.args.api_key}\r\n"
        )
        for _ in range(count):
            reader, writer = await asyncio.open_connection(address.hostname, address.port or 80)
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await asyncio.wait_for(reader.readuntil(b"data: "), self.args.timeout)
            writers.append(writer)
        for writer in writers:
            writer.transport.abort()
        begin = time.monotonic()
        while time.monotonic() - begin < 30:
            now = await self.sample()
            if not now.open and now.free == now.blocks:
                break
            await asyncio.sleep(0.01)
        return time.monotonic() - begin

    def _result(self, idle: Sample, quiet: Sample, freed: list[float]) -> dict[str, Any]:
        r, memory = self.record, self._memory(quiet)
        checks = {
            "no error": not r.errors,
            "answers came": r.tokens > 0,
            "all blocks free": quiet.free == quiet.blocks and not quiet.open,
            "no file descriptor left": quiet.fds <= idle.fds,
            f"memory grows by at most {self.args.max_memory_growth:.0%}": memory["growth"]
            <= self.args.max_memory_growth,
            f"cut connections free their blocks within {FREED_SECONDS:g} s": max(freed) <= FREED_SECONDS,
        }
        most_fds = max((s.fds for s in r.samples), default=0)
        rows = [[round(s.seconds, 1), round(s.rss / 2**20, 2), s.fds, s.blocks - s.free, s.open] for s in r.samples]
        return {
            "passed": all(checks.values()), "checks": checks,
            "clients": self.args.clients, "seconds": self.args.seconds, "requests": dict(sorted(r.outcomes.items())),
            "errors": len(r.errors), "first_errors": r.errors[:10],
            "tokens": r.tokens, "tokens_per_second": r.tokens / self.args.seconds,
            "latency": quantiles(r.seconds), "first_event": quantiles(r.first), "freed_seconds": freed,
            "file_descriptors": {"idle": idle.fds, "most": most_fds, "end": quiet.fds}, "rss_mib": memory,
            "samples": {"columns": ["seconds", "rss_mib", "fds", "held_blocks", "open_requests"], "rows": rows},
        }  # fmt: skip

    def _memory(self, quiet: Sample) -> dict[str, float]:
        """Memory by the line of least squares through the samples after the warm-up, with its relative `growth`."""
        warm = [s for s in self.record.samples if s.seconds >= WARM_UP * self.args.seconds] or [quiet]
        slope = 0.0 if len(warm) < 3 else linear_regression([s.seconds for s in warm], [s.rss for s in warm]).slope
        growth = slope * (warm[-1].seconds - warm[0].seconds) / warm[0].rss
        return {"warm": warm[0].rss / 2**20, "end": quiet.rss / 2**20, "slope_mib_per_minute": slope * 60 / 2**20,
                "growth": growth}  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float] | None:
    """Median, 95%, largest, in seconds."""
    if not values:
        return None
    ordered = sorted(values)
    return {"p50": ordered[len(ordered) // 2], "p95": ordered[len(ordered) * 95 // 100], "max": ordered[-1]}


def _message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def report(found: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{found['clients']} clients for {found['seconds']:g} s", show_header=False)
    for kind, count in found["requests"].items():
        table.add_row(kind, str(count))
    table.add_row("errors", str(found["errors"]))
    table.add_row("tokens/s", f"{found['tokens_per_second']:.1f}")
    for name in ("latency", "first_event"):
        if found[name]:
            table.add_row(f"{name.replace('_', ' ')}, s", "  ".join(f"{k} {v:.2f}" for k, v in found[name].items()))
    table.add_row("file descriptors", "  ".join(f"{k} {v:.0f}" for k, v in found["file_descriptors"].items()))
    memory = found["rss_mib"]
    table.add_row(
        "memory, MiB",
        f"warm {memory['warm']:.1f}, end {memory['end']:.1f}, slope {memory['slope_mib_per_minute']:+.3f} a minute",
    )
    table.add_row("cut connections free, s", "  ".join(f"{s:.3f}" for s in found["freed_seconds"]))
    for name, passed in found["checks"].items():
        table.add_row(name, "yes" if passed else "[red]NO[/red]")
    console.print(table)
    for error in found["first_errors"]:
        console.print(error, markup=False)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("load_test", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--url", default="http://127.0.0.1:8000")
    p.add_argument("--api_key", default="", help="if the server wants one")
    p.add_argument("--clients", type=positive, default=64, help="at once (default: 64)")
    p.add_argument("--seconds", type=seconds, default=60.0, help="of load (default: 60)")
    p.add_argument("--max_tokens", type=positive, default=48, help="of an answer, at most (default: 48)")
    p.add_argument("--prompt_words", type=positive, default=60, help="of a prompt, at most (default: 60)")
    p.add_argument("--words", nargs="+", default=WORDS, help="that prompts are made of; default: Python's")
    p.add_argument("--leave", type=float, default=0.1, help="share of the requests that leave in the middle")
    p.add_argument("--timeout", type=seconds, default=120.0, help="seconds that a client waits (default: 120)")
    p.add_argument(
        "--max_memory_growth", type=float, default=0.02, help="of RSS, after the first fifth (default: 0.02)"
    )
    p.add_argument("--output", type=new_file, help="write the result as JSON, the samples with it")
    add_argument(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    load = Load(args)
    try:
        found = asyncio.run(load.run())
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"load_test: {args.url}: {type(error).__name__}: {error}; is fp8-serve running there?", file=sys.stderr)
        return 1
    report(found, Console(width=100))
    if args.output:
        save_results(args.output, "load_test", argv, args.commit, found)
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
