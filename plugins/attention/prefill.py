"""Attention of prefill chunks: packed sequences of any length, causal, over the paged cache.

plugin.py joins two parts of one interface, this module for the prefill rows and decode.py for the decode rows:

    @dataclass(frozen=True) class Decode (here: Prefill)
        The tactic: ints and strings with defaults, every field's name beginning with `decode_` (here: `prefill_`).
        The plugin's tactic record inherits from both, so it can be passed wherever either is asked for.
    candidates(plugin, inputs) -> list[Decode]
        Legal tactics, the favourite first; few, since the tuner times the parts' candidates one part at a time.
    kernels(plugin, tactic, inputs) -> tuple[Kernel, ...]
        What to compile; `functions` of `bind` come in this order.
    workspace(plugin, tactic, inputs, max_tokens, max_sequences) -> int
        Bytes of zero-initialised scratch, left zero where it must be zero at the next launch.
    bind(plugin, tactic, functions, q, tensors, workspace) -> Launcher
        q: the rotated and quantized (or rounded) queries [max_tokens, H, D], e4m3 or 16 bits like the cache, which
        rope_kv_write.cu has put into the workspace. tensors: the plugin's inputs, then its output. workspace: this
        part's uint8 slice, 1024-byte aligned, or None where it asked for 0 bytes. The launcher enqueues the decode
        rows [0, step.decode_sequences) - sequence i owns row i - or, here, the sequences [step.decode_sequences,
        step.sequences); it is not called where there are none. It must not trust step.max_context to be exact (under a
        CUDA graph it is an upper bound), and writes every row of its sequences: zeros where sequence_lengths is 0.

rope_kv_write comes first in the stream and is launched with programmatic dependent launch like the rest: both parts run
`griddepcontrol.wait` before they read q, the caches or any step input. The prefill part runs after the decode part and
depends on nothing that it wrote.
"""
