"""What MkDocs does beyond its settings: formulas as MathML, links out of docs/, pages of the root.

What a page links to outside docs/ is copied beside the pages; folders have no page to link to.

Formulas are written as `$…$` and `$$…$$`, which GitHub renders too. They become MathML when the
site is built, which every browser draws by itself: no script and no font is fetched.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
#: Pages of the repository's root, and their names in the site.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_TO_FOLDER = re.compile(r"\[([^\]\[]*)\]\(([^)#\s:]+)\)")
_LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages of the root, and every file outside docs/ that a page links to."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_in_site(text, ROOT)))
    for path in sorted(_linked_outside()):
        place = _place(path)
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turns links out of docs/ to the copies beside the pages."""
    return _in_site(markdown, ROOT / "docs")


def on_page_content(html_text: str, **_: Any) -> str:
    """Turns formulas into MathML."""
    return _FORMULA.sub(_mathml, html_text)


def _mathml(found: re.Match[str]) -> str:
    block = found[1] == "div"
    formula = convert(html.unescape(found[2]).strip(), display="block" if block else "inline")
    return f'<div class="formula">{formula}</div>' if block else formula


def _in_site(markdown: str, folder: Path) -> str:
    """Links of a page in `folder` of the repository as links of a page of the site."""

    def moved(found: re.Match[str]) -> str:
        target = _target(folder, found[2])
        if target is None or target.parts[0] == "docs":
            inside = target.relative_to("docs").as_posix() if target else found[2]
            return f"{found[1]}{inside}{found[3] or ''})"
        place = PAGES.get(target.as_posix()) or _place(target)
        return f"{found[1]}{place}{found[3] or ''})"

    def without_folder(found: re.Match[str]) -> str:
        target = _target(folder, found[2])
        return found[1] if target and (ROOT / target).is_dir() else found[0]

    return _LINK.sub(moved, _TO_FOLDER.sub(without_folder, markdown))


def _place(path: Path) -> str:
    """Where a copy of a file outside docs/ lies in the site, as a text that browsers show."""
    return f"files/{path.as_posix()}.txt"


def _linked_outside() -> set[Path]:
    """Files of the repository outside docs/ that its pages link to."""
    found = set()
    pages = [(ROOT / "docs", path) for path in (ROOT / "docs").glob("*.md")]
    for folder, page in (*pages, *((ROOT, ROOT / name) for name in PAGES)):
        for link in _LINK.finditer(page.read_text(encoding="utf-8")):
            target = _target(folder, link[2])
            if target and target.parts[0] != "docs" and target.as_posix() not in PAGES:
                found.add(target)
    return {path for path in found if (ROOT / path).is_file()}


def _target(folder: Path, link: str) -> Path | None:
    """What a relative link names, from the root of the repository; None where it is not there."""
    path = posixpath.normpath(posixpath.join(folder.relative_to(ROOT).as_posix(), link))
    return Path(path) if not path.startswith("..") and (ROOT / path).exists() else None
