"""Bytes of a packed leaf, from its format, its size, and how many of its blocks have each width."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from btc_jax.formats import Format
from btc_jax.planes import plane_specs, row_layout
from btc_jax.seal import SEAL


def packed_nbytes(form: Format, size: int, counts: Sequence[int]) -> int:
    """Bytes that `size` weights take if `counts[i]` of their blocks are `form.widths[i]` bits wide."""
    of_block = nbytes_by_width(form)
    payload = sum(count * of_block[width] for count, width in zip(counts, form.widths, strict=True))
    return payload + header_nbytes(form, size)


def nbytes_of_one_width(form: Format, size: int, width: int) -> int:
    """Bytes that `size` weights take if all their blocks are `width` bits wide."""
    return -(-size // form.block_size) * nbytes_by_width(form)[width] + header_nbytes(form, size)


def header_nbytes(form: Format, size: int) -> int:
    """Bytes of what `size` weights store besides their codes."""
    header = form.stored_header(-(-size // form.block_size)).values()
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in header) + SEAL.nbytes


@functools.lru_cache
def nbytes_by_width(form: Format) -> tuple[int, ...]:
    """Bytes of the codes of a block of 0 to 8 bits."""
    specs = plane_specs(form.widths)
    rows = [(spec.end, row_layout(form.block_size, spec.bits).nbytes) for spec in specs]
    return tuple(sum(nbytes for end, nbytes in rows if width >= end) for width in range(9))


def padded_nbytes(form: Format, size: int, counts: Sequence[Sequence[int]]) -> int:
    """Bytes of each of several pieces of `size` weights, with planes padded to the longest.

    Args:
        counts: for each piece, how many of its blocks are `form.widths[i]` bits wide.
    """
    total = header_nbytes(form, size)
    for spec in plane_specs(form.widths):
        rows = max(sum(n for n, width in zip(piece, form.widths, strict=True) if width >= spec.end) for piece in counts)
        total += rows * row_layout(form.block_size, spec.bits).nbytes
    return total


def leaf_nbytes(leaf: Any) -> int:
    """Bytes of an array or packed leaf; 0 for anything else."""
    if hasattr(leaf, "nbytes"):
        return int(leaf.nbytes)
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize if isinstance(leaf, jax.ShapeDtypeStruct) else 0
