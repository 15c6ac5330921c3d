"""What the shell offers, through the protocol in which bash asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dominie.cli import main
from dominie.cli.completion import offered_keys

RECIPE = """
models: {large: {path: org/large}}
data: {general: {path: g.jsonl, test_fraction: 0.1}, shop: {path: s.jsonl, test_fraction: 0.1}}
train: {epochs: 3, precision: bf16, report_to: [tensorboard]}
stages:
  distill: {student: org/small, teacher: large, data: {general: 1.0}, loss: {prediction: 1.0}}
  align:
    student: distill
    teacher: large
    data: {shop: {share: 0.1, teacher: distill}, general: 0.9}
    loss: {prediction: 1.0}
    train: {epochs: 2}
  pair: {upcycle: {model: org/small, experts: 2}}
evaluate:
  models: {small: org/small, distill: distill, align: align}
  tasks: {general: {source: general}, shop: {source: shop}}
"""


@pytest.fixture
def offered(tmp_path, monkeypatch, capsys):
    """What is offered for the word that a line ends in, in a folder with a recipe and two runs."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "mkdocs.yml").write_text("site_name: no recipe")
    (tmp_path / "broken.yaml").write_text("stages: [")
    for run in ("mine", "other"):
        for stage in ("distill", "align"):
            (tmp_path / "runs" / run / stage / "model").mkdir(parents=True)
        (tmp_path / "runs" / run / "recipe.yaml").write_text(RECIPE)
        results = {"align": {"general": {"score": 1.0}, "shop": {"score": 0.5}}}
        (tmp_path / "runs" / run / "results.json").write_text(json.dumps(results))
    (tmp_path / "runs" / "cache").mkdir()
    monkeypatch.chdir(tmp_path)

    def complete(*parts: str) -> list[str]:
        monkeypatch.setenv("_DOMINIE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["dominie", *parts]))
        monkeypatch.setenv("COMP_CWORD", str(len(parts)))
        monkeypatch.setattr(sys, "argv", ["dominie"])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()

    return complete


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["run", ""], ["broken.yaml", "mine.yaml", "runs/mine", "runs/other", "shop"]),
        (["check", "sh"], ["shop"]),
        (["plan", "./mi"], ["./mine.yaml"]),
        (["run", "shop/re"], ["shop/recipe.yaml"]),
        (["report", ""], ["mine", "other"]),
        (["report", "runs/o"], ["runs/other"]),
        (["report", "none"], []),
        (["compare", "mine", "ot"], ["other"]),
        (["compare", "mine", "--x", "s"], ["shop"]),
        (["compare", "runs/mine", "--against", ""], ["align"]),
        (["chat", "m"], ["mine", *(f"mine:{x}" for x in ("align", "distill", "large", "small"))]),
        (["chat", "mine", ":"], ["align", "distill", "large", "small"]),
        (["chat", "mine", ":", "al"], ["align"]),
        (["chat", "mine", ":", "align,d"], ["align,distill"]),
        (["chat", "runs/mine", ":", "align", "oth"], ["other", "other:align"]),
        (["run", "mine.yaml", "--only", "small,a"], ["small,align"]),
        (["sweep", "mine.yaml", "--over", "train.ep"], ["train.epochs="]),
        (["run", "mine.yaml", "--engine", "f"], ["fsdp2"]),
        (["run", "broken.yaml", "stages.a"], []),
    ],
)
def test_bash_is_offered(offered, parts, expected):
    found = offered(*parts)
    assert [word for word in found if word in expected] == expected
    if parts[0] != "chat" or ":" in parts[:-1]:
        assert found == expected or parts[-1] == "oth"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", ["data.", "evaluate.", "models.", "name=", "stages.", "train."]),
        ("sta", ["stages.align.", "stages.distill.", "stages.pair."]),
        ("stages.align.data.", ["stages.align.data.general.", "stages.align.data.shop."]),
        ("stages.align.train.epo", ["stages.align.train.epochs=", "stages.align.train.epochs=2"]),
        ("stages.distill.train.epochs=", ["3"]),
        ("train.prec", ["train.precision=", *(f"train.precision={v}" for v in ("bf16", "fp32"))]),
        ("train.gradient_checkpointing=", ["true", "false"]),
        ("models.large.pa", ["models.large.path=", "models.large.path=org/large"]),
        ("stages.pair.", ["stages.pair.upcycle."]),
        ("stages.algin.", []),
    ],
)
def test_keys_of_the_recipe_and_their_values(offered, typed, expected):
    key, equals, value = typed.partition("=")
    found = offered("run", "mine.yaml", key, *filter(None, [equals, value]))
    assert set(expected) <= set(found)
    if not typed or typed.startswith("stages.a"):
        assert found == sorted(expected)


def test_every_key_that_is_offered_is_taken(tmp_path):
    """As `docs/recipe_keys.py` found them, the recipe's objects accept them."""
    from ruamel.yaml import YAML

    from dominie.recipe import load_recipe

    tree = YAML(typ="safe", pure=True).load(RECIPE)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    with_values = [
        word
        for start in ("train.", "data.shop.", "stages.align.train.")
        for key in offered_keys(tree, start)
        if key.endswith("=")
        for word in list(offered_keys(tree, key))[:1]
        if not key.endswith(("batch=", "steps=", "keep=", "report_to="))
    ]
    assert len(with_values) > 15
    load_recipe(tmp_path / "mine.yaml", with_values)


def test_it_is_quick_and_imports_nothing_heavy(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    asked = {
        "_DOMINIE_COMPLETE": "complete_bash",
        "COMP_WORDS": "dominie\nrun\nmine.yaml\nstages.al",
        "COMP_CWORD": "3",
    }
    code = (
        "import atexit, os, sys\n"
        "heavy = lambda: {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "atexit.register(lambda: print(heavy() or sum(os.times()[:2]), file=sys.stderr))\n"
        "sys.argv = ['dominie']\n"
        "import dominie.cli as cli\n"
        "cli.main()\n"
    )
    took = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **asked},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "stages.align.train." in done.stdout.split()
        took.append(float(done.stderr))
    assert min(took) < 0.6  # seconds of the processor's: 0.25 on an idle machine
