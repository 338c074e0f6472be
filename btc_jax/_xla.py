"""Workarounds for choices of XLA that cost speed or exactness, mostly on CPU. Each says why it exists."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from btc_jax._typing import Array


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


def row_sums(x: Array) -> Array:
    """`x.sum(1)`, the same whatever other rows there are.

    XLA:CPU adds term by term, in loops that are not vectorized and wait for each sum: four times the time of a product
    of matrices. That takes rows in batches of up to 16, and adds the remaining ones in another order.
    """
    rows, size = x.shape

    def product(x: Array) -> Array:
        return (jnp.pad(x, ((0, -rows % 16), (0, 0))) @ jnp.ones((size, 1), x.dtype))[:rows, 0]

    return lax.platform_dependent(x, cpu=product, default=lambda x: x.sum(1))


def no_fusion(function: Callable[..., Array], *arrays: Any) -> Array:
    """`function(*arrays)`, not fused with what is done with its result.

    XLA:CPU fuses a reshape of the result into the loops of `function`, which then are not vectorized and take twice
    the time. A branch that it cannot predict prevents that.
    """

    def branch(*arrays: Any) -> Array:
        floats = [array for array in jax.tree.leaves(arrays) if jnp.issubdtype(array.dtype, jnp.floating)]
        x = floats[0].reshape(-1)[0]
        return lax.cond(x == x, function, function, *arrays)  # not known to hold: x might be NaN

    return lax.platform_dependent(*arrays, cpu=branch, default=function)
