#!/usr/bin/env bash
# Installs what the tests need and runs them: the tests of the CPU everywhere, those of the GPU where there is a Hopper.
#
#   bash scripts/test.sh                     makes .venv if it must
#   bash scripts/test.sh --no-venv           uses python3 (or $PYTHON) as it is; needs no network
#   bash scripts/test.sh --lint              ruff and mypy before the tests, as CI does
#   bash scripts/test.sh -- -k attention     what follows -- goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh

no_venv= lint=
while [ $# -gt 0 ]; do
  case $1 in
    --no-venv) no_venv=1 ;;
    --lint) lint=1 ;;
    --) shift; break ;;
    *) fail "unknown argument $1; known: --no-venv, --lint, --" ;;
  esac
  shift
done
prepare test "$no_venv"
if [ -n "$lint" ]; then
  say "ruff"
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
  say "mypy"
  "$PYTHON" -m mypy
fi
say "pytest"
# One process per core, each with one thread: small tensors gain nothing from more.
export OMP_NUM_THREADS=1
parallel=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  cores=$("$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')
  parallel=(-n "$cores" --dist loadfile)
fi
exec "$PYTHON" -m pytest -q "${parallel[@]}" "$@"
