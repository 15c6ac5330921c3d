"""A base model without a chat template gets one: its own file's, or that of a model it fits."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from dominie.core.display import Display
from dominie.core.errors import InputError
from dominie.recipe import load_recipe
from dominie.stages.run_folder import ChatTokenizers, RunFolder
from dominie.toyworld import materialise

RECIPE = """
name: t
models: {{base: {{path: {base}{given}}}}}
data: {{general: {{path: "toyworld:general"}}}}
stages:
  distill:
    student: base
    teacher: {teacher}
    data: {{general: 1.0}}
    loss: {{prediction: 1.0}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The toy student with its template taken away, as a base model comes."""
    folder = materialise("toyworld:student", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizers(tmp_path: Path, base: Path, *, given: str = "", teacher: str = "toyworld:teacher"):
    path = tmp_path / "t.yaml"
    path.write_text(RECIPE.format(base=base, given=given, teacher=teacher))
    said = io.StringIO()
    folder = RunFolder(load_recipe(path), tmp_path / "runs")
    return ChatTokenizers(folder, Display(Console(file=said, width=200))), said


def test_it_is_borrowed_from_the_teacher_and_said_once(base, tmp_path):
    found, said = tokenizers(tmp_path, base)
    template = found.of("distill").chat_template
    assert template == found.of("toyworld:teacher").chat_template
    assert found.of("base").chat_template == template
    assert said.getvalue().count("has no chat template") == 1


def test_a_given_file_comes_first(base, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    found, said = tokenizers(tmp_path, base, given=f", chat_template: {tmp_path}/own.jinja")
    assert found.of("base").chat_template == "{{ messages }}"
    assert not said.getvalue()


def test_without_any_it_says_what_to_set(base, tmp_path):
    found, _ = tokenizers(tmp_path, base, teacher="base")
    with pytest.raises(InputError, match=r"chat_template: FILE\.jinja"):
        found.of("base")


def test_what_a_killed_run_left_half_written_goes_with_the_next_lock(base, tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(RECIPE.format(base=base, given="", teacher="toyworld:teacher"))
    folder = RunFolder(load_recipe(path), tmp_path / "runs")
    half = ["rows/.making-a/rows", "distill/.writing-model", ".taking-distill"]
    kept = ["distill/cache/.writing-1", "rows/general", "distill/model"]
    for name in half + kept:
        (folder.path / name).mkdir(parents=True)
    (folder.path / ".report-1").write_text("<html>")
    with folder.locked():
        left = {p.name for p in folder.path.rglob("*")}
    assert left == {".lock", "rows", "distill", "cache", ".writing-1", "general", "model"}
