#!/usr/bin/env bash
# Every check and figure that needs a GPU, in two calls for a machine that is lent for a time:
#   bash benchmarks/gpu.sh first [--quick]                 tests, geometry, attention, prediction
#   bash benchmarks/gpu.sh second [--quick] [ARGUMENT…]    real_run.py ARGUMENT…, then what is left
# Lines and rows are appended to files in $OUT (benchmarks/results/gpu without it) as they are made:
# they stay whatever ends a part, and no part keeps the next from running. A summary comes last.
# benchmarks/README.md has what to bring, the commands and the goals. --quick: tiny sizes, also on a
# CPU, to see that all of it runs.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:?first or second}
shift
quick=()
if [ "${1:-}" = --quick ]; then
  quick=(--quick)
  shift
fi
out=${OUT:-benchmarks/results/gpu}
mkdir -p "$out"
export PYTHONPATH="src:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
unset TRITON_INTERPRET
status=0

# part SECONDS FILE COMMAND…: what a command prints is appended to a file; it is ended after SECONDS.
part() {
  local seconds=$1 file=$out/$2 began=$SECONDS ended=0
  shift 2
  [ ${#quick[@]} = 0 ] || seconds=600
  echo "--- $*" >>"$out/log.txt"
  timeout -k 5 "$seconds" "$@" >>"$file" 2>>"$out/log.txt" || ended=$?
  echo "$((SECONDS - began)) s, status $ended: $*"
  if [ "$ended" != 0 ]; then
    status=1
    tail -n 4 "$out/log.txt"
  fi
}

# figures SECONDS NAME [ARGUMENT…]: rows of a benchmark that begins nothing in its last 20 seconds.
figures() {
  local seconds=$1 name=$2
  shift 2
  [ ${#quick[@]} = 0 ] || seconds=600
  part "$seconds" "$name.jsonl" \
    python3 "benchmarks/$name.py" --json --seconds "$((seconds - 20))" ${quick[@]+"${quick[@]}"} "$@"
}

PYTHONPATH=benchmarks:$PYTHONPATH python3 -c "import _results; print(_results.machine())" \
  >"$out/machine.txt" 2>>"$out/log.txt"
date --utc +"%F, %H:%M UTC" >>"$out/machine.txt"
case $call in
  first)
    options=(-q -p no:cacheprovider -m "not full")
    if [ ${#quick[@]} = 0 ]; then
      options+=(-k "gpu or triton or kernel") # the rest does not differ on a GPU
      # Most of their time is the kernels' compilation, which many processes share.
      python3 -c "import xdist" 2>/dev/null && options+=(-n 8)
      python3 -c "import pytest_timeout" 2>/dev/null && options+=(--session-timeout=60)
    else
      options+=(-k KD)
    fi
    part 80 tests.txt python3 -m pytest "${options[@]}" \
      tests/gpu tests/losses/test_attention.py tests/losses/test_vocabulary.py
    figures 150 geometry --only dominie
    figures 80 attention
    figures 70 prediction
    ;;
  second)
    figures 150 real_run "$@"
    figures 90 geometry --only plain
    figures 40 prediction --rest
    ;;
  *)
    echo "first or second, not $call" >&2
    exit 2
    ;;
esac
python3 benchmarks/parts/gpu_summary.py "$out" | tee "$out/summary.md" || status=1
exit "$status"
