"""The files of a data path: one file, or those of a folder that are data."""

from __future__ import annotations

import re
from pathlib import Path

from dominie.core.errors import InputError, unreadable
from dominie.data.ecommerce_formats import META_FILE

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
"""The file formats that can be read, by the end of the file's name."""
_IN_FOLDERS = (".jsonl", ".json", ".parquet")  # a CSV among them is as often a table of contents
_NO_DATA = (META_FILE, "dataset_infos.json")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(ing|uation)?(?![a-z])", re.I)
_PACKED = re.compile(r"\.((jsonl?|parquet)\.(gz|zst|xz|bz2|zip)|arrow|tsv)$", re.I)


def expanded(text: str) -> Path:
    """A path with the home folder in the place of ~, and as it stands for an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def exists(path: Path, *, link: bool = False) -> bool:
    """Whether a file or folder lies at a path, or a `link`, even if that leads nowhere.

    Nothing can where the system takes no such name.
    """
    try:
        return path.exists() or (link and path.is_symlink())
    except (OSError, ValueError):  # too long, a NUL in it
        return False


def data_files(place: str, source: str) -> list[Path]:
    """The files of a local source, in the order of their names.

    Args:
        place: a file, or a folder; hidden files of a folder are no data, such as macOS makes.
        source: its name, for messages.

    Raises:
        InputError: nothing lies there, no file of a format that can be read, or a folder that is
            read otherwise.
    """
    path = expanded(place)
    if not exists(path, link=True):
        absolute = str(path.absolute())
        shown = absolute if absolute.isprintable() else repr(absolute)
        raise InputError(
            "there is no such file or folder",
            where=place[:200] if place.isprintable() else repr(place)[:200],
            expected=f"a file ending in {', '.join(DATA_SUFFIXES)}, or a folder of such files",
            found=f"nothing at {shown}" if len(shown) <= 200 else "a name that is too long",
            do=f"correct the path of source {source}",
        )
    if path.is_dir():
        return _files_in(path)
    _check_regular([path])
    if path.suffix.lower() not in DATA_SUFFIXES:
        raise InputError(
            "the name of this file does not tell a format that can be read",
            where=place,
            expected=f"a name ending in {', '.join(DATA_SUFFIXES)}",
            found=path.suffix or "a name without an extension",
            do="convert the file, or rename it to what it is",
        )
    return [path]


def _files_in(folder: Path) -> list[Path]:
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from error
    if {"dataset_dict.json", "state.json"} & set(names):
        raise InputError(
            "the folder was written by datasets.save_to_disk",
            where=str(folder),
            expected=f"files ending in {', '.join(_IN_FOLDERS)}",
            found=", ".join(names[:5]),
            do="write its rows as Parquet, in Python: datasets.load_from_disk(FOLDER)"
            f"{'[SPLIT]' if 'dataset_dict.json' in names else ''}.to_parquet('rows.parquet')",
        )
    files = [
        folder / name
        for name in names
        if Path(name).suffix.lower() in _IN_FOLDERS and name not in _NO_DATA
    ]
    if packed := [name for name in names if _PACKED.search(name)]:
        raise InputError(
            "the folder holds files of a format that cannot be read",
            where=str(folder),
            expected=f"files ending in {', '.join(_IN_FOLDERS)}",
            found=", ".join(packed[:5]),
            do="unpack or convert them, or move them elsewhere",
        )
    if not files:
        below = [n for n in names if (folder / n).is_dir() and _holds_data(folder / n)]
        raise InputError(
            "the folder holds no data file",
            where=str(folder),
            expected=f"files ending in {', '.join(_IN_FOLDERS)}",
            found=", ".join(names[:5]) or "nothing",
            do=f"name the folder of the files: {folder / below[0]}" if below else None,
        )
    splits = {match[1].lower(): file.name for file in files if (match := _SPLIT.match(file.name))}
    if len(splits) > 1:
        raise InputError(
            "the folder holds several splits, which would be read as one",
            where=str(folder),
            expected="the files of one split",
            found=", ".join(sorted(splits.values())),
            do="name one file, or move each split to a folder of its own; a split that is not to "
            "be trained on can be a source with test_fraction: 1.0",
        )
    _check_regular(files)
    return files


def _holds_data(folder: Path) -> bool:
    return any(path.suffix.lower() in _IN_FOLDERS for path in folder.iterdir())


def _check_regular(files: list[Path]) -> None:
    """Refuse what would be read for ever, or not at all: pipes, devices, folders, broken links."""
    for path in files:
        if not path.is_file():
            there = path.exists()
            raise InputError(
                "this is not a regular file",
                where=str(path),
                expected="a file of rows",
                found="a folder, a pipe or a device" if there else "a link that leads nowhere",
                do="copy the rows to a file, or remove it from the folder",
            )
