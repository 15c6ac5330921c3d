"""Prints one line for each source file, from its docstring; `--write` puts them into README.md."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- map -->", "<!-- /map -->"


def file_map() -> str:
    """The files of the package by folder, each with the first sentence of its docstring."""
    package = ROOT / "src" / "dominie"
    lines = []
    for folder in [package, *sorted(p for p in package.rglob("*") if (p / "__init__.py").exists())]:
        files = sorted(folder.glob("*.py"), key=lambda p: (p.name != "__init__.py", p.name))
        shown = [path for path in files if _purpose(path)]
        name = folder.relative_to(ROOT / "src").as_posix()
        lines.append(f"{name}/")
        width = max((len(path.name) for path in shown), default=0)
        lines += [f"  {path.name:<{width}}  {_purpose(path)}" for path in shown]
    return "\n".join(lines)


def readme_with_map(text: str) -> str:
    """README.md with the map of today."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n```\n{file_map()}\n```\n{END}{after}"


def _purpose(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split())


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        readme.write_text(readme_with_map(readme.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(file_map())
