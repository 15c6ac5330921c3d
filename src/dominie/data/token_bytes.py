"""The bytes that tokens stand for, and the map from one vocabulary to another that follows.

Two tokenizers have nothing in common but the text. A token of a byte-level vocabulary is read
through GPT-2's table of characters, one of SentencePiece with its ▁ as a space and its `<0x0A>` as
a byte, one of WordPiece with a space before it unless it goes on with a word (`##`) or begins with
a sign.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dominie.core.errors import InputError
from dominie.data.assistant_spans import ends_of_turn

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

END = b"\xff"
"""Stands for the end of a turn, whichever token a tokenizer ends it with; no byte of UTF-8."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of each token of a vocabulary.

    Attributes:
        of: [V] bytes; None for a token that stands for no text, as special tokens do.
        spare: ids of bytes that are written as one only where no token has the character.
    """

    of: Sequence[bytes | None]
    spare: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.of)

    @cached_property
    def ids(self) -> Mapping[bytes, int]:
        """The id of each string of bytes: of several the first that is not spare."""
        found: dict[bytes, int] = {}
        for index in (*(i for i in range(len(self)) if i not in self.spare), *sorted(self.spare)):
            if each := self.of[index]:
                found.setdefault(each, index)
        return found

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[V] bytes of each token; 0 for one without text."""
        return np.fromiter((len(each or b"") for each in self.of), np.int64, len(self))

    @cached_property
    def _flat(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The bytes of all tokens one after the other, and where each begins."""
        joined = np.frombuffer(b"".join(each or b"" for each in self.of), np.uint8)
        return joined, np.cumsum(self.lengths) - self.lengths

    def joined(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """The bytes of tokens, one after the other."""
        flat, starts = self._flat
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        joined: NDArray[np.uint8] = flat[np.repeat(starts[ids], lengths) + within]
        return joined

    def beginning(self, first: bytes) -> NDArray[np.bool_]:
        """[V] whether a token begins with one of these bytes."""
        found = (each is not None and each[:1] != b"" and each[0] in first for each in self.of)
        return np.fromiter(found, np.bool_, len(self))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The bytes of each token; those that end a turn of the assistant are all `END`.

    Raises:
        InputError: the tokenizer is not a fast one, which alone says how its tokens are written.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "the bytes of its tokens are not known",
            where=str(tokenizer.name_or_path),
            expected="a fast tokenizer (tokenizer.json)",
            found=type(tokenizer).__name__,
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    read = _reader(state)
    vocabulary = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        found[index] = read(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        found[index] = None if added.special else added.content.encode()
    # Bytes that no text has stand for other things here.
    found = [None if each and (b"\xfe" in each or END in each) else each for each in found]
    ends = [*ends_of_turn(tokenizer), tokenizer.eos_token_id]
    for index in ends:
        if index is not None and index < len(found):
            found[index] = END
    spare = frozenset(i for t, i in vocabulary.items() if _BYTE.fullmatch(t)) - {*ends}
    # The end that answers have is the first of the ends by its place, not by its id.
    others = frozenset(e for e in ends[1:] if e is not None and e != ends[0])
    return TokenBytes(found, spare | others)


def _reader(state: Mapping[str, Any]) -> Any:
    """How a token is read as bytes; None of it where it cannot be."""
    kinds = {part["type"]: part for part in _parts(state.get("decoder"))}
    before = {part["type"] for part in _parts(state.get("pre_tokenizer"))}
    if "ByteLevel" in kinds or "ByteLevel" in before:
        table = {chr(c): b for b, c in zip(range(256), _byte_level_characters(), strict=True)}

        def byte_level(token: str) -> bytes | None:
            try:
                return bytes(table[character] for character in token)
            except KeyError:
                return None

        return byte_level
    if state["model"].get("type") in ("WordPiece", "WordLevel") and "Metaspace" not in before:
        prefix = state["model"].get("continuing_subword_prefix")

        def word(token: str) -> bytes:
            if prefix and token.startswith(prefix) and len(token) > len(prefix):
                return token[len(prefix) :].encode()
            return (" " + token if token[:1].isalnum() else token).encode()

        return word
    spaced = (
        "Metaspace" in kinds
        or "Metaspace" in before
        or "▁" in json.dumps([state.get("decoder"), state.get("normalizer")], ensure_ascii=False)
    )

    def piece(token: str) -> bytes:
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return (token.replace("▁", " ") if spaced else token).encode()

    return piece


def _parts(component: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a component of a tokenizer, in sequences too."""
    if component is None:
        return
    inner = [each for key in ("decoders", "pretokenizers") for each in component.get(key, ())]
    yield from (part for each in inner for part in _parts(each))
    if not inner:
        yield component


def _byte_level_characters() -> list[int]:
    """The character that byte-level vocabularies write for each byte (GPT-2's table)."""
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [byte if byte in kept else next(others) for byte in range(256)]


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """From the tokens of a teacher to those of a student.

    Attributes:
        longest: [V_t] the longest token of the student that a token of the teacher begins with, by
            their bytes; −1 if there is none.
        fold: [V_s] a student's token that no token of the teacher maps to is counted with the
            longest one that it begins with and that one does; every other with itself.
        same: whether both vocabularies have the same bytes under the same ids.
    """

    longest: NDArray[np.int64]
    fold: NDArray[np.int64]
    same: bool


def vocabulary_map(teacher: TokenBytes, student: TokenBytes) -> VocabularyMap:
    """Map every token of a teacher to the longest token of the student that it begins with.

    Byte-prefix mapping (BPM, arXiv 2607.22334). A token of the student which is longer than all of
    the teacher's that begin as it does could otherwise never be right: what the student gives it
    counts for the text that it begins with.
    """
    longest = _longest_prefixes(teacher.of, student.ids)
    reached = {student.of[i]: i for i in dict.fromkeys(longest.tolist()) if i >= 0}
    image = {each: i for each, i in reached.items() if each is not None}
    fold = _longest_prefixes(student.of, image)
    itself = np.arange(len(fold))
    kept = (fold < 0) | np.isin(itself, longest)
    same = len(teacher) == len(student) and list(teacher.of) == list(student.of)
    return VocabularyMap(longest, np.where(kept, itself, fold), same)


@dataclass(frozen=True, eq=False)
class Vocabularies:
    """The tokens of a student and of its teacher.

    Attributes:
        student: the bytes of its tokens.
        teacher: of the teacher's.
        mapped: from the teacher's tokens to the student's.
    """

    student: TokenBytes
    teacher: TokenBytes
    mapped: VocabularyMap


def _longest_prefixes(
    tokens: Sequence[bytes | None], known: Mapping[bytes, int]
) -> NDArray[np.int64]:
    """[tokens] the value of the longest key that each begins with; −1 if none is one."""
    most = max(map(len, known), default=0)
    found = np.full(len(tokens), -1, np.int64)
    for index, token in enumerate(tokens):
        if token:
            for length in range(min(len(token), most), 0, -1):
                if (value := known.get(token[:length])) is not None:
                    found[index] = value
                    break
    return found
