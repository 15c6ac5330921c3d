"""A teacher cache on disk: its identity, its manifest, and its rows by key."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError, RunError
from dominie.core.io import is_inside, read_object_strictly
from dominie.data.shards import Entry, Shards, damaged_shards, shard_files
from dominie.teachers.cache_codec import FORMAT_VERSION, Coder, Damaged, Decoded
from dominie.teachers.cache_sampling import SCHEMES, CacheSettings, TokenStats, load_token_stats

MANIFEST = "manifest.json"
_VOCABULARY = "vocabulary.npy"
_MANIFEST_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that a stored probability depends on, the row aside.

    Attributes:
        teacher: the recipe's name of it, for people alone.
        revision: its commit on the hub, if it is from there; for people alone.
        weights: fingerprint of its weights.
        tokenizer: fingerprint of the tokenizer with its chat template.
        vocabulary: ids there are.
        temperature: of the softmax.
        scheme: `CacheSettings.identity`.
    """

    teacher: str
    revision: str | None
    weights: str
    tokenizer: str
    vocabulary: int
    temperature: float
    scheme: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of all that counts."""
        text = json.dumps([FORMAT_VERSION, *self.compared().items()], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def compared(self) -> dict[str, Any]:
        """What has to be equal, by the name it has in a message."""
        return {
            "teacher (its weights)": self.weights,
            "tokenizer or chat template": self.tokenizer,
            "vocabulary": self.vocabulary,
            "temperature": self.temperature,
            "scheme": dict(self.scheme),
        }


class Cache:
    """A cache that exists and is the one that was asked for.

    Args:
        folder: with a manifest.
        identity: what it has to be.
        remedy: what to do about whatever is wrong, for the messages.

    Raises:
        InputError: there is none, it is of another identity, or its files are damaged.
    """

    def __init__(self, folder: Path, identity: Identity, *, remedy: str) -> None:
        self.folder, self.identity, self.remedy = folder, identity, remedy
        manifest = _read_manifest(folder, remedy)
        _check(manifest, identity, folder)
        self.manifest: Mapping[str, Any] = manifest
        self.vocabulary = _read_vocabulary(folder, manifest, remedy, identity)
        self.settings = CacheSettings(**identity.scheme)
        #: What its rows and shards are marked with: another's decode to other tokens.
        self.owner = f"{identity.digest}-{manifest['vocabulary_file']}".encode()
        self.coder = Coder.of(self.vocabulary, self.settings, self.owner)
        self._trusted: frozenset[str] = frozenset()

    @cached_property
    def rows(self) -> Shards:
        """The rows as they were when they were first looked at; every byte is checked then.

        Raises:
            InputError: a shard is damaged, or another cache's.
        """
        return Shards(self.folder, remedy=self.remedy, trusted=self._trusted, owner=self.owner)

    def reread(self) -> None:
        """Read the folder again when rows are next asked for, and check what has been added."""
        if "rows" in self.__dict__:
            self._trusted |= self.__dict__.pop("rows").checked

    def drop_damaged(self) -> list[Path]:
        """Delete the shards whose rows cannot be trusted, and say which."""
        damaged = damaged_shards(self.folder, self._trusted)
        for path in damaged:
            path.unlink()
        self._trusted |= {path.name for path in shard_files(self.folder)}
        return damaged

    def decoded(self, key: bytes, tokens: int) -> Decoded:
        """What was stored of a conversation.

        Raises:
            RunError: nothing was, or not what was written.
        """
        entry = self.rows.get(key)
        if entry is None:
            raise RunError(
                "a conversation is not in the cache",
                where=str(self.folder),
                found=f"no row {key.hex()} among {len(self.rows):,}",
                do=self.remedy,
            )
        try:
            stored = self.coder.decoded(entry.code, key)
            if stored.tokens != tokens:
                raise Damaged(f"{stored.tokens} tokens in the place of {tokens}")
        except Damaged as error:
            raise RunError(
                "a row of the cache is damaged",
                where=str(self.folder),
                found=f"row {key.hex()}: {error}",
                do=f"remove {self.folder}; {self.remedy}",
            ) from None
        return stored

    def is_intact(self, entry: Entry) -> bool:
        """Whether a row can be read back."""
        try:
            return self.coder.decoded(entry.code, entry.key).tokens == entry.tokens
        except Damaged:
            return False


def create(
    folder: Path,
    identity: Identity,
    vocabulary: TokenStats,
    made_with: Mapping[str, str],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a manifest, unless another process was first: then its one counts.

    Args:
        folder: of the cache.
        identity: of what it will hold.
        vocabulary: measured on its first rows.
        made_with: versions of the libraries.
        notes: further entries of the manifest, of a server that the rows come from.
    """
    scratch = folder / f".making-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{vocabulary.save(scratch)}.{_VOCABULARY}"
        scratch.replace(folder / name)
        manifest = {
            "format": FORMAT_VERSION,
            **dataclasses.asdict(identity),
            "vocabulary_file": name,
            "made_with": dict(made_with),
            **(notes or {}),
        }
        with scratch.open("w", encoding="utf-8") as out:
            out.write(json.dumps(manifest, indent=1) + "\n")
            out.flush()
            os.fsync(out.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(scratch, folder / MANIFEST)
    except OSError as error:
        raise RunError(
            "the cache cannot be written",
            where=str(folder),
            found=error.strerror or str(error),
            do="make room, or choose another place",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def exists(folder: Path) -> bool:
    """Whether a cache was begun there."""
    return (folder / MANIFEST).exists()


def _read_manifest(folder: Path, remedy: str) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_object_strictly(path, most=_MANIFEST_BYTES)
    except FileNotFoundError:
        raise InputError("there is no cache", where=str(folder), do=remedy) from None
    except (OSError, ValueError) as error:
        raise InputError(
            "the manifest of the cache cannot be read",
            where=str(path),
            found=str(error),
            do=f"remove {folder}; {remedy}",
        ) from None
    return manifest


def _check(manifest: Mapping[str, Any], identity: Identity, folder: Path) -> None:
    """Refuse a cache that does not hold what is asked for."""
    version, scheme = manifest.get("format"), manifest.get("scheme")
    name = scheme.get("scheme") if isinstance(scheme, dict) else f"no mapping: {scheme!r}"
    for what, known, found in (
        ("format", str(FORMAT_VERSION), version if version != FORMAT_VERSION else None),
        ("scheme", ", ".join(SCHEMES), name if name not in SCHEMES else None),
    ):
        if found is not None or (what == "format" and version is None):
            raise InputError(
                f"the cache has an unknown {what}",
                where=str(folder / MANIFEST),
                expected=known,
                found=str(found),
                do="use the dominie that wrote it, or remove the folder and make it again",
            )
    fields = {field.name for field in dataclasses.fields(Identity)}
    try:
        found = Identity(**{name: manifest[name] for name in fields}).compared()
    except KeyError as error:
        raise InputError(
            "the manifest of the cache is incomplete",
            where=str(folder / MANIFEST),
            found=f"no {error.args[0]}",
            do="remove the folder and make it again",
        ) from None
    for what, wanted in identity.compared().items():
        if found[what] != wanted:
            raise InputError(
                f"the cache was made with another {what}",
                where=str(folder / MANIFEST),
                expected=str(wanted),
                found=str(found[what]),
                do="name another folder (or none) in the stage's cache, or remove this one",
            )


def _read_vocabulary(
    folder: Path, manifest: Mapping[str, Any], remedy: str, identity: Identity
) -> TokenStats:
    name = str(manifest.get("vocabulary_file"))
    path = folder / name
    try:
        if not is_inside(name):
            raise ValueError("it leads out of the cache's folder")
        return load_token_stats(path, identity.vocabulary, identity.scheme.get("pooled", 0.0))
    except (OSError, ValueError) as error:
        raise InputError(
            "the vocabulary of the cache cannot be read",
            where=str(path),
            found=getattr(error, "strerror", None) or str(error),
            do=f"remove {folder}; {remedy}",
        ) from None
