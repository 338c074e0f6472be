"""From the packed arrays of a leaf to its weights. Nothing here knows how they were encoded."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from btc_jax._mesh import constants, like_leaf, off_mesh, staging
from btc_jax._typing import Array, Order
from btc_jax.backends import REFERENCE, backend_for, native
from btc_jax.backends.xla import narrowed, tile_rows
from btc_jax.blocks import aligned, axes, put, tap_sizes, unflattened
from btc_jax.formats import Format
from btc_jax.formats.base import namespace
from btc_jax.pieces import at, joined
from btc_jax.planes import plane_specs, row_layout, spare_rows
from btc_jax.primitives import decode
from btc_jax.seal import broken_seal, changed_arrays
from btc_jax.tiles import filled_up, overlapped


def unpack(
    planes: Sequence[Any],
    header: Mapping[str, Any],
    seal: Any,
    form: Format,
    shape: tuple[int, ...],
    dtype: Any,
    order: Order,
) -> Array:
    """The decoded leaf in `dtype`; all NaN if its seal is broken.

    Outside of `jit` and on CPU, tile by tile: the same program decodes leaves of all shapes.

    Raises:
        TypeError: if a plane does not have the rows that the widths of the blocks require.
    """
    planes, header, seal = constants((planes, dict(header), seal))
    if all(map(on_cpu, (*planes, *header.values(), seal))) and not staging():
        return like_leaf(_on_host(planes, header, seal, form, shape, dtype, order), seal)
    return decode(planes, header, seal, form, shape, dtype, order)


def unpack_pieces(
    planes: Sequence[Any],
    header: Mapping[str, Any],
    seal: Any,
    form: Format,
    piece: tuple[int, ...],
    kept: tuple[bool, ...],
    dtype: Any,
    order: Order,
) -> Array:
    """A leaf that is cut into pieces, each decoded where it lies.

    Args:
        piece: shape of a piece.
        kept: for each leading axis of the arrays, whether the leaf is a stack along it.
    """
    arrays = constants((tuple(planes), dict(header), seal))
    seal = arrays[2]
    if all(map(on_cpu, jax.tree.leaves(arrays))) and not staging() and _is_on_one(seal):
        host = jax.tree.map(np.asarray, arrays)
        places = [at(host, place) for place in np.ndindex(seal.shape[:-1])]
        parts = [_on_host(place[0], place[1], place[2], form, piece, dtype, order) for place in places]
        return like_leaf(joined(np.stack(parts).reshape(*seal.shape[:-1], *piece), kept), seal)
    what = form, piece, kept, jnp.dtype(dtype), order
    if isinstance(seal, Tracer):
        return _unpack_pieces(*what, *arrays)
    return _program(*what, _place(seal, len(kept)))(*arrays)


def _place(seal: Array, axes: int) -> NamedSharding | None:
    """The sharding of the decoded leaf: that of the seal, if it is on a mesh."""
    place = seal.sharding
    return NamedSharding(place.mesh, _spec(place, axes)) if isinstance(place, NamedSharding) else None


def _spec(sharding: Any, axes: int) -> PartitionSpec:
    return PartitionSpec(*tuple(sharding.spec)[:axes])


@functools.lru_cache(2**10)
def _program(
    form: Format, piece: tuple[int, ...], kept: tuple[bool, ...], dtype: Any, order: Order, place: NamedSharding | None
) -> Callable[..., Array]:
    """Decodes leaves of pieces that lie on several devices."""
    return jax.jit(functools.partial(_unpack_pieces, form, piece, kept, dtype, order), out_shardings=place)


def _unpack_pieces(
    form: Format,
    piece: tuple[int, ...],
    kept: tuple[bool, ...],
    dtype: Any,
    order: Order,
    planes: Sequence[Array],
    header: Mapping[str, Array],
    seal: Array,
) -> Array:
    """Of traced arrays, whether axes of the mesh are explicit in their types or not."""

    def one(planes: Sequence[Array], header: Mapping[str, Array], seal: Array) -> Array:
        return unpack(planes, header, seal, form, piece, dtype, order)

    def whole(planes: Sequence[Array], header: Mapping[str, Array], seal: Array) -> Array:
        parts = one
        for _ in kept:
            parts = jax.vmap(parts)
        return joined(parts(planes, header, seal), kept)

    sharding = jax.typeof(seal).sharding
    kinds = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not explicit:
        return whole(planes, header, seal)
    inside: Any = jax.sharding.auto_axes(whole, axes=explicit, out_sharding=_spec(sharding, len(kept)))
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        return inside(planes, header, seal)


def widths_of_pieces(form: Format, header: Mapping[str, Any], blocks: int, pieces: tuple[int, ...]) -> Any:
    """The widths of all blocks, piece by piece, `u8[blocks]`."""
    if not pieces:
        return form.unpack_header(header, blocks)[0]
    xp, count = namespace(next(iter(header.values()))), math.prod(pieces)
    places = [{name: array.reshape(count, -1)[i] for name, array in header.items()} for i in range(count)]
    return xp.concatenate([form.unpack_header(place, blocks // count)[0] for place in places])


@off_mesh
def _on_host(
    planes: Sequence[Any],
    header: Mapping[str, Any],
    seal: Any,
    form: Format,
    shape: tuple[int, ...],
    dtype: Any,
    order: Order,
) -> np.ndarray:
    planes, header = [np.asarray(plane) for plane in planes], jax.tree.map(np.asarray, dict(header))
    size = math.prod(shape)
    if broken := broken_seal(np.asarray(seal)):
        raise TypeError(changed_arrays(shape, f"its seal became {broken}"))
    if size == 0:
        return np.zeros(shape, dtype)
    widths, per_block = form.unpack_header(header, -(-size // form.block_size))
    if trouble := wrong_rows(planes, form, widths):
        raise TypeError(changed_arrays(shape, trouble))
    if backend_for(form, "cpu") is REFERENCE and native.takes(form, size, dtype):
        return _by_kernel(planes, header, np.asarray(seal), form, shape, dtype, order)
    decoded = functools.partial(_by_tiles, planes, widths, per_block, form)
    if math.prod(tap_sizes(shape, order)) > 1:
        flat = np.empty(size, np.float32)
        decoded(flat)
        with np.errstate(all="ignore"):  # a forged header can hold any number
            return np.asarray(narrowed(unflattened(flat, shape, order), dtype))
    leaf = aligned(size, dtype).reshape(shape)
    decoded(leaf.transpose(axes(leaf.ndim, order)))
    return leaf


def _by_kernel(
    planes: Sequence[np.ndarray],
    header: Mapping[str, np.ndarray],
    seal: np.ndarray,
    form: Format,
    shape: tuple[int, ...],
    dtype: Any,
    order: Order,
) -> np.ndarray:
    columns, taps = native.columns_of(shape, order), math.prod(tap_sizes(shape, order)) > 1
    weights = aligned(math.prod(shape), np.float32 if taps else dtype)
    native.decode_on_host(planes, header, seal, form, columns, weights)
    if columns:
        return weights.reshape(shape)
    with np.errstate(all="ignore"):  # a forged header can hold any number
        return np.asarray(unflattened(weights, shape, order)).astype(dtype, copy=False)


def _by_tiles(
    planes: Sequence[np.ndarray], widths: np.ndarray, header: Mapping[str, np.ndarray], form: Format, placed: np.ndarray
) -> None:
    """Decodes blocks into a leaf whose axes are in the order in which its weights run."""
    size, cpu = tile_rows(form.block_size), jax.local_devices(backend="cpu")[0]
    program = functools.partial(backend_for(form, "cpu").decode, form=form, dtype=placed.dtype)
    rows = zip(*(_row_tiles(form, i, planes, widths, size) for i in range(len(plane_specs(form.widths)))), strict=True)

    def started(start: int) -> Array:
        here, of_planes = widths[start : start + size], [filled_up(plane, size) for plane in next(rows, ())]
        numbers = {name: filled_up(array[start : start + size], size) for name, array in header.items()}
        with jax.default_device(cpu):
            return program(of_planes, filled_up(here, size), numbers, np.int32(len(here)))

    def finished(start: int, tile: Array) -> None:
        first = start * form.block_size
        put(placed, first, np.asarray(tile).reshape(-1)[: placed.size - first])

    overlapped(started, finished, range(0, len(widths), size))


def _row_tiles(
    form: Format, i: int, planes: Sequence[np.ndarray], widths: np.ndarray, size: int
) -> Iterator[np.ndarray]:
    """Of plane `i` a row for every block, tile by tile; any for a block that has none there."""
    spec, read = plane_specs(form.widths)[i], 0
    layout = row_layout(form.block_size, spec.bits)
    none = np.zeros((size, layout.nbytes // layout.dtype.itemsize), layout.dtype)
    for start in range(0, len(widths), size):
        present = widths[start : start + size] >= spec.end
        count = int(np.count_nonzero(present))
        partly = False
        if count == 0:
            rows = none[: len(present)]
        elif len(planes[i]) == len(widths):  # a row for every block, in its place
            rows = planes[i][start : start + size]
        else:
            rows, partly = planes[i][read : read + count], count < len(present)
        read += count
        yield rows.take(np.cumsum(present, dtype=np.int32) - 1, axis=0, mode="clip") if partly else rows


def wanted_rows(form: Format, widths: np.ndarray) -> list[int]:
    """How many blocks of these widths are in each plane of the format."""
    return [int(np.count_nonzero(widths >= spec.end)) for spec in plane_specs(form.widths)]


def wrong_rows(planes: Sequence[Any], form: Format, widths: np.ndarray) -> str:
    """What is wrong with the numbers of rows of planes for blocks of these widths, or an empty string.

    A plane may have spare rows of zeros, as in a leaf that is packed like another; see `btc_jax.fit`.
    """
    wanted, rows = wanted_rows(form, widths), [len(plane) for plane in planes]
    spare = [0] * (len(wanted) - len(rows))
    if not all(count <= found <= len(widths) for count, found in zip(wanted, rows + spare, strict=True)):
        asked = [count for count in wanted if count]
        return f"its planes have {rows} rows, and the widths of its blocks ask for {asked}"
    for i, (plane, spec) in enumerate(zip(planes, plane_specs(form.widths), strict=False)):
        if rows[i] > wanted[i] and spare_rows(np.asarray(plane), widths >= spec.end).any():
            return f"its plane {i} has {rows[i]} rows with codes, and the widths of its blocks ask for {wanted[i]}"
    return ""


def _is_on_one(array: Any) -> bool:
    return isinstance(array, np.ndarray) or len(array.devices()) == 1


def on_cpu(array: Any) -> bool:
    """Whether numpy can read an array at no cost. A traced one has no values."""
    if isinstance(array, Tracer):
        return False
    return isinstance(array, np.ndarray) or all(device.platform == "cpu" for device in array.devices())
