"""The structure that the package keeps: few files, short ones, one name each, few import layers."""

from __future__ import annotations

import ast
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dominie"
FILES = sorted(PACKAGE.rglob("*.py"))


def test_files_are_few_short_and_have_names_of_their_own():
    assert len(FILES) <= 225
    assert len([path for path in FILES if path.name == "__init__.py"]) <= 17
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := lines(p)) > 330}
    assert not long
    names = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_layers_are_few_and_name_packages():
    contracts = ConfigParser()
    contracts.read(ROOT / ".importlinter")
    layers = contracts["importlinter:contract:layers"]["layers"].split("\n")
    layers = [layer for layer in layers if layer]
    assert len(layers) <= 10
    named = {name.strip(" |:") for layer in layers for name in layer.split() if len(name) > 1}
    packages = {f"dominie.{p.parent.name}" for p in PACKAGE.glob("*/__init__.py")}
    assert named == packages


def test_no_two_files_import_each_other():
    """At import time; inside a function it is allowed, and hardly ever needed."""
    imports = {name_of(path): set(imported(path)) for path in FILES}
    for name, others in imports.items():
        for other in others & imports.keys():
            assert name not in imports[other], f"{name} and {other}"


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(path: Path) -> list[str]:
    """The modules that a file imports; of a package, those of which it imports names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    return [
        module
        for node in found
        for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        if not (PACKAGE.parent / node.module.replace(".", "/")).is_dir() or module != node.module
    ]
