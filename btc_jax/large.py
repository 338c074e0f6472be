"""A leaf of a file that is too large to be in memory as a whole: its blocks are read a panel at a time."""

import abc
import math
from typing import Any

import numpy as np

from btc_jax._typing import Order
from btc_jax.blocks import axes, flattened

LARGE = 2**30
"""Bytes from which a leaf is read in panels: with its blocks in order beside it, it would take twice that."""
PANEL = 2**27
"""Bytes of a panel, at least one slice along the axis that is cut."""

Box = tuple[slice | int, ...]
"""A part of an array: for each axis a slice without a step, or an index."""


class LargeLeaf(abc.ABC):
    """What `blocks_in` and `parts_of` need of a leaf that is not in memory.

    Attributes:
        shape, dtype, nbytes: as of an array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    nbytes: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @abc.abstractmethod
    def __getitem__(self, box: Box) -> np.ndarray:
        """Reads a part."""


class Panels:
    """The numbers that run through the blocks of a leaf, in its dtype. Made for reading from first to last: one panel
    is kept.

    Examples:
        >>> class Leaf(LargeLeaf):
        ...     shape, dtype, nbytes = (2, 3), np.dtype("float32"), 24
        ...     __getitem__ = lambda self, box: np.arange(6, dtype=np.float32).reshape(2, 3)[box]
        >>> Panels(Leaf(), "output-major")[1:4].tolist()
        [3.0, 1.0, 4.0]
    """

    def __init__(self, leaf: LargeLeaf, order: Order):
        self._leaf, self.size, self.dtype = leaf, leaf.size, leaf.dtype
        self._order: Order = order
        self._axis = axes(len(leaf.shape), order)[0]
        of_slice = leaf.size // leaf.shape[self._axis]
        self._slices = max(PANEL // (of_slice * leaf.dtype.itemsize), 1)
        self._size = self._slices * of_slice
        self._kept: tuple[int, np.ndarray] | None = None

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        """The numbers in a range, or at an array of places."""
        if isinstance(places, slice):
            start, stop, _ = places.indices(self.size)
            return np.concatenate([self._of(i, start, stop) for i in self._numbers(start, stop)])
        found, numbers = np.empty(places.shape, self.dtype), places // self._size
        for i in np.unique(numbers):
            found[numbers == i] = self._panel(int(i))[places[numbers == i] - i * self._size]
        return found

    def _numbers(self, start: int, stop: int) -> range:
        """The panels with some of the numbers in a range; one even if it is empty."""
        return range(start // self._size, max(-(-stop // self._size), start // self._size + 1))

    def _of(self, i: int, start: int, stop: int) -> np.ndarray:
        first = i * self._size
        return self._panel(i)[max(start - first, 0) : max(stop - first, 0)]

    def _panel(self, i: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != i:
            self._kept = None  # released before the next is read
            box: list[Any] = [slice(None)] * len(self._leaf.shape)
            box[self._axis] = slice(i * self._slices, (i + 1) * self._slices)
            self._kept = i, flattened(self._leaf[tuple(box)], self._order)
        return self._kept[1]
