"""Runs the command line: every error becomes one message and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import NoReturn

from dominie.cli.app import app
from dominie.cli.completion import whole_words
from dominie.core.distributed import EXIT_PEER_LOST, is_peer_loss, report_error, world_size
from dominie.core.errors import DominieError
from dominie.core.launch import stop_with_launcher


class _Stopped(BaseException):
    """A signal came. No `Exception`, so that nothing on its way mistakes it for a failure."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def _stop(signum: int, _: FrameType | None) -> None:
    raise _Stopped(signum)


def main() -> None:
    """Run the command line; every error becomes one message and an exit status."""
    debug = "--debug" in sys.argv
    if debug:  # wherever it stands
        sys.argv = [sys.argv[0], "--debug", *(a for a in sys.argv[1:] if a != "--debug")]
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):  # while a stage trains, it listens itself
            signal.signal(signum, _stop)
        stop_with_launcher()
    try:
        with whole_words():
            status = app(prog_name="dominie", standalone_mode=False)
    except _Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        _fail(f"interrupted by {name}; what was done is kept", 128 + stopped.signum, debug)
    except DominieError as error:
        if is_peer_loss(error):
            _end_with_another(debug)
        _fail(str(error), error.exit_status, debug)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if (show := getattr(error, "show", None)) is not None:  # click's usage errors
            show()
            _hint_at_override(error)
            sys.exit(2)
        if is_peer_loss(error):
            _end_with_another(debug)
        _fail(_unforeseen(error), 1, debug)
    sys.exit(status if isinstance(status, int) else 0)


def _unforeseen(error: Exception) -> str:
    """The message of an error that nobody put into words."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}\n  do        {_ADVICE['OSError']}"
    kind = type(error).__name__
    advice = "run again with --debug and report this"
    if kind != "SafetensorError" or "os error" in str(error):  # else a fault of ours
        advice = _ADVICE.get(kind, advice)
    return f"{kind}: {error}\n  do        {advice}"


_ADVICE = {
    "SafetensorError": "make room; the same command goes on from what is done",
    "OSError": "make room or mend permissions; the same command goes on from what is done",
    "OutOfMemoryError": "lower train.micro_batch or train.max_length, "
    "or set train.gradient_checkpointing=true",
}


def _hint_at_override(error: Exception) -> None:
    """Overrides are written without dashes, which those of many other programs have."""
    name = str(getattr(error, "option_name", "")).lstrip("-")
    if "." in name:
        print(f"  do        write overrides without dashes: {name}=VALUE", file=sys.stderr)


def _fail(message: str, status: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    report_error(message, status)
    _exit(status)


def _end_with_another(debug: bool) -> NoReturn:
    """End because another process did, which says why, or whose launcher does."""
    if debug:
        traceback.print_exc()
    _exit(EXIT_PEER_LOST)


def _exit(status: int) -> NoReturn:
    """End, at once where there are others: a collective that is under way holds the exit up."""
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
