"""What `dominie init` writes runs as it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dominie.cli import app
from dominie.core.errors import InputError
from dominie.recipe import load_recipe
from dominie.workflows.init import ROWS, TEMPLATES, start


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_is_a_recipe_with_its_data(tmp_path, template):
    written = start(tmp_path / "my shop", template)
    assert {path.name for path in (tmp_path / "my shop").iterdir()} == {p.name for p in written}
    recipe = load_recipe(written[0])
    assert recipe.name == "my-shop"
    assert list(recipe.stages) == list(TEMPLATES[template].stages)
    assert list(recipe.data) == list(TEMPLATES[template].sources)
    for source in recipe.data.values():
        rows = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
        assert len(rows) == ROWS
        assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
    assert {model: model for model in recipe.evaluate.models} == recipe.evaluate.models
    assert list(recipe.stages)[-1] in recipe.evaluate.models
    assert max(map(len, written[0].read_text().splitlines())) <= 110


def test_nothing_is_overwritten(tmp_path):
    start(tmp_path, "kd")
    (tmp_path / "recipe.yaml").unlink()
    before = (tmp_path / "general.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"general.jsonl: there is a file already"):
        start(tmp_path, "kd-dae")
    assert (tmp_path / "general.jsonl").read_bytes() == before
    assert not (tmp_path / "recipe.yaml").exists()


def test_what_cannot_be_is_named(tmp_path):
    with pytest.raises(InputError, match="one of kd, kd-dae"):
        start(tmp_path, "kddae")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        start(tmp_path / "file" / "folder", "kd")


@pytest.mark.parametrize("template", ["kd-dae", "2x7b"])
def test_it_runs(tmp_path, monkeypatch, capsys, template):
    monkeypatch.chdir(tmp_path)
    app(["init", "first", "--template", template], standalone_mode=False)
    assert "next: dominie check first/recipe.yaml" in capsys.readouterr().out
    app(["check", "first/recipe.yaml"], standalone_mode=False)
    small = ["train.steps=2", "stages.taught.train.steps=2"]
    app(["run", "first/recipe.yaml", *small], standalone_mode=False)
    results = json.loads((tmp_path / "runs" / "first" / "results.json").read_text())
    assert set(results["align"]) == {"general", "domain"}
