"""One rank of several evaluates: judges are paid once."""

from __future__ import annotations

import pytest

from dominie.recipe import load_recipe
from dominie.workflows import pipeline


@pytest.mark.parametrize(("rank", "evaluations"), [(None, 1), ("0", 1), ("1", 0)])
def test_only_the_first_rank_evaluates(tmp_path, monkeypatch, rank, evaluations):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    done: list[str] = []
    monkeypatch.setattr(pipeline, "run_stages", lambda *_, **__: {})
    monkeypatch.setattr(pipeline, "evaluate", lambda *_: done.append("evaluated"))
    monkeypatch.setattr(pipeline, "write_report", lambda _: done.append("reported"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "evaluate: {models: {m: 'toyworld:student'}, tasks: {t: {source: d}}}\n"
        "data: {d: {path: 'toyworld:general', test_fraction: 0.5}}\n"
    )
    pipeline.run_recipe(load_recipe(recipe), tmp_path / "runs")
    assert done == ["evaluated", "reported"] * evaluations
