"""Kernels that an engine holds beside those of its plan's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fp8.builder.engine import Engine, EngineError
from fp8.plugins.base import Plugin, Tensor

if TYPE_CHECKING:
    from fp8.plugins.cuda import Function


def embedded(engine: Engine, plugin: Plugin, types: Sequence[Tensor | None], rows: int) -> tuple[Any, list[Function]]:
    """The tactic whose kernels the engine holds, and their functions. Raises EngineError if there is none."""
    from fp8.plugins.cuda import Module

    held = {
        (f["plugin"], f["source"], f["entry"], tuple(sorted(f["constants"].items()))): h
        for h, f in engine.plan.kernels.items()
    }
    for tactic in plugin.tactics(types, rows):
        kernels = plugin.kernels(tactic, types)
        hashes = [held.get((k.plugin, k.source, k.entry, tuple(sorted(k.constants)))) for k in kernels]
        if all(hashes):
            found = zip(filter(None, hashes), kernels, strict=True)
            return tactic, [Module(engine.cubins[h]).function(k.entry) for h, k in found]
    raise EngineError(f"{engine.directory} holds no {plugin.name} kernel of this package's; build it again")
