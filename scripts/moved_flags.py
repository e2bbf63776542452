"""What to use here instead of the flags of TensorRT-LLM's commands: the refusal of such a flag says it."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

ANSWERS = {  # what to give instead: the flags that it answers
    # examples/quantization/quantize.py, convert_checkpoint.py
    "a checkpoint serves any number of ranks; give --tp_size and --pp_size to fp8-build": (
        "tp_size", "pp_size", "calib_tp_size", "calib_pp_size"),
    "fp8-quantize --qformat fp8_rowwise, with --exclude_modules for layers that are to stay as they are": (
        "use_fp8_rowwise", "use_meta_fp8_rowwise_recipe"),
    "fp8-quantize --kv_cache_dtype fp8": ("fp8_kv_cache",),
    "memory holds one layer at a time; --device says where": ("device_map",),
    "fp8-quantize --calib_max_seq_length": ("tokenizer_max_seq_length",),
    "lm_head stays in the model's type": ("quantize_lm_head",),
    "--exclude_modules leaves layers in the model's type": ("autoq_format", "auto_quantize_bits"),
    # trtllm-build
    "leave it out: fusion takes the kernel that fits, and fp8-inspect ENGINE lists what was fused": (
        "gpt_attention_plugin", "gemm_plugin", "low_latency_gemm_plugin", "gemm_swiglu_plugin",
        "low_latency_gemm_swiglu_plugin", "fp8_rowwise_gemm_plugin", "rmsnorm_plugin", "nccl_plugin",
        "gemm_allreduce_plugin", "context_fmha", "context_fmha_type", "use_fused_mlp", "reduce_fusion", "user_buffer",
        "norm_quant_fusion", "use_custom_all_reduce", "multi_block_mode"),
    "leave it out: attention is in FP8 where fp8-quantize had --kv_cache_dtype fp8": ("use_fp8_context_fmha",),
    "leave it out: it is always so": (
        "remove_input_padding", "paged_kv_cache", "use_paged_context_fmha", "enable_chunked_context",
        "kv_cache_enable_block_reuse", "cuda_graph_mode"),
    "leave it out: the KV cache is paged, in blocks of 64 tokens": ("kv_cache_type", "tokens_per_block"),
    "prompt and output together are bounded by fp8-build --max_seq_len": (
        "max_input_len", "max_input_length", "max_output_len"),
    "leave it out: one engine serves steps of all sizes": ("opt_num_tokens", "multiple_profiles"),
    "no limit of an engine; fp8-run --beam_width": ("max_beam_width",),
    "fp8-run --prompt_logprobs and --logprobs, with any engine": (
        "gather_context_logits", "gather_generation_logits", "gather_all_token_logits"),
    "fp8-inspect graph, or fp8-build --dump_passes or --export_onnx": ("visualize_network",),
    "fp8-inspect ENGINE --layers --tactics, with any engine": ("profiling_verbosity",),
    "fp8-build prints the budget, with --dry_run before it compiles": ("monitor_memory",),
    "leave it out: what --tune measures is remembered": ("input_timing_cache", "output_timing_cache"),
    "logits are float32": ("logits_dtype",),
    "there is no LoRA; merge the adapter into the model first": (
        "lora_plugin", "lora_dir", "lora_task_uids", "lora_target_modules"),
    "there is nothing like it here": (
        "strip_plan", "weight_streaming", "gpu_weights_percent", "weight_sparsity", "max_draft_len",
        "speculative_decoding_mode", "auto_parallel", "cp_size", "streamingllm", "sink_token_length",
        "max_attention_window_size", "no_repeat_ngram_size", "awq_block_size"),
    # examples/run.py, trtllm-serve
    "the engine directory holds the model's tokenizer": ("tokenizer_dir", "tokenizer"),
    "leave it out: there is one kind of session": ("use_py_session",),
    "fp8-run --beam_width K, with --n K for all of their outputs": ("num_beams",),
    "fp8-run --n": ("num_return_sequences",),
    "fp8-run --seed": ("random_seed",),
    "fp8-run --stop": ("stop_words",),
    "fp8-run --logit_bias TOKEN:-100": ("bad_words",),
    "leave it out: texts come token by token": ("streaming_interval",),
    "fp8-bench latency": ("run_profiling",),
    "--max_kv_blocks, of 64 tokens each": ("max_tokens_in_paged_kv_cache",),
    "fp8-run --output json": ("output_csv", "output_npy", "output_log_probs_npy"),
    "it is fp8-build's": ("max_batch_size", "max_seq_len", "max_num_tokens", "workers"),
    # examples/summarize.py, mmlu.py
    "fp8-eval --reference HF_DIR": ("hf_model_dir", "test_hf"),
    "leave it out: fp8-eval measures the engine": ("test_trt_llm",),
    "fp8-eval --data": ("data_dir", "dataset_dir", "dataset_path"),
    "leave it out: the reference is in float32": ("data_type",),
    "fp8-eval --task": ("eval_task",),
    "fp8-eval --num_shots": ("ntrain",),
    "fp8-eval --max_items": ("max_ite",),
    "fp8-eval --max_output_len": ("output_len",),
    "fp8-eval --min_accuracy": ("check_accuracy", "accuracy_threshold", "tensorrt_llm_rouge1_threshold"),
}  # fmt: skip
MOVED = {flag: answer for answer, flags in ANSWERS.items() for flag in flags}


class CommandParser(argparse.ArgumentParser):
    """One whose refusal of a flag says what to give instead: ours for TensorRT-LLM's, or the nearest of its own."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            flags = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            message = "; ".join([message, *filter(None, map(self._instead, flags))])
        super().error(message)

    def _instead(self, flag: str) -> str:
        if answer := MOVED.get(flag[2:]):
            return f"{flag}: {answer}"
        own = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag, own, 1)
        return f"{flag}: did you mean {near[0]}?" if near else ""
