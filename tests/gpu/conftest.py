"""These tests need a GPU; with DOMINIE_GPU_TESTS=cpu they run on the CPU, to see that they run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# importlib mode puts no folder on the path; conversations and gradients are those of the trainer's.
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or what DOMINIE_GPU_TESTS names."""
    named = os.environ.get("DOMINIE_GPU_TESTS", "cuda")
    if named == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU (DOMINIE_GPU_TESTS=cpu runs it on the CPU, to see that it runs)")
    return torch.device(named)
