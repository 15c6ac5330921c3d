#!/usr/bin/env bash
# Every check and timing that needs a GPU, in under 8 minutes: bash benchmarks/gpu.sh
# Nothing need be installed but torch, triton, transformers, accelerate, peft and pytest (pyarrow for
# DAE from a cache). Parts stop themselves (--seconds) well before they would be stopped; one that
# fails does not keep the next from running. Tables are printed, and written to benchmarks/results.
#
# Not part of it: `python benchmarks/evidence.py --gpu`, ten minutes by itself, which runs whole
# recipes and so needs pydantic, ruamel.yaml, datasets, typer and rich as well; `python
# benchmarks/plan.py`, which needs them too. Where there is no network, bring them as wheels.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
unset TRITON_INTERPRET
status=0
pytest_options=(-q -p no:cacheprovider -m "not full")
# Most of their time is the kernels' compilation, which many processes share.
python -c "import xdist" 2>/dev/null && pytest_options+=(-n 8)
python -c "import pytest_timeout" 2>/dev/null && pytest_options+=(--session-timeout=110)

timeout 125 python -m pytest "${pytest_options[@]}" \
  tests/losses/test_attention.py tests/losses/test_vocabulary.py || status=1
timeout 85 python benchmarks/attention.py --seconds 60 || status=1
timeout 65 python benchmarks/prediction.py --seconds 45 || status=1
timeout 200 python benchmarks/geometry.py --seconds 150 || status=1
exit "$status"
