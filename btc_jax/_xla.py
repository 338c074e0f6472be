"""Ways around choices of XLA that cost speed or exactness, mostly on CPU. Each says what it is there for."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from btc_jax._typing import Array

_CHUNK = 2**16
"""Weights worked on at once by `in_chunks`: 256 KiB, which stays in the cache for every pass after the first."""


def divide(a: Array, b: Array) -> Array:
    """`a / b`, correctly rounded on CPU.

    XLA turns a division by a constant or by a broadcast value into a product with the reciprocal, which is off by one
    unit in the last place now and then. It cannot where the divisor depends on the numerator.
    """
    return a / jnp.where(a == a, b, jnp.ones_like(b))


def rounded(x: Array, dtype: Any) -> Array:
    """`x.astype(dtype)`, to a narrower floating dtype, that stays rounded when it is widened again.

    XLA:GPU drops a pair of such casts as excess precision (openxla/xla#41605); it cannot see through the bits.
    """
    narrow = x.astype(dtype)
    bits = lax.bitcast_convert_type(narrow, f"uint{8 * narrow.dtype.itemsize}")
    return lax.bitcast_convert_type(
        bits | (x != x).astype(bits.dtype), narrow.dtype
    )  # x != x: only a NaN, and it stays


def in_chunks(function: Callable[[Array], Any], rows: Array) -> Any:
    """`function(rows)`, for one that maps each row to scalars, a cacheful of rows at a time on CPU.

    XLA:CPU reads its input once for each reduction; from memory that costs twice the time of all the arithmetic.
    """
    size = max(1, _CHUNK // max(rows.shape[1], 1))
    if rows.shape[0] <= size:
        return function(rows)

    def chunked(rows: Array) -> Any:
        def step(i: Array, out: Any) -> Any:
            # The last chunk is moved back to end with the rows; what it repeats comes out the same.
            part = function(lax.dynamic_slice_in_dim(rows, i * size, size))
            return jax.tree.map(lambda o, p: lax.dynamic_update_slice_in_dim(o, p, i * size, 0), out, part)

        out = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, rows))
        return lax.fori_loop(0, -(-rows.shape[0] // size), step, out)

    return lax.platform_dependent(rows, cpu=chunked, default=function)


def apart(function: Callable[..., Array], *arrays: Any) -> Array:
    """`function(*arrays)`, compiled apart from what is done with its result.

    XLA:CPU fuses a reshape of the result into the loops of `function`, which then are not vectorized and take twice
    the time. A branch that it cannot foresee stops that.
    """

    def branch(*arrays: Any) -> Array:
        floats = [array for array in jax.tree.leaves(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]
        x = floats[0].reshape(-1)[0]
        return lax.cond(x == x, function, function, *arrays)  # not known to hold: x might be NaN

    return lax.platform_dependent(*arrays, cpu=branch, default=function)
