"""The primitive that looks up rows of a packed matrix, such as tokens in an embedding, and decodes no others."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from btc_jax._typing import Array, Int
from btc_jax.backends.native import Call
from btc_jax.backends.xla import narrowed
from btc_jax.formats import Format
from btc_jax.planes import PlaneSpec, plane_specs, unpack_planes
from btc_jax.primitives.whole import arguments, decode_p, grid_or_nan, takes

rows_p = Primitive("btc_rows")
"""Row numbers `i32[count]`, each in bounds, and the operands of `decode_p` -> `f32[count, columns]`: those rows.

The weights of the leaf are a matrix of so many columns in the order of the blocks.
"""

_RUN = 256
"""Blocks whose rows in a plane are counted together."""


def rows(index: Int[Array, " count"], arrays: Sequence[Any], columns: int, **params: Any) -> Array:
    """Rows of a packed matrix.

    Args:
        index: their numbers, in bounds.
        arrays: operands of `decode_p`.
        params: parameters of `decode_p`; `dtype` is what the weights are rounded to.
    """
    return rows_p.bind(index, *arrays, columns=columns, **params)


def reference(index: Array, *arrays: Any, columns: int, **params: Any) -> Array:
    """The primitive in operations of XLA."""
    planes, header, seal, _ = arguments(arrays, params["names"], params["waits"])
    form, size = params["form"], math.prod(params["shape"])
    for axis in range(seal.ndim - 1):  # axes with a single piece
        planes, header, seal = jax.tree.map(lambda array: array[0], (planes, header, seal))
        del axis
    return _looked_up(index, planes, header, seal, form, size, columns, params["dtype"])


def _looked_up(
    index: Array,
    planes: Sequence[Array],
    header: Mapping[str, Array],
    seal: Array,
    form: Format,
    size: int,
    columns: int,
    dtype: Any,
) -> Array:
    block_size, blocks = form.block_size, -(-size // form.block_size)
    aligned = columns % block_size == 0
    each = columns // block_size if aligned else (columns + block_size - 2) // block_size + 1
    # Block numbers and positions within a block: neither overflows, as their product could.
    whole, part = divmod(columns, block_size)
    first = index * whole + index * part // block_size
    wanted = jnp.minimum(first[:, None] + jnp.arange(each, dtype=index.dtype)[None], blocks - 1).reshape(-1)
    widths, per_block = form.unpack_header(header, blocks)
    widths, per_block = jnp.asarray(widths), {name: jnp.asarray(array)[wanted] for name, array in per_block.items()}
    specs = plane_specs(form.widths)[: len(planes)]
    found = [plane[_places(plane, spec, widths, wanted)] for plane, spec in zip(planes, specs, strict=True)]
    grid = grid_or_nan(form, seal, widths[wanted], per_block)
    weights = form.decode(unpack_planes(found, specs, widths[wanted], block_size), grid)
    flat = narrowed(weights.reshape(wanted.size, -1)[:, :block_size], dtype).reshape(index.size, each * block_size)
    if aligned:
        return flat.astype(jnp.float32)
    places = (index * part % block_size)[:, None] + jnp.arange(columns, dtype=index.dtype)[None]
    return jnp.take_along_axis(flat, places, axis=1).astype(jnp.float32)


def _places(plane: Array, spec: PlaneSpec, widths: Array, wanted: Array) -> Array:
    """The rows of blocks in a plane: of those before each in its run, and of whole runs."""
    if plane.shape[0] == widths.size:
        return wanted
    present = jnp.pad(widths >= spec.end, (0, -widths.size % _RUN)).reshape(-1, _RUN)
    counts = present.sum(1, dtype=jnp.int32)
    before = jnp.cumsum(counts, dtype=jnp.int32) - counts
    run, place = wanted // _RUN, wanted % _RUN
    inside = present[run] & (jnp.arange(_RUN, dtype=place.dtype)[None] < place[:, None])
    return jnp.clip(before[run] + inside.sum(1, dtype=jnp.int32), 0, plane.shape[0] - 1)


def _native(index: Array, *arrays: Any, columns: int, **params: Any) -> Array:
    planes, _, seal, _ = arguments(arrays, params["names"], params["waits"])
    own = arrays[: len(arrays) - params["waits"]]
    leaf = Call(own, len(planes), params["form"], math.prod(params["shape"]), params["dtype"], seal.shape[:-1])
    return leaf.rows(index, columns)


@rows_p.def_abstract_eval
def _abstract(index: Any, *arrays: Any, columns: int, **_: Any) -> Any:
    varying = {"manual_axis_type": index.manual_axis_type} if hasattr(index, "manual_axis_type") else {}
    return ShapedArray((index.shape[0], columns), jnp.dtype(jnp.float32), **varying)


@rows_p.def_impl
def _compiled(*operands: Any, **params: Any) -> Array:
    return _program(**params)(*operands)


@functools.lru_cache(2**12)
def _program(**params: Any) -> Any:
    return jax.jit(functools.partial(rows_p.bind, **params))


def _batched(operands: Sequence[Any], axes: Sequence[Any], columns: int, **params: Any) -> Any:
    (index, *arrays), (axis, *rest) = operands, axes
    if axis is not None:
        index = jnp.moveaxis(index, axis, 0)
    if all(other is None for other in rest):
        found = rows_p.bind(index.reshape(-1), *arrays, columns=columns, **params)
        return found.reshape(*index.shape, columns), 0
    shape = (math.prod(params["shape"]) // columns, columns)
    one = functools.partial(decode_p.bind, **{**params, "shape": shape, "order": "stored"})
    tables = jax.vmap(one, in_axes=tuple(rest))(*arrays).astype(jnp.float32)
    return jax.vmap(lambda i, table: table[i], in_axes=(None if axis is None else 0, 0))(index, tables), 0


_by_xla = mlir.lower_fun(reference, multiple_results=False)
_by_kernel = mlir.lower_fun(_native, multiple_results=False)


def _on_cpu(context: Any, *operands: Any, **params: Any) -> Any:
    return (_by_kernel if takes(context, **params) else _by_xla)(context, *operands, **params)


batching.primitive_batchers[rows_p] = _batched
mlir.register_lowering(rows_p, _by_xla)
mlir.register_lowering(rows_p, _on_cpu, platform="cpu")
