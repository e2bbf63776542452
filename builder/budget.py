"""What an engine takes of a card's memory, told before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from fp8.builder.engine import Plan
from fp8.builder.memory import buffer_bytes
from fp8.builder.workplace import BuildError


@dataclass(frozen=True)
class Budget:
    """Bytes that an engine takes on its device."""

    weights: int
    activations: int
    workspace: int
    inputs_and_outputs: int
    sampling: int  # what options such as penalties and top-p take
    kv_block: int  # one block of `block_size` tokens over all layers

    @property
    def fixed(self) -> int:
        return self.weights + self.activations + self.workspace + self.inputs_and_outputs + self.sampling

    def blocks(self, memory: int) -> int:
        """KV blocks that fit beside the rest into `memory` bytes; negative if the rest does not fit."""
        return (memory - self.fixed) // self.kv_block if self.kv_block else 0


def of(plan: Plan) -> Budget:
    sizes = {kind: 0 for kind in ("weight", "activation", "input", "output", "kv_cache")}
    for buffer in plan.buffers:
        sizes[buffer.kind] += buffer_bytes(buffer, plan.limits)
    return Budget(
        sizes["weight"],
        plan.arena_bytes,
        plan.workspace_bytes,
        sizes["input"] + sizes["output"],
        plan.sampling_bytes,
        sizes["kv_cache"],
    )


def lines(built: Plan, gpu_memory: int) -> list[tuple[str, str]]:
    """The memory budget as rows (what, how much)."""
    b = of(built)
    per_sequence = built.limits.sequence_blocks
    blocks, batch = b.blocks(gpu_memory), built.limits.max_batch_size
    rows = {
        "weights": b.weights, "activations": b.activations, "workspace": b.workspace,
        "inputs and outputs": b.inputs_and_outputs, "options of sampling": b.sampling,
        f"KV block of {built.limits.block_size} tokens": b.kv_block,
        f"KV cache of {batch} full sequences": b.kv_block * per_sequence * batch,
    }  # fmt: skip
    fits = (
        f"{blocks} ({blocks // per_sequence} sequences of {built.limits.max_seq_len})" if blocks > 0 else "does not fit"
    )
    return [*((k, size_text(v)) for k, v in rows.items()), (f"KV blocks in {size_text(gpu_memory)}", fits)]


def check_fits(built: Plan, gpu_memory: int) -> None:
    """Raises BuildError if a card of that size could not run the engine if it held nothing else."""
    b, limits = of(built), built.limits
    blocks = max(limits.sequence_blocks, limits.max_batch_size)
    needed = b.fixed + blocks * b.kv_block
    if needed > gpu_memory:
        raise BuildError(
            f"rank {built.compatibility.rank} takes {size_text(needed)} with KV blocks for one sequence of "
            f"{limits.max_seq_len} tokens and one for each of {limits.max_batch_size} sequences, "
            f"{size_text(needed - gpu_memory)} more than the {size_text(gpu_memory)} of --gpu_memory; divide the model "
            "(--tp_size, --pp_size) or lower the limits"
        )


def size_text(count: int) -> str:
    for unit, scale in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << scale:
            return f"{count / (1 << scale):.2f} {unit}"
    return f"{count} B"
