"""A teacher that reads its targets from a cache, and decodes them while something else runs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dominie.data.batch import Batch, Row, Span, to_device
from dominie.losses.targets import Part, Signal
from dominie.losses.vocabulary import SparseTarget
from dominie.teachers.cache import Cache
from dominie.teachers.cache_codec import Decoded

if TYPE_CHECKING:
    from numpy.typing import NDArray


class CachedTeacher:
    """Reads targets from a cache. A conversation is found by its tokens, wherever it is in a batch.

    Args:
        cache: of the teacher.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._ahead: _Decoding | None = None

    def expect(self, spans: Sequence[Span]) -> None:
        """Decode these conversations in a thread, for the next `signal`; none ends the last one."""
        taught = {key_of_span(span): span for span in spans if span.supervised}
        if self._ahead is not None:
            if self._ahead.spans.keys() == taught.keys():
                return
            self._ahead.stop()
        self._ahead = _Decoding(self.cache, taught) if taught else None

    def signal(self, batch: Batch) -> Signal:
        """Sparse probabilities of all supervised positions.

        Raises:
            RunError: a conversation was not cached, or its bytes are damaged.
        """
        ahead, self._ahead = self._ahead, None
        found = {} if ahead is None else ahead.result()
        stored = [
            found[key]
            if (key := key_of_span(span)) in found
            else self.cache.decoded(key, span.supervised)
            for span in batch.spans
            if span.supervised
        ]
        rows = torch.arange(len(batch.input_ids))
        target = target_of(stored, batch.input_ids.device, self.cache.vocabulary.pool_shape)
        return Signal((Part(rows, target),))


class _Decoding:
    """A thread that decodes conversations.

    What it cannot decode it leaves to whoever asks for it, who then gets the error: it ends the
    micro-batch that needs the conversation, and no other.
    """

    def __init__(self, cache: Cache, spans: Mapping[bytes, Span]) -> None:
        self.spans = spans  # by key
        self._cache = cache
        self._found: dict[bytes, Decoded] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._decode, name="dominie-cache", daemon=True)
        self._thread.start()

    def _decode(self) -> None:
        for key, span in self.spans.items():
            if self._stopped:
                return
            try:
                self._found[key] = self._cache.decoded(key, span.supervised)
            except Exception:
                return

    def result(self) -> dict[bytes, Decoded]:
        """What could be decoded, by key, once the thread has ended."""
        self._thread.join()
        return self._found

    def stop(self) -> None:
        """End the thread after the conversation that it is at."""
        self._stopped = True
        self._thread.join()


def key_of_span(span: Span) -> bytes:
    """The key of a conversation in a batch."""
    return key_of(span.input_ids, span.taught)


def key_of(input_ids: NDArray[np.integer[Any]], taught: NDArray[np.bool_]) -> bytes:
    """16 bytes that name a conversation.

    Args:
        input_ids: [n] token ids.
        taught: [n] positions whose next token is supervised.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"dominie signal")
    digest.update(np.ascontiguousarray(input_ids, np.int32).tobytes())
    digest.update(np.packbits(taught).tobytes())
    return digest.digest()


def key_of_row(row: Row) -> bytes:
    """The key of a tokenised conversation."""
    supervised = np.asarray(row.supervised, np.bool_)
    return key_of(np.asarray(row.input_ids), np.append(supervised[1:], False))


def target_of(
    conversations: Sequence[Decoded],
    device: torch.device,
    pool_shape: NDArray[np.float32] | None = None,
) -> SparseTarget:
    """Stored probabilities of conversations, one after the other, as a loss takes them.

    Args:
        conversations: what was stored of each.
        device: where the target is wanted.
        pool_shape: [V] the teacher's average over the pool; None if nothing is pooled.
    """
    starts = np.cumsum([0, *(each.tokens for each in conversations)])
    total = int(starts[-1])
    width = max((int(each.slot.max(initial=0)) + 1 for each in conversations), default=1)
    ids = np.full((total, width), -1, np.int64)
    probabilities = np.zeros((total, width), np.float32)
    for start, each in zip(starts, conversations, strict=False):
        ids[start + each.token, each.slot] = each.ids
        probabilities[start + each.token, each.slot] = each.probabilities

    def column(parts: list[NDArray[np.float64] | None]) -> torch.Tensor | None:
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not parts:
            return None
        return to_device(torch.from_numpy(np.concatenate(known).astype(np.float32)), device)

    masses = column([each.pooled for each in conversations])
    pool = None
    if pool_shape is not None and masses is not None:
        pool = (to_device(torch.from_numpy(pool_shape), device), masses)
    return SparseTarget(
        to_device(torch.from_numpy(ids), device),
        to_device(torch.from_numpy(probabilities), device),
        column([each.tail for each in conversations]),
        column([each.entropy for each in conversations]),
        pool,
    )
