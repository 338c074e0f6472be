"""Differences between two checkpoints, compressed or dense, leaf by leaf, with one leaf of each in memory at a time."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax.checkpoint import Checkpoint, open_checkpoint
from btc_jax.checkpoint.errors import BTCNotCompressedError
from btc_jax.coding import Error
from btc_jax.metrics import Measures, Storage, jsonable
from btc_jax.sources import Source, open_source
from btc_jax.tensor import is_packed

_CHUNK = 2**22
"""Weights compared at a time, in float64."""


class AnyCheckpoint:
    """One of two checkpoints, compressed or dense, open for reading. A context manager.

    Attributes:
        leaves: shape and dtype of each leaf, by path.
        read: the dense values of one leaf; packed leaves are decoded.
    """

    def __init__(self, opened: Checkpoint | Source):
        self._opened = opened
        self.leaves: Mapping[str, tuple[tuple[int, ...], str]]
        self.read: Callable[[str], Any] = opened.read
        if isinstance(opened, Checkpoint):
            self.leaves = {path: (record.shape, record.dtype) for path, record in opened.records.items()}
            self.read = lambda path: _dense(opened.read_numpy(path), opened.records[path].dtype)
        else:
            self.leaves = {leaf.path: (leaf.shape, leaf.dtype.name) for leaf in opened.leaves}

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves when dense."""
        return sum(dense_nbytes(*leaf) for leaf in self.leaves.values())

    def __enter__(self) -> "AnyCheckpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


def open_any(path: str | os.PathLike[str]) -> AnyCheckpoint:
    """A compressed checkpoint, or a dense one of any kind that `open_source` reads.

    Raises:
        FileNotFoundError: if there is nothing at `path`.
        ValueError: if it is neither, or damaged.
    """
    with suppress(BTCNotCompressedError):
        return AnyCheckpoint(open_checkpoint(path))
    source = open_source(path)
    if source.compressed:
        raise ValueError(
            f"{path} is a compressed tree in an Orbax checkpoint; restore it in Python with btc_jax.orbax, and compare "
            "what btc_jax.save writes"
        )
    return AnyCheckpoint(source)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the values of a leaf in the second checkpoint are from those in the first.

    Attributes:
        path: the leaf, or `all`.
        equal: it has the same shape, dtype and values in both.
        note: what else differs: its shape, its dtype, or that only one of them has it.
        rmse, relative_rmse, sqnr_db, largest_error: as in `Measures`; `None` where there are no numbers to compare.
    """

    path: str
    equal: bool
    note: str = ""
    rmse: float | None = None
    relative_rmse: float | None = None
    sqnr_db: float | None = None
    largest_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Every leaf of two checkpoints.

    Attributes:
        leaves: leaves that cannot be compared first, then the others, the lowest sqnr first.
        total: over all weights of the leaves that differ and could be compared.
    """

    leaves: tuple[Difference, ...]
    total: Difference

    @property
    def different(self) -> tuple[Difference, ...]:
        return tuple(leaf for leaf in self.leaves if not leaf.equal)

    def to_json(self, limit: int | None = None) -> dict[str, Any]:
        """The leaves that differ, at most `limit` of them, as plain JSON values; what is infinite becomes `None`."""
        different = self.different
        counts = {"different_leaves": len(different), "equal_leaves": len(self.leaves) - len(different)}
        return jsonable({"equal": not different} | counts | {"total": self.total, "leaves": different[:limit]})


def dense_nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a dense leaf; 0 for what is not an array of numbers."""
    try:
        return math.prod(shape) * jnp.dtype(dtype).itemsize
    except TypeError:
        return 0


def compare(a: AnyCheckpoint, b: AnyCheckpoint, on_leaf: Callable[[str, int], None] | None = None) -> Comparison:
    """Compare `b` with `a`, the original.

    Args:
        on_leaf: called after each leaf of `a` with its path and its bytes when dense.

    Examples:
        >>> import btc_jax, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, value in (("a", 1.0), ("b", 1.5)):
        ...         _ = btc_jax.save(f"{folder}/{name}", {"same": jnp.ones(3), "other": jnp.full(3, value)})
        ...     with open_any(f"{folder}/a") as a, open_any(f"{folder}/b") as b:
        ...         found = compare(a, b)
        >>> [(leaf.path, leaf.rmse) for leaf in found.different]
        [('other', 0.5)]
    """
    leaves, total, weights = [], Error(), 0
    for path in dict.fromkeys((*a.leaves, *b.leaves)):
        leaf, error, size = _compared(path, a, b)
        leaves.append(leaf)
        if not leaf.equal:
            total, weights = total + error, weights + size
        if on_leaf and path in a.leaves:
            on_leaf(path, dense_nbytes(*a.leaves[path]))
    leaves.sort(key=lambda leaf: (leaf.sqnr_db is not None, leaf.sqnr_db, leaf.path))
    equal = all(leaf.equal for leaf in leaves)
    all_ = _difference("all", equal, "", total, weights) if weights or equal else Difference("all", False)
    return Comparison(tuple(leaves), all_)


def _compared(path: str, a: AnyCheckpoint, b: AnyCheckpoint) -> tuple[Difference, Error, int]:
    if path not in a.leaves or path not in b.leaves:
        return Difference(path, False, f"only in the {'first' if path in a.leaves else 'second'}"), Error(), 0
    (shape, dtype), (other, cast) = a.leaves[path], b.leaves[path]
    note = "" if dtype == cast else f"{dtype}, then {cast}"
    if shape != other:
        return Difference(path, False, f"shape {list(shape)}, then {list(other)}"), Error(), 0
    x, y = a.read(path), b.read(path)
    if not (isinstance(x, np.ndarray) and isinstance(y, np.ndarray)):
        same = not note and x == y
        return Difference(path, same, note or ("" if same else "the values differ")), Error(), 0
    error, same = _error(x, y)
    return _difference(path, same and not note, note, error, x.size), error, x.size


def _difference(path: str, equal: bool, note: str, error: Error, weights: int) -> Difference:
    m = Measures.of(Storage(weights=weights), error)
    return Difference(path, equal, note, m.rmse, m.relative_rmse, m.sqnr_db, m.largest_error)


def _error(a: np.ndarray, b: np.ndarray) -> tuple[Error, bool]:
    """The error of `b`, and whether all values are equal. NaN equals NaN, and is infinitely far from any number."""
    total, same = Error(), True
    wide = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    for i in range(0, a.size, _CHUNK):
        x, y = (np.reshape(values, -1)[i : i + _CHUNK] for values in (a, b))
        if a.dtype != b.dtype:
            x, y = x.astype(wide), y.astype(wide)
        with np.errstate(invalid="ignore", over="ignore"):
            equal = (x == y) | ((x != x) & (y != y))
            w, e = np.abs(x.astype(wide)), np.abs(x.astype(wide) - y.astype(wide))
            w, e = np.where(np.isfinite(w), w, 0), np.where(equal, 0, np.where(np.isfinite(e), e, np.inf))
            total += Error(float(np.square(w).sum()), float(np.square(e).sum()), float(e.max()))
        same = same and bool(equal.all())
    return total, same


def _dense(leaf: Any, dtype: str) -> Any:
    """The numbers of a leaf in numpy, in its own dtype; jax alone would cut 64 bits to 32."""
    if is_packed(leaf):
        with np.errstate(over="ignore"):
            return np.asarray(jax.device_put(leaf).dequantize(np.float32)).astype(jnp.dtype(dtype))
    return np.asarray(jax.random.key_data(leaf)) if isinstance(leaf, jax.Array) else leaf
