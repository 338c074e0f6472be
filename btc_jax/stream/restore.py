"""From a compressed checkpoint to a plain safetensors file."""

import dataclasses
import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax.checkpoint.errors import BTCFormatError
from btc_jax.checkpoint.files import whole_file
from btc_jax.checkpoint.read import Checkpoint, open_checkpoint
from btc_jax.checkpoint.record import LeafRecord
from btc_jax.checkpoint.text import canonical
from btc_jax.checkpoint.write import index_of, real_path
from btc_jax.sources import DTYPES, PACKED
from btc_jax.stream.compress import OnLeaf, refuse_source
from btc_jax.stream.plan import PathLike

_CODES = {dtype.name: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class DequantizedFile:
    """What `dequantize_file` wrote.

    Attributes:
        leaves: number of leaves written.
        nbytes: bytes of the file.
        changed: leaves that are written as something else, by path, such as `key<fry> as uint32[2]`.
        left_out: leaves that safetensors cannot hold, by path, and what they are.
    """

    leaves: int
    nbytes: int
    changed: dict[str, str]
    left_out: dict[str, str]


def dequantize_file(path: PathLike, target: PathLike, *, on_leaf: OnLeaf | None = None) -> DequantizedFile:
    """Decode a checkpoint into a plain safetensors file, with the original names and dtypes.

    Typed PRNG keys are written as their uint32 data, Python numbers as arrays without axes, and arrays of a dtype that
    safetensors lacks as their bytes, along a new last axis. Text is left out. The result lists each of these.

    Args:
        path: a compressed checkpoint.
        target: the file to write.
        on_leaf: called after each leaf with its path and its bytes in the file.

    Returns:
        The number of leaves and bytes, and what is written as something else or left out.

    Raises:
        BTCFormatError: if the checkpoint cannot be read, or is damaged.
        OSError: if the target could not be written.

    Examples:
        >>> import btc_jax, jax, jax.numpy as jnp, tempfile
        >>> tree = {"kernel": jnp.ones((64, 64)), "key": jax.random.key(0), "name": "net"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = btc_jax.save(f"{folder}/small", btc_jax.btc_quantize(tree))
        ...     done = dequantize_file(f"{folder}/small", f"{folder}/plain.safetensors")
        >>> done.leaves, done.changed, done.left_out
        (2, {'key': 'key<fry> as uint32[2]'}, {'name': 'Python str'})
    """
    target = real_path(target)
    if index_of(target).exists():
        raise FileExistsError(errno.EEXIST, f"{index_of(target)} is an index of the same name; name another file")
    with open_checkpoint(path) as checkpoint:
        refuse_source(target, checkpoint.files)
        plain = {path: _entry(checkpoint, record) for path, record in checkpoint.records.items()}
        entries = {path: entry for path, entry in plain.items() if entry}
        size = _write(target, entries, on_leaf)
        left_out = {path: _what(checkpoint.records[path]) for path, entry in plain.items() if not entry}
    changed = {path: entry.change for path, entry in entries.items() if entry.change}
    return DequantizedFile(len(entries), size, changed, left_out)


class _Entry(NamedTuple):
    """A leaf as plain safetensors holds it.

    Attributes:
        code: the dtype, by its name there.
        values: a function that reads them.
        change: what the leaf is and how it is written, if they differ.
    """

    code: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]
    change: str = ""

    @property
    def bits(self) -> int:
        return PACKED.get(self.code) or 8 * DTYPES[self.code].itemsize

    @property
    def nbytes(self) -> int:
        return -(-math.prod(self.shape) * self.bits // 8)


def _entry(checkpoint: Checkpoint, record: LeafRecord) -> _Entry | None:
    """How a leaf is written; `None` if it cannot be."""
    if record.kind == "tied":  # the same object as an earlier leaf
        record = checkpoint.records[record.details["of"]]
    if record.kind in ("python", "key"):
        return _small(record, checkpoint.read(record.path))
    if "origin" in record.details:
        return _from_bytes(record, lambda: checkpoint.read_numpy(record.path))
    if record.dtype in _CODES:
        dtype = jnp.dtype(record.dtype)
        read = lambda: np.asarray(checkpoint.read(record.path, dense=True)).astype(dtype, copy=False)  # noqa: E731
        return _Entry(_CODES[record.dtype], record.shape, read)
    shape = (*record.shape, jnp.dtype(record.dtype).itemsize)
    return _Entry("U8", shape, lambda: checkpoint.read_numpy(record.path), _change(record.dtype, "uint8", shape))


def _small(record: LeafRecord, leaf: Any) -> _Entry | None:
    """What is not an array: PRNG keys and Python values. Text and numbers beyond 64 bits cannot be written."""
    if isinstance(leaf, str) or (isinstance(leaf, int) and not -(2**63) <= leaf < 2**63):
        return None
    values = np.asarray(jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else leaf)
    change = _change(_what(record), values.dtype.name, values.shape)
    return _Entry(_CODES[values.dtype.name], values.shape, lambda: values, change)


def _from_bytes(record: LeafRecord, read: Callable[[], np.ndarray]) -> _Entry:
    """A leaf that is stored as its bytes: in its own dtype if safetensors has it, otherwise as bytes."""
    match record.details["origin"]:
        case [str(code), [*shape]] if code in PACKED and all(type(n) is int and n >= 0 for n in shape):
            entry = _Entry(code, tuple(shape), read)
            if entry.nbytes == record.nbytes:
                return entry
        case [str(what), _] if what not in PACKED:
            return _Entry("U8", record.shape, read, _change(what, "uint8", record.shape))
    raise BTCFormatError(f"leaf {record.path!r} of {record.nbytes} bytes has a malformed origin")


def _what(record: LeafRecord) -> str:
    return f"Python {record.dtype}" if record.kind == "python" else record.dtype


def _change(what: str, dtype: str, shape: tuple[int, ...]) -> str:
    return f"{what} as {dtype}{list(shape)}"


def _write(target: Path, entries: dict[str, _Entry], on_leaf: OnLeaf | None) -> int:
    """Writes the file, the widest dtypes first, and returns its size."""
    entries, end, header = dict(sorted(entries.items(), key=lambda item: -item[1].bits)), 0, {}
    for path, entry in entries.items():
        place = [end, end + entry.nbytes]
        header[path] = {"dtype": entry.code, "shape": entry.shape, "data_offsets": place}
        end += entry.nbytes
    text = canonical(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(target) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for path, entry in entries.items():
            file.write(np.ascontiguousarray(entry.values()).reshape(-1).view(np.uint8).data)
            if on_leaf:
                on_leaf(path, entry.nbytes)
        return file.tell()
