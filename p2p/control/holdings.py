"""What somebody holds of a list of objects: a bit for each that is whole.

The objects are those of a download, or of a model. With 100,000 objects and 200 sources
anything larger than a bit would be felt. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tensorswarm.store import bitmap


class Holdings:
    """The objects that somebody holds, whole or in part.

    Parameters
    ----------
    count : int
        How many objects there are.

    Attributes
    ----------
    parts : dict of int to bytes
        Bitmaps of chunks, of the objects that it holds in part.
    """

    def __init__(self, count: int, whole: Iterable[int] = ()) -> None:
        self.parts: dict[int, bytes] = {}
        self._whole = bitmap.empty(count)
        self._whole_count = 0
        for index in whole:
            self.add(index, None)

    def __contains__(self, index: int) -> bool:
        return bitmap.is_set(self._whole, index) or index in self.parts

    def __len__(self) -> int:
        return self._whole_count + len(self.parts)

    @property
    def whole_count(self) -> int:
        """How many are held whole."""
        return self._whole_count

    def add_run(self, start: int, stop: int) -> bool:
        """Note that the objects from `start` to before `stop` are held whole; return if news."""
        if self.parts:
            for index in [index for index in self.parts if start <= index < stop]:
                del self.parts[index]
        before = self._whole_count
        window = self._whole[start >> 3 : (stop + 7) >> 3]
        known = bitmap.count_set(window)
        bitmap.set_range(window, start & 7, (start & 7) + stop - start)
        self._whole_count += bitmap.count_set(window) - known
        self._whole[start >> 3 : (stop + 7) >> 3] = window
        return self._whole_count > before

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the runs of objects held whole: the first, and the one after the last."""
        return bitmap.runs_of_set(self._whole)

    def add(self, index: int, proved: bytes | None) -> bool:
        """Note what it holds of an object now (None: all); return whether that is news."""
        was_whole = bitmap.is_set(self._whole, index)
        if proved is None:
            self.parts.pop(index, None)
            if not was_whole:
                bitmap.set_bit(self._whole, index)
                self._whole_count += 1
            return not was_whole
        is_new = self.parts.get(index) != proved
        if was_whole:
            self.discard(index)
        self.parts[index] = proved
        return is_new

    def covers(self, index: int, proved: bytes | None) -> bool:
        """Tell whether it holds at least so much of an object (None: all)."""
        if bitmap.is_set(self._whole, index):
            return True
        held = self.parts.get(index)
        if held is None or proved is None:
            return False
        return not int.from_bytes(proved, "little") & ~int.from_bytes(held, "little")

    def discard(self, index: int) -> None:
        """Note that it holds nothing of an object."""
        self.parts.pop(index, None)
        if bitmap.is_set(self._whole, index):
            bitmap.clear_bit(self._whole, index)
            self._whole_count -= 1

    def whole(self) -> Iterator[int]:
        """Yield the objects that it holds whole, in order."""
        return set_bits(self._whole)

    def items(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield what it holds: the object, and the bitmap of its chunks or None for all."""
        yield from self.parts.items()
        for index in self.whole():
            yield index, None


def set_bits(bits: bytes | bytearray) -> Iterator[int]:
    """Yield the positions of the bits that are set, in order."""
    for place, byte in enumerate(bits):
        if byte:
            base = place << 3
            if byte == 0xFF:
                yield from range(base, base + 8)
                continue
            for offset in range(8):
                if byte >> offset & 1:
                    yield base + offset
