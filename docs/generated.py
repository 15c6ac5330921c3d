"""What the scripts of generated pages have in common: they print their page, or write it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def say_or_write(path: Path, page: str) -> None:
    """Prints a page; with `--write` on the command line puts it into its file."""
    if "--write" in sys.argv:
        path.write_text(page, encoding="utf-8")
        print(f"wrote {path.name}")
    else:
        print(page, end="")
