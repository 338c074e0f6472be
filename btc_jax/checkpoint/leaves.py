"""One leaf <-> its record and its arrays."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax.blocks import MAX_TAPS, ORDERS, tap_sizes
from btc_jax.checkpoint.errors import BTCFormatError, refusing
from btc_jax.checkpoint.files import crc32c
from btc_jax.checkpoint.manifest import CODES, LeafRecord, Tensor, canonical, check_path
from btc_jax.codecs import Codec, codec_from_json
from btc_jax.planes import plane_specs, row_layout
from btc_jax.tensor import BTCTensor, is_packed

_PYTHON = {kind.__name__: kind for kind in (bool, int, float, str)}
_MAX_TEXT = 2**16
_DTYPE = re.compile(r"(bool|u?int|b?float|complex)[0-9a-z_]*")
_OF_SOME_MACHINES = ("float96", "float128", "complex192", "complex256")


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
    if (
        isinstance(leaf, jax.Array | np.ndarray | np.generic)
        and not isinstance(leaf, np.ma.MaskedArray)
        and _storable(leaf.dtype)
    ):
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
    with refusing(f"leaf {record.path!r}"):
        return _LEAVES[record.kind](record, arrays)


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
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
    if array.dtype.name not in CODES:
        array = array.reshape(*array.shape, 1).view(np.uint8)
    return LeafRecord(path, kind, tuple(shape), dtype, (_tensor(path, array),), details), [array]


def _tensor(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, CODES[array.dtype.name], array.shape, crc32c(array))


def _storable(dtype: Any) -> bool:
    return (dtype.kind in "biufc" or jnp.issubdtype(dtype, jnp.number)) and dtype.name not in _OF_SOME_MACHINES


def _dtype(record: LeafRecord) -> np.dtype:
    """The dtype of a record, if arrays of it are stored. Only plain names come to numpy, which knows much else."""
    dtype = jnp.dtype(record.dtype) if _DTYPE.fullmatch(record.dtype) else None
    if dtype is None or dtype.name != record.dtype or not _storable(dtype):
        raise BTCFormatError(f"leaf {record.path!r} has the unknown dtype {record.dtype[:60]!r}")
    return dtype


def _read_dense(record: LeafRecord, arrays: Sequence[np.ndarray]) -> np.ndarray:
    (array,), (tensor,), dtype = arrays, record.tensors, _dtype(record)
    no_bools = dtype.name == "bool" and array.size and array.view(np.uint8).max() > 1
    if tensor.code != CODES.get(dtype.name, "U8") or no_bools:
        raise BTCFormatError(f"leaf {record.path!r} of dtype {dtype} has a tensor of other numbers")
    array = array if array.dtype == dtype else array.view(dtype).reshape(array.shape[:-1])
    if array.shape != record.shape:
        raise BTCFormatError(f"leaf {record.path!r} has shape {record.shape}, its tensor {array.shape}")
    return array


def _read_key(record: LeafRecord, arrays: Sequence[np.ndarray]) -> jax.Array:
    (array,), impl = arrays, record.details["impl"]
    if array.dtype != np.uint32 or not isinstance(impl, str):
        raise BTCFormatError(f"leaf {record.path!r} has keys of {array.dtype} for {str(impl)[:60]!r}")
    keys = jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
    if (keys.shape, str(keys.dtype)) != (record.shape, record.dtype):
        raise BTCFormatError(f"leaf {record.path!r} is {record.dtype}{record.shape}, its keys {keys.dtype}{keys.shape}")
    return keys


def _read_python(record: LeafRecord, arrays: Sequence[np.ndarray]) -> Any:
    value = record.details["value"]
    if not isinstance(value, str) or len(value) > _MAX_TEXT or arrays or record.shape:
        raise BTCFormatError(f"leaf {record.path!r} has no readable value")
    result = value == "True" if record.dtype == "bool" else _PYTHON[record.dtype](value)
    if str(result) != value:
        raise BTCFormatError(f"leaf {record.path!r} has the value {value[:60]!r}, which is no {record.dtype}")
    return result


def _read_packed(record: LeafRecord, arrays: Sequence[np.ndarray]) -> BTCTensor:
    codec, order, dtype = codec_from_json(record.details["codec"]), record.details["order"], _dtype(record)
    if canonical(codec.to_json() | record.details["codec"]) != canonical(codec.to_json()):
        raise BTCFormatError(f"leaf {record.path!r} has a codec that is not as written")
    if codec.candidates != (codec,) or codec.stored != codec:
        raise BTCFormatError(f"leaf {record.path!r} has a codec as it is before packing, {codec!r}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise BTCFormatError(f"leaf {record.path!r} is packed and of the dtype {dtype}, which is not floating")
    if order not in ORDERS or math.prod(tap_sizes(record.shape, order)) > MAX_TAPS:
        raise BTCFormatError(
            f"leaf {record.path!r} has the unknown order {str(order)[:30]!r}, or one with too many taps"
        )
    named = {t.name.removeprefix(f"{record.path}#"): array for t, array in zip(record.tensors, arrays, strict=True)}
    planes = tuple(named.pop(f"plane{i}") for i in range(len(plane_specs(codec.widths))))
    _check_header(record, codec, named)
    tensor = BTCTensor(planes, named, record.shape, dtype, codec, order)
    _check_planes(record, tensor)
    return tensor


def _check_header(record: LeafRecord, codec: Codec, header: dict[str, np.ndarray]) -> None:
    blocks = -(-math.prod(record.shape) // codec.block_size)
    # No block is stored in less than a bit, so this also keeps a lie from becoming a large number.
    if blocks > 8 * record.nbytes:
        raise BTCFormatError(f"leaf {record.path!r} of shape {record.shape} cannot be held by {record.nbytes} bytes")
    expected = _header_of(codec, blocks)
    found = {name: (array.shape, array.dtype) for name, array in header.items()}
    if found != expected:
        raise BTCFormatError(f"leaf {record.path!r} has the header {str(found)[:200]}; its codec stores {expected}")
    if blocks and not any(header[codec.witness][:1].tobytes()):
        raise BTCFormatError(f"leaf {record.path!r} has a header that begins with zeros, which its codec never writes")


def _check_planes(record: LeafRecord, tensor: BTCTensor) -> None:
    widths = _widths(tensor)
    for i, (plane, spec) in enumerate(zip(tensor.planes, plane_specs(tensor.codec.widths), strict=True)):
        layout = row_layout(tensor.codec.block_size, spec.bits)
        expected = (int((widths >= spec.end).sum()), layout.runs * layout.words)
        if plane.shape != expected or plane.dtype != layout.dtype:
            raise BTCFormatError(
                f"leaf {record.path!r}: the widths of its blocks ask for {expected} {layout.dtype} in plane {i}, "
                f"there are {plane.shape} {plane.dtype}"
            )


def _header_of(codec: Codec, blocks: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {name: (array.shape, array.dtype) for name, array in codec.stored_header(blocks).items()}


def _widths(tensor: BTCTensor) -> np.ndarray:
    """The widths of all blocks, from a header filled up to a power of two of them: XLA compiles for each number."""
    filled = 1 << max(tensor.num_blocks - 1, 7).bit_length()
    shapes = {name: shape for name, (shape, _) in _header_of(tensor.codec, filled).items()}
    header = {name: jnp.asarray(_filled_up(tensor.header[name], shape)) for name, shape in shapes.items()}
    return np.asarray(tensor.codec.unpack_header(header, filled)[0])[: tensor.num_blocks]


def _filled_up(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    filled = np.zeros(shape, array.dtype)
    filled[: len(array)] = array
    return filled


_LEAVES = {"packed": _read_packed, "dense": _read_dense, "key": _read_key, "python": _read_python}
