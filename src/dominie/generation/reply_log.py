"""Replies of an endpoint: read without trust, and logged on disk before they count."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dominie.core.errors import InputError
from dominie.core.io import checksummed, mapping, open_append, verify_checksum
from dominie.data.json_files import whole_characters

_MOST_TOKENS = 10_000_000  # no call uses more; a server that says so is not believed
# Values of `finish_reason`, lower case, as servers write them.
_CUT = {"length", "max_tokens", "model_length", "model_context_window_exceeded"}
_FAILED = {"error", "abort", "cancelled", "network_error", "insufficient_system_resource"}
_REFUSED = {
    *("content_filter", "safety", "refusal", "sensitive", "recitation", "blocklist"),
    *("prohibited_content", "spii", "guardrail_intervened"),
}


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    Attributes:
        text: of the reply; empty if it has none.
        cut: whether its length limit ended it.
        refused: whether a content filter of the server took it away or ended it.
        candidates: log-probabilities of the first token's alternatives, if they were given.
        usage: (prompt, reply) tokens, if the server counted them believably.
        silent: whether the model thought, or did nothing, and had no word left for the text.
        thoughts: what it thought, if the server sends that in a field of its own.
    """

    text: str
    cut: bool = False
    refused: bool = False
    candidates: Mapping[str, float] | None = None
    usage: tuple[int, int] | None = None
    silent: bool = False
    thoughts: str = ""


def read_reply(body: str) -> Reply | None:
    """Return the reply in the body of a response, None if it holds none or one that failed."""
    try:
        tree = json.loads(body.lstrip("\ufeff"), strict=False)
        choice = tree["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        text = _text(message)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    reason = str(ended).lower().partition(":")[0].strip()  # "content_filter: OTHER"
    failed = reason in _FAILED or choice.get("error") or tree.get("error")
    if failed or (text is None and not isinstance(ended, str)):
        return None
    refused = reason in _REFUSED
    apart = text is None or message.get("reasoning_content") or message.get("reasoning")
    silent = not refused and not (text or "").strip() and (apart or reason in _CUT)
    return Reply(
        text=whole_characters(text or ""),
        cut=reason in _CUT,
        refused=refused,
        silent=bool(silent),
        thoughts=whole_characters(_thoughts(message)),
        candidates=_candidates(choice),
        usage=_usage(tree.get("usage")),
    )


def _thoughts(message: Mapping[str, Any]) -> str:
    """Return what a server sends of thoughts beside the text of a message."""
    found = (message.get(name) for name in ("reasoning_content", "reasoning"))
    return next((text.strip() for text in found if isinstance(text, str)), "")


def _text(message: Mapping[str, Any]) -> str | None:
    """Return the text of a message, its parts of type text joined; None if it has none."""
    content = message.get("content")
    if isinstance(content, dict):
        content = [content]
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        texts = [p.get("text") for p in parts if p.get("type", "text") in ("text", "output_text")]
        texts = [one.get("value") if isinstance(one, dict) else one for one in texts]
        return "".join(text for text in texts if isinstance(text, str)) if texts else None
    for found in (content, message.get("refusal")):
        if isinstance(found, str):
            return found
    return None


def _candidates(choice: Mapping[str, Any]) -> dict[str, float] | None:
    try:
        first: Sequence[Any] = choice["logprobs"]["content"][0]["top_logprobs"]
        found = {str(entry["token"]): float(entry["logprob"]) for entry in first}
    except (LookupError, TypeError, ValueError):
        return None
    believable = {t: p for t, p in found.items() if not math.isnan(p) and p <= 1e-6}
    return believable or None


def _usage(usage: Any) -> tuple[int, int] | None:
    if not isinstance(usage, dict):
        return None
    prompt, reply = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not (type(prompt) is int and type(reply) is int):
        return None
    total = usage.get("total_tokens")
    if type(total) is int:  # some servers leave thoughts out of completion_tokens, and bill them
        reply = max(reply, total - prompt)
    believable = 0 <= prompt <= _MOST_TOKENS and 0 <= reply <= _MOST_TOKENS
    return (prompt, reply) if believable else None


def call_key(*parts: Any) -> str:
    """Return 32 hexadecimal digits of all a reply depends on: model, prompt, sampling."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def record_line(record: Mapping[str, Any]) -> str:
    """Return the line of a record in a log, with its checksum."""
    return json.dumps(checksummed(record), ensure_ascii=False) + "\n"


def _is_sealed(line: bytes) -> bool:
    """Return whether a line is a whole record with its checksum."""
    try:
        record = json.loads(line)
        return isinstance(record, dict) and record != verify_checksum(dict(record))
    except (ValueError, RecursionError):
        return False


class ReplyLog:
    """A JSON Lines file that is only appended to; each line is on disk before `append` returns.

    Each line has a checksum; lines of earlier versions have none. A last line that a crash cut in
    two is removed when the file is opened again.

    Args:
        path: the file; made with its folder by the first `append`.

    Raises:
        InputError: the file cannot be read, or is damaged elsewhere than in its last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_key: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in self._whole_lines():
            self._by_key[record["key"]].append(record)

    def of(self, key: str) -> list[dict[str, Any]]:
        """Return what was written under a key, oldest first."""
        return self._by_key.get(key, [])

    def replies(self, key: str) -> list[Reply]:
        """Return the whole replies under a key, oldest first."""
        found = [read_reply(record["body"]) for record in self.of(key) if record["status"] == 200]
        return [reply for reply in found if reply is not None]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All that was written, key by key."""
        return [record for records in self._by_key.values() for record in records]

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records, each of which has a `key`, and wait until they are on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open_append(self.path) as file:
            file.write("".join(map(record_line, records)).encode())
            file.flush()
            os.fsync(file.fileno())
        for record in records:
            self._by_key[record["key"]].append(dict(record))

    def _whole_lines(self) -> list[dict[str, Any]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError("cannot be read", where=str(self.path), found=error.strerror) from None
        lines = content.split(b"\n")
        torn = lines.pop()  # empty if the last line is whole
        if torn:
            # Only its end may be missing or damaged: what is in it has been paid for.
            whole = next(filter(_is_sealed, (torn, torn[:-1])), None)
            with self.path.open("r+b") as file:
                file.truncate(len(content) - len(torn))
                if whole is not None:
                    file.seek(0, os.SEEK_END)
                    file.write(whole + b"\n")
                    lines.append(whole)
                os.fsync(file.fileno())
        return [self._parsed(line, number) for number, line in enumerate(lines, 1) if line.strip()]

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("key"), str):
                return verify_checksum(record)
            found = "no record of a reply"
        except (ValueError, RecursionError) as error:
            found = str(error)
        raise InputError(
            "the log of replies is damaged",
            where=f"{self.path}:{number}",
            found=found,
            do="correct or remove this line; the call is then made again",
        )


@dataclass(frozen=True)
class ScoredReply(Reply):
    """A reply whose content is in its JSON."""

    tree: Mapping[str, Any] = field(default_factory=dict)


class ScoreLog(ReplyLog):
    """Keeps of each call what a budget counts: replies are large, and are kept as rows of a cache.

    Args:
        on_disk: whether calls are counted over several runs.
    """

    def __init__(self, path: Path, *, on_disk: bool) -> None:
        super().__init__(path)
        self._on_disk = on_disk

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write records without prompts and replies."""
        for record in records:
            ids = record["request"].get("prompt", record["request"].get("input_ids", ()))
            request = {"prompt_tokens": len(ids), "max_tokens": 1}
            body = "" if record["status"] == 200 else record["body"][:500]
            kept = {**record, "request": request, "body": body}
            if self._on_disk:
                super().append(kept)
            else:
                self._by_key[record["key"]].append(kept)

    def forget(self) -> None:
        """Drop what is in memory, unless calls are counted: a training may make millions."""
        if not self._on_disk:
            self._by_key.clear()


def read_scored(body: str) -> ScoredReply | None:
    """Return the reply in the body of a response, None if it is cut or none of a model."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, dict) or not tree.keys() & {"choices", "meta_info"}:
        return None
    usage = mapping(tree.get("usage") or tree.get("meta_info"))
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    known = all(type(count) is int and 0 <= count < 10_000_000 for count in counts)
    return ScoredReply(text="", usage=counts if known else None, tree=tree)  # type: ignore[arg-type]
