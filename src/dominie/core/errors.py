"""Errors that a user can act on: where, what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_SECRET_NAME = re.compile(
    r"api[-_ ]?key|authori[sz]ation|bearer|passw(?:or)?d|secret|credential|private[-_ ]?key"
    r"|(?:^|[-_ ])(?:access|auth|refresh|session|id|hf|api)[-_ ]?token$"
    r"|^(?:token|key|auth|cookie)$",
    re.IGNORECASE,
)
# Keys as their issuers write them: models, hubs, clouds, repositories, web tokens.
_SECRET_VALUE = re.compile(
    r"\b(?:(?:sk-|[Bb]earer\s+)[\w.~+/-]{8,}=*"
    r"|(?:hf_|gsk_|xai-|AIza|gh[pousr]_|github_pat_|glpat-|nvapi-|pplx-|r8_|ya29\.|AKIA|eyJ)"
    r"[\w.-]{16,})"
)
_ASSIGNED = re.compile(
    r"((?:api[-_]?key|(?:access|auth|hf|api)[-_]?token|passw(?:or)?d|secret|authorization)"
    r"[\w.-]{0,40}=)[^\s,}]+",
    re.IGNORECASE,
)


#: Control characters but tab and line feed, as they are shown. A terminal obeys the others.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


def printable(text: str) -> str:
    """Return a text with control characters written out, so that no terminal obeys them."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def without_secrets(text: str) -> str:
    """Return a text with `[hidden]` for what looks like a key or a password in it."""
    return _ASSIGNED.sub(r"\1[hidden]", _SECRET_VALUE.sub("[hidden]", text))


def secret_in(value: Any, place: str) -> str | None:
    """Return the place of the first secret in a JSON value, by its name or its look; else None."""
    if isinstance(value, dict):
        for name, inner in value.items():
            named = _SECRET_NAME.search(str(name)) and not isinstance(inner, dict | None)
            if found := f"{place}.{name}" if named else secret_in(inner, f"{place}.{name}"):
                return found
    elif isinstance(value, list):
        return next((f for item in value if (f := secret_in(item, place))), None)
    elif isinstance(value, str) and _SECRET_VALUE.search(value):
        return place
    return None


class DominieError(Exception):
    """An error that a person can act on. The command line prints it without a traceback.

    Args:
        what: what went wrong, in one clause.
        where: the file and line, recipe key, stage or batch at fault.
        expected: what would have been accepted.
        found: what was there instead.
        do: the next thing to try.
    """

    exit_status = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        do: str | None = None,
    ) -> None:
        self.what = without_secrets(what)
        self.where, self.expected, self.found, self.do = (
            None if text is None else without_secrets(text) for text in (where, expected, found, do)
        )
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        for label, text in (("expected", self.expected), ("found", self.found), ("do", self.do)):
            if text:
                lines.append(f"  {label:<9} {text}")
        return printable("\n".join(lines))


class InputError(DominieError):
    """The recipe, the data, a model or an option is at fault: exit status 2."""

    exit_status = 2

    def within(self, place: str) -> InputError:
        """Return the same error, with its place inside another key."""
        return InputError(
            self.what,
            where=".".join(filter(None, [place, self.where])),
            expected=self.expected,
            found=self.found,
            do=self.do,
        )


def nearest(name: object, known: Iterable[object]) -> str | None:
    """Find the name that was most likely meant by one that does not exist; None if none is alike.

    Alike are names that a few letters tell apart, and those of which one adds a word to the other
    (`batch_size`, `batch`). All advice of this kind asks here.

    Args:
        name: as it was written.
        known: names that exist.
    """
    found = {str(each): _likeness(str(name).lower(), str(each).lower()) for each in known}
    best = max(found, key=lambda each: found[each], default=None)
    return best if best is not None and found[best] else None


def _likeness(name: str, other: str) -> float:
    """From 0, not alike, to 1, the same."""
    matcher = difflib.SequenceMatcher(None, name, other, autojunk=False)
    if (ratio := matcher.ratio()) < 0.65:
        return 0.0
    if sorted(name) == sorted(other):  # letters that changed places
        return ratio
    words, others = (set(re.findall(r"[^\W_]+", text)) for text in (name, other))
    if words <= others or others <= words or other.startswith(name):
        return ratio
    changes = [
        (i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"
    ]
    few = sum(map(max, changes)) <= max(2, max(len(name), len(other)) // 3)
    return ratio if few and ratio >= 0.75 else 0.0


class OutOfReach(InputError):
    """The hub cannot be reached, so it is not known whether a name on it is right.

    A run ends with it; a check goes on, and lists what was not checked.
    """


class RunError(DominieError):
    """The run failed with acceptable input, by a non-finite loss for example: exit status 1."""


def unreadable(path: Path, error: OSError) -> InputError:
    """Return the error for a file that the system does not give out."""
    found = error.strerror or str(error)
    return InputError("the file cannot be read", where=str(path), found=found)


def hub_error(error: Exception) -> type[InputError]:
    """Return the class for an error of a hub call: `OutOfReach` if the hub did not answer.

    Raises:
        InputError: variables of the environment name a proxy or certificates that cannot be used.
    """
    from dominie.core.network import check_variables

    if type(error).__name__ != "OfflineModeIsEnabled":
        check_variables()
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | TimeoutError) or _UNANSWERED & {
            base.__name__ for base in type(cause).__mro__
        }:
            return OutOfReach
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        if status >= 500 or (status in _BARRED and type(cause).__name__ == "HfHubHTTPError"):
            return OutOfReach  # or from a proxy: the hub itself raises other errors
        cause = cause.__cause__
    return InputError


#: By name, as the HTTP client of the hub's library depends on its version.
_UNANSWERED = {"TransportError", "LocalEntryNotFoundError"}
_BARRED = (401, 403, 407)
