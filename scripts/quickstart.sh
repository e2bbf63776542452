#!/usr/bin/env bash
# From a checkout to a table of perplexity, size, speed and text, on the GPU if there is a Hopper, else on the CPU.
#
#   bash scripts/quickstart.sh               makes .venv if it must
#   bash scripts/quickstart.sh --no-venv     uses python3 (or $PYTHON) as it is; needs no network
#   bash scripts/quickstart.sh -- --work_dir DIR   what follows -- goes to scripts/quickstart.py
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

no_venv=
while [ $# -gt 0 ]; do
  case $1 in
    --no-venv) no_venv=1 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; known: --no-venv, --" ;;
  esac
  shift
done
prepare "" "$no_venv"
exec "$PYTHON" -m fp8.scripts.quickstart "$@"
