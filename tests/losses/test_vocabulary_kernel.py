"""The vocabulary kernel compiles: the interpreter that tests its results would not tell."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dominie.losses.divergence import KINDS

SCRIPT = Path(__file__).parent / "compile_vocabulary_kernel.py"


@pytest.mark.full
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_kind_compiles_for_a_gpu(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == list(KINDS)
