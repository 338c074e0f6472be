"""Conversion between codes of blocks of mixed widths and packed bit planes.

A plane holds the same few bits, 1, 2, 4 or 8, of the codes of every block that is wide enough: most significant bits in
the first plane, one row per block, in block order. The row of a block in a plane is its rank among the blocks that have
one, a prefix sum over the widths; it is never stored. With the paper's widths 4 and 8, the first plane is a plain 4-bit
matrix of all blocks, and the second refines the wide ones: `q = 16 * first + second`.

A row is an array of words, uint32 if its bits fill them, else uint16, else uint8. Its `W` words are cut into runs of
`J = gcd(W, 8)` words. A run holds consecutive codes, and its word `j` holds the run's codes `j, j + J, j + 2 * J, ...`,
the first in its lowest bits. (Up to 8 words side by side decode as vectors of 8 floats.)
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from btc_jax._typing import Array, UInt, UInt8


class PlaneSpec(NamedTuple):
    """Which bits of a code a plane holds.

    Attributes:
        end: bits of the code down to the last of this plane. A block has a row in the plane if it is at least as wide.
        bits: bits of each code in the plane: 1, 2, 4 or 8.
    """

    end: int
    bits: int


def plane_specs(widths: tuple[int, ...]) -> tuple[PlaneSpec, ...]:
    """The planes for blocks of these widths (bits, ascending).

    Examples:
        >>> plane_specs((4, 8))
        (PlaneSpec(end=4, bits=4), PlaneSpec(end=8, bits=4))
        >>> plane_specs((3, 4))
        (PlaneSpec(end=2, bits=2), PlaneSpec(end=3, bits=1), PlaneSpec(end=4, bits=1))
    """
    specs, end = [], 0
    for width in widths:
        for bits in (8, 4, 2, 1):
            if (width - end) & bits:
                specs.append(PlaneSpec(end + bits, bits))
                end += bits
    return tuple(specs)


class RowLayout(NamedTuple):
    """How a row of a plane is laid out: `runs` of `words` words, each word with `lanes` codes of `bits` bits."""

    runs: int
    lanes: int
    words: int
    bits: int
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.runs * self.words * self.dtype.itemsize


def row_layout(block_size: int, bits: int) -> RowLayout:
    """The layout of rows of `block_size` codes.

    Examples:
        >>> row_layout(128, 4)
        RowLayout(runs=2, lanes=8, words=8, bits=4, dtype=dtype('uint32'))
    """
    nbytes = -(-block_size * bits // 8)
    word = math.gcd(nbytes, 4)
    run = math.gcd(nbytes // word, 8)
    return RowLayout(nbytes // word // run, 8 * word // bits, run, bits, np.dtype(f"uint{8 * word}"))


def pack_rows(fields: Sequence[UInt[Array, "blocks size"]], bits: int) -> list[UInt[Array, "blocks row"]]:
    """Packs the lowest `bits` bits of each code of several matrices of the same shape, each into a matrix of words."""
    blocks, size = fields[0].shape
    layout = row_layout(size, bits)
    shape = (blocks, layout.runs, layout.lanes, layout.words)
    shifts = lax.broadcasted_iota(jnp.uint32, shape, 2) * bits

    def place(field: Array) -> Array:
        field = jnp.pad(field, ((0, 0), (0, math.prod(shape[1:]) - size))).reshape(shape)
        return (field.astype(jnp.uint32) & (2**bits - 1)) << shifts

    # One reduction with many results: the codes are computed once, and their matrix is never in memory.
    zeros = (jnp.uint32(0),) * len(fields)
    packed = lax.reduce(
        tuple(map(place, fields)), zeros, lambda a, b: tuple(x | y for x, y in zip(a, b, strict=True)), (2,)
    )
    return [words.reshape(blocks, layout.runs * layout.words).astype(layout.dtype) for words in packed]


def unpack_rows(
    packed: UInt[Array, "blocks row"], bits: int, block_size: int
) -> UInt[Array, "blocks runs lanes words"]:
    """The codes of each row in order, in the shape of the row's layout; those past `block_size` are padding."""
    layout = row_layout(block_size, bits)
    shape = (packed.shape[0], layout.runs, layout.lanes, layout.words)
    shifts = lax.broadcasted_iota(packed.dtype, shape, 2) * bits
    lanes = packed.reshape(packed.shape[0], layout.runs, 1, layout.words) >> shifts
    return lanes.astype(jnp.uint32) & (2**bits - 1)


def pack_planes(
    codes: UInt[Array, "blocks size"], widths: UInt8[Array, " blocks"], specs: Sequence[PlaneSpec]
) -> tuple[UInt[Array, "_ _"], ...]:
    """The rows of all blocks in all planes; those of blocks too narrow for a plane are meaningless."""
    if not specs:
        return ()
    top = specs[-1].end
    aligned = codes.astype(jnp.uint32) << (top - widths.astype(jnp.uint32))[:, None]
    rows: dict[PlaneSpec, Array] = {}
    for bits in {spec.bits for spec in specs}:
        alike = [spec for spec in specs if spec.bits == bits]
        rows |= zip(alike, pack_rows([aligned >> (top - spec.end) for spec in alike], bits), strict=True)
    return tuple(rows[spec] for spec in specs)


def trimmed(plane: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The rows of the blocks that are in the plane, without spare ones: see `fitted`."""
    count = int(np.count_nonzero(present))
    return plane[present] if len(plane) == len(present) != count else plane[:count]


def spare_rows(plane: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The rows that no block is in."""
    return plane[~present] if len(plane) == len(present) else plane[int(np.count_nonzero(present)) :]


def fitted(plane: np.ndarray, present: np.ndarray, rows: int) -> np.ndarray:
    """A plane with this many rows, at least one for every block in it; spare rows are zeros.

    They come last; but in a plane of as many rows as there are blocks each block has its own.
    """
    room = np.zeros((rows, *plane.shape[1:]), plane.dtype)
    room[present if rows == len(present) else slice(int(np.count_nonzero(present)))] = trimmed(plane, present)
    return room


def expand(plane: UInt[Array, "rows words"], widths: UInt8[Array, " blocks"], end: int) -> UInt[Array, "blocks words"]:
    """A row for every block; a block without one in the plane gets that of another."""
    if plane.shape[0] == widths.size:
        return plane
    present = widths >= end
    rank = jnp.cumsum(present, dtype=jnp.int32) - present.astype(jnp.int32)
    return plane.at[jnp.minimum(rank, plane.shape[0] - 1)].get(mode="promise_in_bounds")  # checkify refuses to clip


def unpack_planes(
    rows: Sequence[UInt[Array, "_ _"]], specs: Sequence[PlaneSpec], widths: UInt8[Array, " blocks"], block_size: int
) -> UInt[Array, "blocks ..."]:
    """The codes of all blocks from expanded planes, each block in the shape of a row's layout or flat.

    A code is shifted down to the width of its block, so the rows of others that `expand` put in fall out.
    """
    if not specs:
        return jnp.zeros((widths.size, block_size), jnp.uint32)
    fields = [unpack_rows(plane, spec.bits, block_size) for plane, spec in zip(rows, specs, strict=True)]
    if len({spec.bits for spec in specs}) > 1:
        fields = [field.reshape(field.shape[0], -1)[:, :block_size] for field in fields]
    codes = fields[0]
    for field, spec in zip(fields[1:], specs[1:], strict=True):
        codes = codes << spec.bits | field
    spare = specs[-1].end - widths.astype(jnp.uint32)
    return codes >> spare.reshape(-1, *[1] * (codes.ndim - 1))
