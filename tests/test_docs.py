"""The documentation says what is so: generated pages are today's, and every page can be found."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dominie.core.errors import InputError
from dominie.recipe import load_recipe
from dominie.workflows.init import start

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
errors = importlib.import_module("error_reference")
recipe = importlib.import_module("recipe_reference")
cli = importlib.import_module("cli_reference")


@pytest.mark.parametrize("script", [errors, recipe, cli])
def test_generated_pages_are_today_s(script):
    written = script.PAGE.read_text(encoding="utf-8")
    assert written == script.page(), "run: make pages"


def test_every_key_of_a_recipe_has_a_meaning():
    assert recipe.undocumented() == []


def test_every_option_of_the_command_line_has_a_word_of_help():
    assert cli.unexplained() == []


def test_every_error_has_a_cause_and_a_cure():
    assert errors.without_cure() == [], "say expected= or do= there, or add it to CURES"
    assert errors.unused_cures() == [], "no error has these words any more"


def test_errors_are_read_from_the_source():
    found = {entry.what: entry for entry in errors.entries()}
    assert len(found) > 150
    assert found["the endpoint refuses the key"].do.startswith("check the key in")
    assert found["the array is broken off"].file == "data/json_files.py"
    assert found["the budget is spent"].status == 1
    assert found["no such recipe"].status == 2
    assert "micro_batch … must divide batch …" in errors.refused_values()


def test_the_example_of_an_error_is_one(tmp_path):
    start(tmp_path / "mine", "kd-dae")
    recipe_file = tmp_path / "mine" / "recipe.yaml"
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, ["stages.align.data.domain.teacher=expret"])
    told = str(caught.value).replace(str(recipe_file), "recipe.yaml")
    assert f"error: {told}\n" in errors.PAGE.read_text(encoding="utf-8")


def test_every_page_is_in_the_index_and_in_the_navigation():
    pages = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)", index))
    config = YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"'([\w-]+\.md)'", str(config["nav"]))
    assert pages | {"README.md"} == set(listed) - {"changelog.md", "contributing.md"}
    assert len(listed) == len(set(listed))


def test_links_to_headings_lead_to_headings():
    anchors = {page.name: {anchor(title) for title in headings(page)} for page in DOCS.glob("*.md")}
    for page in DOCS.glob("*.md"):
        for name, place in re.findall(r"\]\(([\w-]*\.md)?#([^)]+)\)", prose(page)):
            assert place in anchors[name or page.name], f"{page.name}: {name}#{place}"


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchor(title: str) -> str:
    """What Python-Markdown makes of a heading."""
    plain = re.sub(r"[`*]|\]\(.*?\)|\[", "", title).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
