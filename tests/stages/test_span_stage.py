"""Stages that learn from a teacher with another tokenizer: to a model, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from tiny_tokenizers import TEXTS, byte_level, sentence_piece

from dominie.core.display import Display, PlainConsole
from dominie.core.errors import InputError
from dominie.recipe import recipe_of
from dominie.workflows.pipeline import run_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of bytes, a teacher of pieces, one of bytes, and rows."""
    path = tmp_path_factory.mktemp("models")
    for name, tokenizer, family, seed in (
        ("student", byte_level(), "llama", 1),
        ("pieces", sentence_piece(), "gemma3_text", 2),
        ("bytes", byte_level(), "qwen2", 3),
    ):
        size = len(tokenizer) + 5
        model = tiny_model(family, seed=seed, vocab_size=size, max_position_embeddings=256)
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    for name, shift in (("shop", 0), ("general", 1)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{name} {i}"},
                    {"role": "assistant", "content": f"{TEXTS[(i + shift) % len(TEXTS)]} {i}"},
                ]
            }
            for i in range(24)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return path


def tree(folder: Path, loss: Any, **stage: Any) -> dict[str, Any]:
    """A stage with the teacher of pieces on one source, and the one of bytes on the other."""
    data = {name: {"path": str(folder / f"{name}.jsonl")} for name in ("shop", "general")}
    data["shop"]["validation_fraction"] = 0.2  # type: ignore[assignment]
    return {
        "name": "mine",
        "data": data,
        "train": {"learning_rate": 1e-3, "steps": 2, "batch": 8, "max_length": 96, "log_every": 1},
        "stages": {
            "align": {
                "student": str(folder / "student"),
                "data": {
                    "shop": {"share": 0.5, "teacher": str(folder / "pieces"), "loss": loss},
                    "general": {"share": 0.5, "teacher": str(folder / "bytes")},
                },
                "loss": {"prediction": 1.0},
                **stage,
            },
        },
    }


def run(runs: Path, recipe: dict[str, Any], capsys: Any) -> str:
    run_recipe(recipe_of(recipe), runs, Display(PlainConsole()))
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_two_teachers_of_two_tokenizers_teach_one_student(folder, tmp_path, capsys):
    recipe = tree(folder, {"spans": 1.0, "next_token": 0.1})
    shown = run(tmp_path, recipe, capsys)
    assert "shop: of" in shown
    assert "supervised tokens" in shown
    lines = (tmp_path / "mine/align/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    taught = [step for step in steps if "terms" in step]
    assert {"next_token", "prediction", "spans"} <= set(taught[0]["terms"])
    assert all(step["terms"]["spans"] > 0 for step in taught)
    measured = [step["evaluation"]["shop"] for step in steps if "evaluation" in step]
    assert measured[0]["divergence"] > 0
    assert (tmp_path / "mine/align/model/model.safetensors").exists()


@pytest.mark.parametrize(
    ("loss", "stage", "words"),
    [
        ({"prediction": 1.0}, {}, "spans: 1.0"),
        ({"spans": 1.0}, {"cache": True}, "another tokenizer is needed in memory"),
        ({"spans": 1.0, "prediction": 1.0}, {}, "spans and prediction"),
        ({"spans": {"chunk_temperature": 0.0}}, {}, "chunk_temperature"),
        ({"spans": 1.0, "next_token": {"kind": "dft"}}, {}, "kind: cross_entropy"),
    ],
)
def test_what_spans_cannot_do_is_refused(folder, tmp_path, capsys, loss, stage, words):
    with pytest.raises(InputError) as refused:
        run(tmp_path, tree(folder, loss, **stage), capsys)
    assert words in str(refused.value)


def test_answers_of_the_student_are_refused(folder, tmp_path, capsys):
    recipe = tree(folder, {"spans": 1.0})
    recipe["stages"]["align"]["data"]["shop"]["on_policy"] = 0.5
    with pytest.raises(InputError, match="known before training"):
        run(tmp_path, recipe, capsys)
