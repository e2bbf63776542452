#!/usr/bin/env bash
# A whole round on a Hopper GPU; results as JSON in OUT_DIR.
#
#   bash scripts/gpu.sh OUT_DIR [--no-venv] [--commit HASH] [PART...]     all parts by default:
#     kernels     every plugin's cases on every tactic against its reference, and their times   kernels.json
#     sanitizer   compute-sanitizer memcheck and racecheck over the small cases                 sanitizer.log
#     example     quantize, build, run, evaluate the example; its engines against themselves
#                 interpreted on the CPU                                                        example.txt engines.json
#     service     random arrivals, sampling, prefixes, streaming, debug tensors on the example   service.json
#     llama-7b    random weights in FP8 with FP8 KV: build, latency, profile of a decode step   llama-7b.json ...
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
. scripts/environment.sh

no_venv='' commit='' parts=''
while [ $# -gt 0 ]; do
  case $1 in
    --no-venv) no_venv=1 ;;
    --commit) commit=$2; shift ;;
    kernels | sanitizer | example | service | llama-7b) parts="$parts $1" ;;
    *) fail "unknown argument $1; known: --no-venv, --commit HASH, kernels, sanitizer, example, service, llama-7b" ;;
  esac
  shift
done
prepare "" "$no_venv"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
for part in ${parts:-kernels sanitizer example service llama-7b}; do
  say "$part"
  begin=$SECONDS
  case $part in
    kernels) "$PYTHON" -m fp8.scripts.gpu_round --output "$out/kernels.json" --commit "$commit" || failed=1 ;;
    sanitizer)
      for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 "$PYTHON" -m fp8.scripts.gpu_round --small --no-bench \
          --tactics 2 2>&1 | tee "$out/sanitizer.$tool.log" | tail -n 3 || failed=1
      done ;;
    example)
      "$PYTHON" -m fp8.scripts.quickstart --work_dir "$work/example" | tee "$out/example.txt" || failed=1
      (cd "$work/example" && "$PYTHON" -m fp8.scripts.gpu_engines --base BF16/engine --data "$OLDPWD/examples/heldout.txt" \
        --commit "$commit" --output "$out/engines.json" */engine) || failed=1 ;;
    service)
      "$PYTHON" -m fp8.scripts.gpu_service --work_dir "$work/service" --commit "$commit" --output "$out/service.json" || failed=1 ;;
    llama-7b)
      "$PYTHON" -m fp8.scripts.random_checkpoint --model llama-7b --qformat fp8 --kv_cache_dtype fp8 --output_dir "$work/checkpoint"
      "$PYTHON" -m fp8.scripts.build --checkpoint_dir "$work/checkpoint" --output_dir "$work/engine" --max_batch_size 64 \
        --max_seq_len 2048 --max_num_tokens 8192 --log_level warning
      "$PYTHON" -m fp8.scripts.bench latency --engine_dir "$work/engine" --batch_size 1 8 16 32 64 --input_len 1024 \
        --output_len 128 --commit "$commit" --output "$out/llama-7b.json" || failed=1
      "$PYTHON" -m fp8.scripts.bench profile --engine_dir "$work/engine" --batch_size 1 64 --commit "$commit" \
        --output "$out/llama-7b-profile.json" || failed=1 ;;
  esac
  say "$part took $((SECONDS - begin)) s"
done
exit $failed
