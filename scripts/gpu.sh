#!/usr/bin/env bash
# A whole round on a Hopper GPU; results as JSON in OUT_DIR, and at the end the record of them, h200.json.
#
#   bash scripts/gpu.sh OUT_DIR [--no-venv] [--commit HASH] [PART...]     all parts of the first list by default:
#     kernel        kernels of Llama 7B, 8B and 70B against cuBLASLt, cuDNN and torch            kernel.json
#     llama-7b      random weights in FP8 with FP8 KV: build and start-up times, latency of the
#                   grid, where a step's time goes                                               llama-7b*.json
#     llama-7b-bf16 latency of the same shape in BF16                                            llama-7b-bf16.json
#     llama-3.1-8b  latency of the grid, throughput of a full queue at every pair of lengths     llama-3.1-8b*.json
#     first-token   prompts of 1024 to 131072 tokens, attention in FP8 and in BF16               llama-7b-first-*.json
#   and, by name:
#     kernels       every plugin's cases on every tactic against its reference, and their times  kernels.json
#     sanitizer     compute-sanitizer memcheck and racecheck over the small cases                sanitizer.log
#     example       quantize, build, run, evaluate the example; its engines against themselves
#                   interpreted on the CPU                                                       example.txt engines.json
#     service       random arrivals, sampling, beams, prefixes, streaming, debug tensors on the example   service.json
#     whole         the 8B shape's throughput of whole queues, as vLLM was measured              llama-3.1-8b-whole.json
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
. scripts/environment.sh

measured='kernel llama-7b llama-7b-bf16 llama-3.1-8b first-token'
named='kernels sanitizer example service whole'
no_venv='' commit='' parts=''
while [ $# -gt 0 ]; do
  case $1 in
    --no-venv) no_venv=1 ;;
    --commit) commit=$2; shift ;;
    *)
      case " $measured $named " in
        *" $1 "*) parts="$parts $1" ;;
        *) fail "unknown argument $1; known: --no-venv, --commit HASH, $measured $named" ;;
      esac ;;
  esac
  shift
done
prepare "" "$no_venv"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

bench() { # bench SECONDS MODE NAME ARGUMENT...: results in OUT_DIR/NAME.json
  local seconds=$1 mode=$2 name=$3 begin=$SECONDS
  shift 3
  timeout "$seconds" "$PYTHON" -m fp8.scripts.bench "$mode" --commit "$commit" --output "$out/$name.json" "$@" || failed=1
  say "$name: $mode took $((SECONDS - begin)) s"
}

checkpoint() { # checkpoint MODEL QFORMAT KV [ARGUMENT...]: in $work/checkpoint
  rm -rf "$work/checkpoint"
  "$PYTHON" -m fp8.scripts.random_checkpoint --model "$1" --qformat "$2" --kv_cache_dtype "$3" "${@:4}" \
    --output_dir "$work/checkpoint"
}

build() { # build ARGUMENT...: $work/checkpoint to $work/engine
  rm -rf "$work/engine"
  "$PYTHON" -m fp8.scripts.build --checkpoint_dir "$work/checkpoint" --output_dir "$work/engine" --log_level warning "$@"
}

grid() { # grid NAME
  bench 120 latency "$1" --engine_dir "$work/engine" --batch_size 1 8 16 32 64 --input_len 1024 --output_len 128
}

small=(--max_batch_size 64 --max_seq_len 2048 --max_num_tokens 8192)
queue=(--max_batch_size 1024 --max_seq_len 22528 --max_num_tokens 8192)
lengths=(--input_len 128 128 500 1000 2048 2048 5000 20000 --output_len 128 2048 2000 1000 128 2048 500 2000)

for part in ${parts:-$measured}; do
  say "$part"
  begin=$SECONDS
  case $part in
    kernel) bench 180 kernel kernel --max_seconds 150 ;;
    llama-7b)
      checkpoint llama-7b fp8 fp8
      bench 200 startup llama-7b-startup --checkpoint_dir "$work/checkpoint" --engine_dir "$work/engine" -- "${small[@]}"
      grid llama-7b
      bench 90 roofline llama-7b-roofline --engine_dir "$work/engine" --batch_size 1 64 --prompt_len 1024 8192 ;;
    llama-7b-bf16)
      checkpoint llama-7b bf16 auto
      build "${small[@]}"
      grid llama-7b-bf16 ;;
    llama-3.1-8b)
      checkpoint llama-3.1-8b fp8 fp8
      build "${queue[@]}"
      grid llama-3.1-8b
      bench 90 roofline llama-3.1-8b-roofline --engine_dir "$work/engine" --batch_size 1 64 1024 --prompt_len 8192
      bench 180 throughput llama-3.1-8b-throughput --engine_dir "$work/engine" "${lengths[@]}" --max_seconds 6 ;;
    whole)
      checkpoint llama-3.1-8b fp8 fp8
      build "${queue[@]}"
      bench 200 throughput llama-3.1-8b-whole --engine_dir "$work/engine" --input_len 128 1000 2048 \
        --output_len 128 1000 128 --num_requests 4096 512 1024 ;;
    first-token)
      for kv in fp8 auto; do
        checkpoint llama-7b fp8 $kv --max_position_embeddings 131136
        build --max_batch_size 1 --max_seq_len 131136 --max_num_tokens 8192
        bench 120 latency "llama-7b-first-token-$kv" --engine_dir "$work/engine" --output_len 1 --runs 1 \
          --input_len 1024 4096 16384 32768 65536 131072
      done ;;
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
  esac
  say "$part took $((SECONDS - begin)) s"
done
"$PYTHON" -m fp8.scripts.record --input "$out" --output "$out/h200.json" || failed=1
exit $failed
