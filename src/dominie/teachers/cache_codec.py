"""Encodes a conversation's stored probabilities as bytes, and decodes them."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dominie.teachers.cache_sampling import CacheSettings, Chosen, TokenStats

    Numbers = NDArray[np.int64]


FORMAT_VERSION = 3
"""Raised when the same bytes come to mean something else."""

_ENTROPY_STEPS = 16  # per nat
_LEAST_MASS = 1e-7
_NOTHING = 0  # the level of a mass that is none; of others, 1 and more


@dataclass(frozen=True, eq=False)
class Decoded:
    """Stored probabilities of N tokens, as lists of (token, slot, id, probability).

    Attributes:
        tokens: how many.
        token: [E] index of the token that an entry belongs to.
        slot: [E] its place among the entries of that token.
        ids: [E] distinct within a token.
        probabilities: [E].
        tail: [N] mass of all other ids; None if the entries are samples of them as well.
        entropy: [N] of the teacher, in nats; None if it was not stored.
        pooled: [N] mass on the pool; None if the tail is one outcome.
    """

    tokens: int
    token: Numbers
    slot: Numbers
    ids: Numbers
    probabilities: NDArray[np.float64]
    tail: NDArray[np.float64] | None
    entropy: NDArray[np.float64] | None
    pooled: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class Coder:
    """Bytes for one cache.

    Attributes:
        ids: [V] token ids, the commonest first.
        levels: steps per nat of a stored probability.
        bucket: whether a tail is one outcome; else it is in the samples.
        owner: of the cache; the bytes of another owner are refused.
    """

    ids: Numbers
    levels: int
    bucket: bool
    owner: bytes = b""

    @cached_property
    def _ranks(self) -> Numbers:
        """[V] the place of each id in `ids`."""
        ranks = np.empty_like(self.ids)
        ranks[self.ids] = np.arange(len(self.ids))
        return ranks

    @classmethod
    def of(cls, vocabulary: TokenStats, settings: CacheSettings, owner: bytes = b"") -> Coder:
        """The coder of a cache."""
        return cls(vocabulary.ids, settings.levels, settings.scheme == "top", owner)

    def encoded(self, chosen: Chosen, key: bytes) -> bytes:
        """The bytes of a conversation's tokens, which `decoded` takes with the same key."""
        heads, samples = chosen.heads, chosen.samples
        head_order, head_gaps = self._gaps(chosen.head_ids, heads, distinct=True)
        _, sample_gaps = self._gaps(chosen.sample_ids, samples, distinct=False)
        # Rounded up or down at random, so that means are right where all entropies are alike; by
        # the key, so that a row written again is the same.
        dither = np.random.default_rng([*key]).random(len(chosen))
        entropy = np.floor(chosen.tail_entropy * _ENTROPY_STEPS + dither).astype(np.int64)
        body = struct.pack("<I", len(chosen)) + _packed(
            heads,
            samples,
            self._mass_levels(chosen.tail),
            self._mass_levels(chosen.pooled),
            entropy,
            self._levels(chosen.head_probabilities[head_order]),
            head_gaps,
            sample_gaps,
        )
        return struct.pack("<I", self._checksum(body, key)) + body

    def decoded(self, data: bytes, key: bytes) -> Decoded:
        """The stored probabilities.

        Raises:
            Damaged: these are not the bytes that were written under this key for this owner.
        """
        body = data[4:]
        if len(data) < 8 or struct.unpack("<I", data[:4])[0] != self._checksum(body, key):
            raise Damaged("the checksum is another")
        (count,) = struct.unpack("<I", body[:4])
        reader = _Reader(body[4:])
        heads, samples, tail, pooled, entropy = (reader.next(count) for _ in range(5))
        levels = reader.next(int(heads.sum()))
        head_gaps, sample_gaps = reader.next(int(heads.sum())), reader.next(int(samples.sum()))
        if not reader.at_end:
            raise Damaged("more bytes than were written")
        return self._assembled(
            heads,
            self._ids(head_gaps, heads, distinct=True),
            np.exp(-levels / self.levels),
            samples,
            self._ids(sample_gaps, samples, distinct=False),
            self._masses(tail),
            self._masses(pooled),
            entropy / _ENTROPY_STEPS,
        )

    def _checksum(self, body: bytes, key: bytes) -> int:
        return zlib.crc32(body, zlib.crc32(self.owner + key))

    def _levels(self, probabilities: NDArray[np.float64]) -> Numbers:
        logarithms = np.log(np.clip(probabilities, 1e-30, 1.0))
        levels: Numbers = np.rint(-logarithms * self.levels).astype(np.int64)
        return levels

    def _mass_levels(self, masses: NDArray[np.float64]) -> Numbers:
        levels: Numbers = np.where(masses > _LEAST_MASS, self._levels(masses) + 1, _NOTHING)
        return levels

    def _masses(self, levels: Numbers) -> NDArray[np.float64]:
        masses: NDArray[np.float64] = np.exp(-(levels - 1) / self.levels)
        return np.where(levels == _NOTHING, 0.0, masses)

    def _gaps(self, ids: Numbers, counts: Numbers, *, distinct: bool) -> tuple[Numbers, Numbers]:
        """The order that sorts ids by rank within their tokens, and the gaps in that order."""
        ranks, token = self._ranks[ids], np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((ranks, token))
        ranks = ranks[order]
        gaps = np.diff(ranks, prepend=0) - int(distinct)
        first = _starts(counts)
        gaps[first] = ranks[first]
        return order, gaps

    def _ids(self, gaps: Numbers, counts: Numbers, *, distinct: bool) -> Numbers:
        """The inverse of `_gaps`."""
        first = _starts(counts)
        steps = gaps + int(distinct)
        steps[first] = gaps[first]
        reach = np.cumsum(steps)
        ranks = reach - np.repeat(reach[first] - steps[first], counts[counts > 0])
        if len(ranks) and ranks.max() >= len(self.ids):
            raise Damaged("an id is none of the vocabulary's")
        ids: Numbers = self.ids[ranks]
        return ids

    def _assembled(
        self,
        heads: Numbers,
        head_ids: Numbers,
        head_probabilities: NDArray[np.float64],
        samples: Numbers,
        sample_ids: Numbers,
        tail: NDArray[np.float64],
        pooled: NDArray[np.float64],
        tail_entropy: NDArray[np.float64],
    ) -> Decoded:
        count = len(heads)
        head_token = np.repeat(np.arange(count), heads)
        whole = np.bincount(head_token, head_probabilities, count) + tail + pooled
        scale = 1 / np.maximum(whole, 1e-30)
        tail, pooled, p = tail * scale, pooled * scale, head_probabilities * scale[head_token]
        if self.bucket:
            slot = np.arange(len(head_token)) - np.repeat(np.cumsum(heads) - heads, heads)
            return Decoded(count, head_token, slot, head_ids, p, tail, None, None)
        # A token drawn twice weighs twice: equal ids stand together.
        token = np.repeat(np.arange(count), samples)
        new = np.ones(len(token), bool)
        new[1:] = (np.diff(sample_ids) != 0) | (np.diff(token) != 0)
        times = np.diff(np.append(np.flatnonzero(new), len(new)))
        token, sample_ids = token[new], sample_ids[new]
        weights = times * (tail / np.maximum(samples, 1))[token]
        tokens = np.concatenate([head_token, token])
        order = np.argsort(tokens, kind="stable")
        tokens = tokens[order]
        counts = np.bincount(tokens, minlength=count)
        left = tail + pooled
        entropy = left * tail_entropy - np.bincount(head_token, p * np.log(p), count)
        entropy -= left * np.log(np.maximum(left, 1e-30))
        return Decoded(
            count,
            tokens,
            np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts, counts),
            np.concatenate([head_ids, sample_ids])[order],
            np.concatenate([p, weights])[order],
            None,
            entropy,
            pooled,
        )


def _starts(counts: Numbers) -> Numbers:
    """Where the entries of each token that has any begin."""
    return (np.cumsum(counts) - counts)[counts > 0]


_WIDTHS = (16, 32, 64)  # bits of an array's numbers: the fewest that hold its largest
_MOST = 2**24 - 1  # values of one array, by pcodec's format


class Damaged(ValueError):
    """The bytes are not what a writer wrote."""


def _packed(*arrays: Numbers) -> bytes:
    """Whole numbers of 0 or more, as pcodec's header, widths, and a chunk of each array.

    How many numbers an array holds is for the reader to know.
    """
    from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, wrapped

    compressor = wrapped.FileCompressor()
    widths = [sum(array.max(initial=0) >> bits > 0 for bits in _WIDTHS[:2]) for array in arrays]
    places = sum(width << (2 * i) for i, width in enumerate(widths))
    parts = [compressor.write_header(), struct.pack("<H", places)]
    for array, width in zip(arrays, widths, strict=True):
        if len(array):
            config = ChunkConfig(
                mode_spec=ModeSpec.classic(),
                delta_spec=DeltaSpec.no_op(),  # gaps are differences already
                paging_spec=PagingSpec.exact_page_sizes([len(array)]),
            )
            numbers = array.astype(f"u{_WIDTHS[width] // 8}")
            chunk = compressor.chunk_compressor(numbers, config)
            parts += [chunk.write_meta(), chunk.write_page(0)]
    return b"".join(parts)


class _Reader:
    """Reads the arrays that `_packed` wrote, one after the other, from bytes that are not trusted.

    Raises:
        Damaged: they are not what it wrote.
    """

    def __init__(self, data: bytes) -> None:
        from pcodec import wrapped

        try:
            self._decompressor, used = wrapped.FileDecompressor.new(data)
            (self._widths,) = struct.unpack_from("<H", data, used)
            self._left = data[used + 2 :]
        except (RuntimeError, struct.error) as error:
            raise Damaged(str(error)) from None

    @property
    def at_end(self) -> bool:
        """Whether everything has been read."""
        return not self._left

    def next(self, count: int) -> Numbers:
        """The next array, of [count] numbers."""
        place, self._widths = self._widths & 3, self._widths >> 2
        if place >= len(_WIDTHS) or not 0 <= count <= _MOST:  # before memory is asked for
            raise Damaged("more values than any conversation has")
        bits = _WIDTHS[place]
        found = np.empty(count, f"u{bits // 8}")
        if count:
            try:
                chunk, meta = self._decompressor.chunk_decompressor(self._left, f"u{bits}")
                progress, page = chunk.read_page_into(self._left[meta:], count, found)
            except RuntimeError as error:
                raise Damaged(" ".join(str(error).split())[:200]) from None
            if progress.n_processed != count:
                raise Damaged("an array holds another number of values")
            self._left = self._left[meta + page :]
        return found.astype(np.int64)
