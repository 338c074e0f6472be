"""The primitive that multiplies a matrix by a packed one, decoding at most a tile at a time."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from btc_jax._typing import Array, Float
from btc_jax.backends.native import Call
from btc_jax.primitives.whole import arguments, decode_p, refuse_gradient, takes

multiply_p = Primitive("btc_multiply")
"""A matrix `[rows, inputs]` and the operands of `decode_p` -> `[rows, outputs]`: the product with the leaf, transposed.

The weights of the leaf are a matrix `[outputs, inputs]` in the order of the blocks.
"""

_FEW = 16
"""Largest number of rows that a kernel multiplies while it decodes; for more, XLA's matrix products are faster."""
_TILE = 2**22
"""Weights that are decoded at once for a product in XLA."""


def multiply(
    x: Float[Array, "rows inputs"], arrays: Sequence[Any], out: Any, precision: Any = None, **params: Any
) -> Float[Array, "rows outputs"]:
    """The product of a matrix and a packed leaf.

    Args:
        x: the matrix, in float32 or bfloat16.
        arrays: operands of `decode_p`.
        out: dtype of the product.
        precision: as of `lax.dot_general`.
        params: parameters of `decode_p`; `dtype` is what the weights are rounded to.
    """
    return multiply_p.bind(x, *arrays, out=out, precision=precision, **params)


def reference(x: Array, *arrays: Any, out: Any, precision: Any, **params: Any) -> Array:
    """The primitive in operations of XLA, which decode the whole leaf."""
    weights = decode_p.bind(*arrays, **_as_matrix(params, x.shape[1])).reshape(-1, x.shape[1])
    return _product(x, weights.astype(x.dtype), out, precision)


def _as_matrix(params: dict[str, Any], inputs: int) -> dict[str, Any]:
    """Parameters of a leaf that is a matrix as the weights run through the blocks."""
    return {**params, "shape": (math.prod(params["shape"]) // inputs, inputs), "order": "stored"}


def _product(x: Array, weights: Array, out: Any = jnp.float32, precision: Any = None) -> Array:
    numbers = (((x.ndim - 1,), (weights.ndim - 1,)), ((), ()))
    return lax.dot_general(x, weights, numbers, precision=precision, preferred_element_type=jnp.dtype(out))


def _native(x: Array, *arrays: Any, out: Any, precision: Any, **params: Any) -> Array:
    return _by_tiles(x.astype(jnp.float32), *arrays, **params).astype(out)


def _by_tiles(x: Array, *arrays: Any, **params: Any) -> Array:
    planes, _, seal, _ = arguments(arrays, params["names"], params["waits"])
    size, inputs = math.prod(params["shape"]), x.shape[1]
    own, after = arrays[: len(arrays) - params["waits"]], arrays[len(arrays) - params["waits"] :]
    leaf = Call(own, len(planes), params["form"], size, params["dtype"], seal.shape[:-1])
    if len(x) <= _FEW:
        return leaf.multiplied(x)
    outputs = size // inputs
    tile = max(1, min(_TILE // inputs, outputs))
    if tile == outputs:
        return _product(x, leaf.tile(jnp.int32(0), outputs, inputs, after))

    def step(i: Array, y: Array) -> Array:
        first = jnp.minimum(i * tile, outputs - tile)  # the last tile is moved back, and repeats a part
        return lax.dynamic_update_slice(y, _product(x, leaf.tile(first, tile, inputs, after)), (jnp.int32(0), first))

    count = jnp.int32(-(-outputs // tile))
    return lax.fori_loop(jnp.int32(0), count, step, jnp.zeros((len(x), outputs), jnp.float32))


@multiply_p.def_abstract_eval
def _abstract(x: Any, *arrays: Any, shape: tuple[int, ...], out: Any, **_: Any) -> Any:
    varying = {"manual_axis_type": x.manual_axis_type} if hasattr(x, "manual_axis_type") else {}
    return ShapedArray((x.shape[0], math.prod(shape) // x.shape[1]), out, **varying)


@multiply_p.def_impl
def _compiled(*operands: Any, **params: Any) -> Array:
    return _program(**params)(*operands)


@functools.lru_cache(2**12)
def _program(**params: Any) -> Any:
    return jax.jit(functools.partial(multiply_p.bind, **params))


def _batched(operands: Sequence[Any], axes: Sequence[Any], out: Any, precision: Any, **params: Any) -> Any:
    (x, *arrays), (axis, *rest) = operands, axes
    if axis is not None:
        x = jnp.moveaxis(x, axis, 0)
    if all(other is None for other in rest):
        y = multiply(x.reshape(-1, x.shape[-1]), arrays, out, precision, **params)
        return y.reshape(*x.shape[:-1], -1), 0
    one = functools.partial(reference, out=out, precision=precision, **params)
    return jax.vmap(one, in_axes=(None if axis is None else 0, *rest))(x, *arrays), 0


def _derivative(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    (x, *arrays), (dx, *rest) = primals, tangents
    if any(type(tangent) is not ad.Zero for tangent in rest):
        refuse_gradient(shape=params["shape"])
    y = multiply_p.bind(x, *arrays, **params)
    return y, multiply_p.bind(ad.instantiate_zeros(dx), *arrays, **params)


def _transposed(ct: Any, x: Any, *arrays: Any, out: Any, precision: Any, **params: Any) -> Any:
    weights = decode_p.bind(*arrays, **_as_matrix(params, x.aval.shape[1])).reshape(-1, x.aval.shape[1])
    back = lax.dot_general(ad.instantiate_zeros(ct), weights.astype(out), (((1,), (0,)), ((), ())), precision=precision)
    return [back.astype(x.aval.dtype), *[None] * len(arrays)]


_by_xla = mlir.lower_fun(reference, multiple_results=False)
_by_kernel = mlir.lower_fun(_native, multiple_results=False)


def _on_cpu(context: Any, *operands: Any, **params: Any) -> Any:
    return (_by_kernel if takes(context, **params) else _by_xla)(context, *operands, **params)


batching.primitive_batchers[multiply_p] = _batched
ad.primitive_jvps[multiply_p] = _derivative
ad.primitive_transposes[multiply_p] = _transposed
mlir.register_lowering(multiply_p, _by_xla)
mlir.register_lowering(multiply_p, _on_cpu, platform="cpu")
