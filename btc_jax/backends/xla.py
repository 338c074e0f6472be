"""Encoding, measuring and decoding a tile of blocks in XLA: one program each, whatever the leaf.

A tile is a matrix of a fixed number of blocks, so a program is compiled once for all leaves of all models. The last
tile of a leaf is padded, and only its first `count` rows matter. On CPU, a tile is processed a cacheful at a time, up
to `count`: otherwise each reduction of XLA:CPU would read the weights from memory again, at twice the cost of the
arithmetic.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from btc_jax._typing import Array, Float, Int, UInt
from btc_jax.codecs import Codec, LeafParams
from btc_jax.codecs.statistics import statistics_of, totals
from btc_jax.formats import Format
from btc_jax.planes import pack_planes, plane_specs, unpack_planes

_CHUNK = 2**14
"""Weights processed at once on CPU: 64 KiB, so that intermediate results stay in the cache."""
_CHUNKS = 8
"""Chunks of a tile on CPU."""
_WEIGHTS = 2**21
"""Weights of a large tile, which an accelerator processes at once; leaves of at least that size stay there."""


class Encoded(NamedTuple):
    """A tile as it is stored, and what that cost: arrays over its blocks.

    Attributes:
        rows: those of every block in every plane of the format; rows of blocks too narrow for a plane are meaningless.
        widths: bits per weight.
        header: what a block stores besides its codes and its width, by name.
        noise: the squared error of the weights, relative to the squared scale.
        largest: the largest absolute error.
    """

    rows: tuple[Array, ...]
    widths: Array
    header: dict[str, Array]
    noise: Array
    largest: Array


def is_large(size: int, platform: str) -> bool:
    """Whether this many weights are processed in large tiles."""
    return platform != "cpu" and size >= _WEIGHTS


def tile_rows(block_size: int, large: bool = False) -> int:
    """Blocks of a tile."""
    return max(1, _WEIGHTS // block_size) if large else _CHUNKS * max(1, _CHUNK // block_size)


@jax.jit
def statistics(blocks: Float[Array, "rows size"], spare: Float[Array, " rows"], count: Int[Array, ""]) -> Any:
    """The statistics of each block."""
    return in_chunks(statistics_of, blocks.shape[1], count, blocks, spare)


@functools.partial(jax.jit, static_argnames=("encoder", "form", "dtype"))
def encode(
    blocks: Float[Array, "rows size"],
    spare: Float[Array, " rows"],
    scale: Float[Array, " rows"],
    leaf_params: LeafParams,
    count: Int[Array, ""],
    encoder: Codec,
    form: Format,
    dtype: Any,
) -> Encoded:
    """Codes a tile.

    Args:
        spare, leaf_params: see `Codec.encode`.
        scale: the unit of the errors of each block.
        dtype: what the decoded weights are rounded to.
    """
    coded = functools.partial(_coded, encoder, form, dtype)
    return in_chunks(coded, blocks.shape[1], count, blocks, spare, scale, leaf_params)


def _coded(
    encoder: Codec, form: Format, dtype: Any, blocks: Any, spare: Any, scale: Any, leaf_params: LeafParams
) -> Encoded:
    widths, codes, header = encoder.encode(form, blocks, spare, leaf_params)
    # The barrier keeps XLA from computing the codes once for the planes and once for the errors.
    codes, widths, header = lax.optimization_barrier((codes.astype(jnp.uint8), widths, header))
    rows = rows_of(form, widths, codes, spare)
    stored = {name: leaf_params[name] for name in leaf_params} | header
    decoded = narrowed(form.decode(codes, form.grid(widths, stored)), dtype).astype(jnp.float32)
    errors = decoded - blocks
    noise = totals(jnp.square(errors / scale[:, None]), spare)
    return Encoded(rows, widths, header, noise, jnp.abs(errors).max(1))


def rows_of(form: Format, widths: Any, codes: Any, spare: Any) -> tuple[Array, ...]:
    """A row of every block in every plane, with zeros in spare places."""
    is_weight = lax.broadcasted_iota(jnp.float32, codes.shape, 1) < form.block_size - spare[:, None]
    return pack_planes(jnp.where(is_weight, codes, jnp.uint8(0)), widths, plane_specs(form.widths))


@functools.partial(jax.jit, static_argnames=("form", "dtype"))
def decode(
    rows: Sequence[UInt[Array, "rows _"]],
    widths: UInt[Array, " rows"],
    header: Mapping[str, Array],
    count: Int[Array, ""],
    form: Format,
    dtype: Any,
) -> Float[Array, "rows size"]:
    """The weights of a tile, from a row of every block in every plane."""
    decoded = functools.partial(_decoded, form, dtype)
    weights = in_chunks(decoded, form.block_size, count, tuple(rows), widths, dict(header))
    # Not in the loop, which XLA:CPU would not vectorize for it.
    return weights.reshape(len(widths), -1)[:, : form.block_size]


def _decoded(form: Format, dtype: Any, rows: Any, widths: Any, header: Any) -> Array:
    grid = lax.optimization_barrier(form.grid(widths, header))
    codes = unpack_planes(rows, plane_specs(form.widths), widths, form.block_size)
    return narrowed(form.decode(codes, grid), dtype)


def narrowed(weights: Any, dtype: Any) -> Any:
    """In the dtype of the leaf, whose largest weights may decode to more than it can represent: infinity, or NaN."""
    limits = jnp.finfo(dtype)
    if float(limits.max) < float(jnp.finfo(jnp.bfloat16).max):
        weights = jnp.clip(weights, float(limits.min), float(limits.max))
    return weights.astype(dtype)


def in_chunks(function: Callable[..., Any], block_size: int, count: Any, *arrays: Any) -> Any:
    """`function(*arrays)`, which maps rows to rows, some rows at a time on CPU, and only the first `count`."""
    rows, size = jax.tree.leaves(arrays)[0].shape[0], max(1, _CHUNK // block_size)
    if rows <= size:
        return function(*arrays)

    def chunked(count: Array, *arrays: Any) -> Any:
        def step(i: Array, out: Any) -> Any:
            # The last chunk is moved back to end with the rows; what it repeats comes out the same.
            start = jnp.minimum(i * size, rows - size)
            part = function(*jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), arrays))
            return jax.tree.map(lambda o, p: lax.dynamic_update_slice_in_dim(o, _bits(p), start, 0), out, part)

        shapes = jax.eval_shape(function, *arrays)
        out = jax.tree.map(lambda a: _bits(jnp.zeros(a.shape, a.dtype)), shapes)
        out = lax.fori_loop(0, (count + size - 1) // size, step, out)
        return jax.tree.map(lambda a, o: o if o.dtype == a.dtype else lax.bitcast_convert_type(o, a.dtype), shapes, out)

    default = lambda _, *arrays: function(*arrays)  # noqa: E731
    return lax.platform_dependent(jnp.asarray(count, jnp.int32), *arrays, cpu=chunked, default=default)


def _bits(array: Array) -> Array:
    """XLA:CPU carries bfloat16 through a loop as float32, and converts all of it each time around; so not those."""
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array
