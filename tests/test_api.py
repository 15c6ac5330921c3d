"""dominie from Python: lazy, typed, and the same as the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dominie
from dominie.core.errors import InputError

RECIPE = {
    "name": "small",
    "data": {"d": {"path": "toyworld:general?rows=60", "test_fraction": 0.2}},
    "train": {"learning_rate": 1e-3, "steps": 2, "batch": 4, "max_length": 64},
    "stages": {
        "s": {"student": "toyworld:student", "data": {"d": 1.0}, "loss": {"next_token": 1.0}}
    },
    "evaluate": {"models": {"s": "s"}, "tasks": {"t": {"source": "d", "limit": 3}}},
}


def test_importing_dominie_imports_nothing_heavy():
    code = (
        "import sys, dominie\n"
        "assert not {'torch', 'pydantic', 'transformers'} & set(sys.modules)\n"
        "assert {'run', 'check', 'load_recipe'} <= set(dir(dominie))\n"
        "assert callable(dominie.load_recipe)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        dominie.walk  # noqa: B018


def test_a_recipe_is_checked_run_and_read(tmp_path):
    checked = dominie.check(RECIPE, runs=tmp_path)
    assert checked.stages == ("s",)
    assert all(sample.supervised > 0 for sample in checked.samples["d"])
    done = dominie.run(RECIPE, "train.steps=1", runs=tmp_path)
    assert isinstance(done, dominie.Run)
    assert done.results["s"]["t"]["n"] == 3
    assert done.stages == ["s"]
    assert done.metrics("s")[-1]["step"] == 1
    assert done.report.is_file()
    model, tokenizer = done.load("s")
    assert not model.training
    assert tokenizer.chat_template
    with pytest.raises(InputError, match="no finished stage"):
        done.model("t")
    assert RECIPE["train"]["steps"] == 2  # the caller's mapping is not touched
    again = dominie.evaluate(RECIPE, "train.steps=1", runs=tmp_path)
    assert again.results == done.results


def test_a_plan_and_what_is_refused(tmp_path):
    assert dominie.plan(RECIPE, gpu="h100").stages["s"].fits
    loaded = dominie.load_recipe
    (tmp_path / "r.yaml").write_text("name: x\n")
    with pytest.raises(InputError, match="nothing to do"):
        loaded(tmp_path / "r.yaml")
    with pytest.raises(InputError, match="has no name"):
        dominie.run({"data": {}})
    with pytest.raises(InputError, match="did you mean"):
        dominie.check({**RECIPE, "trian": {}}, runs=tmp_path)
    recipe = dominie.api._loaded(RECIPE, ())
    with pytest.raises(InputError, match="no overrides"):
        dominie.run(recipe, "train.seed=1", runs=tmp_path)
