"""The primitive that decodes a leaf."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from btc_jax._typing import Array, Order
from btc_jax._xla import no_fusion
from btc_jax.backends import native
from btc_jax.backends.xla import narrowed
from btc_jax.blocks import join, tap_sizes
from btc_jax.formats import Format
from btc_jax.planes import expand, plane_specs, unpack_planes
from btc_jax.seal import is_intact

decode_p = Primitive("btc_decode")
"""The arrays of a packed leaf (planes, header by name, seal, and perhaps one to wait for) -> its weights.

Leading axes that all arrays share, but not the one to wait for, are of a stack of leaves.
"""


def decode(
    planes: Sequence[Any],
    header: Mapping[str, Any],
    seal: Any,
    form: Format,
    shape: tuple[int, ...],
    dtype: Any,
    order: Order,
    after: Array | None = None,
) -> Array:
    """The weights of a leaf of this shape, in `dtype`; all NaN if its seal is broken.

    Args:
        after: an array that must be computed before decoding begins.
    """
    names = tuple(sorted(header))
    arrays = (*planes, *(header[name] for name in names), seal, *(() if after is None else (after,)))
    what: dict[str, Any] = {"form": form, "shape": shape, "dtype": jnp.dtype(dtype), "order": order}
    return decode_p.bind(*map(jnp.asarray, arrays), **what, names=names, waits=after is not None)


def arguments(arrays: Sequence[Any], names: tuple[str, ...], waits: bool) -> tuple[Any, dict[str, Any], Any, Any]:
    """Planes, header, seal and what to wait for, from the operands of the primitive."""
    *arrays, after = arrays if waits else (*arrays, None)
    count = len(arrays) - len(names) - 1
    return tuple(arrays[:count]), dict(zip(names, arrays[count:-1], strict=True)), arrays[-1], after


def reference(
    *arrays: Any,
    form: Format,
    shape: tuple[int, ...],
    dtype: Any,
    order: Order,
    names: tuple[str, ...],
    waits: bool,
    together: bool = True,
) -> Array:
    """The primitive in operations of XLA.

    Args:
        together: whether the blocks of all leaves of a stack are decoded side by side, as those of one leaf are, to the
            last bit. Not where they lie on several devices.
    """
    planes, header, seal, after = arguments(arrays, names, waits)
    if after is not None:
        planes, header, seal = jax.tree.map(functools.partial(_once, is_there(after)), (planes, header, seal))
    lead, size = seal.shape[:-1], math.prod(shape)
    blocks = -(-size // form.block_size)
    if size == 0:
        return jnp.zeros((*lead, *shape), dtype)
    specs = plane_specs(form.widths)[: len(planes)]
    between = jnp.float32 if tap_sizes(shape, order) else dtype

    def expanded(planes: Sequence[Array], header: Mapping[str, Array], seal: Array) -> tuple[list[Array], Array, Any]:
        widths, per_block = jax.tree.map(jnp.asarray, form.unpack_header(header, blocks))
        rows = [expand(plane, widths, spec.end) for plane, spec in zip(planes, specs, strict=True)]
        return rows, widths, grid_or_nan(form, seal, widths, per_block)

    def decoded(rows: list[Array], widths: Array, grid: Any) -> Array:
        return narrowed(form.decode(unpack_planes(rows, specs, widths, form.block_size), grid), between)

    placed = functools.partial(join, shape=shape, order=order)
    for _ in lead:
        expanded, placed = jax.vmap(expanded), jax.vmap(placed)
    made = expanded(planes, header, seal)
    if together:
        count = math.prod(lead) * blocks
        made = jax.tree.map(lambda a: a.reshape(count, *a.shape[len(lead) + 1 :]), made)
        weights = no_fusion(decoded, *made)
    else:
        no_fusion_of_each = functools.partial(no_fusion, decoded)
        for _ in lead:
            no_fusion_of_each = jax.vmap(no_fusion_of_each)
        weights = no_fusion_of_each(*made)
    weights = weights.reshape(*lead, blocks, -1)[..., : form.block_size]
    return narrowed(placed(weights), dtype)


def is_there(array: Array) -> Array:
    """True, once the array is computed.

    XLA removes a barrier before it schedules, and does not see that a number with a bit set is not zero.
    """
    return (lax.bitcast_convert_type(array.reshape(-1)[0].astype(jnp.float32), jnp.uint32) | 1) != 0


def _once(there: Array, array: Array) -> Array:
    return jnp.where(there, array, jnp.zeros_like(array))


def grid_or_nan(form: Format, seal: Array, widths: Array, header: Mapping[str, Array]) -> Any:
    """What decoding needs of each block; NaN if the seal is broken.

    Nothing can be raised under `jit`, and spoiling a few numbers per block costs less than spoiling the weights.
    """
    return jax.tree.map(functools.partial(_or_nan, is_intact(seal)), form.grid(widths, header))


def _or_nan(intact: Array, numbers: Array) -> Array:
    return jnp.where(intact, numbers, jnp.nan) if jnp.issubdtype(numbers.dtype, jnp.floating) else numbers


def _native(
    *arrays: Any, form: Format, shape: tuple[int, ...], dtype: Any, order: Order, names: tuple[str, ...], waits: bool
) -> Array:
    """The primitive by a kernel, which writes the weights of a matrix in place."""
    planes, _, seal, _ = arguments(arrays, names, waits)
    between = jnp.float32 if tap_sizes(shape, order) else dtype
    own, after = arrays[: len(arrays) - waits], arrays[len(arrays) - waits :]
    leaf = native.Call(own, len(planes), form, math.prod(shape), between, seal.shape[:-1])
    if columns := native.columns_of(shape, order):
        return leaf.decoded(columns, after).reshape(*seal.shape[:-1], *shape)
    placed = functools.partial(join, shape=shape, order=order)
    for _ in seal.shape[:-1]:
        placed = jax.vmap(placed)
    return narrowed(placed(leaf.decoded(None, after)), dtype)


def takes(context: Any, form: Format, shape: tuple[int, ...], dtype: Any, **_: Any) -> bool:
    """Whether native kernels support a leaf: XLA does not partition them over a mesh, and exported programs have
    none."""
    is_exported = context.module_context.lowering_parameters.for_export
    return not is_exported and _is_for_one_device(context) and native.takes(form, math.prod(shape), dtype)


def _is_for_one_device(context: Any) -> bool:
    where = context.module_context.axis_context
    mesh = getattr(where, "mesh", None)
    if mesh is not None:
        return set(mesh.axis_names) <= set(where.manual_axes)
    return getattr(where, "num_devices", 1) == 1


@decode_p.def_abstract_eval
def _abstract(*arrays: Any, shape: tuple[int, ...], dtype: Any, names: tuple[str, ...], waits: bool, **_: Any) -> Any:
    seal = arguments(arrays, names, waits)[2]
    varying = {"manual_axis_type": seal.manual_axis_type} if hasattr(seal, "manual_axis_type") else {}
    return ShapedArray((*seal.shape[:-1], *shape), dtype, **varying)


@decode_p.def_impl
def _compiled(*arrays: Any, **params: Any) -> Array:
    return _program(**params)(*arrays)


@functools.lru_cache(2**12)
def _program(**params: Any) -> Any:
    return jax.jit(functools.partial(decode_p.bind, **params))


def _batched(arrays: Sequence[Any], axes: Sequence[Any], waits: bool, **params: Any) -> Any:
    own = len(arrays) - waits  # what is waited for may have any shape
    size = next((array.shape[axis] for array, axis in zip(arrays, axes[:own], strict=False) if axis is not None), None)
    if size is None:
        return decode_p.bind(*arrays, waits=waits, **params), None
    stacked = [
        jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes[:own], strict=False)
    ]
    return decode_p.bind(*stacked, *arrays[own:], waits=waits, **params), 0


def refuse_gradient(*_: Any, shape: tuple[int, ...], **__: Any) -> Any:
    raise TypeError(
        f"{math.prod(shape)} packed weights have no gradient. Differentiate with respect to the other leaves only "
        "(docs/training.md), decode the tree with btc_dequantize, or quantize inside the loss with btc_reconstruct"
    )


batching.primitive_batchers[decode_p] = _batched
ad.primitive_jvps[decode_p] = refuse_gradient
_by_xla = mlir.lower_fun(reference, multiple_results=False)
_by_kernel = mlir.lower_fun(_native, multiple_results=False)


def _anywhere(context: Any, *operands: Any, **params: Any) -> Any:
    return _by_xla(context, *operands, **params, together=_is_for_one_device(context))


def _on_cpu(context: Any, *operands: Any, **params: Any) -> Any:
    return (_by_kernel if takes(context, **params) else _anywhere)(context, *operands, **params)


mlir.register_lowering(decode_p, _anywhere)
mlir.register_lowering(decode_p, _on_cpu, platform="cpu")
