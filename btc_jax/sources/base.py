"""The contract of a source, and the checks that all of them share."""

import abc
import contextlib
import difflib
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._paths import leaf_path
from btc_jax._typing import PyTree
from btc_jax.large import Box
from btc_jax.leafspec import LeafSpec, Origin
from btc_jax.sources.kinds import Foreign

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""The floating dtypes of weights. Leaves of other dtypes are scales, or too coarse for further error: they stay
dense."""

DTYPES = {
    **{"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16, "BOOL": jnp.bool_},
    **{"I64": jnp.int64, "I32": jnp.int32, "I16": jnp.int16, "I8": jnp.int8, "F8_E4M3": jnp.float8_e4m3fn},
    **{"U64": jnp.uint64, "U32": jnp.uint32, "U16": jnp.uint16, "U8": jnp.uint8, "F8_E5M2": jnp.float8_e5m2},
    **{"C64": jnp.complex64, "F8_E8M0": jnp.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": jnp.float8_e4m3fnuz, "F8_E5M2FNUZ": jnp.float8_e5m2fnuz},
}
DTYPES = {name: np.dtype(kind) for name, kind in DTYPES.items()}
"""The dtypes of safetensors that numpy can hold, by their names there."""

PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of an element of the other ones: several share a byte."""

MAX_PARTS = 2_000_000  # of a JSON header, some 300,000 tensors: parsed, 100 MB of small parts would be gigabytes
MAX_NAME = 64  # letters of the name of a dtype; those of structures can be long
AGAIN = "save or download it again"
KINDS = (
    "a .safetensors file, a Hugging Face folder of them or its *.safetensors.index.json, an .npz file, "
    "a Flax .msgpack file, or an Orbax checkpoint folder"
)


S = TypeVar("S", bound="Source")


class Source(abc.ABC):
    """A dense checkpoint, open for reading: see `open_source`. A context manager.

    Attributes:
        file: the file or folder.
        leaves: what it holds, in the order of the file, in which reading is fastest.
        compressed: whether it is a checkpoint compressed by btc_jax, whose leaves are then parts of packed ones.
    """

    compressed = False
    reads_parts = False
    """Whether a part of a leaf is read without the rest of it."""

    def __init__(self, file: Path):
        self.file = file
        self.leaves: tuple[LeafSpec, ...] = tuple(self._scan())
        self._by_path = {leaf.path: leaf for leaf in reversed(self.leaves)}
        twice = [leaf.path for leaf in self.leaves if self._by_path[leaf.path] is not leaf]
        if twice:
            raise ValueError(f"{file} holds two leaves named {twice[0]!r}; rename one and save it again")

    def read(self, path: str, box: Box = ()) -> np.ndarray:
        """The values of one leaf, of the shape and dtype that `leaves` tells; nothing else is kept in memory.

        Args:
            path: the leaf.
            box: the part to read, as slices without steps, and indices; all of it by default.

        Raises:
            ValueError: if there is no such leaf or part, its bytes are damaged, or the source is closed.
        """
        if path not in self._by_path:
            near = difflib.get_close_matches(path, self._by_path) or list(self._by_path)[:3]
            raise ValueError(
                f"{self.file} has no leaf {path!r}; {', '.join(near) or 'none, as it is closed'} can be read"
            )
        leaf = self._by_path[path]
        if not _fits(box, leaf.shape):
            raise ValueError(
                f"{self.file}: {path!r} of shape {list(leaf.shape)} has no part {box!r}; give, for as many axes "
                "as it has or fewer, a slice without a step or an index from 0"
            )
        values = self._read(leaf, box)
        return values if leaf.origin is None else _bytes_of(values)

    @property
    def torch_layout(self) -> bool:
        """Whether the names are PyTorch's (`weight`, `*.weight`): kernels are then (out, in, height, width)."""
        return any(f".{leaf.path}".endswith(".weight") for leaf in self.leaves)

    def fingerprint(self) -> str:
        """A short hex string that changes with the name, size or time of any file of the source; no content is read.

        Raises:
            FileNotFoundError: if one of the files is gone.
        """
        digest = hashlib.sha256()
        for file in self.files:
            stat, name = file.stat(), os.fsencode(os.path.relpath(file, self.file.parent))
            digest.update(b"%d:%b %d %d\n" % (len(name), name, stat.st_size, stat.st_ctime_ns))
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Close the file; `read` is an error afterwards."""
        self._by_path = {}

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def files(self) -> Sequence[Path]:
        """All files that it is read from."""
        return [self.file]

    @abc.abstractmethod
    def _scan(self) -> Iterable[LeafSpec]:
        """The leaves of `self.file`."""

    @abc.abstractmethod
    def _read(self, leaf: LeafSpec, box: Box) -> np.ndarray: ...


def _fits(box: Box, shape: tuple[int, ...]) -> bool:
    return len(box) <= len(shape) and all(
        part.step in (None, 1) if isinstance(part, slice) else 0 <= part < size
        for part, size in zip(box, shape, strict=False)
    )


def leaf_of(file: Path, path: str, shape: tuple[Any, ...], dtype: np.dtype) -> LeafSpec:
    """A leaf of this shape and dtype; of its bytes, if it is not an array of numbers."""
    shape = checked_shape(file, path, shape, 8 * dtype.itemsize)
    if dtype.hasobject:
        raise ValueError(f"{file}: {path!r} holds Python objects, not numbers; leave it out, or save it as numbers")
    numbers = dtype.kind in "biufc" or jnp.issubdtype(dtype, jnp.number)
    if numbers and dtype.type not in (np.longdouble, np.clongdouble):  # those differ from machine to machine
        return LeafSpec(path, shape, dtype, note=_note(dtype))
    name = str(dtype) if dtype.names or dtype.kind != "V" else f"V{dtype.itemsize} (dtype lost in .npz)"
    return bytes_leaf(path, math.prod(shape) * dtype.itemsize, Origin(name[:MAX_NAME], shape))


def bytes_leaf(path: str, nbytes: int, origin: Origin) -> LeafSpec:
    """A leaf that is read as its bytes."""
    return LeafSpec(path, (nbytes,), np.dtype(np.uint8), note=origin.dtype, origin=origin)


def _note(dtype: np.dtype) -> str:
    """Why weights of this dtype are not quantized."""
    return dtype.name if jnp.issubdtype(dtype, jnp.floating) and dtype.name not in FLOATS else ""


def checked_shape(file: Path, path: str, shape: tuple[Any, ...], bits: int) -> tuple[int, ...]:
    """The shape, if an array of elements of so many bits can have it."""
    whole = all(type(axis) is int and axis >= 0 for axis in shape) and len(shape) <= 64
    if not whole or math.prod(axis or 1 for axis in shape) * bits >= 2**66:
        raise ValueError(f"{file}: {path!r} has a shape that no array can have, {shape!s:.80}; {AGAIN}")
    return tuple(shape)


def _bytes_of(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.uint8 else np.frombuffer(bytearray(values.tobytes()), np.uint8)


def flat(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [leaf_path(keys) for keys, _ in pairs], [leaf for _, leaf in pairs], structure


def parse_json(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} occurs twice")
        return dict(pairs)

    with readable(file, "should hold a JSON object and does not"):
        if sum(map(text.count, (b",", b"[", b"{"))) > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} parts")
        found = json.loads(text.decode(), object_pairs_hook=unique)
        if not isinstance(found, dict):
            raise ValueError(f"but {type(found).__name__}")
        return found


def unknown() -> str:
    return f"is of an unknown kind; give {KINDS}"


def refuse(file: Path, foreign: Foreign | None) -> None:
    """Raise an error that says how to convert a foreign file into a supported one.

    Raises:
        ValueError: if the file is foreign.
    """
    if foreign:
        raise ValueError(f"{file} is {foreign.name}; {foreign.way.replace('FILE', repr(str(file)))}")


@contextlib.contextmanager
def readable(file: Path, otherwise: str) -> Iterator[None]:
    """Turns anything that a foreign reader raises into one ValueError that names the file."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{file} {otherwise} ({why}); {AGAIN}") from error
