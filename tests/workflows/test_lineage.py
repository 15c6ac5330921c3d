"""Where a model comes from, and what whoever publishes it has to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from dominie.core.references import ModelName
from dominie.models.spec import Model
from dominie.recipe import load_recipe, register_stage_kind
from dominie.recipe.stage_config import unregister_stage_kind
from dominie.stages.stage_kind import StageKind
from dominie.workflows.lineage import hub_id, licence_of, lineage, public_name, warnings

RECIPE = """
name: shop
models: {big: {path: org/big}, writer: {path: org/writer}}
data: {general: {path: "toyworld:general"}}
train: {steps: 2, batch: 4, max_length: 64}
stages:
  distill: {student: org/small, teacher: big, data: {general: 1.0}, loss: {prediction: 1.0}}
  expert: {student: distill, data: {general: 1.0}, loss: {next_token: 1.0}}
  merged: {merge: {models: {distill: 0.5, expert: 0.5}}}
"""


def recipe(tmp_path: Path, more: str = ""):
    (tmp_path / "shop.yaml").write_text(RECIPE + more)
    return load_recipe(tmp_path / "shop.yaml")


def test_a_merge_begins_as_what_its_models_began_as(tmp_path):
    found = lineage(recipe(tmp_path), "merged")
    assert found.stages == ("distill", "expert", "merged")
    assert (found.students, found.teachers) == (("org/small",), ("big",))


@dataclass(frozen=True, kw_only=True)
class WrittenBy(StageKind):
    """A kind whose data a model writes."""

    kind: ClassVar[str] = "written_by"
    key: ClassVar[str | None] = "written_by"
    makes: ClassVar = "data"
    written_by: ModelName


@pytest.fixture
def written_by():
    register_stage_kind(WrittenBy)
    yield
    unregister_stage_kind("written_by")


def test_who_wrote_the_data_of_a_stage_is_a_teacher(tmp_path, written_by):
    found = lineage(
        recipe(
            tmp_path,
            """\
  written: {written_by: writer}
  tuned: {student: org/small, data: {written: 1.0}, loss: {next_token: 1.0}}
""",
        ),
        "tuned",
    )
    assert found.stages == ("written", "tuned")
    assert (found.students, found.teachers) == (("org/small",), ("writer",))


def test_warnings_if_licences_restrict():
    assert warnings("mit", {"a": "apache-2.0", "b": "MIT"}, "s") == []
    data = warnings(None, {"a": "llama3.1", "b": None}, "s")
    assert ["licence of s" in data[0], "`llama3.1`" in data[1], "b could not" in data[2]] == [
        True,
        True,
        True,
    ]
    assert warnings(None, {}, None) == [], "of a toy model there is nobody to be asked"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("license: mit", "mit"),
        ("license: other\nlicense_name: llama3.1", "llama3.1"),
        ("license: other", "other"),
        ("tags: [a]", None),
        ("a: [", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_card(tmp_path, card, licence):
    (tmp_path / "config.json").write_text("{}")
    if card is not None:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
    assert licence_of(Model(path=str(tmp_path))) == licence


def test_a_folder_has_a_public_name_and_no_id(tmp_path):
    found = recipe(tmp_path, "")
    assert (public_name(found, "big"), hub_id(found, "big")) == ("org/big", "org/big")
    (tmp_path / "mine").mkdir()
    place = str(tmp_path / "mine")
    assert (public_name(found, place), hub_id(found, place)) == ("mine", None)
    assert public_name(found, "distill") == "distill"
