"""Values beside a time: a step of the kind that was timed runs again and again, and its logits are looked at."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fp8.runtime.repeats import Repeated
from fp8.runtime.scheduler import Row
from fp8.runtime.session import Session

DECODES, PROMPTS = 40, 4  # how often a step runs: one of single tokens, and one with prompts


def repeated(session: Session, *steps: Sequence[Row]) -> dict[str, int]:
    """Repeats each of `steps` as often as suits its kind. Counts how many ran, how many of these gave other bits than
    the first of their kind, and how many a value that is not finite."""
    found = [session.probing.repeat(rows, DECODES if all(r.count == 1 for r in rows) else PROMPTS) for rows in steps]
    times, unsteady, not_finite = (sum(getattr(f, name) for f in found) for name in Repeated.__dataclass_fields__)
    return {"repeated_steps": times, "unsteady_steps": unsteady, "not_finite_steps": not_finite}


def wrong(row: Mapping[str, Any], what: str) -> bool:
    """Whether a row's logits are not what they should be; says so."""
    bad = row["unsteady_steps"] or row["not_finite_steps"]
    if bad:
        found = f"{row['unsteady_steps']} gave other bits, {row['not_finite_steps']} logits that are not finite"
        print(f"fp8-bench: {what}: of {row['repeated_steps']} equal steps {found}", file=sys.stderr, flush=True)
    return bool(bad)
