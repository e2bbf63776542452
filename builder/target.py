"""What is compiled for, and the journal of what the passes did."""

from __future__ import annotations

from dataclasses import dataclass, field

from fp8.builder.engine import Limits
from fp8.builder.parallel.tensor import TensorParallel
from fp8.builder.pattern import Mismatch, Variant

TARGETS = ("sm_90a", "cpu")  # cpu: the references run it, so no kernel's limit applies


@dataclass
class Journal:
    """Which nodes of the emitted graph each plugin node replaced, and the failed attempts at the explained ones."""

    replaced: dict[str, list[str]] = field(default_factory=dict)  # plugin node -> nodes of the emitted graph
    explain: str | None = None  # a node's name or the beginning of names
    attempts: dict[str, tuple[int, str]] = field(default_factory=dict)  # pattern -> (nodes matched, sentence)

    def record(self, variant: Variant, root: str, outcome: Mismatch | str) -> None:
        """Keeps the attempt that got farthest, of each pattern."""
        matched, sentence = (outcome.matched, outcome.sentence) if isinstance(outcome, Mismatch) else (10**6, outcome)
        if matched > self.attempts.get(variant.pattern, (-1, ""))[0]:
            where = "" if sentence.startswith(f"{root}:") else f" at {root}"
            self.attempts[variant.pattern] = (matched, f"{variant}{where}: {sentence}")


@dataclass(frozen=True)
class Target:
    name: str
    limits: Limits
    journal: Journal = field(default_factory=Journal)
    kept: frozenset[str] = frozenset()  # tensors that no fusion may swallow, because they are tapped
    parallel: TensorParallel | None = None  # which rank's graph it is to become, if its layers are shared
    fp8_accumulation: str = "fast"  # of e4m3 products, or "precise"
    fp8_all_reduce: int = 0  # KiB from which on sums over ranks travel as e4m3; 0: none
    dtype: str | None = None  # of the activations, if not the graph's own: "float32"
