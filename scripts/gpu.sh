#!/usr/bin/env bash
# A whole round on a Hopper GPU; results as JSON in OUT_DIR, and at the end the record of them, h200.json.
#
#   bash scripts/gpu.sh OUT_DIR [--no-venv] [--commit HASH] [PART...]     all parts but the last by default:
#     kernel        kernels of Llama 7B, 8B and 70B against cuBLASLt, cuDNN and torch            kernel.json
#     llama-7b      random weights in FP8 with FP8 KV: build and start-up times, latency of the
#                   grid, where a step's time goes                                               llama-7b*.json
#     llama-3.1-8b  latency of the grid, throughput of a full queue at every pair of lengths     llama-3.1-8b*.json
#     llama-7b-bf16 latency of the 7B shape in BF16                                              llama-7b-bf16.json
#     first-token   prompts of 1024 to 131072 tokens, attention in FP8 and in BF16               llama-7b-first-*.json
#     kernels       every plugin's cases on every tactic against its reference                   kernels.json
#     example       quantize, build, run, evaluate the example; its engines against themselves
#                   interpreted on the CPU                                                       example.txt engines.json
#     service       random arrivals, sampling, beams, prefixes, streaming, debug tensors on the example   service.json
#     whole         the 8B shape's throughput of whole queues, as vLLM was measured              llama-3.1-8b-whole.json
#     sanitizer     compute-sanitizer memcheck and racecheck over the small cases                sanitizer.*.*.log
#
# Parts run in this order. Engines are made while kernels are measured; they hold no matrices (random_engine), but for
# those of llama-7b, 14 GB in $TMPDIR. A part that fails or takes too long loses its own figures alone.
set -euo pipefail
out=$(mkdir -p "${1:?a directory for the results: bash scripts/gpu.sh OUT_DIR}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
. scripts/round.sh
start_round 'kernel llama-7b llama-3.1-8b llama-7b-bf16 first-token kernels example service whole' 'sanitizer' "$@"
[ "$device" = cuda ] || fail "these parts need a GPU; scripts/gpu_ranks.sh has --device cpu"

bench() { # bench SECONDS MODE NAME ARGUMENT...: results in OUT_DIR/NAME.json; engines and checkpoints by their names
  local seconds=$1 mode=$2 name=$3 begin=$SECONDS
  shift 3
  (cd "$work" && timeout "$seconds" "$PYTHON" -X faulthandler -m fp8.scripts.bench "$mode" \
    --commit "$commit" --output "$out/$name.json" "$@") || failed=1
  say "$name: $mode took $((SECONDS - begin)) s"
}

random() { # random engine|checkpoint NAME MODEL QFORMAT KV [ARGUMENT...]
  (cd "$work" && nice "$PYTHON" -m "fp8.scripts.random_$1" --output_dir "$2" --model "$3" --qformat "$4" \
    --kv_cache_dtype "$5" "${@:6}")
}

small=(--max_batch_size 64 --max_seq_len 2048 --max_num_tokens 8192)
queue=(--max_batch_size 1536 --max_seq_len 22528 --max_num_tokens 8192)
long=(--max_position_embeddings 131136 --max_batch_size 1 --max_seq_len 131136 --max_num_tokens 8192)
lengths=(--input_len 128 128 500 1000 2048 2048 5000 20000 --output_len 128 2048 2000 1000 128 2048 500 2000
  --max_batch_size 1536 1536 1024 1024 1024 1024 1024 1024)
prompts=(--input_len 1024 4096 16384 32768 65536 131072 --output_len 1)

ahead() { # makes what the parts measure, by the CPU alone
  local part
  for part in $parts; do
    case $part in
      llama-7b) random checkpoint llama-7b-checkpoint llama-7b fp8 fp8 ;;
      llama-3.1-8b | whole) [ -d "$work/llama-3.1-8b" ] || random engine llama-3.1-8b llama-3.1-8b fp8 fp8 "${queue[@]}" ;;
      llama-7b-bf16) random engine llama-7b-bf16 llama-7b bf16 auto "${small[@]}" ;;
      first-token)
        random engine llama-7b-first-token llama-7b fp8 fp8 "${long[@]}"
        random engine llama-7b-first-token-bf16-kv llama-7b fp8 auto "${long[@]}" ;;
      *) continue ;;
    esac
    touch "$work/$part.made"
    say "$part: what it measures was made after $SECONDS s"
  done
}

made() { # made PART: waits for what it measures; made all: until the host is at rest, too
  until [ -e "$work/$1.made" ] || [ -e "$work/all.made" ]; do sleep 0.1; done
}

grid() { # grid ENGINE [ARGUMENT...]
  bench 120 latency "$1" --engine_dir "$1" --batch_size 1 8 16 32 64 --input_len 1024 --output_len 128 "${@:2}"
}

sanitize() { # sanitize TOOL: the small cases, dealt out to processes side by side; racecheck takes minutes for some
  local tool=$1 shares=12 i jobs=() wrong=0
  for i in $(seq $shares); do
    timeout 200 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 "$PYTHON" -m fp8.scripts.gpu_round \
      --small --no-bench --tactics 2 --share "$i/$shares" --max_seconds 100 >"$out/sanitizer.$tool.$i.log" 2>&1 &
    jobs+=($!)
  done
  for i in $(seq $shares); do
    wait "${jobs[i - 1]}" || { wrong=1; say "$tool $i/$shares exits with $?: sanitizer.$tool.$i.log"; }
  done
  grep -ah "gpu_round: .* cases" "$out/sanitizer.$tool".*.log
  return $wrong
}

set -m # the work ahead is a group of processes, ended as one
{ ahead || true; touch "$work/all.made"; } &
set +m
trap 'kill -- -$! 2>/dev/null || true; rm -rf "$work"' EXIT
for part in $parts; do
  say "$part"
  begin=$SECONDS
  case $part in
    kernel) bench 180 kernel kernel --max_seconds 130 ;;
    llama-7b)
      made all
      bench 200 startup llama-7b-startup --checkpoint_dir llama-7b-checkpoint --engine_dir llama-7b -- "${small[@]}"
      grid llama-7b
      bench 90 roofline llama-7b-roofline --engine_dir llama-7b --batch_size 1 64 --prompt_len 1024 2048 ;;
    llama-3.1-8b)
      made all
      grid llama-3.1-8b
      bench 90 roofline llama-3.1-8b-roofline --engine_dir llama-3.1-8b --batch_size 1 64 1024 --prompt_len 8192 \
        --mixed 1016x192+8x128 1023x1500+1x1000 88x21000+1x910@10000
      bench 180 throughput llama-3.1-8b-throughput --engine_dir llama-3.1-8b "${lengths[@]}" --max_seconds 4 ;;
    llama-7b-bf16)
      made all
      grid llama-7b-bf16 --runs 2 --prompt_runs 3 ;;
    first-token)
      made first-token
      for name in llama-7b-first-token llama-7b-first-token-bf16-kv; do
        bench 90 latency $name --engine_dir $name "${prompts[@]}" --max_seconds 2
      done ;;
    whole)
      made all
      bench 200 throughput llama-3.1-8b-whole --engine_dir llama-3.1-8b --input_len 128 1000 2048 \
        --output_len 128 1000 128 --max_batch_size 1536 1024 1024 --num_requests 4096 512 1024 ;;
    kernels)
      timeout 300 "$PYTHON" -m fp8.scripts.gpu_round --no-bench --output "$out/kernels.json" --commit "$commit" || failed=1 ;;
    sanitizer)
      for tool in memcheck racecheck; do sanitize $tool || failed=1; done ;;
    example)
      "$PYTHON" -m fp8.scripts.quickstart --work_dir "$work/example" | tee "$out/example.txt" || failed=1
      ln -s "$PWD/examples" "$work/examples"
      (cd "$work/example" && "$PYTHON" -m fp8.scripts.gpu_engines --base BF16/engine --data ../examples/heldout.txt \
        --commit "$commit" --output "$out/engines.json" */engine) || failed=1 ;;
    service)
      "$PYTHON" -m fp8.scripts.gpu_service --work_dir "$work/service" --commit "$commit" --output "$out/service.json" || failed=1 ;;
  esac
  say "$part took $((SECONDS - begin)) s"
done
"$PYTHON" -m fp8.scripts.record --input "$out" --output "$out/h200.json" || failed=1
exit $failed
