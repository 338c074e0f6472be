"""Uses of a packed leaf that need not decode it: products with a matrix, and lookups of rows."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from btc_jax._typing import Array
from btc_jax.fusion.late import Late, Layout, layout_of, result_of
from btc_jax.primitives import multiply, rows


def product(eqn: JaxprEqn, values: Sequence[Any], after: Array | None) -> Any:
    """The result of a `dot_general` with one late operand, or `None` if the leaf must be decoded. It can stay packed if
    what is summed over are the innermost axes of its blocks, as it is for kernels in the order `output-major` and for
    embeddings that give logits.
    """
    contracted, batch = eqn.params["dimension_numbers"]
    place = next(i for i, value in enumerate(values) if isinstance(value, Late))
    late, other = values[place], values[1 - place]
    layout = layout_of(late)
    if batch[0] or layout is None or other.ndim == 0 or eqn.params.get("out_sharding") is not None:
        return None
    summed, summed_of_other = list(contracted[place]), list(contracted[1 - place])
    pairs = sorted(zip(summed, summed_of_other, strict=True), key=lambda pair: layout.dims[pair[0]])
    inner = [axis for dim, _ in pairs for axis in layout.dims[dim]]
    axes = [axis for axis, size in enumerate(layout.sizes) if size > 1]
    if not inner or inner != axes[len(axes) - len(inner) :]:
        return None
    free_of_other = [i for i in range(other.ndim) if i not in summed_of_other]
    x = other.transpose([*free_of_other, *(i for _, i in pairs)])
    x = x.reshape(-1, math.prod(layout.sizes[axis] for axis in inner))
    out = result_of(eqn)
    y = _multiplied(x, late, layout, after, out.dtype, eqn.params["precision"])
    free = [layout.dims[i] for i in range(len(layout.dims)) if i not in summed]
    sizes_of_other = [other.shape[i] for i in free_of_other]
    y = _in_order(y, axes[: len(axes) - len(inner)], free, layout, sizes_of_other)
    if place == 0:
        count = len(free_of_other)
        y = y.transpose([*range(count, y.ndim), *range(count)])
    return y.reshape(out.shape)


def _multiplied(x: Array, late: Late, layout: Layout, after: Array | None, out: Any, precision: Any) -> Array:
    arrays, params = late.waiting(after)
    return multiply(x, arrays, **{**params, "dtype": layout.rounding}, out=jnp.dtype(out), precision=precision)


def _in_order(
    y: Array, outer: Sequence[int], free: Sequence[tuple[int, ...]], layout: Layout, leading: Sequence[int]
) -> Array:
    """The outer axes of a product from the order of the blocks to that of the value."""
    y = y.reshape(*leading, *(layout.sizes[axis] for axis in outer))
    wanted = [outer.index(axis) for dim in free for axis in dim]
    return y.transpose([*range(len(leading)), *(len(leading) + i for i in wanted)])


def looked_up(eqn: JaxprEqn, values: Sequence[Any], after: Array | None) -> Any:
    """The result of a `gather` or `dynamic_slice` of whole rows, or `None` if the leaf must be decoded."""
    late = values[0]
    if not isinstance(late, Late) or any(isinstance(value, Late) for value in values[1:]):
        return None
    layout = layout_of(late)
    if layout is None or not late.shape or math.prod(late.shape) == 0:
        return None
    flat = [axis for dim in layout.dims for axis in dim]
    if flat != sorted(flat) or math.prod(late.shape[1:]) == 1:
        return None
    find = _gathered if eqn.primitive.name == "gather" else _sliced
    index = find(eqn, late, values[1:])
    if index is None:
        return None
    limit, out = late.shape[0], result_of(eqn)
    flat_index = jnp.clip(index, 0, limit - 1).astype(jnp.int32).reshape(-1)
    arrays, params = late.waiting(after)
    params = {**params, "dtype": layout.rounding}
    found = rows(flat_index, arrays, columns=math.prod(late.shape[1:]), **params).astype(out.dtype)
    found = found.reshape(*index.shape, *late.shape[1:])
    if eqn.params.get("mode") == lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        is_there = ((index >= 0) & (index < limit)).reshape(*index.shape, *[1] * (late.ndim - 1))
        found = jnp.where(is_there, found, jnp.asarray(np.nan if fill is None else fill, out.dtype))
    return found.reshape(out.shape)


def _gathered(eqn: JaxprEqn, late: Late, rest: Sequence[Any]) -> Array | None:
    """The numbers of the rows that a `gather` takes, if it takes whole rows, and puts their columns last."""
    numbers, (index,) = eqn.params["dimension_numbers"], rest
    ndim = len(result_of(eqn).shape)
    takes_rows = (
        numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and numbers.collapsed_slice_dims == (0,)
        and tuple(eqn.params["slice_sizes"]) == (1, *late.shape[1:])
        and numbers.offset_dims == tuple(range(ndim - late.ndim + 1, ndim))
    )
    return index.reshape(index.shape[:-1]) if takes_rows else None


def _sliced(eqn: JaxprEqn, late: Late, rest: Sequence[Any]) -> Array | None:
    """The number of the row that a `dynamic_slice` takes, if it takes one."""
    takes_row = tuple(eqn.params["slice_sizes"]) == (1, *late.shape[1:])
    return jnp.asarray(rest[0]) if takes_row else None
