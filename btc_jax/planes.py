"""Codes of blocks of mixed widths <-> packed planes of bits.

A plane holds the same few bits, 1, 2, 4 or 8, of the codes of every block that is wide enough: most significant bits in
the first plane, one row a block, in block order. Where a block's row lies in a plane is its rank among the blocks that
have one, a prefix sum over the widths; it is never stored. With the paper's widths 4 and 8 the first plane is a plain
4-bit matrix that every block is in, and the second corrects the wide ones: `q = 16 * first + second`.

A row is an array of words, uint32 if its bits fill them, else uint16, else uint8. With `J` words a row, word `j` holds
the codes `j, j + J, j + 2 * J, ...`, the first in its lowest bits.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

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

    Example:
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


def row_nbytes(block_size: int, bits: int) -> int:
    """Bytes of one row of a plane."""
    return -(-block_size * bits // 8)


def word_dtype(block_size: int, bits: int) -> np.dtype:
    """The widest unsigned type that a row fills: uint32, uint16 or uint8."""
    nbytes = row_nbytes(block_size, bits)
    return np.dtype(next(f"uint{8 * size}" for size in (4, 2, 1) if nbytes % size == 0))


def pack_rows(codes: UInt8[Array, "blocks size"], bits: int) -> UInt[Array, "blocks words"]:
    """Packs codes below `2 ** bits` into rows of words."""
    dtype = word_dtype(codes.shape[1], bits)
    per_word = 8 * dtype.itemsize // bits
    words = -(-codes.shape[1] // per_word)
    codes = jnp.pad(codes, ((0, 0), (0, words * per_word - codes.shape[1])))
    lanes = codes.astype(dtype).reshape(-1, per_word, words)
    packed = lanes[:, 0]
    for lane in range(1, per_word):
        packed |= lanes[:, lane] << (bits * lane)
    return packed


def unpack_rows(packed: UInt[Array, "blocks words"], bits: int, block_size: int) -> UInt8[Array, "blocks size"]:
    """Inverse of `pack_rows`."""
    per_word = 8 * packed.dtype.itemsize // bits
    shifts = jnp.arange(per_word, dtype=packed.dtype) * jnp.array(bits, packed.dtype)
    lanes = (packed[:, None, :] >> shifts[None, :, None]) & jnp.array(2**bits - 1, packed.dtype)
    return lanes.astype(jnp.uint8).reshape(packed.shape[0], -1)[:, :block_size]


def pack_plane(codes: UInt8[Array, "blocks size"], widths: UInt8[Array, " blocks"], spec: PlaneSpec) -> Array:
    """The rows of all blocks in one plane; those of blocks that are too narrow hold nothing of use."""
    below = jnp.maximum(widths, spec.end) - spec.end
    return pack_rows((codes >> below[:, None]) & (2**spec.bits - 1), spec.bits)


def compact(rows: UInt[Array, "blocks words"], widths: UInt8[Array, " blocks"], end: int, count: int) -> Array:
    """The rows of the `count` blocks that are at least `end` bits wide."""
    return rows[jnp.nonzero(widths >= end, size=count)[0]]


def unpack_planes(
    planes: tuple[UInt[Array, "_ _"], ...],
    specs: tuple[PlaneSpec, ...],
    widths: UInt8[Array, " blocks"],
    block_size: int,
) -> UInt8[Array, "blocks size"]:
    """The codes of all blocks; inverse of packing and compacting each plane of `specs`."""
    codes = jnp.zeros((widths.size, block_size), jnp.uint8)
    for plane, spec in zip(planes, specs, strict=True):
        if plane.shape[0]:
            rows = plane if plane.shape[0] == widths.size else _expand(plane, widths >= spec.end)
            below = jnp.maximum(widths, spec.end) - spec.end
            codes |= unpack_rows(rows, spec.bits, block_size) << below[:, None]
    return codes


def _expand(plane: UInt[Array, "rows words"], present: Array) -> UInt[Array, "blocks words"]:
    """The plane with a row of zeros for every block that has none. Whole words are gathered: far faster than bytes."""
    rank = jnp.maximum(jnp.cumsum(present, dtype=jnp.int32) - 1, 0)
    return jnp.where(present[:, None], plane[rank], jnp.zeros((), plane.dtype))
