"""One leaf <-> its record and its arrays."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax import coding
from btc_jax.checkpoint.errors import BTCFormatError
from btc_jax.checkpoint.files import crc32c
from btc_jax.checkpoint.manifest import CODES, LeafRecord, Tensor, check_path
from btc_jax.codecs import Codec, codec_from_json
from btc_jax.planes import plane_specs, row_layout
from btc_jax.tensor import BTCTensor, is_packed

_PYTHON = {kind.__name__: kind for kind in (bool, int, float, str)}
_MAX_TEXT = 2**16


def to_arrays(path: str, leaf: Any) -> tuple[LeafRecord, list[np.ndarray]]:
    """The record of a leaf, and the arrays to store, in the order of its tensors.

    Raises:
        TypeError: the leaf is nothing that can be stored.
    """
    try:
        check_path(path)
    except BTCFormatError as error:
        raise ValueError(f"{error}; rename it") from error
    if is_packed(leaf):
        return _packed(path, leaf)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(leaf))
        return _dense(path, "key", leaf.shape, str(leaf.dtype), np.asarray(jax.random.key_data(leaf)), {"impl": impl})
    if isinstance(leaf, jax.Array | np.ndarray | np.generic) and _storable(leaf.dtype):
        return _dense(path, "dense", leaf.shape, np.dtype(leaf.dtype).name, np.asarray(leaf), {})
    name = type(leaf).__name__
    if _PYTHON.get(name) is type(leaf) and len(repr(leaf)) <= _MAX_TEXT:
        return LeafRecord(path, "python", (), name, (), {"value": str(leaf)}), []
    raise TypeError(
        f"{path or 'the tree'} is {str(leaf)[:60]} ({name}); only arrays, PRNG keys, numbers and text can be stored"
    )


def from_arrays(record: LeafRecord, arrays: Sequence[np.ndarray]) -> Any:
    """The leaf of a record and the arrays that belong to it; packed leaves are checked against their codec.

    Raises:
        BTCFormatError: they do not fit.
    """
    try:
        return _LEAVES[record.kind](record, arrays)
    except BTCFormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BTCFormatError(f"leaf {record.path!r} cannot be read: {str(error)[:200]}") from error


def _packed(path: str, leaf: BTCTensor) -> tuple[LeafRecord, list[np.ndarray]]:
    named = {f"plane{i}": plane for i, plane in enumerate(leaf.planes)} | leaf.header
    arrays = {name: np.ascontiguousarray(array) for name, array in named.items()}
    tensors = tuple(_tensor(f"{path}#{name}", array) for name, array in arrays.items())
    details = {"codec": leaf.codec.to_json(), "order": leaf.order}
    record = LeafRecord(path, "packed", leaf.shape, np.dtype(leaf.dtype).name, tensors, details)
    return record, list(arrays.values())


def _dense(
    path: str, kind: str, shape: tuple[int, ...], dtype: str, array: np.ndarray, details: dict[str, Any]
) -> tuple[LeafRecord, list[np.ndarray]]:
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name not in CODES:
        array = array.reshape(*array.shape, 1).view(np.uint8)
    return LeafRecord(path, kind, tuple(shape), dtype, (_tensor(path, array),), details), [array]


def _tensor(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, CODES[array.dtype.name], array.shape, crc32c(array))


def _storable(dtype: Any) -> bool:
    return dtype.kind in "biufc" or jnp.issubdtype(dtype, jnp.number)


def _read_dense(record: LeafRecord, arrays: Sequence[np.ndarray]) -> np.ndarray:
    (array,), dtype = arrays, jnp.dtype(record.dtype)
    array = array if array.dtype == dtype else array.view(dtype).reshape(array.shape[:-1])
    if array.shape != record.shape:
        raise BTCFormatError(f"leaf {record.path!r} has shape {record.shape}, its tensor {array.shape}")
    return array


def _read_key(record: LeafRecord, arrays: Sequence[np.ndarray]) -> jax.Array:
    keys = jax.random.wrap_key_data(jnp.asarray(arrays[0]), impl=record.details["impl"])
    if keys.shape != record.shape:
        raise BTCFormatError(f"leaf {record.path!r} has shape {record.shape}, its keys {keys.shape}")
    return keys


def _read_python(record: LeafRecord, arrays: Sequence[np.ndarray]) -> Any:
    value = record.details["value"]
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise BTCFormatError(f"leaf {record.path!r} has no readable value")
    return value == "True" if record.dtype == "bool" else _PYTHON[record.dtype](value)


def _read_packed(record: LeafRecord, arrays: Sequence[np.ndarray]) -> BTCTensor:
    codec, order = codec_from_json(record.details["codec"]), record.details["order"]
    if order not in ("output-major", "stored"):
        raise BTCFormatError(f"leaf {record.path!r} has the unknown order {str(order)[:30]!r}")
    named = {t.name.removeprefix(f"{record.path}#"): array for t, array in zip(record.tensors, arrays, strict=True)}
    planes = tuple(named.pop(f"plane{i}") for i in range(len(plane_specs(codec.widths))))
    _check_header(record, codec, named)
    tensor = BTCTensor(planes, named, record.shape, jnp.dtype(record.dtype), codec, order)
    _check_planes(record, tensor)
    return tensor


def _check_header(record: LeafRecord, codec: Codec, header: dict[str, np.ndarray]) -> None:
    blocks = -(-math.prod(record.shape) // codec.block_size)
    # No block is stored in less than a bit, so this also keeps a lie from becoming a large number.
    if blocks > 8 * record.nbytes:
        raise BTCFormatError(f"leaf {record.path!r} of shape {record.shape} cannot be held by {record.nbytes} bytes")
    expected = {name: (array.shape, array.dtype) for name, array in coding.stored_header(codec, blocks).items()}
    found = {name: (array.shape, array.dtype) for name, array in header.items()}
    if found != expected:
        raise BTCFormatError(f"leaf {record.path!r} has the header {str(found)[:200]}; its codec stores {expected}")


def _check_planes(record: LeafRecord, tensor: BTCTensor) -> None:
    widths = np.asarray(tensor.widths)
    for i, (plane, spec) in enumerate(zip(tensor.planes, plane_specs(tensor.codec.widths), strict=True)):
        layout = row_layout(tensor.codec.block_size, spec.bits)
        expected = (int((widths >= spec.end).sum()), layout.runs * layout.words)
        if plane.shape != expected or plane.dtype != layout.dtype:
            raise BTCFormatError(
                f"leaf {record.path!r}: the widths of its blocks ask for {expected} {layout.dtype} in plane {i}, "
                f"there are {plane.shape} {plane.dtype}"
            )


_LEAVES = {"packed": _read_packed, "dense": _read_dense, "key": _read_key, "python": _read_python}
