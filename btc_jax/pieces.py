"""A leaf cut into pieces of one shape, each packed by itself: shards of a mesh, and layers or experts of a stack.

The arrays of such a leaf have one leading axis for each axis of the leaf, as long as there are pieces along it. So they
are sharded by the same `PartitionSpec`, and `lax.scan` slices them as it slices the leaf. No block crosses a piece.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from btc_jax._typing import PyTree
from btc_jax.formats import Format
from btc_jax.large import LargeLeaf
from btc_jax.leafspec import LeafSpec
from btc_jax.planes import fitted, plane_specs, row_layout
from btc_jax.processes import is_spread
from btc_jax.seal import SEAL

Index = tuple[int, ...]
MAX_PIECES = 2**16
"""Largest number of pieces of a leaf: each is read separately."""


class Cut(NamedTuple):
    """How a leaf is cut.

    Attributes:
        pieces: number of pieces along each axis of the leaf.
        stacks: axes along which the leaf is a stack: of length 1 in a piece, which leaves them out.
    """

    pieces: tuple[int, ...]
    stacks: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return math.prod(self.pieces)

    def piece(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a piece of a leaf.

        Examples:
            >>> Cut((12, 1, 4), (0,)).piece((12, 64, 256))
            (64, 64)
        """
        sizes = [size // count for size, count in zip(shape, self.pieces, strict=True)]
        return tuple(size for axis, size in enumerate(sizes) if axis not in self.stacks)

    def indices(self) -> Iterator[Index]:
        """The place of each piece, the last axis first."""
        return itertools.product(*map(range, self.pieces))

    def slices(self, index: Index, shape: tuple[int, ...]) -> tuple[slice | int, ...]:
        """Where a piece lies in the leaf."""
        sizes = [size // count for size, count in zip(shape, self.pieces, strict=True)]
        return tuple(
            i if axis in self.stacks else slice(i * size, (i + 1) * size)
            for axis, (i, size) in enumerate(zip(index, sizes, strict=True))
        )


def cut_of(leaf: LeafSpec, stacks: tuple[int, ...], pieces: tuple[int, ...] | None = None) -> Cut | None:
    """How a leaf is cut: into its shards, along its stacks, and into the requested pieces. `None` for a whole one.

    Raises:
        ValueError: if a leaf cannot be cut that way.
    """
    path, shape = leaf.path, leaf.shape
    if 0 in shape:
        return None
    shards = [size // part for size, part in zip(shape, shard_shape(leaf), strict=True)]
    asked = list(pieces or shards)
    if len(asked) != len(shape):
        raise ValueError(
            f"{path} has the shape {list(shape)}, and {tuple(asked)} pieces are asked for; name a number for each axis"
        )
    counts = [size if axis in stacks else asked[axis] for axis, size in enumerate(shape)]
    for axis, (size, count, own) in enumerate(zip(shape, counts, shards, strict=True)):
        if size % count or count % own:
            why = f"it has {size} elements" if size % count else f"it lies in {own} shards"
            raise ValueError(
                f"{path}: axis {axis} cannot be cut into {count} pieces, since {why}; ask for a number that fits, or "
                "put the leaf on fewer devices along that axis"
            )
    if math.prod(counts) > MAX_PIECES:
        raise ValueError(f"{path} would be cut into {math.prod(counts):,} pieces; {MAX_PIECES:,} are the most")
    return Cut(tuple(counts), stacks) if stacks or max(counts, default=1) > 1 or _has_spec(leaf.sharding) else None


def _has_spec(sharding: Any) -> bool:
    """Whether a sharding names axes of a mesh, even of a single device: the names must still fit once the leaf is
    packed."""
    return isinstance(sharding, NamedSharding) and any(name is not None for name in sharding.spec)


def shard_shape(leaf: Any) -> tuple[int, ...]:
    """The shape of what one device holds."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, Tracer) or not isinstance(sharding, NamedSharding) or 0 in leaf.shape:
        return tuple(leaf.shape)
    return sharding.shard_shape(tuple(leaf.shape))


def parts_of(leaf: Any, cut: Cut) -> Mapping[Index, Any]:
    """The pieces that this process has: on their devices if the leaf is sharded, otherwise on the host."""
    shape = tuple(leaf.shape)
    if isinstance(leaf, LargeLeaf):
        return _PartsInFile(leaf, cut)
    if shard_shape(leaf) == shape:
        whole = leaf if isinstance(leaf, jax.Array) and len(leaf.devices()) == 1 else np.asarray(leaf)
        return {index: whole[cut.slices(index, shape)] for index in cut.indices()}
    found: dict[Index, Any] = {}
    for shard in leaf.addressable_shards:
        inside = [
            range(*_bounds(part, size, count)) for part, size, count in zip(shard.index, shape, cut.pieces, strict=True)
        ]
        first = tuple(places[0] for places in inside)
        here = Cut(tuple(map(len, inside)), cut.stacks)
        data = np.asarray(shard.data) if shard.device.platform == "cpu" else shard.data
        for index in itertools.product(*inside):
            own = tuple(i - start for i, start in zip(index, first, strict=True))
            found.setdefault(index, data[here.slices(own, shard.data.shape)])
    return found


class _PartsInFile(Mapping[Index, np.ndarray]):
    """The pieces of a leaf that is not in memory, each read when it is asked for."""

    def __init__(self, leaf: LargeLeaf, cut: Cut):
        self._leaf, self._cut = leaf, cut

    def __getitem__(self, index: Index) -> np.ndarray:
        return self._leaf[self._cut.slices(index, self._leaf.shape)]

    def __iter__(self) -> Iterator[Index]:
        return self._cut.indices()

    def __len__(self) -> int:
        return self._cut.total


def _bounds(part: slice, size: int, count: int) -> tuple[int, int]:
    """The first piece in a part of an axis, and the one after the last."""
    start, stop, _ = part.indices(size)
    return start * count // size, stop * count // size


def is_here(leaf: Any, cut: Cut) -> set[Index] | None:
    """The places of the pieces that this process has; `None` for a leaf that is not spread over processes."""
    if not is_spread(leaf):
        return None
    shape = tuple(leaf.shape)
    found: set[Index] = set()
    for where in leaf.sharding.addressable_devices_indices_map(shape).values():
        inside = (range(*_bounds(part, size, n)) for part, size, n in zip(where, shape, cut.pieces, strict=True))
        found |= set(itertools.product(*inside))
    return found


class Parts:
    """The pieces of a leaf, which is read once for consecutive requests, and released with the last."""

    def __init__(self, leaf: Any, cut: Cut):
        self._leaf, self._cut, self._parts = leaf, cut, dict[Index, Any]()

    def read(self, index: Index) -> Any:
        if isinstance(self._leaf, LargeLeaf):
            return parts_of(self._leaf, self._cut)[index]
        if index not in self._parts:
            self._parts = dict(parts_of(self._leaf, self._cut))
        return self._parts.pop(index)


def cut_up(leaf: Any, cut: Cut) -> Any:
    """A leaf that may be traced as `[*pieces, *piece]`."""
    sizes = [size // count for size, count in zip(leaf.shape, cut.pieces, strict=True)]
    split = leaf.reshape([n for pair in zip(cut.pieces, sizes, strict=True) for n in pair])
    ndim = leaf.ndim
    parts = split.transpose([*range(0, 2 * ndim, 2), *range(1, 2 * ndim, 2)])
    return parts.reshape(*cut.pieces, *cut.piece(leaf.shape))


def joined(parts: Any, stacks: tuple[bool, ...]) -> Any:
    """Pieces `[*pieces, *piece]` side by side as a leaf.

    Args:
        stacks: of each axis of the grid, whether the pieces have no axis along it.

    Examples:
        >>> joined(np.zeros((12, 1, 4, 64, 64)), (True, False, False)).shape
        (12, 64, 256)
    """
    permutation, shape, axis = [], [], len(stacks)
    for i, is_stack in enumerate(stacks):
        permutation.append(i)
        shape.append(parts.shape[i])
        if not is_stack:
            permutation.append(axis)
            shape[-1] *= parts.shape[axis]
            axis += 1
    return parts.transpose(permutation).reshape(shape)


def at(arrays: PyTree, index: Any) -> PyTree:
    """One piece of arrays with the axes of the grid first."""
    return jax.tree.map(lambda array: array[index], arrays)


def padded(
    pieces: Mapping[Index, tuple[Any, dict[str, Any]]],
    form: Format,
    blocks: int,
    rows: Iterable[Sequence[int]] | None = None,
) -> dict[Index, Any]:
    """Planes, header and seal of each piece, with its planes padded to the longest of all pieces.

    The padding is zeros; planes without rows in any piece are left out.

    Args:
        blocks: blocks of a piece.
        rows: how many rows the planes of each piece of the leaf have, wherever it is; `None` if all are here.
    """
    specs, layouts = plane_specs(form.widths), [row_layout(form.block_size, s.bits) for s in plane_specs(form.widths)]
    rows = [[len(plane) for plane in planes] for planes, _ in pieces.values()] if rows is None else rows
    counts = [[*of_planes, *[0] * (len(specs) - len(of_planes))] for of_planes in rows]
    most = [rows for rows in np.max(counts, axis=0, initial=0).tolist() if rows]
    found = {}
    for index, (planes, header) in pieces.items():
        widths = form.unpack_header(header, blocks)[0]
        empty = [np.zeros((0, layout.runs * layout.words), layout.dtype) for layout in layouts[len(planes) :]]
        all_planes = zip([*planes, *empty], specs, most, strict=False)
        fits = tuple(fitted(plane, widths >= spec.end, count) for plane, spec, count in all_planes)
        found[index] = (fits, header, SEAL)
    return found


def stacked(pieces: Mapping[Index, PyTree], cut: Cut) -> PyTree:
    """The arrays of all pieces as one of each, with the axes of the grid first."""
    columns = [pieces[index] for index in cut.indices()]
    return jax.tree.map(lambda *arrays: np.stack(arrays).reshape(*cut.pieces, *arrays[0].shape), *columns)
