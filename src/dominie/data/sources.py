"""A source: a name for conversations, where they lie and how much of them is held out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dominie.data.benchmarks import COMPANION
from dominie.errors import InputError

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""The file formats that can be read, by the end of the file's name."""
_IN_FOLDERS = (".jsonl", ".json", ".parquet")  # a CSV among them is as often a table of contents

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|ya?ml|arrow|pkl|gz|zst|zip|xlsx?)$", re.I)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Conversations under one name.

    Args:
        name: what the recipe, the logs and the summary call it.
        path: a `.jsonl`, `.json` or `.parquet` file, a folder of such files, or else the id of a
            data set on the Hugging Face hub.
        validation_fraction: fraction of the prompts held out for evaluation during training.
        test_fraction: fraction of the prompts held out for evaluation after training.
        subset: configuration of the hub data set; local files have none.
        split: split of the hub data set that is read; local files have none.
        too_long: what becomes of a conversation longer than `max_length`: `truncate` keeps its
            beginning, `drop` removes it. Both are counted.
        where: fields and the values they must have; other rows are passed over, as if the file did
            not hold them.

    Raises:
        InputError: for a fraction outside 0 to 1, fractions that sum to more than 1, or another
            value of `too_long`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    name: str
    path: str
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    subset: str | None = None
    split: str = "train"
    too_long: Literal["truncate", "drop"] = "truncate"
    where: dict[str, str | int | float | bool] | None = None

    def __post_init__(self) -> None:
        for key in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise InputError(
                    f"{key} is not a fraction",
                    where=f"source {self.name}",
                    expected="a number from 0 to 1",
                    found=repr(getattr(self, key)),
                )
        if self.held_out_fraction > 1:
            raise InputError(
                "the held-out fractions are more than the whole",
                where=f"source {self.name}",
                expected="validation_fraction + test_fraction of at most 1",
                found=f"{self.validation_fraction} + {self.test_fraction}",
            )
        if self.too_long not in ("truncate", "drop"):
            raise InputError(
                "too_long names no treatment",
                where=f"source {self.name}",
                expected="truncate or drop",
                found=repr(self.too_long),
            )

    @property
    def held_out_fraction(self) -> float:
        """Fraction of the prompts that is not trained on."""
        # Rounded so that 0.9 + 0.1 is the whole and nothing more.
        return round(self.validation_fraction + self.test_fraction, 12)

    @property
    def is_local(self) -> bool:
        """Whether the path names files here: it exists, or it could not be the id of a data set."""
        return (
            Path(self.path).expanduser().exists()
            or _FILE_SUFFIX.search(self.path) is not None
            or _HUB_ID.fullmatch(self.path) is None
        )

    def local_files(self) -> list[Path]:
        """The files of a local source, in the order of their names.

        Raises:
            InputError: nothing lies there, or no file of a format that can be read.
        """
        path = Path(self.path).expanduser()
        formats = ", ".join(DATA_SUFFIXES)
        if path.is_dir():
            files = sorted(
                p for p in path.iterdir() if p.suffix.lower() in _IN_FOLDERS and p.name != COMPANION
            )
            if not files:
                raise InputError(
                    "the folder holds no data file",
                    where=self.path,
                    expected=f"files ending in {', '.join(_IN_FOLDERS)}",
                    found=", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing",
                )
            return files
        if not path.exists():
            raise InputError(
                "there is no such file or folder",
                where=self.path,
                expected=f"a file ending in {formats}, or a folder of such files",
                found=f"nothing at {path.absolute()}",
                do=f"correct the path of source {self.name}",
            )
        if path.suffix.lower() not in DATA_SUFFIXES:
            raise InputError(
                "the name of this file does not tell a format that can be read",
                where=self.path,
                expected=f"a name ending in {formats}",
                found=path.suffix or "a name without an extension",
                do="convert the file, or rename it to what it is",
            )
        return [path]
