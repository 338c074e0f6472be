"""A packed leaf <-> the bytes of its one tensor: seal, header arrays, planes, each little-endian, nothing in between.

How many rows a plane has follows from the widths, and they from the header; so nothing else is stored, and the length
must come out to the byte. The same checks hold when a leaf is saved and when it is loaded.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from btc_jax.blocks import MAX_TAPS, ORDERS, tap_sizes
from btc_jax.decoding import wrong_rows
from btc_jax.formats import Format, check_registered, format_from_json
from btc_jax.intact import changes
from btc_jax.pieces import Cut, padded, stacked
from btc_jax.planes import plane_specs, row_layout, trimmed
from btc_jax.seal import SEAL, changed_arrays
from btc_jax.tensor import BTCTensor, pieces_in


@functools.lru_cache(maxsize=256)
def format_json(form: Format) -> dict[str, Any]:
    """A format as files have it; the same object each time."""
    return form.to_json()


def check(leaf: BTCTensor) -> None:
    """Refuse a packed leaf that could not be read again. Of its arrays, only seal and header are read.

    Raises:
        ValueError: if it is stacked, its format is not registered, or its order has too many taps.
        TypeError: if it does not hold arrays with values, or they were changed.
    """
    if leaf.stack:
        raise ValueError(
            f"it is a stack of {math.prod(leaf.stack)} packed leaves of shape {leaf.shape}; save them one by one, or "
            "decode them before they are stacked (btc_jax.btc_dequantize)"
        )
    check_format(leaf.order, leaf.piece, np.dtype(leaf.dtype))
    check_registered(leaf.format)
    if format_from_json(format_json(leaf.format)) != leaf.format:
        raise ValueError(f"its format {leaf.format!r} does not come back from its JSON, {leaf.format.to_json()}")
    for array in jax.tree.leaves((leaf.planes, leaf.header, leaf.seal)):
        _refuse_without_values(array)
    if trouble := changes(leaf) or _wrong_rows(leaf):
        raise TypeError(changed_arrays(leaf.shape, trouble))


def arrays_of(leaf: BTCTensor) -> list[np.ndarray]:
    """The arrays of a packed leaf as they are stored, in the order of its bytes."""
    return [np.ascontiguousarray(array) for piece in _pieces(leaf) for array in _arrays_of(piece)]


def _arrays_of(leaf: BTCTensor) -> list[Any]:
    header = {name: np.asarray(leaf.header[name]) for name in leaf.format.stored_header(leaf.num_blocks)}
    present = _present(leaf)
    planes = [trimmed(np.asarray(plane), here) for plane, here in zip(leaf.planes, present, strict=False)]
    return [leaf.seal, *header.values(), *(plane for plane in planes if len(plane))]


def _pieces(leaf: BTCTensor) -> Iterable[BTCTensor]:
    """The pieces of a leaf, on the host; the leaf itself, if it is whole."""
    return [leaf] if leaf.stacks is None else pieces_in(leaf).values()


def stored_nbytes(leaf: BTCTensor) -> int:
    """Bytes of the arrays, without the room that some planes have: see `btc_jax.fit`."""
    return sum(_stored_nbytes(piece) for piece in _pieces(leaf))


def _stored_nbytes(leaf: BTCTensor) -> int:
    rows = zip(leaf.planes, _present(leaf), strict=False)
    return leaf.nbytes - sum(
        (len(plane) - int(np.count_nonzero(here))) * (plane.nbytes // max(len(plane), 1)) for plane, here in rows
    )


def _present(leaf: BTCTensor) -> list[np.ndarray]:
    """Which blocks are in each plane."""
    header = {name: np.asarray(array) for name, array in leaf.header.items()}
    widths = leaf.format.unpack_header(header, leaf.num_blocks)[0]
    return [widths >= spec.end for spec in plane_specs(leaf.format.widths)]


def from_bytes(
    data: np.ndarray, form: Format, order: Any, shape: tuple[int, ...], dtype: np.dtype, cut: Cut | None = None
) -> BTCTensor:
    """The packed leaf that these bytes hold.

    Raises:
        ValueError, TypeError: if they do not fit.
    """
    if cut is None:
        leaf, rest = _from_bytes(data, form, order, shape, dtype)
    else:
        pieces, rest = {}, data
        for index in cut.indices():
            leaf, rest = _from_bytes(rest, form, order, cut.piece(shape), dtype)
            pieces[index] = (leaf.planes, leaf.header)
        planes, header, seal = stacked(padded(pieces, form, -(-math.prod(cut.piece(shape)) // form.block_size)), cut)
        leaf = BTCTensor(planes, header, cut.piece(shape), dtype, form, order, seal, cut.stacks)
    if rest.nbytes:
        raise ValueError(f"it has {rest.nbytes} bytes more than the widths of its blocks ask for")
    return leaf


def _from_bytes(
    data: np.ndarray, form: Format, order: Any, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[BTCTensor, np.ndarray]:
    """A packed leaf, or a piece, that the bytes begin with, and the rest of them."""
    check_format(order, shape, dtype)
    blocks = -(-math.prod(shape) // form.block_size)
    # A block takes at least one bit, so this also bounds a false count.
    if blocks > 8 * data.nbytes:
        raise ValueError(f"{blocks} blocks cannot be held by {data.nbytes} bytes")
    bytes_ = _Bytes(data)
    seal = bytes_.next(SEAL.shape, SEAL.dtype)
    if seal.tobytes() != SEAL.tobytes():
        raise ValueError(
            f"it begins with {seal.tobytes().hex()}, not with the seal of packed leaves, {SEAL.tobytes().hex()}"
        )
    header = {name: bytes_.next(array.shape, array.dtype) for name, array in form.stored_header(blocks).items()}
    planes = tuple(bytes_.next(*plane) for plane in _planes(form, form.unpack_header(header, blocks)[0]))
    return BTCTensor(planes, header, shape, dtype, form, order, seal), data[len(data) - bytes_.left :]


def check_format(order: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse what no packed leaf can be.

    Raises:
        ValueError: if order or dtype is invalid.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"it is packed and of the dtype {dtype}, which is not floating")
    if order not in ORDERS or math.prod(tap_sizes(shape, order)) > MAX_TAPS:
        raise ValueError(f"it has the unknown order {str(order)[:30]!r}, or one with more than {MAX_TAPS} taps")


def _refuse_without_values(array: Any) -> None:
    if not isinstance(array, jax.Array | np.ndarray) or isinstance(array, Tracer):
        raise TypeError(f"it holds {str(array)[:60]} ({type(array).__name__}) in place of an array of values")
    if isinstance(array, jax.Array) and array.is_deleted():
        raise ValueError("its arrays were deleted or donated, so its values are gone")


def _wrong_rows(leaf: BTCTensor) -> str:
    return next(filter(None, map(_wrong_rows_of_piece, _pieces(leaf))), "")


def _wrong_rows_of_piece(leaf: BTCTensor) -> str:
    header = {name: np.asarray(array) for name, array in leaf.header.items()}
    return wrong_rows(leaf.planes, leaf.format, leaf.format.unpack_header(header, leaf.num_blocks)[0])


def _planes(form: Format, widths: np.ndarray) -> Iterator[tuple[tuple[int, int], np.dtype]]:
    """Shape and dtype of each plane that has rows."""
    for spec in plane_specs(form.widths):
        rows, layout = int((widths >= spec.end).sum()), row_layout(form.block_size, spec.bits)
        if rows:
            yield (rows, layout.runs * layout.words), layout.dtype


class _Bytes:
    """Bytes that are consumed from the front as arrays: views, possibly unaligned."""

    def __init__(self, data: np.ndarray):
        self._data, self._position = data, 0

    @property
    def left(self) -> int:
        return self._data.nbytes - self._position

    def next(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes > self.left:
            raise ValueError(f"it has {self._data.nbytes} bytes, fewer than the widths of its blocks ask for")
        self._position += nbytes
        return self._data[self._position - nbytes : self._position].view(dtype).reshape(shape)
