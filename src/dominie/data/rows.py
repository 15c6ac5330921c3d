"""Sources as tokenised rows by split, made once and found again by what they were made from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dominie.core.errors import InputError, RunError
from dominie.core.io import file_manifest, is_intact, read_checksummed, write_checksummed
from dominie.data.child_processes import encode_batches
from dominie.data.conversations import read_conversations
from dominie.data.left_out import LeftOut, is_rich, summed
from dominie.data.row_store import Row, Rows, RowsWriter
from dominie.data.sources import (
    DIGEST_BYTES,
    SPLITS,
    content_fingerprint,
    held_out_prompts,
    prompt_digest,
    split_of_prompt,
    without_duplicates,
)
from dominie.data.tokenization import tokenizer_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence, Set

    from transformers import PreTrainedTokenizerBase

    from dominie.data.conversations import Conversation
    from dominie.data.sources import Source, Split

__all__ = ["PreparedSource", "Row", "Rows", "Summary", "held_out_of_all", "prepare"]

FORMAT_VERSION = 6
"""Raised when the same sources come to be read, split, encoded or stored in another way."""

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 2**22

_Tag = tuple["Split", bool]  # where a conversation goes, and whether it has tools or thoughts


@dataclass(frozen=True)
class Summary:
    """What became of the conversations of a source.

    `read = removed_duplicates + removed_held_out + too_long + kept`, always.

    Attributes:
        read: conversations in the source.
        removed_duplicates: those that stood before, word for word.
        removed_held_out: those to train on whose prompt is held out in some source of the recipe.
        truncated: those of `kept` that were cut at the right.
        too_long: those removed for their length: all of them where the source says `drop`, else
            those of whose answers nothing was left.
        kept: those in the three splits.
        beside: columns that only tasks and `where` use: how many conversations have each.
        unread: columns and keys that go nowhere, likewise.
        left_out: what the chat template leaves out of those of `kept`, by kind.
    """

    read: int
    removed_duplicates: int
    removed_held_out: int
    truncated: int
    too_long: int
    kept: int
    beside: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()

    def line(self, name: str) -> str:
        """One line that accounts for every conversation of the source `name`."""
        removed = self.removed_duplicates + self.removed_held_out
        return (
            f"{name}: read {self.read:,}, removed {removed:,} "
            f"({self.removed_duplicates:,} duplicates, {self.removed_held_out:,} held out), "
            f"truncated {self.truncated:,}, too long {self.too_long:,}, kept {self.kept:,}"
        )

    def columns_line(self, name: str) -> str:
        """One line on the columns that nothing is trained on; empty if there are none."""
        parts = []
        if self.beside:
            parts.append(f"for tasks and `where` alone: {', '.join(self.beside)}")
        if self.unread:
            counted = (f"{column} ({count:,} rows)" for column, count in self.unread.items())
            parts.append(f"read by nothing: {', '.join(counted)}")
        return f"{name}: columns not trained on, {'; '.join(parts)}" if parts else ""


@dataclass(frozen=True)
class PreparedSource:
    """The rows of a source by split, and what became of its conversations.

    Attributes:
        rich: split and number of the first row with tools or thoughts; None if there is none.
    """

    train: Rows
    validation: Rows
    test: Rows
    summary: Summary
    rich: tuple[Split, int] | None = None


def prepare(
    sources: Mapping[str, Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    cache: Path,
    progress: Callable[[str, int], None] | None = None,
    processes: int | None = None,
) -> dict[str, PreparedSource]:
    """Tokenise the sources of a recipe, or find what was tokenised before.

    Rows are found again by the content of the files, the tokenizer with its template, `max_length`,
    the fractions and the held-out prompts of all sources. They appear in `cache` at once and whole,
    so that an interruption leaves nothing half made and several processes may share it.

    Args:
        sources: by name; *all* sources of the recipe, since what one holds out no other may teach.
        tokenizer: a fast tokenizer with a chat template.
        max_length: tokens in the longest row.
        cache: folder of the tokenised rows, made if it is missing.
        progress: called now and then with a source's name and the conversations read of it.
        processes: how many tokenise a large source; by default one for each core, up to 16.

    Raises:
        InputError: a source that cannot be read or encoded, or of which nothing is left to learn.
        RunError: the rows cannot be written.
    """
    if max_length < 2:
        raise InputError(
            "no token can be predicted", expected="max_length of at least 2", found=str(max_length)
        )
    contents = {name: content_fingerprint(source) for name, source in sources.items()}
    try:
        held_out = held_out_of_all(sources, contents, cache)
        shared = (
            FORMAT_VERSION,
            tokenizer_fingerprint(tokenizer),
            max_length,
            hashlib.sha256(b"".join(sorted(held_out))).hexdigest(),
        )
        prepared = {}
        for name, source in sources.items():
            fractions = source.validation_fraction, source.test_fraction
            folder = cache / _key(*shared, contents[name], *fractions, source.too_long)
            if folder.exists() and not is_intact(folder, folder / "prepared.json"):
                shutil.rmtree(folder)  # a disk has damaged it
            if not folder.exists():
                _make(folder, source, tokenizer, max_length, held_out, progress, processes)
            prepared[name] = _opened(folder)
    except OSError as error:  # those of the sources are InputErrors by now
        raise RunError(
            "the tokenised rows cannot be written or read",
            where=str(cache),
            found=error.strerror or str(error),
            do="make room, or choose another folder",
        ) from error
    return prepared


def _opened(folder: Path) -> PreparedSource:
    record = read_checksummed(folder / "prepared.json")
    rows = {split: Rows(folder / f"{split}.arrow", record["digests"][split]) for split in SPLITS}
    lost = tuple(LeftOut(**each) for each in record["summary"].pop("left_out"))
    summary, rich = Summary(**record["summary"], left_out=lost), record.get("rich")
    return PreparedSource(**rows, summary=summary, rich=rich and (rich[0], rich[1]))


def _make(
    folder: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    held_out: Set[bytes],
    progress: Callable[[str, int], None] | None,
    processes: int | None,
) -> None:
    """Tokenise a source into `folder`, which appears when it is complete."""
    counts: Counter[str] = Counter()
    columns: dict[str, Counter[str]] = {"beside": Counter(), "unread": Counter()}
    left_out: list[LeftOut] = []
    rich: tuple[Split, int] | None = None
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        made = Path(scratch) / "rows"
        made.mkdir()
        writers = {split: RowsWriter(made / f"{split}.arrow") for split in SPLITS}
        try:
            batches = _batches(_assigned(source, held_out, counts, columns))
            with closing(encode_batches(tokenizer, batches, processes=processes)) as encoded:
                for batch in encoded:
                    for (split, is_rich), (row, lost) in batch:
                        if len(row.input_ids) > max_length - source.prompts:  # room for one
                            row = row.first(max_length)
                            # The first token is never predicted.
                            if source.too_long == "drop" or not any(row.supervised[1:]):
                                counts["too_long"] += 1
                                continue
                            counts["truncated"] += 1
                        counts["kept"] += 1
                        left_out = summed(lost, left_out)
                        if is_rich and rich is None:
                            rich = split, writers[split].rows
                        writers[split].add(row)
                    if progress is not None:
                        progress(source.name, counts["read"])
        finally:
            digests = {split: writer.close() for split, writer in writers.items()}
        names = {f.name for f in dataclasses.fields(Summary)} - columns.keys() - {"left_out"}
        summary = Summary(
            **{name: counts[name] for name in names},
            beside=dict(columns["beside"]),
            unread=dict(columns["unread"]),
            left_out=tuple(left_out),
        )
        if not writers["train"].rows and source.held_out_fraction < 1:
            raise _nothing_left(source, summary, max_length)
        record = {"summary": dataclasses.asdict(summary), "digests": digests, "rich": rich}
        write_checksummed(made / "prepared.json", record | {"files": file_manifest(made)})
        _appear(made, folder)


def _batches(
    assigned: Iterator[tuple[_Tag, Conversation]],
) -> Iterator[list[tuple[_Tag, Conversation]]]:
    """Conversations in batches that have a bounded number of rows and, nearly, of characters."""
    batch: list[tuple[_Tag, Conversation]] = []
    characters = 0
    for tag, conversation in assigned:
        batch.append((tag, conversation))
        characters += sum(len(message["content"]) for message in conversation.messages)
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _assigned(
    source: Source,
    held_out: Set[bytes],
    counts: Counter[str],
    columns: Mapping[str, Counter[str]],
) -> Iterator[tuple[_Tag, Conversation]]:
    """The conversations of a source that are used, each with its split; the others are counted."""
    for conversation in without_duplicates(read_conversations(source)):
        counts["read"] += 1
        if conversation is None:
            counts["removed_duplicates"] += 1
            continue
        prompt = prompt_digest(conversation)
        split = split_of_prompt(prompt, source)
        if split == "train" and prompt in held_out:
            counts["removed_held_out"] += 1
            continue
        columns["beside"].update(list(conversation.fields))  # a mapping would add up its values
        columns["unread"].update(conversation.unread)
        yield (split, is_rich(conversation)), conversation


def held_out_of_all(
    sources: Mapping[str, Source], contents: Mapping[str, str], cache: Path
) -> set[bytes]:
    """Hashes of the prompts that any source holds out, kept in `cache` by the source's content."""
    cache.mkdir(parents=True, exist_ok=True)
    return {p for name in sources for p in _held_out_prompts(sources[name], contents[name], cache)}


def _held_out_prompts(source: Source, content: str, cache: Path) -> set[bytes]:
    """`held_out_prompts`, read from the cache where the source was read before."""
    if not source.held_out_fraction:
        return set()
    key = _key(FORMAT_VERSION, content, source.validation_fraction, source.test_fraction)
    path = cache / f"{key}.held_out"
    whole = path.read_bytes() if path.exists() else b""
    if not whole or _sealed([whole[DIGEST_BYTES:]]) != whole:
        whole = _sealed(sorted(held_out_prompts(source)))
        with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as scratch:
            made = Path(scratch) / "prompts"
            made.write_bytes(whole)
            _appear(made, path)
    return {whole[at : at + DIGEST_BYTES] for at in range(DIGEST_BYTES, len(whole), DIGEST_BYTES)}


def _sealed(prompts: Sequence[bytes]) -> bytes:
    """The prompts after a hash of them all."""
    joined = b"".join(prompts)
    return hashlib.blake2b(joined, digest_size=DIGEST_BYTES).digest() + joined


def _appear(made: Path, path: Path) -> None:
    """Move what was made to where it is looked for, unless another process was first."""
    try:
        made.replace(path)
    except OSError:
        if not path.exists():
            raise


def _nothing_left(source: Source, summary: Summary, max_length: int) -> InputError:
    advice = {
        "removed_held_out": "this source repeats what others hold out: hold out less of them",
        "too_long": f"raise max_length, now {max_length}, or shorten the conversations",
        "kept": "hold out less, or give more data; fractions that sum to 1 mean evaluation alone",
    }
    most = max(advice, key=lambda reason: getattr(summary, reason))
    return InputError(
        "nothing is left to train on",
        where=f"source {source.name}, path {source.path}",
        expected="at least one conversation in the train split",
        found=summary.line(source.name),
        do=advice[most],
    )


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
