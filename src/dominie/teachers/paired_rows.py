"""Rows of a student beside the same conversations in its teacher's tokens, made once and kept.

They are found by the student's row, wherever it stands in a batch: its tokens and which of them are
supervised. What becomes of the supervised tokens is counted while they are made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dominie.core.errors import RunError
from dominie.core.io import file_manifest, is_intact, read_checksummed, write_checksummed
from dominie.data.conversations import read_conversations
from dominie.data.paired_text import Paired, paired
from dominie.data.shards import Entry, Shards, ShardWriter
from dominie.data.sources import content_fingerprint, without_duplicates
from dominie.data.token_bytes import Vocabularies, VocabularyMap, token_bytes, vocabulary_map
from dominie.data.tokenization import tokenizer_fingerprint
from dominie.teachers.cached import key_of
from dominie.teachers.span_teacher import Asked, asked_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dominie.data.batch import Span
    from dominie.data.formats import Conversation
    from dominie.data.sources import Source

FORMAT_VERSION = 1
"""Raised when the same conversations come to be paired or stored in another way."""
_BATCH_ROWS = 64
_RECORD = "pairs.json"
_REMEDY = "remove the folder; it is made again"


@dataclass(frozen=True)
class Alignment:
    """What becomes of the supervised tokens of a source.

    Attributes:
        tokens: how many there are.
        direct: those whose whole distribution is compared.
        chunks: those that are compared by the likelihood of a chunk, if the teacher finds it
            likely that a boundary follows.
        space: those that are left out as white space.
        written: tokens in which the teacher writes these answers.
        same: those of them that are a token of the student as they are.
        unmapped: those that no token of the student begins.
    """

    tokens: int = 0
    direct: int = 0
    chunks: int = 0
    space: int = 0
    written: int = 0
    same: int = 0
    unmapped: int = 0

    def line(self, name: str, teacher: str) -> str:
        """One line on the source `name`."""

        def share(part: int, whole: int) -> str:
            return f"{100 * part / max(whole, 1):.1f} %"

        apart = self.tokens - self.direct - self.chunks - self.space
        return (
            f"{name}: of {self.tokens:,} supervised tokens {share(self.direct, self.tokens)} are "
            f"compared with {teacher}'s distribution, up to {share(self.chunks, self.tokens)} by "
            f"the likelihood of a chunk; {share(self.space, self.tokens)} are white space and left "
            f"out, {share(apart, self.tokens)} have no counterpart. Of the tokens in which "
            f"{teacher} writes these answers {share(self.same, self.written)} are tokens of the "
            f"student, {share(self.unmapped, self.written)} begin with none"
        )


class PairedRows:
    """Pairs by the student's rows.

    Args:
        folders: that `prepare_pairs` has made.
        words: the tokens of both.
    """

    def __init__(self, folders: Sequence[Path], words: Vocabularies) -> None:
        self.folders, self.words = list(folders), words
        self._rows = [Shards(folder, remedy=_REMEDY) for folder in folders]

    def of(self, span: Span) -> Paired:
        """The pair of a conversation in a batch.

        Raises:
            RunError: it is none of those that were paired.
        """
        key = key_of(span.input_ids, span.taught)
        for rows in self._rows:
            if (entry := rows.get(key)) is not None:
                return _decoded(entry.code)
        raise RunError(
            "a conversation is not known in the teacher's tokens",
            where=", ".join(map(str, self.folders)),
            found=f"no row {key.hex()}",
            do=_REMEDY,
        )


def vocabularies(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    cache: Path,
    fingerprints: Sequence[str],
) -> Vocabularies:
    """The bytes of both tokenizers, and the map between them, found again by `fingerprints`.

    Raises:
        InputError: one of them is not a fast tokenizer.
    """
    tables = token_bytes(student), token_bytes(teacher)
    key = _key(FORMAT_VERSION, *fingerprints)
    path = cache / f"{key}.tokens.npy"
    sizes = len(tables[1]), len(tables[0])
    try:
        both = np.load(path, allow_pickle=False)
        longest, fold, end = np.split(both, np.cumsum(sizes))
        if not len(end) and both.dtype == np.int64:
            return Vocabularies(*tables, VocabularyMap(longest, fold, _same(*tables)))
    except (OSError, ValueError):
        pass
    made = vocabulary_map(tables[1], tables[0])
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as scratch:
        np.save(Path(scratch) / "map.npy", np.concatenate([made.longest, made.fold]))
        (Path(scratch) / "map.npy").replace(path)
    return Vocabularies(*tables, made)


def _same(student: Any, teacher: Any) -> bool:
    return list(student.of) == list(teacher.of)


def pair_sources(
    sources: Sequence[Source],
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    **options: Any,
) -> tuple[PairedRows, dict[str, tuple[Path, Alignment]]]:
    """Pair several sources with the tokens of one teacher; options are those of `prepare_pairs`.

    Returns:
        The pairs of all, and what `prepare_pairs` returns of each source by its name.
    """
    prints = tokenizer_fingerprint(student), tokenizer_fingerprint(teacher)
    words = vocabularies(student, teacher, cache=options["cache"], fingerprints=prints)
    made = {
        each.name: prepare_pairs(each, student, teacher, words, fingerprints=prints, **options)
        for each in sources
    }
    return PairedRows([path for path, _ in made.values()], words), made


def prepare_pairs(
    source: Source,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    words: Vocabularies,
    *,
    fingerprints: Sequence[str],
    max_length: int,
    teacher_length: int | None,
    cache: Path,
    progress: Callable[[str, int], None] | None = None,
) -> tuple[Path, Alignment]:
    """Pair the conversations of a source, or find what was paired before.

    Args:
        source: whose conversations.
        student: fast tokenizer with a chat template.
        teacher: likewise.
        words: the tokens of both.
        fingerprints: of both tokenizers.
        max_length: tokens in the student's longest row.
        teacher_length: in the teacher's; what lies behind is not compared. None is no bound.
        cache: folder of the tokenised rows.
        progress: called now and then with the source's name and the conversations read of it.

    Returns:
        The folder, whose name is a hash of all that it depends on, and what the pairs come to.

    Raises:
        InputError: a conversation that cannot be rendered or encoded for either model.
        RunError: the pairs cannot be written.
    """
    key = _key(
        FORMAT_VERSION,
        "pairs",
        *fingerprints,
        content_fingerprint(source),
        max_length,
        teacher_length,
    )
    folder = cache / key
    try:
        if folder.exists() and not is_intact(folder, folder / _RECORD):
            shutil.rmtree(folder)  # a disk has damaged it
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as scratch:
                made = Path(scratch) / "pairs"
                made.mkdir()
                counts: Counter[str] = Counter()
                read = 0
                with ShardWriter(made) as writer:
                    for batch in _batches(source):
                        found = paired(batch, student, teacher, (words.student, words.teacher))
                        entries = []
                        for conversation, (one, pair) in zip(batch, found, strict=True):
                            row = one.row(conversation).as_arrays().first(max_length)
                            pair = pair.first(teacher_length)
                            taught = np.append(row.supervised[1:], False)
                            asked = asked_of(pair, row.input_ids, taught, words)
                            counts.update(_counts(asked, pair, taught, words))
                            code = _encoded(pair)
                            key_of_it = key_of(row.input_ids, taught)
                            entries.append(Entry(key_of_it, int(taught.sum()), code))
                        writer.add(entries)
                        read += len(batch)
                        if progress is not None:
                            progress(source.name, read)
                alignment = asdict(Alignment(**counts))
                record = {"alignment": alignment, "files": file_manifest(made)}
                write_checksummed(made / _RECORD, record)
                try:
                    made.replace(folder)
                except OSError:
                    if not folder.exists():  # else another process was first
                        raise
        return folder, Alignment(**read_checksummed(folder / _RECORD)["alignment"])
    except OSError as error:
        raise RunError(
            "the rows in the teacher's tokens cannot be written or read",
            where=str(cache),
            found=error.strerror or str(error),
            do="make room, or choose another folder",
        ) from error


def _batches(source: Source) -> Iterator[list[Conversation]]:
    """The conversations of a source that have an answer, some at a time."""
    found = (each for each in without_duplicates(read_conversations(source)) if each is not None)
    answered = (each for each in found if not each.prompt)
    while batch := list(islice(answered, _BATCH_ROWS)):
        yield batch


def _counts(asked: Asked, pair: Paired, taught: Any, words: Vocabularies) -> dict[str, int]:
    """What `Alignment` counts, of one conversation."""
    longest, theirs = words.mapped.longest, pair.teacher_ids[asked.row.supervised]
    lengths = words.student.lengths[longest[theirs].clip(min=0)]
    mapped = longest[theirs] >= 0
    return {
        "tokens": int(taught.sum()),
        "direct": len(asked.direct.first),
        "chunks": int((asked.whole.last + 1 - asked.begin).sum()),
        "space": asked.space,
        "written": len(theirs),
        "same": int((mapped & (lengths == words.teacher.lengths[theirs])).sum()),
        "unmapped": int((~mapped).sum()),
    }


def _encoded(pair: Paired) -> bytes:
    arrays = (pair.student_ends, pair.teacher_ids, pair.teacher_ends)
    sizes = struct.pack("<3I", len(pair.text), len(arrays[0]), len(arrays[1]))
    return sizes + pair.text + b"".join(each.astype("<i4").tobytes() for each in arrays)


def _decoded(code: bytes) -> Paired:
    text, ours, theirs = struct.unpack("<3I", code[:12])
    columns = np.frombuffer(code, "<i4", offset=12 + text).astype(np.int32)
    student_ends, teacher_ids, teacher_ends = np.split(columns, [ours, ours + theirs])
    return Paired(code[12 : 12 + text], student_ends, teacher_ids, teacher_ends)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
