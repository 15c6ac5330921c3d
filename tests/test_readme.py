"""The README stays true."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import dominie
from dominie.recipe import load_recipe

ROOT = Path(__file__).parents[1]


def test_the_map_of_packages_and_the_list_of_files_are_today_s():
    spec = importlib.util.spec_from_file_location("file_map", ROOT / "docs" / "file_map.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.readme_with_map(readme) == readme, "run: make pages"
    files = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert module.files_page() == files, "run: make pages"


def test_the_example_recipe_is_valid(tmp_path: Path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text(example)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.stages["align"].teacher_on("ecommerce") == "expert"


def test_the_citation_names_the_paper_and_this_version():
    yaml = YAML(typ="safe", pure=True)
    cited = yaml.load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == dominie.__version__
    paper = cited["preferred-citation"]
    assert paper["title"] == "A Teacher Is Worth A Million Instructions"
    assert paper["url"].endswith("2406.19112")
    assert len(paper["authors"]) == 5
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.load(form.read_text(encoding="utf-8")), form


def linked(text: str) -> list[str]:
    parts = text.split("](")[1:]
    return [part.split(")")[0] for part in parts if not part.startswith("http")]


@pytest.mark.parametrize("page", ["README.md", *sorted(p.name for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str):
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    for link in linked(path.read_text(encoding="utf-8")):
        assert (path.parent / link.split("#")[0]).exists(), link
