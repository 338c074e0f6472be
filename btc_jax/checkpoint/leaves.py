"""One leaf <-> its record and its arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax.checkpoint.dtypes import dtype_of, is_storable
from btc_jax.checkpoint.errors import BTCFormatError, refusing
from btc_jax.checkpoint.files import crc32c
from btc_jax.checkpoint.manifest import check_path, check_shape, dense_tensor, key_tensor, packed_tensor
from btc_jax.checkpoint.packed import arrays_of, check, format_json, from_bytes, stored_nbytes
from btc_jax.checkpoint.record import LeafRecord
from btc_jax.checkpoint.text import canonical
from btc_jax.formats import format_from_json
from btc_jax.pieces import Cut
from btc_jax.tensor import BTCTensor, is_packed

_PYTHON = {kind.__name__: kind for kind in (bool, int, float, str)}
_MAX_TEXT = 2**16


def to_arrays(path: str, leaf: Any) -> tuple[LeafRecord, list[np.ndarray]]:
    """The record of a leaf, and the arrays whose concatenated bytes are its tensor.

    Raises:
        TypeError: if the leaf cannot be stored.
        ValueError: if its path, its shape or its content cannot be stored.
    """
    return signed_leaf(record_of(path, leaf), leaf)


def record_of(path: str, leaf: Any) -> LeafRecord:
    """The record of a leaf without its checksum: it reads no more than headers, and refuses what cannot be stored."""
    try:
        check_path(path)
    except BTCFormatError as error:
        raise ValueError(f"{error}; rename it") from error
    check_shape(getattr(leaf, "shape", ()), path)
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        raise ValueError(f"{path or 'the tree'} was deleted or donated, so its values are gone")
    if isinstance(leaf, BTCTensor):
        return _packed(path, leaf)
    if _is_key(leaf):
        words = list(jax.eval_shape(jax.random.key_data, leaf).shape[leaf.ndim :])
        details = {"impl": str(jax.random.key_impl(leaf)), "words": words}
        return LeafRecord(path, "key", leaf.shape, str(leaf.dtype), (key_tensor(path, leaf.shape, words),), details)
    if _is_array(leaf):
        name = np.dtype(leaf.dtype).newbyteorder("=").name
        return LeafRecord(path, "dense", tuple(leaf.shape), name, (dense_tensor(path, leaf.shape, name),), {})
    name = type(leaf).__name__
    if _PYTHON.get(name) is type(leaf) and len(repr(leaf)) <= _MAX_TEXT:
        return LeafRecord(path, "python", (), name, (), {"value": str(leaf)})
    raise TypeError(
        f"{path or 'the tree'} is {str(leaf)[:60]} ({name}); only arrays, PRNG keys, numbers and text can be stored"
    )


def signed_leaf(record: LeafRecord, leaf: Any) -> tuple[LeafRecord, list[np.ndarray]]:
    """A record with its checksum, and the arrays of its leaf."""
    if not record.tensors:
        return record, []
    if is_packed(leaf):
        arrays = arrays_of(leaf)
    elif _is_key(leaf):
        arrays = [np.ascontiguousarray(jax.random.key_data(leaf))]
    else:
        array = np.asarray(leaf)
        arrays = [np.ascontiguousarray(array, array.dtype.newbyteorder("="))]
    (tensor,) = record.tensors
    return dataclasses.replace(record, tensors=(tensor._replace(crc32c=crc32c(*arrays)),)), arrays


def from_arrays(record: LeafRecord, arrays: Sequence[np.ndarray]) -> Any:
    """The leaf of a record and of its tensor; packed leaves are checked against their format.

    Raises:
        BTCFormatError: if they do not fit; a `BTCUnknownFormatError` if the format is not registered.
    """
    with refusing(f"leaf {record.path!r}"):
        return _LEAVES[record.kind](record, *arrays)


def _packed(path: str, leaf: BTCTensor) -> LeafRecord:
    try:
        check(leaf)
    except (TypeError, ValueError) as error:
        error.args = (f"{path or 'the tree'} cannot be saved: {error}",)
        raise
    details = {"codec": format_json(leaf.format), "order": leaf.order}
    if leaf.stacks is not None:
        details["cut"] = [list(leaf.pieces), list(leaf.stacks)]
    tensor = packed_tensor(path, stored_nbytes(leaf))
    return LeafRecord(path, "packed", tuple(leaf.shape), np.dtype(leaf.dtype).name, (tensor,), details)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_array(leaf: Any) -> bool:
    arrays = isinstance(leaf, jax.Array | np.ndarray | np.generic) and not isinstance(leaf, np.ma.MaskedArray)
    return arrays and is_storable(leaf.dtype)


def _read_dense(record: LeafRecord, array: np.ndarray) -> np.ndarray:
    dtype = dtype_of(record.dtype)
    if dtype.name == "bool" and array.size and array.view(np.uint8).max() > 1:
        raise BTCFormatError(f"leaf {record.path!r} has bytes that are neither true nor false")
    return array if array.dtype == dtype else array.view(dtype).reshape(record.shape)


def _read_key(record: LeafRecord, array: np.ndarray) -> jax.Array:
    impl = record.details["impl"]
    if not isinstance(impl, str):
        raise BTCFormatError(f"leaf {record.path!r} has keys of {str(impl)[:60]!r}")
    keys = jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
    if (keys.shape, str(keys.dtype)) != (record.shape, record.dtype):
        raise BTCFormatError(f"leaf {record.path!r} is {record.dtype}{record.shape}, its keys {keys.dtype}{keys.shape}")
    return keys


def _read_python(record: LeafRecord) -> Any:
    value = record.details["value"]
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise BTCFormatError(f"leaf {record.path!r} has no readable value")
    result = value == "True" if record.dtype == "bool" else _PYTHON[record.dtype](value)
    if str(result) != value:
        raise BTCFormatError(f"leaf {record.path!r} has the value {value[:60]!r}, which does not print as itself")
    return result


def _read_packed(record: LeafRecord, array: np.ndarray) -> BTCTensor:
    written = record.details["codec"]
    form = format_from_json(written)
    if canonical(form.to_json() | written) != canonical(form.to_json()):
        raise BTCFormatError(f"leaf {record.path!r} has a codec that is not as written")
    cut = Cut(*map(tuple, record.details["cut"])) if "cut" in record.details else None
    return from_bytes(array, form, record.details["order"], record.shape, dtype_of(record.dtype), cut)


_LEAVES = {"packed": _read_packed, "dense": _read_dense, "key": _read_key, "python": _read_python}
