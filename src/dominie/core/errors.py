"""Errors that a user can act on: where, what was expected, what was found, what to do."""

from __future__ import annotations


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
        self.what, self.where = what, where
        self.expected, self.found, self.do = expected, found, do
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        for label, text in (("expected", self.expected), ("found", self.found), ("do", self.do)):
            if text:
                lines.append(f"  {label:<9} {text}")
        return "\n".join(lines)


class InputError(DominieError):
    """The recipe, the data, a model or an option is at fault: exit status 2."""

    exit_status = 2

    def within(self, place: str) -> InputError:
        """The same, where its place is a key within another one."""
        return InputError(
            self.what,
            where=".".join(filter(None, [place, self.where])),
            expected=self.expected,
            found=self.found,
            do=self.do,
        )


class OutOfReach(InputError):
    """The hub could not be asked: what it holds may be right or wrong.

    Where something has to be loaded that is the end; a check goes on and lists it.
    """


class RunError(DominieError):
    """The run failed though its input was acceptable, a non-finite loss say: exit status 1."""


def hub_error(error: Exception) -> type[InputError]:
    """The kind of error that a call to the hub came to: refused by it, or never answered."""
    met: BaseException | None = error
    while met is not None:
        if isinstance(met, ConnectionError | TimeoutError) or _UNANSWERED & {
            base.__name__ for base in type(met).__mro__
        }:
            return OutOfReach
        status = getattr(getattr(met, "response", None), "status_code", 0)
        if status >= 500 or (status in _BARRED and type(met).__name__ == "HfHubHTTPError"):
            return OutOfReach  # or a proxy in its place: the hub gives a reason of its own
        met = met.__cause__
    return InputError


#: By name, since which client the hub's library calls with depends on its version.
_UNANSWERED = {"TransportError", "LocalEntryNotFoundError"}
_BARRED = (401, 403, 407)
