"""Rice codes: whole numbers in few bits, a whole array at a time.

A stream says how it was coded in a few bytes of its own, so that every array gets the code that is
shortest for it. How many values it holds is for the reader to know. No loop runs over values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

_CONSTANT = 255  # in the place of a Rice parameter: every value is the smallest one
_LARGEST_PARAMETER = 48
_MOST = 2**27  # values of one stream; a gigabyte of them


class Damaged(ValueError):
    """The bytes are not what a writer wrote."""


class BitReader:
    """Reads streams one after the other from bytes that are not trusted.

    Args:
        data: what `rice` and `by_magnitude` made, joined.
    """

    def __init__(self, data: bytes) -> None:
        self._bytes, self._at = np.frombuffer(data, np.uint8), 0

    @property
    def at_end(self) -> bool:
        """Whether everything has been read."""
        return self._at == len(self._bytes)

    def number(self) -> int:
        """One number, of seven bits a byte, the low ones first."""
        value = shift = 0
        while True:
            byte = int(self._take(1)[0])
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 56:
                raise Damaged("a number has no end")

    def rice(self, count: int) -> Numbers:
        """What `rice` wrote: [count] numbers."""
        if not 0 <= count <= _MOST:  # before memory is asked for
            raise Damaged("more values than any conversation has")
        parameter, least = int(self._take(1)[0]), self.number()
        if parameter == _CONSTANT:
            return np.full(count, least, np.int64)
        if parameter > _LARGEST_PARAMETER:
            raise Damaged("no Rice code has such a parameter")
        length = self.number()
        ends = np.flatnonzero(self._bits(length))
        if len(ends) != count or (count and ends[-1] != length - 1):
            raise Damaged("a stream holds another number of values")
        quotients = np.diff(ends, prepend=-1) - 1
        return (quotients << parameter) + self.raw(np.full(count, parameter)) + least

    def by_magnitude(self, count: int) -> Numbers:
        """What `by_magnitude` wrote: [count] numbers."""
        centre = self.number()
        widths = centre + _unfolded(self.rice(count))
        if count and (widths.min() < 0 or widths.max() > _LARGEST_PARAMETER):
            raise Damaged("a value has an impossible width")
        return (np.int64(1) << widths) - 1 + self.raw(widths)

    def raw(self, widths: Numbers) -> Numbers:
        """What `raw` wrote: numbers of so many bits each."""
        ends = np.cumsum(widths)
        total = int(ends[-1]) if len(ends) else 0
        bits = self._bits(total)
        places = np.repeat(ends, widths) - 1 - np.arange(total)
        sums = np.concatenate([[0], np.cumsum(bits.astype(np.int64) << places)])
        found: Numbers = sums[ends] - sums[ends - widths]
        return found

    def _bits(self, count: int) -> NDArray[np.uint8]:
        return np.unpackbits(self._take(-(-count // 8)), count=count)

    def _take(self, count: int) -> NDArray[np.uint8]:
        taken = self._bytes[self._at : self._at + count]
        if len(taken) < count:
            raise Damaged("the bytes end too early")
        self._at += count
        return taken


def number(value: int) -> bytes:
    """One number of 0 or more, of seven bits a byte, the low ones first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def rice(values: Numbers) -> bytes:
    """Numbers of 0 or more, shortest where they fall off geometrically from their least.

    The quotient by 2^k in unary and the remainder in k bits (R. F. Rice, 1979), k the best one.
    """
    least = int(values.min()) if len(values) else 0
    above = values - least
    if not above.any():
        return bytes([_CONSTANT]) + number(least)
    mean = float(above.mean())
    guess = max(0, int(np.log2(mean + 1e-9)))
    parameter = min(
        range(max(0, guess - 1), guess + 2),
        key=lambda k: len(values) * (k + 1) + int((above >> k).sum()),
    )
    ends = np.cumsum((above >> parameter) + 1)
    unary = np.zeros(int(ends[-1]), np.uint8)
    unary[ends - 1] = 1
    remainders = above & ((1 << parameter) - 1)
    head = bytes([parameter]) + number(least) + number(len(unary))
    return head + np.packbits(unary).tobytes() + raw(remainders, np.full(len(values), parameter))


def by_magnitude(values: Numbers) -> bytes:
    """Numbers of 0 or more whose *sizes in bits* lie close together, gaps between ids say.

    Of v + 1 the number of bits, as its distance from the middle one, by `rice`; then the bits
    below the highest.
    """
    widths = np.frexp((values + 1).astype(np.float64))[1].astype(np.int64) - 1
    centre = int(np.median(widths)) if len(widths) else 0
    below = values + 1 - (np.int64(1) << widths)
    return number(centre) + rice(_folded(widths - centre)) + raw(below, widths)


def raw(values: Numbers, widths: Numbers) -> bytes:
    """The low bits of numbers, so many of each, the high ones first."""
    ends = np.cumsum(widths)
    total = int(ends[-1]) if len(ends) else 0
    places = np.repeat(ends, widths) - 1 - np.arange(total)
    bits = (np.repeat(values, widths) >> places) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def _folded(signed: Numbers) -> Numbers:
    """Signed numbers as 0 or more: 0, −1, 1, −2, 2 as 0, 1, 2, 3, 4."""
    return np.where(signed < 0, -2 * signed - 1, 2 * signed)


def _unfolded(folded: Numbers) -> Numbers:
    return np.where(folded & 1, -(folded + 1) // 2, folded // 2)
