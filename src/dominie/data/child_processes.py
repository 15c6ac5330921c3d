"""Child processes of this package: how they are started, and those that tokenise."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from dominie.core.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from transformers import PreTrainedTokenizerBase

    from dominie.data.conversations import Conversation
    from dominie.data.left_out import LeftOut
    from dominie.data.row_store import Row

T = TypeVar("T")
Batch = list[tuple[T, "Conversation"]]
"""Conversations, each with something that is handed back beside its row."""
Told = tuple["Row", list["LeftOut"]]
"""A row, and what the chat template leaves out of its conversation."""

SERIAL_BATCHES = 2
"""So many batches are tokenised in this process before others are started, which takes a second."""
_MOST_WORKERS = 16  # one process reads and writes for all of them, and feeds no more

logger = logging.getLogger(__name__)


def child_command(function: str, *, module: str = __name__) -> dict[str, Any]:
    """How to start a child that runs a function of a module, and nothing of `__main__`.

    `multiprocessing` imports the main script again in each child, which runs it a second time if it
    has no `if __name__ == "__main__"`.
    """
    package = Path(__file__).parents[2]
    return {
        "args": [sys.executable, "-c", f"from {module} import {function}; {function}()"],
        "env": {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(package), *filter(None, sys.path)]),
            "TOKENIZERS_PARALLELISM": "false",
        },
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
    }


@contextlib.contextmanager
def processor_limit(seconds: float) -> Iterator[None]:
    """Let the system end this process, a child, if it takes more processor time than that."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


# Conversations are tokenised


def encode_batches(
    tokenizer: PreTrainedTokenizerBase, batches: Iterator[Batch[T]], *, processes: int | None = None
) -> Generator[list[tuple[T, Told]]]:
    """`encode_and_tell` for batches of conversations in order, in several processes if many.

    Rows, their order and the first error are the same for any number of processes. Close the
    iterator to end them early.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        batches: read a few batches ahead.
        processes: how many tokenise; by default one for each core, up to 16. 1 is this process
            alone, which waits for a child to try each rendering first.

    Raises:
        InputError: as `encode` does, or as `batches` does after all before it are tokenised.
        RunError: a process ended that should not have.
    """
    from dominie.core.hardware import cores

    count = min(cores(), _MOST_WORKERS) if processes is None else processes
    for batch in islice(batches, None if processes == 1 else SERIAL_BATCHES):
        yield _encoded(tokenizer, batch)
    following = next(batches, None)
    if following is None:
        return
    yield _encoded(tokenizer, following)
    try:
        pickled = pickle.dumps(tokenizer)
    except Exception as error:  # a class of a function, a lock in an attribute
        logger.warning("tokenising in one process: the tokenizer cannot be copied (%s)", error)
        pickled = b""
    if pickled:
        with contextlib.closing(_Pool(pickled, count)) as pool:
            if pool.usable:
                yield from pool.encoded(batches)
    for batch in batches:  # none is left of those that the pool has tokenised
        yield _encoded(tokenizer, batch)


def _encoded(tokenizer: PreTrainedTokenizerBase, batch: Batch[T]) -> list[tuple[T, Told]]:
    from dominie.data.tokenization import encode_and_tell

    return _tagged(batch, encode_and_tell(tokenizer, [conversation for _, conversation in batch]))


def _tagged(batch: Batch[T], rows: list[Told]) -> list[tuple[T, Told]]:
    return [(tag, row) for (tag, _), row in zip(batch, rows, strict=True)]


class _Pool:
    """Worker processes, each with a thread that waits for it."""

    def __init__(self, tokenizer: bytes, count: int) -> None:
        self._count = count
        self._free: SimpleQueue[_Worker] = SimpleQueue()
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(count, "tokenise")
        try:
            self._workers += (_Worker() for _ in range(count))
            self._started = [self._threads.submit(w.start, tokenizer) for w in self._workers]
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            self._free.put(worker)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)

    @property
    def usable(self) -> bool:
        """Whether every worker has the tokenizer. One of a class that only `__main__` has, say."""
        faults = [fault for future in self._started if (fault := future.result())]
        if faults:
            logger.warning("tokenising in one process: %s", faults[0])
        return not faults

    def encoded(self, batches: Iterator[Batch[T]]) -> Iterator[list[tuple[T, Told]]]:
        pending: deque[tuple[Batch[T], Future[list[Told]]]] = deque()
        failure: InputError | None = None
        ended = False
        while pending or not ended:
            if not ended:
                try:
                    batch = next(batches)
                    pending.append((batch, self._threads.submit(self._encode, batch)))
                except StopIteration:
                    ended = True
                except InputError as error:  # those before it come first
                    failure, ended = error, True
            if pending and (ended or len(pending) > 2 * self._count):
                sent, future = pending.popleft()
                yield _tagged(sent, future.result())
        if failure is not None:
            raise failure

    def _encode(self, batch: Batch[T]) -> list[Told]:
        worker = self._free.get()
        try:
            return worker.encode([conversation for _, conversation in batch])
        finally:
            self._free.put(worker)


class _Worker:
    """A process that tokenises, seen from its parent."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(**child_command("tokenise"))

    def start(self, tokenizer: bytes) -> str | None:
        """Give it the tokenizer; why it cannot use it, if so."""
        try:
            return self._ask(tokenizer)  # type: ignore[no-any-return]
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            return f"a process cannot be started ({error or 'it ended'})"

    def encode(self, conversations: list[Conversation]) -> list[Told]:
        try:
            sent: list[tuple[Any, ...]] = [
                (c.messages, c.tools, c.where, {}, c.weights) for c in conversations
            ]
            reply = self._ask(pickle.dumps(sent))
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            status = self.process.wait()
            if status == -getattr(signal, "SIGPROF", 0):
                raise InputError(
                    "the chat template does not end on one of these conversations",
                    where=f"conversations from {conversations[0].where} on",
                    expected="a rendering within seconds, as of the conversations before",
                    do="correct the template, or use that of another tokenizer",
                ) from error
            raise RunError(
                "a process that tokenises conversations ended",
                where=f"conversations from {conversations[0].where} on",
                found=f"exit status {status}, negative if a signal ended it",
                do="make room in memory, and see whether a row from there on is very long",
            ) from error
        if isinstance(reply, InputError):
            raise reply
        return reply  # type: ignore[no-any-return]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ask(self, request: bytes) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(request)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)


def tokenise() -> None:
    """Tokenise the batches that come on standard input, until it is closed."""
    from dominie.data import chat_template
    from dominie.data.conversations import Conversation
    from dominie.data.tokenization import encode_and_tell

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent closes the pipe
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply

    def reply(value: Any) -> None:
        pickle.dump(value, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()

    try:
        tokenizer = pickle.load(requests)
    except Exception as error:
        reply(f"the tokenizer cannot be copied ({type(error).__name__}: {error})")
        return
    reply(None)
    chat_template.in_worker = chat_template.may_end = True
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        while True:
            chats = [Conversation(*chat) for chat in pickle.load(requests)]
            try:
                rows = encode_and_tell(tokenizer, chats)
            except InputError as error:
                reply(error)
            else:
                reply([(row.as_arrays(), lost) for row, lost in rows])
