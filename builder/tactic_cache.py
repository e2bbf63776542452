"""The tactics that --tune found fastest, from build to build: a file for each GPU, driver and package version."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fp8.builder.engine import write_atomically

FORMAT = 1

Facts = dict[str, str]
Winners = dict[str, dict[str, Any]]


class TacticCache:
    """Tactics by content (`measure.entry`). What other machines or versions left, and what is damaged, is ignored with
    one remark. Builds side by side take turns and see what the other found."""

    def __init__(self, folder: Path, facts: Facts, remark: Callable[[str], None]) -> None:
        """`facts`: all that a time depends on beside the kernels."""
        self._facts = facts
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        name = "".join(c if c.isalnum() else "_" for c in next(iter(facts.values()), ""))
        self.path = folder / f"{name}-{key}.json"
        self._known: Winners = {}
        self._refresh(remark)
        others = sorted(p for p in folder.glob("*.json") if p != self.path)
        if others and not self.path.exists():
            remark(f"tuned tactics in {others[0]} are ignored: {self._difference(others[0])}")

    def get(self, entry: str) -> dict[str, Any] | None:
        return self._known.get(entry)

    def put(self, entry: str, tactic: dict[str, Any]) -> None:
        """Stores a tactic. Call it within one's `turn`."""
        self._known[entry] = tactic
        text = json.dumps({"format": FORMAT, "facts": self._facts, "winners": self._known}, sort_keys=True)
        write_atomically(self.path, [text.encode()])

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Times alone among builds on this machine, as they would disturb each other. The lock ends with the
        process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: writes are atomic in any case
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._refresh(lambda text: None)
            yield

    def _refresh(self, remark: Callable[[str], None]) -> None:
        """Takes over what is in the file now."""
        if not self.path.exists():
            return
        try:
            facts, winners = _read(self.path)
        except ValueError as error:
            return remark(f"{self.path} is damaged and ignored: {error}")
        if facts != self._facts:
            return remark(f"{self.path} is ignored: {_difference(facts, self._facts)}")
        self._known |= winners

    def _difference(self, other: Path) -> str:
        try:
            return _difference(_read(other)[0], self._facts)
        except ValueError:
            return f"this is {', '.join(self._facts.values())}"


def _difference(found: Facts, wanted: Facts) -> str:
    """`driver 13.0, here 12.8`."""
    pairs = [f"{k} {found.get(k)}, here {v}" for k, v in wanted.items() if found.get(k) != v]
    return "; ".join(pairs) or "its facts are not those of this machine"


def _read(path: Path) -> tuple[Facts, Winners]:
    """Raises ValueError if there is anything but what `put` writes."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"expected an object of format {FORMAT}")
    facts, winners = data.get("facts"), data.get("winners")
    if not isinstance(facts, dict) or not isinstance(winners, dict):
        raise ValueError("facts or winners are missing")
    if not all(isinstance(w, dict) for w in winners.values()):
        raise ValueError("a winner is no object")
    return facts, winners
