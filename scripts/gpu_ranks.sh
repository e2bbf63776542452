#!/usr/bin/env bash
# A round on several Hopper GPUs of one host; results as JSON in OUT_DIR, and at the end the record of them, h200xN.json.
#
#   bash scripts/gpu_ranks.sh OUT_DIR [--no-venv] [--commit HASH] [--device cpu] [PART...]      all parts by default:
#     all_reduce  every way to sum over ranks: checks, stress at varied sizes, times                    all_reduce.json
#     llama-7b    random weights in FP8 with FP8 KV: latency at batch 1 and 64 of one GPU, tp N, pp N   llama-7b*.json
#                 where a decode step's time goes at tp N                                 llama-7b-tpN-roofline.json
#     llama-70b   Llama-2-70B's shape, likewise, at tp N: time per token at batch 1                     llama-2-70b*.json
#     engines     the example in BF16, FP8 and FP8 with FP8 KV, at tp N and pp N, against one rank      engines.json
#     wide        both shapes with four layers at tp N: one launch, a launch each, NCCL, same logits?      wide.json
#     faults      (not by default) a rank of decode steps is stopped, killed, stands still: an end in time?   faults.json
#
# N is the number of GPUs. Needs an mpirun and mpi4py (fp8-engine[mpi]); $MPIRUN names another than the one on PATH, with
# its options. The CPU makes all engines while the all-reduces are measured; no matrix of the 7B and 70B shapes is
# written. --device cpu tries the script itself: tiny engines on two CPU ranks, no all-reduces over NVLink.
set -euo pipefail
out=$(mkdir -p "${1:?a directory for the results: bash scripts/gpu_ranks.sh OUT_DIR}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
. scripts/round.sh
start_round 'all_reduce llama-7b llama-70b engines wide' 'faults' "$@"
if [ "$device" = cpu ]; then
  gpus=2 target=cpu
  length=(--input_len 32 --output_len 8 --runs 1)
  limits=(--max_seq_len 64 --max_batch_size 64 --max_num_tokens 256)
  context=32 small=(--num_layers 2 --model "$PWD/examples/tiny-python-llama/config.json")
else
  gpus=$(nvidia-smi -L | wc -l) target=sm_90a
  length=(--input_len 1024 --output_len 128)
  limits=(--max_seq_len 2048 --max_batch_size 64)
  context=1088 small=()
fi
[ "$gpus" -gt 1 ] || fail "a round of several ranks needs several GPUs; there is $gpus (scripts/gpu.sh measures one)"
# Ranks are not bound to a core each: a rank's threads (NCCL's too) need several.
read -ra mpirun <<<"${MPIRUN:-mpirun --allow-run-as-root --bind-to none --oversubscribe}"
ln -s "$PWD/examples" "$work/examples"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python() { (cd "$work" && "$PYTHON" -X faulthandler -m "fp8.scripts.$1" "${@:2}"); }

ranks() { # ranks COUNT SECONDS SCRIPT ARGUMENT...
  local start=()
  [ "$1" -eq 1 ] || start=("${mpirun[@]}" -n "$1")
  (cd "$work" && timeout "$2" "${start[@]}" "$PYTHON" -X faulthandler -m "fp8.scripts.$3" "${@:4}")
}

bench() { # bench COUNT SECONDS MODE NAME ARGUMENT...: results in OUT_DIR/NAME.json
  local begin=$SECONDS
  ranks "$1" "$2" bench "$3" --commit "$commit" --output "$out/$4.json" "${@:5}" || failed=1
  say "$4: $3 took $((SECONDS - begin)) s"
}

all_reduce() { # a tactic that ends or hangs the job is left out of the next one, and counts as a failure
  local again=()
  for _ in 1 2 3; do
    bench "$gpus" 90 all_reduce all_reduce "${again[@]}"
    again=(--again)
    grep -qs '"under_way"' "$out/all_reduce.json" || return 0
  done
}

hollow() { # hollow NAME MODEL ARGUMENT...: an engine without its matrices, random ones instead
  python random_engine --model "$2" --qformat fp8 --kv_cache_dtype fp8 --output_dir "$1" --target $target \
    --workers "$gpus" "${limits[@]}" "${@:3}" "${small[@]}" >/dev/null
}

example() { # example NAME QFORMAT KV: checkpoint and engines of one rank, tp N and pp N
  CUDA_VISIBLE_DEVICES='' python quantize --model_dir examples/tiny-python-llama --qformat "$2" --kv_cache_dtype "$3" \
    --calib_dataset examples/calibration.txt --calib_size 64 --device cpu --output_dir "$1/checkpoint" >/dev/null 2>&1
  for place in "1 1 one" "$gpus 1 tp" "1 $gpus pp"; do
    set -- "$1" $place
    python build --checkpoint_dir "$1/checkpoint" --output_dir "$1/$4" --target $target --tp_size "$2" --pp_size "$3" \
      --max_batch_size 8 --max_seq_len 512 --max_num_tokens 512 --log_level warning &
  done
  wait
}

ahead() { # makes what the parts measure, by the CPU alone, all at once
  local part
  for part in $parts; do
    case $part in
      engines) for q in "bf16 bf16 auto" "fp8 fp8 auto" "fp8-kv fp8 fp8"; do example $q & done ;;
      llama-7b)
        hollow llama-7b llama-7b &
        hollow llama-7b-tp llama-7b --tp_size "$gpus" &
        hollow llama-7b-pp llama-7b --pp_size "$gpus" & ;;
      llama-70b) hollow llama-2-70b-tp llama-2-70b --tp_size "$gpus" & ;;
      wide) for m in llama-7b llama-2-70b; do hollow few-$m $m --num_layers 4 --tp_size "$gpus" & done ;;
      faults) hollow faulty llama-7b --num_layers 4 --tp_size "$gpus" & ;;
    esac
  done
  wait
}

begin=$SECONDS
set -m # the work ahead is a group of processes, ended as one
ahead &
set +m
trap 'kill -- -$! 2>/dev/null || true; rm -rf "$work"' EXIT
case $parts in
  *all_reduce*) [ "$device" = cpu ] || all_reduce ;;
esac
wait $! || failed=1
say "engines were made after $((SECONDS - begin)) s"
for part in ${parts/all_reduce/}; do
  say "$part"
  begin=$SECONDS
  case $part in
    llama-7b)
      bench "$gpus" 60 latency "llama-7b-tp$gpus" --engine_dir llama-7b-tp --device $device --batch_size 1 64 "${length[@]}"
      bench 1 60 latency llama-7b-one --engine_dir llama-7b --device $device --batch_size 1 64 "${length[@]}"
      bench "$gpus" 60 latency "llama-7b-pp$gpus" --engine_dir llama-7b-pp --device $device --batch_size 1 64 "${length[@]}" ;;
    llama-70b)
      bench "$gpus" 90 latency "llama-2-70b-tp$gpus" --engine_dir llama-2-70b-tp --device $device --batch_size 1 "${length[@]}" ;;
    engines)
      pairs=()
      for name in bf16 fp8 fp8-kv; do pairs+=("$name/tp=$name/one" "$name/pp=$name/one"); done
      windows=()
      [ "$device" = cuda ] || windows=(--max_windows 2)
      ranks "$gpus" 120 gpu_ranks --device $device --data examples/heldout.txt --commit "$commit" \
        --output "$out/engines.json" "${windows[@]}" "${pairs[@]}" || failed=1 ;;
    wide) # a CPU has but one way
      [ "$device" = cpu ] || ranks "$gpus" 40 gpu_wide --commit "$commit" --output "$out/wide.json" few-llama-7b few-llama-2-70b || failed=1 ;;
    faults)
      (cd "$work" && MPIRUN="${mpirun[*]}" timeout 60 "$PYTHON" -m fp8.scripts.gpu_faults --engine_dir faulty --device $device \
        --commit "$commit" --output "$out/faults.json") || failed=1 ;;
  esac
  say "$part took $((SECONDS - begin)) s"
done
case $parts in
  *llama-7b*)
    bench "$gpus" 40 roofline "llama-7b-tp$gpus-roofline" --engine_dir llama-7b-tp --device $device --batch_size 1 64 \
      --context_len "$context" --prompt_len ;;
esac
[ "$device" = cpu ] || python record --gpus "$gpus" --input "$out" --output "$out/h200x$gpus.json" || failed=1
exit $failed
