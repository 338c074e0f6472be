"""Leaves as the C kernels expect them: a description in numbers, and calls from the host and from XLA."""

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._typing import Array, Order
from btc_jax.formats import Format, MultilevelFormat, UniformFormat
from btc_jax.native import library
from btc_jax.native.loading import pointers
from btc_jax.planes import plane_specs, row_layout

_ROUNDINGS = {"float32": 0, "bfloat16": 1}
"""Dtypes of leaves, as the kernels number them."""


def takes(form: Format, size: int, dtype: Any) -> bool:
    """Whether there are kernels, and they support leaves like this."""
    known = type(form) in (MultilevelFormat, UniformFormat) and np.dtype(dtype).name in _ROUNDINGS
    return known and size > 0 and form.block_size % 32 == 0 and form.block_size <= 256 and library() is not None


def description(form: Format, size: int, rows: Sequence[int], dtype: Any, *more: int) -> np.ndarray:
    """What a kernel must know of a leaf, or of each piece of one: numbers in the order of `btc_read_leaf`.

    Args:
        rows: number of rows of each plane.
        dtype: what a weight is rounded to.
        more: further numbers of the call.
    """
    kind, low, high = 0, -1, 8
    extremes_are_float32 = is_mixed = 0
    if isinstance(form, UniformFormat):
        kind, low, high, is_mixed = 1, form.widths[0], form.widths[-1], int(len(form.widths) > 1)
        extremes_are_float32 = int(form.header_dtype == "float32")
    elif len(form.widths) == 1:
        low = form.widths[0]
    planes: list[int] = []
    for count, spec in zip(rows, plane_specs(form.widths), strict=False):
        layout = row_layout(form.block_size, spec.bits)
        planes += [count, layout.runs * layout.words, spec.bits, spec.end]
    head = [kind, form.block_size, _ROUNDINGS[np.dtype(dtype).name], size, -(-size // form.block_size)]
    return np.array([*head, low, high, extremes_are_float32, is_mixed, len(rows), *planes, *more], np.int64)


def columns_of(shape: tuple[int, ...], order: Order) -> tuple[int, int, int] | None:
    """How a leaf of this shape is written with rows of weights as columns: the numbers of `Columns` in the kernels.

    `None` if its weights are consecutive in memory, or its axes are permuted in another way.
    """
    if order != "output-major" or not 2 <= len(shape) <= 3:
        return None
    inner = shape[1] if len(shape) == 3 else 1
    return math.prod(shape[1:]), shape[0], inner


def decode_on_host(
    planes: Sequence[np.ndarray],
    header: Mapping[str, np.ndarray],
    seal: np.ndarray,
    form: Format,
    columns: tuple[int, int, int] | None,
    out: np.ndarray,
) -> None:
    """Decodes all weights into an array, in the order of the blocks or as `columns_of` says."""
    arrays = [np.ascontiguousarray(a) for a in (*planes, *(header[name] for name in sorted(header)), seal)]
    spec = description(form, out.size, [len(plane) for plane in planes], out.dtype)
    more = np.array([1, _ROUNDINGS[out.dtype.name], *(columns or (0, 0, 0))], np.int64)
    table = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    at, about, into = pointers([spec, more, out])
    found = library()
    assert found is not None
    if not found.functions.btc_decode(at, table, about, into):
        raise MemoryError(f"no memory to decode a leaf of {out.size} weights")


class Call(NamedTuple):
    """A leaf, or a leaf of pieces, in a call of a kernel by XLA.

    Attributes:
        arrays: planes, header and seal, each with leading axes `lead`.
        planes: number of the arrays that are planes.
        form: their format.
        size: weights of a piece.
        dtype: what a weight is rounded to.
    """

    arrays: Sequence[Array]
    planes: int
    form: Format
    size: int
    dtype: Any
    lead: tuple[int, ...] = ()

    def _called(self, target: str, shape: tuple[int, ...], dtype: Any, operands: Sequence[Any], *more: int) -> Array:
        rows = [plane.shape[-2] for plane in self.arrays[: self.planes]]
        spec = description(self.form, self.size, rows, self.dtype, *more)
        call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))
        return call(*self.arrays, *operands, spec=spec)

    def decoded(self, columns: tuple[int, int, int] | None, after: Sequence[Array] = ()) -> Array:
        """All weights of each piece, in the order of the blocks or as `columns_of` says."""
        more = math.prod(self.lead), _ROUNDINGS[np.dtype(self.dtype).name], *(columns or (0, 0, 0))
        return self._called("btc_decode", (*self.lead, self.size), self.dtype, after, *more)

    def tile(self, first: Array, rows: int, columns: int, after: Sequence[Array] = ()) -> Array:
        """So many rows of a matrix, from number `first`, `i32[]`, on: `f32[rows, columns]`."""
        return self._called("btc_tile", (rows, columns), jnp.float32, [first, *after], rows, columns)

    def multiplied(self, x: Array) -> Array:
        """`x @ weights.reshape(-1, inputs).T` for a matrix `f32[rows, inputs]`."""
        rows, inputs = x.shape
        return self._called("btc_multiply", (rows, self.size // inputs), jnp.float32, [x], rows, inputs)

    def rows(self, index: Array, columns: int) -> Array:
        """Rows `index`, `i32[count]`, each in bounds, of a matrix of so many columns: `f32[count, columns]`."""
        return self._called("btc_rows", (index.size, columns), jnp.float32, [index], index.size, columns)
