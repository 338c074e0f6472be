"""The packed arrays of a leaf -> its weights. Nothing here knows how they were made."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from btc_jax._mesh import constants, staging
from btc_jax._typing import Array, Order
from btc_jax._xla import apart
from btc_jax.blocks import axes, inverse, join, tap_sizes, transformed
from btc_jax.codecs import Codec
from btc_jax.planes import expand, plane_specs, unpack_planes
from btc_jax.seal import changed_arrays, is_intact


def unpack(
    planes: Sequence[Any],
    header: Mapping[str, Any],
    seal: Any,
    codec: Codec,
    shape: tuple[int, ...],
    dtype: Any,
    order: Order,
) -> Array:
    """The leaf as the codec has it, in `dtype`; all NaN if its seal is broken.

    Raises:
        TypeError: if a plane has other rows than the widths of the blocks ask for.
    """
    planes, header, seal = constants((planes, dict(header), seal))
    permutation, taps = axes(len(shape), order), tap_sizes(shape, order)
    placed = tuple(shape[axis] for axis in permutation)
    planes = _whole_planes(planes, header, codec, -(-math.prod(shape) // codec.block_size), shape)
    decoded = _unpack(planes, header, seal, codec, placed, jnp.float32 if taps else dtype)
    if taps:
        return _from_frequencies(decoded, taps, inverse(permutation), dtype)
    # Compiled apart: XLA:CPU would write every decoded weight to its far place, instead of a tile at a time.
    return decoded if order == "stored" else _transposed(decoded, inverse(permutation))


def _whole_planes(
    planes: Sequence[Any], header: Mapping[str, Any], codec: Codec, blocks: int, shape: tuple[int, ...]
) -> tuple[Any, ...]:
    """Planes with a row for every block, so that one program fits every mix of widths.

    Only on CPU, where numpy does it, and outside of `jit`, where the numbers of rows are compiled in.

    Raises:
        TypeError: a plane has other rows than the widths of the blocks ask for.
    """
    if all(len(plane) == blocks for plane in planes) or not all(map(on_cpu, (*planes, *header.values()))) or staging():
        return tuple(planes)
    widths = codec.read_widths(jax.tree.map(np.asarray, header), blocks)
    if trouble := wrong_rows(planes, codec, widths):
        raise TypeError(changed_arrays(shape, trouble))
    return tuple(
        plane if len(plane) == blocks else _spread(np.asarray(plane), widths >= spec.end)
        for plane, spec in zip(planes, plane_specs(codec.widths), strict=False)
    )


def wrong_rows(planes: Sequence[Any], codec: Codec, widths: np.ndarray) -> str:
    """What is wrong with the numbers of rows of planes for blocks of these widths, or an empty string."""
    rows = [len(plane) for plane in planes]
    wanted = [count for spec in plane_specs(codec.widths) if (count := int((widths >= spec.end).sum()))]
    return "" if rows == wanted else f"its planes have {rows} rows, and the widths of its blocks ask for {wanted}"


def _spread(rows: np.ndarray, present: np.ndarray) -> np.ndarray:
    whole = np.zeros((len(present), rows.shape[1]), rows.dtype)
    whole[present] = rows
    return whole


def on_cpu(array: Any) -> bool:
    """Whether numpy can look at an array at no cost. A traced one has no values."""
    if isinstance(array, Tracer):
        return False
    return isinstance(array, np.ndarray) or all(device.platform == "cpu" for device in array.devices())


_transposed = jax.jit(jnp.transpose, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _from_frequencies(decoded: Array, taps: tuple[int, ...], permutation: tuple[int, ...], dtype: Any) -> Array:
    return narrowed(transformed(decoded, taps, back=True).transpose(permutation), dtype)


@functools.partial(jax.jit, static_argnames=("codec", "shape", "dtype"))
def _unpack(
    planes: Sequence[Any], header: Mapping[str, Any], seal: Any, codec: Codec, shape: tuple[int, ...], dtype: Any
) -> Array:
    return _decode(codec, shape, dtype, planes, header, seal)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _decode(
    codec: Codec, shape: tuple[int, ...], dtype: Any, planes: Sequence[Array], header: Mapping[str, Array], seal: Array
) -> Array:
    """The decoded weights in the order of the blocks, in a shape."""
    blocks = -(-math.prod(shape) // codec.block_size)
    if blocks == 0:
        return jnp.zeros(shape, dtype)
    widths, per_block = codec.unpack_header(header, blocks)
    specs = plane_specs(codec.widths)[: len(planes)]
    rows = [expand(plane, widths, spec.end) for plane, spec in zip(planes, specs, strict=True)]

    def decode(rows: list[Array], widths: Array, grid: Any) -> Array:
        codes = unpack_planes(rows, specs, widths, codec.block_size)
        return narrowed(codec.decode(codes, grid), dtype)

    # Under jit nothing can be raised; and a few numbers a block cost less than the weights themselves.
    grid = jax.tree.map(functools.partial(_or_nan, is_intact(seal)), codec.grid(widths, per_block))
    decoded = apart(decode, rows, widths, grid)
    return join(decoded.reshape(blocks, -1)[:, : codec.block_size], shape, "stored")


@_decode.defjvp
def _refuse_gradient(codec: Codec, shape: tuple[int, ...], *_: Any) -> Any:
    raise TypeError(
        f"{math.prod(shape)} packed weights have no gradient. Differentiate with respect to the other leaves only "
        "(docs/training.md), decode the tree with btc_dequantize, or quantize inside the loss with btc_reconstruct"
    )


def _or_nan(intact: Array, numbers: Array) -> Array:
    return jnp.where(intact, numbers, jnp.nan) if jnp.issubdtype(numbers.dtype, jnp.floating) else numbers


def narrowed(weights: Array, dtype: Any) -> Array:
    """In the dtype of the leaf. Its largest weights may decode to more than the dtype holds: infinity, or NaN."""
    limits = jnp.finfo(dtype)
    if float(limits.max) < float(jnp.finfo(jnp.bfloat16).max):
        weights = jnp.clip(weights, float(limits.min), float(limits.max))
    return weights.astype(dtype)
