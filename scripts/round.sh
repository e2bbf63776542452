# Sourced by the rounds on GPUs, gpu.sh and gpu_ranks.sh.
. scripts/environment.sh

# Sets $parts (those asked for, or the defaults; in the order given here), $commit, $device, $PYTHON and $failed, and makes
# $work, an empty folder.
start_round() { # start_round DEFAULT_PARTS OTHER_PARTS [--no-venv] [--commit HASH] [--device DEVICE] [PART...]
  local defaults=$1 known="$1 $2" no_venv='' asked='' part
  shift 2
  commit='' device=cuda parts='' failed=0
  while [ $# -gt 0 ]; do
    case $1 in
      --no-venv) no_venv=1 ;;
      --commit) commit=$2; shift ;;
      --device) device=$2; shift ;;
      *)
        case " $known " in
          *" $1 "*) asked="$asked $1" ;;
          *) fail "unknown argument $1; known: --no-venv, --commit HASH, --device DEVICE, $known" ;;
        esac ;;
    esac
    shift
  done
  for part in $known; do
    case " ${asked:-$defaults} " in *" $part "*) parts="$parts $part" ;; esac
  done
  [ "$device" = cpu ] || nvidia-smi -L >/dev/null 2>&1 || fail "nvidia-smi finds no GPU here; a round measures one"
  prepare "" "$no_venv"
  work=$(mktemp -d)
}
