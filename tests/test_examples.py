"""The examples run as they stand, and what they show is so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def imported(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data classes look their module up
    spec.loader.exec_module(module)
    return module


def test_kd_losses_in_a_plain_loop(tmp_path):
    curve = imported("kd_loop").distil(tmp_path, steps=25)
    assert curve[-1] < 0.5 * curve[0]


def test_attention_distillation_on_a_model_of_ones_own():
    curve = imported("attention_custom").distil(steps=60)
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.full
def test_dae_with_adapters_over_one_base(tmp_path):
    before, after = imported("dae_adapters").align(tmp_path, steps=20)
    assert before["general"] == pytest.approx(0.0, abs=1e-6)  # it begins as the reference
    assert after["domain"] < 0.5 * before["domain"]
    assert after["general"] < before["domain"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["kd_loop", "attention_custom", "dae_adapters"])
def test_the_script_runs_as_it_stands(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "KL" in done.stdout
