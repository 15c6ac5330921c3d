"""A source: a name for conversations, where they are, their content hash, and what is held out."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from dominie.core.errors import InputError, hub_error, unreadable
from dominie.core.references import Reference
from dominie.data.conversations import read_conversations
from dominie.data.data_files import data_files, exists, expanded
from dominie.data.ecommerce_formats import meta_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dominie.data.conversations import Conversation
    from dominie.data.formats import Message

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|ya?ml|arrow|pkl|gz|zst|zip|xlsx?)$", re.I)


def is_local(path: str) -> bool:
    """Whether a path of data names files here: it exists, or could not be the id of a data set."""
    return (
        exists(expanded(path), link=True)
        or _FILE_SUFFIX.search(path) is not None
        or _HUB_ID.fullmatch(path) is None
    )


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
        prompts: whether its conversations end where an answer is asked for, for stages whose
            student or model writes it. Last answers that are there are left out.

    Raises:
        InputError: for a fraction outside 0 to 1, fractions that sum to more than 1, or another
            value of `too_long`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    name: str
    path: Annotated[str, Reference("data")]
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    subset: str | None = None
    split: str = "train"
    too_long: Literal["truncate", "drop"] = "truncate"
    where: dict[str, str | int | float | bool] | None = None
    prompts: bool = False

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
        if self.prompts and self.held_out_fraction:
            raise InputError(
                "prompts have no answers to validate or test with",
                where=f"source {self.name}",
                expected="no validation_fraction and no test_fraction beside prompts: true",
                do="remove them, or hold out conversations of a source with answers",
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
        """Whether the path names files here."""
        return is_local(self.path)

    def unreachable(self, error: Exception) -> InputError:
        """The error for a hub data set that cannot be read."""
        return hub_error(error)(
            "neither a file here nor a hub data set that can be read",
            where=f"source {self.name}, path {self.path}",
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
            do="correct the path, subset or split; without a network, give a local file",
        )

    def local_files(self) -> list[Path]:
        """The files of a local source, in the order of their names.

        Raises:
            InputError: as `data_files` does.
        """
        return data_files(self.path, self.name)


def content_fingerprint(source: Source) -> str:
    """Hash of the bytes of a source's files in order, or the revision of a hub data set.

    Raises:
        InputError: the source cannot be read.
    """
    if source.is_local:
        content = _files_hash(source.local_files())
    else:
        content = f"{source.path}@{_hub_revision(source)}/{source.subset}/{source.split}"
    if source.prompts:
        content += " prompts"
    if source.where is None:
        return content
    return f"{content} where {json.dumps(source.where, sort_keys=True)}"


def _files_hash(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        for part in filter(None, (path, meta_file(path))):
            try:
                with part.open("rb") as file:
                    total.update(part.suffix.lower().encode())
                    total.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise unreadable(part, error) from error
    return total.hexdigest()


def _hub_revision(source: Source) -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.HfApi().dataset_info(source.path).sha)
    except Exception as error:  # the hub client raises whatever it pleases
        raise source.unreachable(error) from error


Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

DIGEST_BYTES = 16
_UNIT_BITS = 53  # what a float holds exactly, so that u is never rounded up to 1


def conversation_digest(conversation: Conversation) -> bytes:
    """Hash of a whole conversation: its messages and tools as they stand, and weights if any."""
    weights = [conversation.weights] if conversation.weights else []
    return _digest([conversation.messages, conversation.tools, *weights])


def prompt_digest(conversation: Conversation) -> bytes:
    """Hash of the prompt: the tools and the messages that the first answer answers.

    Roles and contents count, with runs of white space as one space, so that a held-out question
    does not come back to training for the sake of a line break. An assistant who speaks before any
    user answers nothing; such an opening is part of the prompt, and where no user speaks at all the
    whole conversation is.
    """
    prompt = [
        [message["role"], " ".join(unicodedata.normalize("NFC", message["content"]).split())]
        for message in _prompt(conversation.messages)
    ]
    return _digest([prompt, conversation.tools])


def split_of_prompt(digest: bytes, source: Source) -> Split:
    """The split of `source` in which the prompt of this hash lies."""
    u = (int.from_bytes(digest[:8], "big") >> (64 - _UNIT_BITS)) / 2**_UNIT_BITS
    if u < source.test_fraction:
        return "test"
    return "validation" if u < source.held_out_fraction else "train"


def held_out_prompts(source: Source) -> set[bytes]:
    """Hashes of the prompts that lie in the validation or the test split of a source."""
    if not source.held_out_fraction:
        return set()
    digests = map(prompt_digest, read_conversations(source))
    return {digest for digest in digests if split_of_prompt(digest, source) != "train"}


def without_duplicates(conversations: Iterable[Conversation]) -> Iterator[Conversation | None]:
    """The conversations in order, with None in the place of each that stood before."""
    seen: set[bytes] = set()
    for conversation in conversations:
        digest = conversation_digest(conversation)
        yield None if digest in seen else conversation
        seen.add(digest)


def read_split(source: Source, split: Split) -> list[Conversation]:
    """One split of a source without its exact duplicates, for evaluation.

    Args:
        source: where to read.
        split: `validation` or `test`; `train` is what the source itself does not hold out, before
            the held-out prompts of other sources are removed from it.

    Raises:
        InputError: for a row that cannot be read, or a split in which nothing lies.
    """
    if split not in SPLITS:
        raise InputError(
            "there is no such split",
            where=f"source {source.name}",
            expected=", ".join(SPLITS),
            found=repr(split),
        )
    chosen = [
        conversation
        for conversation in without_duplicates(read_conversations(source))
        if conversation and split_of_prompt(prompt_digest(conversation), source) == split
    ]
    if not chosen:
        raise InputError(
            f"the {split} split is empty",
            where=f"source {source.name}, path {source.path}",
            expected="at least one conversation",
            found=f"validation_fraction {source.validation_fraction:g}, "
            f"test_fraction {source.test_fraction:g}"
            f"{f', where {source.where}' if source.where else ''}",
            do=f"raise {split}_fraction, or give more data; 1.0 holds out every conversation"
            if split != "train"
            else "hold out less",
        )
    return chosen


def _prompt(messages: list[Message]) -> list[Message]:
    answering = False
    for position, message in enumerate(messages):
        if message["role"] == "assistant" and answering:
            return messages[:position]
        answering = answering or message["role"] in ("user", "tool")
    return messages


def _digest(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
