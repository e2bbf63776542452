"""From the fused graph to a plan: buffers, steps, tactics, and where everything lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import onnx_graphsurgeon as gs

from fp8.builder import memory, tune
from fp8.builder import merge as merging
from fp8.builder.dtypes import dtype_name
from fp8.builder.engine import Buffer, Limits, Merged, Step, TacticChoice
from fp8.builder.interpret import plugin_of
from fp8.builder.rewrite import DOMAIN, tensor_type
from fp8.plugins.base import Plugin, PluginError, Tensor, load
from fp8.plugins.decode_layers.sizes import MOST_CONTEXT
from fp8.plugins.fetch.plugin import Fetch
from fp8.plugins.hand_on.plugin import HandOn

REGION = 256  # alignment of a workspace region in bytes
PASSED = {"hidden_states", "hidden_states.out"}  # from one pipeline stage to the next


class LegalityError(ValueError):
    """Ops that no kernel of the target can execute, each with its module's name, what was found and the remedy."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A plugin node with what the planner asks of it."""

    name: str
    plugin: Plugin
    types: tuple[Tensor | None, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def rows(self) -> str:
        """Which size of a step counts its rows: "T" or "L"."""
        output = self.plugin.infer(self.types)[0]
        return str(output.shape[0])


def nodes(graph: gs.Graph) -> list[Node]:
    """All nodes, in order. Raises LegalityError for what no plugin took."""
    left = [n for n in graph.nodes if n.domain != DOMAIN]
    if left:
        raise LegalityError(
            f"{len(left)} nodes were taken by no plugin, the first is {left[0].name} ({left[0].op}); "
            f"fp8-build --explain {left[0].name} says why"
        )
    return [
        Node(
            n.name, plugin_of(n), tuple(tensor_type(t) for t in n.inputs), tuple(t.name for t in n.inputs),
            tuple(t.name for t in n.outputs),
        )
        for n in graph.nodes
    ]  # fmt: skip


def check(found: list[Node]) -> None:
    """Raises LegalityError with every op that no CUDA tactic can execute."""
    errors = []
    for node in found:
        try:
            node.plugin.check(node.types)
        except PluginError as error:
            errors.append(f"{node.plugin.name}: {node.name}: {error}")
    if errors:
        more = f"\n({len(errors) - 8} more)" if len(errors) > 8 else ""
        raise LegalityError("\n".join(errors[:8]) + more)


def constants(graph: gs.Graph) -> dict[str, gs.Constant]:
    """The weights, by name."""
    found: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                known = found.setdefault(tensor.name, tensor)
                assert tensor_type(known) == tensor_type(tensor), f"{tensor.name} is stored in two layouts"
    return found


def buffers(graph: gs.Graph) -> dict[str, Buffer]:
    """Every tensor of the plan: inputs, caches, weights, activations, outputs."""
    outputs = {t.name for t in graph.outputs}
    found: dict[str, Buffer] = {}

    def add(tensor: gs.Tensor, kind: str) -> None:
        if tensor.name and tensor.name not in found:
            found[tensor.name] = Buffer(tensor.name, dtype_name(tensor.dtype), tuple(tensor.shape), kind)

    for tensor in graph.inputs:
        add(tensor, "kv_cache" if tensor.name.startswith("kv_cache.") else "input")
    for tensor in constants(graph).values():
        add(tensor, "weight")
    for node in graph.nodes:
        for tensor in node.outputs:
            add(tensor, "output" if tensor.name in outputs else "activation")
    return found


def place(
    found: dict[str, Buffer], steps: list[Step], limits: Limits, early: Mapping[str, int] | None = None
) -> tuple[tuple[Buffer, ...], int]:
    """The buffers with the activations' offsets, and the size of their arena."""
    offsets, size = memory.place(found, steps, limits, early)
    return tuple(dataclasses.replace(b, offset=offsets.get(b.name)) for b in found.values()), size


def steps(found: list[Node]) -> list[Step]:
    """Steps without tactics, as an engine for target cpu has them."""
    return [Step(n.name, n.plugin.name, n.plugin.attributes(), n.inputs, n.outputs) for n in found]


def merge(found: list[Node], known: dict[str, Buffer]) -> tuple[Merged | None, str]:
    """What one launch can stand for where a step has one token, or why nothing can."""
    try:
        first, count, step = merging.find(steps(found), known)
    except merging.Refused as refused:
        return None, str(refused)
    return Merged(first, count, MOST_CONTEXT, step), ""


def merged_node(merged: Merged, found: list[Node]) -> Node:
    """The node of a step that stands for several of `found`."""
    step = merged.step
    types = {name: t for n in found for name, t in zip(n.inputs, n.types, strict=True)}
    given = tuple(types[name] if name else None for name in step.inputs)
    return Node(step.name, load(step.plugin)(**step.attributes), given, step.inputs, step.outputs)


class Tactics:
    """The tactics of all nodes for a GPU target: compiled, and their workspace regions assigned."""

    def __init__(self, found: list[Node], limits: Limits, merged: Merged | None = None) -> None:
        self.nodes = found
        self.limits = limits
        self._merged = merged
        every = found if merged is None else [*found, merged_node(merged, found)]
        self.sites = {n.name: [tune.Site(n.plugin, n.types, rows, n.name) for rows in self._buckets(n)] for n in every}
        self.samplers = self._samplers()
        self.choices: dict[tune.Site, tune.Choice] = {}
        self._regions: dict[Any, int] = {}
        self.workspace_bytes = 0

    def choose(
        self, measured: dict[str, dict[str, Any]], progress: Callable[[int, int], None], warn: Callable[[str], None]
    ) -> None:
        """Compiles; see `tune.choose`. The runtime's own kernels are embedded too: serving needs no compiler."""
        every = [site for sites in self.sites.values() for site in sites]
        self.choices = tune.choose([*every, *self.samplers, *self._links()], measured, progress, warn)

    def assume(self) -> None:
        """Takes every favourite uncompiled: enough for a memory budget."""
        every = [site for sites in self.sites.values() for site in sites]
        self.choices = {site: tune.Choice(site.candidates()[0], ()) for site in every}

    def steps(self) -> list[Step]:
        return list(map(self._with_tactics, steps(self.nodes)))

    def merged(self) -> Merged | None:
        return self._merged and dataclasses.replace(self._merged, step=self._with_tactics(self._merged.step))

    def _with_tactics(self, step: Step) -> Step:
        return dataclasses.replace(step, tactics=tuple(map(self._choice, self.sites[step.name])))

    def cubins(self) -> dict[str, tune.Cubin]:
        return {c.key: c for choice in self.choices.values() for c in choice.cubins}

    def _choice(self, site: tune.Site) -> TacticChoice:
        choice = self.choices[site]
        size = site.plugin.workspace(choice.tactic, site.types, site.max_tokens, self.limits.max_batch_size)
        hashes = tuple(c.key for c in choice.cubins)
        fields = tune.tactic_fields(choice.tactic)
        return TacticChoice(site.max_tokens, fields, hashes, size, self._region(site, choice.tactic, size))

    def _region(self, site: tune.Site, tactic: Any, size: int) -> int:
        """Kernels leave their counters at zero but not their data: only equal launches share a region."""
        if size == 0:
            return 0
        owner = (site, tactic)
        if owner not in self._regions:
            self._regions[owner] = self.workspace_bytes
            self.workspace_bytes += -(-size // REGION) * REGION
        return self._regions[owner]

    def _buckets(self, node: Node) -> list[int]:
        rows = self.limits.logits_rows if node.rows == "L" else self.limits.max_num_tokens
        return node.plugin.buckets(rows)

    def _samplers(self) -> list[tune.Site]:
        """What ends a step where the engine yields logits; an inner stage of a pipeline samples nothing."""
        head = next((n for n in self.nodes if "logits" in n.outputs), None)
        if head is None:
            return []
        kinds = ("float32", "int64", "int32")  # temperature, seed, counter
        types = (head.plugin.infer(head.types)[0], *(Tensor(kind, ("L",)) for kind in kinds))
        rows, table, read = Tensor("int32", ("L",)), Tensor("int32", ("S",)), Tensor("int32", ("S", "L"))
        state = (rows, Tensor("int64", ("L",)), table, *[rows] * 6, read)
        end = {"sampling": types, "advance": state}
        return [tune.Site(load(name)(), types, self.limits.logits_rows, name) for name, types in end.items()]

    def _links(self) -> list[tune.Site]:
        """What brings a pipeline stage its inputs, from the host and from its neighbours."""
        if not any(PASSED.intersection((*n.inputs, *n.outputs)) for n in self.nodes):
            return []
        staging, fields, state = Tensor("uint8", ("N", "S")), Tensor("int32", ("F", 3)), Tensor("int32", (2,))
        given = {HandOn(): (Tensor("int32", ("S",)),), Fetch(): (staging, fields, Tensor("uint8", ("S",)), state)}
        return [tune.Site(plugin, types, self.limits.max_num_tokens, plugin.name) for plugin, types in given.items()]
