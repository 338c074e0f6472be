"""One leaf -> its packed arrays: blocks, codec and planes put together and jitted.

Arrays under `jax.jit` have fixed shapes, and how many rows a plane has is known only when the widths are. So packing is
two steps with a read of a few integers in between, and cannot itself run under `jit`; `reconstruct` can.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from btc_jax._errors import LeafError
from btc_jax._mesh import automatic, gathered, like_leaf, off_mesh
from btc_jax._typing import Array, ArrayLike, Float, Order
from btc_jax.blocks import join, split
from btc_jax.codecs import Codec, Coded, Setting
from btc_jax.codecs.base import root_mean_square
from btc_jax.decoding import narrowed, on_cpu
from btc_jax.planes import compact, pack_planes, plane_specs, row_layout
from btc_jax.seal import SEAL

Planes = tuple[Array, ...]
"""A matrix for each plane that has rows. A block in one plane is in all before it, so planes without rows come last."""
Header = dict[str, Array]


def pack(
    leaf: ArrayLike, codec: Codec, order: Order, path: str = "leaf", slope: ArrayLike = 0.0
) -> tuple[Planes, Header]:
    """Planes and header of a leaf of any floating dtype.

    Args:
        slope: for an adaptive codec, the squared error that saves a bit, over the mean square of the leaf's weights.

    Raises:
        ValueError: weights are NaN, infinite, or too large for the header; the message begins with `path`.
    """
    array = gathered(jnp.asarray(leaf))
    planes, header = _packed(array, codec, order, path, slope)
    return like_leaf((planes, header), leaf)


@off_mesh
def _packed(leaf: Array, codec: Codec, order: Order, path: str, slope: ArrayLike) -> tuple[Planes, Header]:
    codec, slope = codec.traced(slope)
    rows, widths, header, fits, counts = _encode(leaf, _number(slope), codec, order)
    fits, counts = bool(fits), tuple(counts.tolist())
    if not fits:
        raise LeafError(path, what_does_not_fit(leaf, codec))
    planes = [
        _compacted(plane, widths, spec.end, kept) if kept < widths.size else plane
        for plane, spec, kept in zip(rows, plane_specs(codec.widths), _kept_rows(codec, counts), strict=True)
        if kept
    ]
    return tuple(planes), header


def reconstruct(leaf: Float[Array, "..."], codec: Codec, order: Order, slope: ArrayLike = 0.0) -> Float[Array, "..."]:
    """What `pack` packed, decoded, in one traced call. Its derivative is the identity (straight-through)."""
    codec, slope = codec.traced(slope)
    return _reconstructed(leaf, _number(slope), codec, order)


@functools.partial(jax.jit, static_argnames=("codec", "order"))
def _reconstructed(leaf: Array, slope: ArrayLike, codec: Codec, order: Order) -> Array:
    return automatic(lambda leaf: _reconstruct(codec, order, leaf, slope), leaf)


@off_mesh
@functools.partial(jax.jit, static_argnames=("codec", "order"))
def blocks_of(leaf: Float[Array, "..."], codec: Codec, order: Order) -> list[Float[Array, "_ _"]]:
    """The full blocks and the short last one, each a matrix; at least one, for a leaf of size 0."""
    return _parts(leaf, codec, order)


@off_mesh
@functools.partial(jax.jit, static_argnames="codec")
def measure(parts: list[Float[Array, "_ _"]], slope: ArrayLike, codec: Codec) -> tuple[Array, Array]:
    """How many blocks would have each of `codec.widths`, and the squared error over the square of the weights."""
    setting = codec.tune(parts, slope)
    coded = [codec.encode(part, setting) for part in parts]
    signal = jnp.maximum(root_mean_square(parts), jnp.finfo(jnp.float32).tiny)
    errors = [_decoded(codec, one, setting) - part for one, part in zip(coded, parts, strict=True)]
    squares = functools.reduce(jnp.add, [jnp.square(error / signal).sum(1).sum() for error in errors])
    widths = jnp.concatenate([one.widths for one in coded])
    return _histogram(widths, codec), squares / max(sum(part.size for part in parts), 1)


@off_mesh
@jax.jit
def mean_squares(parts: list[Float[Array, "_ _"]]) -> list[Float[Array, " _"]]:
    """Of the weights of each block, over that of all of them."""
    signal = jnp.maximum(root_mean_square(parts), jnp.finfo(jnp.float32).tiny)
    return [jnp.square(part / signal).mean(1) for part in parts]


@off_mesh
@jax.jit
def square_sums(leaf: Float[Array, "..."], scale: ArrayLike) -> Float[Array, "..."]:
    """Sums of the squares of `leaf / scale` over the last axis."""
    return jnp.square(leaf.astype(jnp.float32) / jnp.asarray(scale, jnp.float32)).sum(-1)


def packed_nbytes(codec: Codec, size: int, counts: tuple[int, ...]) -> int:
    """Bytes that `size` weights take if `counts[i]` of their blocks are `codec.widths[i]` bits wide."""
    rows = zip(_kept_rows(codec, counts), plane_specs(codec.widths), strict=True)
    planes = sum(kept * row_layout(codec.block_size, spec.bits).nbytes for kept, spec in rows)
    header = codec.stored_header(-(-size // codec.block_size)).values()
    return planes + sum(math.prod(array.shape) * array.dtype.itemsize for array in header) + SEAL.nbytes


def count_widths(leaf: Float[Array, "..."], slope: ArrayLike, codec: Codec, order: Order) -> Array:
    """How many blocks have each of `codec.widths`; much cheaper than packing."""
    codec, slope = codec.traced(slope)
    return _counted(gathered(leaf), _number(slope), codec, order)


@off_mesh
@functools.partial(jax.jit, static_argnames=("codec", "order"))
def _counted(leaf: Array, slope: Array, codec: Codec, order: Order) -> Array:
    matrices = _parts(leaf, codec, order)
    setting = codec.tune(matrices, slope)
    return _histogram(jnp.concatenate([codec.encode(part, setting).widths for part in matrices]), codec)


@functools.partial(jax.jit, static_argnames=("codec", "order"))
def _encode(leaf: Array, slope: Array, codec: Codec, order: Order) -> tuple[Planes, Array, Header, Array, Array]:
    """Step 1 of packing: rows of all blocks in all planes, widths, stored header, and the numbers the host needs."""
    matrices = _parts(leaf, codec, order)
    setting = codec.tune(matrices, slope)
    parts = [codec.encode(part, setting) for part in matrices]
    widths = jnp.concatenate([part.widths for part in parts])
    specs = plane_specs(codec.widths)
    rows = [pack_planes(_filled_up(part.codes, codec), part.widths, specs) for part in parts]
    rows = tuple(jnp.concatenate(plane) for plane in zip(*rows, strict=True))
    stored = _stored(codec, parts, setting)
    return rows, widths, stored, codec.fits(stored), _histogram(widths, codec)


_compact = jax.jit(compact, static_argnums=(2, 3))


def _compacted(rows: Array, widths: Array, end: int, count: int) -> Array:
    """Step 2 of packing, for one plane. On CPU numpy does it, which need not compile for each count of rows."""
    if on_cpu(rows):
        return jax.device_put(np.asarray(rows)[np.flatnonzero(np.asarray(widths) >= end)])
    return _compact(rows, widths, end, count)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _reconstruct(codec: Codec, order: Order, leaf: Array, slope: Array) -> Array:
    matrices = _parts(leaf, codec, order)
    setting = codec.tune(matrices, slope)
    coded = [codec.encode(part, setting) for part in matrices]
    blocks = jnp.concatenate([_filled_up(_decoded(codec, part, setting), codec) for part in coded])
    fits = codec.fits(_stored(codec, coded, setting))
    return narrowed(join(jnp.where(fits, blocks, jnp.nan), leaf.shape, order), leaf.dtype)


@_reconstruct.defjvp
def _straight_through(codec: Codec, order: Order, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> Any:
    return _reconstruct(codec, order, *primals), tangents[0]


def _decoded(codec: Codec, coded: Coded, setting: Setting) -> Array:
    return codec.decode(coded.codes, codec.grid(coded.widths, coded.header | setting))


def _stored(codec: Codec, parts: Sequence[Coded], setting: Setting) -> Header:
    widths = jnp.concatenate([part.widths for part in parts])
    header = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *(part.header for part in parts))
    return codec.pack_header(widths, header, setting)


def _number(slope: ArrayLike) -> ArrayLike:
    """As an array of no device, so that another number does not ask for another program."""
    return jnp.asarray(slope, jnp.float32) if isinstance(slope, Tracer) else np.asarray(slope, np.float32)


def _parts(leaf: Array, codec: Codec, order: Order) -> list[Array]:
    """The full blocks and the short last one, each a matrix; at least one, for a leaf of size 0."""
    full, tail = split(leaf, codec.block_size, order)
    if tail is None:
        return [full]
    return [full, tail] if full.shape[0] else [tail]


def _filled_up(matrix: Array, codec: Codec) -> Array:
    return jnp.pad(matrix, ((0, 0), (0, codec.block_size - matrix.shape[1])))


def _histogram(widths: Array, codec: Codec) -> Array:
    return jnp.stack([jnp.sum(widths == width, dtype=jnp.int32) for width in codec.widths])


def _kept_rows(codec: Codec, counts: tuple[int, ...]) -> list[int]:
    """Rows of each plane: one for each block that is wide enough."""
    return [
        sum(count for width, count in zip(codec.widths, counts, strict=True) if width >= spec.end)
        for spec in plane_specs(codec.widths)
    ]


def what_does_not_fit(leaf: Array, codec: Codec | None = None) -> str:
    """What is wrong with a leaf that cannot be packed, and the remedy."""
    not_finite = int(jnp.sum(~jnp.isfinite(leaf)))
    if not_finite:
        return f"{not_finite} of {leaf.size} weights are NaN or infinite; fix them, or leave the leaf dense with a rule"
    largest = float(jnp.abs(leaf).max())
    if largest > 1e36 or codec is None:
        return f"weights as large as {largest:g} leave no room to calculate in float32; scale them, or leave them dense"
    size = "as large as" if largest > 1 else "no larger than"
    if getattr(codec, "header_dtype", "float32") == "float32":
        return f"weights {size} {largest:g} leave no room to calculate in float32; scale them, or leave them dense"
    return f"weights {size} {largest:g} do not fit the header; use {codec.id} with header_dtype='float32'"
