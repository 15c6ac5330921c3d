"""What the C library makes of tensors that come and go: how far its heap reaches, with holes."""

from __future__ import annotations

from bisect import bisect_left, insort

#: glibc maps larger pieces one by one, and returns them when they are freed. Its threshold begins
#: lower and rises to this with the sizes that are freed (mallopt(3), M_MMAP_THRESHOLD).
MAPPED_ALONE = 32 << 20

#: By how much a hole has to be larger than a piece that is to begin at a multiple of 64 bytes, as
#: PyTorch asks: where one piece was freed, one of the same size does not fit.
ALIGNING = 96


class Heap:
    """A heap that gives out the smallest hole that is large enough, else what lies above.

    That is what glibc does. Holes do not grow together here: what an aligned piece leaves at its
    ends is given to small objects that live as long as the graph, and these lie between. So a layer
    of many temporary tensors leaves many holes that none of the next layer's fits into.

    Attributes:
        top: bytes that it reaches.
    """

    def __init__(self) -> None:
        self.top = 0
        self._holes: list[tuple[int, int]] = []  # (size, start), smallest first

    def take(self, size: int) -> int:
        """Where a piece comes to lie."""
        place = bisect_left(self._holes, (size + ALIGNING, -1))
        if place == len(self._holes):
            self.top += size
            return self.top - size
        length, start = self._holes.pop(place)
        self.give(start + size, length - size)
        return start

    def give(self, start: int, size: int) -> None:
        """Take a piece back."""
        insort(self._holes, (size, start))
