"""Prints one line for each source file; `--write` updates README.md's map and docs/files.md."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
START, END = "<!-- map -->", "<!-- /map -->"
HEAD = """# Source files

One line for each file, from its docstring; [README](../README.md#the-map) has one for each package.
[CONTRIBUTING](../CONTRIBUTING.md) says which package may import which. `make pages` writes this.
"""


def packages() -> list[Path]:
    """The folders of the package, its root first."""
    root = SOURCE / "dominie"
    return [root, *sorted(path.parent for path in root.glob("*/**/__init__.py"))]


def package_map() -> str:
    """The packages, each with the first sentence of its docstring."""
    shown = {f"{path.relative_to(SOURCE).as_posix()}/": path for path in packages()[1:]}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {_purpose(p / '__init__.py')}" for name, p in shown.items())


def readme_with_map(text: str) -> str:
    """README.md with the map of today."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n```\n{package_map()}\n```\n{END}{after}"


def files_page() -> str:
    """docs/files.md: every file of every package, each with its purpose."""
    parts = [HEAD]
    for folder in packages():
        files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        rows = [f"| `{path.name}` | {_purpose(path)} |" for path in files]
        name, purpose = folder.relative_to(SOURCE).as_posix(), _purpose(folder / "__init__.py")
        head = [f"## {name}", "", purpose, "", "| file | purpose |", "|---|---|"]
        parts.append("\n".join([*head, *rows, ""]))
    return "\n".join(parts)


def _purpose(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split())


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(readme_with_map(readme.read_text(encoding="utf-8")), encoding="utf-8")
        (ROOT / "docs" / "files.md").write_text(files_page(), encoding="utf-8")
    else:
        print(package_map())
