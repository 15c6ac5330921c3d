#!/usr/bin/env bash
# Every check and timing that needs a GPU, in under 8 minutes: bash benchmarks/gpu.sh
# Nothing need be installed but torch, triton, transformers and pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
status=0
workers=()
python -c "import xdist" 2>/dev/null && workers=(-n 8) # the time is the kernels' compilation

timeout 180 python -m pytest -q "${workers[@]}" -p no:cacheprovider \
  tests/losses/test_attention.py tests/losses/test_vocabulary.py || status=1
timeout 150 python benchmarks/attention.py || status=1
timeout 150 python benchmarks/prediction.py || status=1
exit "$status"
