"""What every source is, and the checks that all of them share."""

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._paths import leaf_path
from btc_jax._typing import PyTree

DTYPES = {
    **{"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16, "BOOL": jnp.bool_},
    **{"I64": jnp.int64, "I32": jnp.int32, "I16": jnp.int16, "I8": jnp.int8, "F8_E4M3": jnp.float8_e4m3fn},
    **{"U64": jnp.uint64, "U32": jnp.uint32, "U16": jnp.uint16, "U8": jnp.uint8, "F8_E5M2": jnp.float8_e5m2},
}
DTYPES = {name: np.dtype(kind) for name, kind in DTYPES.items()}
"""The dtypes that are read, by their safetensors names."""

MAX_HEADER = 100_000_000  # bytes: the cap of safetensors itself
MAX_PARTS = 2_000_000  # of a JSON header, some 300,000 tensors: parsed, 100 MB of small parts would be gigabytes
AGAIN = "save or download it again"
KINDS = (
    "a .safetensors file, a Hugging Face folder of them or its *.safetensors.index.json, an .npz file, "
    "a Flax .msgpack file, or an Orbax checkpoint folder"
)


class SourceLeaf(NamedTuple):
    """A leaf of a source, without its values: path, shape, and dtype as stored."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Source(abc.ABC):
    """A dense checkpoint, open for reading: see `open_source`. A context manager.

    Attributes:
        file: the file or folder.
        leaves: what it holds, in the order of the file, in which reading is fastest.
    """

    def __init__(self, file: Path):
        self.file = file
        self.leaves: tuple[SourceLeaf, ...] = tuple(self._scan())
        self._by_path = {leaf.path: leaf for leaf in reversed(self.leaves)}
        twice = [leaf.path for leaf in self.leaves if self._by_path[leaf.path] is not leaf]
        if twice:
            raise ValueError(f"{file} holds two leaves named {twice[0]!r}; rename one and save it again")

    def read(self, path: str) -> np.ndarray:
        """The values of one leaf, of the shape and dtype that `leaves` tells; nothing else is kept in memory.

        Raises:
            ValueError: there is no such leaf, its bytes are damaged, or the source is closed.
        """
        if path not in self._by_path:
            near = difflib.get_close_matches(path, self._by_path) or list(self._by_path)[:3]
            raise ValueError(
                f"{self.file} has no leaf {path!r}; {', '.join(near) or 'none, as it is closed'} can be read"
            )
        return self._read(self._by_path[path])

    @property
    def torch_layout(self) -> bool:
        """Whether the names are PyTorch's (`weight`, `*.weight`): kernels are then (out, in, height, width)."""
        return any(f".{leaf.path}".endswith(".weight") for leaf in self.leaves)

    def fingerprint(self) -> str:
        """A short hex string that changes with the name, size or time of any file of the source; no content is read.

        Raises:
            FileNotFoundError: one of the files is gone.
        """
        digest = hashlib.sha256()
        for file in self.files:
            stat, name = file.stat(), os.fsencode(os.path.relpath(file, self.file.parent))
            digest.update(b"%d:%b %d %d\n" % (len(name), name, stat.st_size, stat.st_ctime_ns))
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Lets go of the file; `read` is an error afterwards."""
        self._by_path = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def files(self) -> Sequence[Path]:
        """All files that it is read from."""
        return [self.file]

    @abc.abstractmethod
    def _scan(self) -> Iterable[SourceLeaf]:
        """The leaves of `self.file`."""

    @abc.abstractmethod
    def _read(self, leaf: SourceLeaf) -> np.ndarray: ...


def leaf_of(file: Path, path: str, shape: tuple[Any, ...], dtype: Any) -> SourceLeaf:
    """A leaf whose shape and dtype numpy can hold."""
    if not isinstance(dtype, np.dtype) or dtype not in DTYPES.values():
        raise ValueError(f"{file}: {path!r} has dtype {dtype}; convert it to one of {', '.join(DTYPES)}")
    whole = all(type(axis) is int and axis >= 0 for axis in shape) and len(shape) <= 64
    if not whole or math.prod(axis or 1 for axis in shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"{file}: {path!r} has a shape that no array can have, {shape!s:.80}; {AGAIN}")
    return SourceLeaf(path, tuple(shape), dtype)


def nbytes_of(leaf: SourceLeaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


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


@contextlib.contextmanager
def readable(file: Path, otherwise: str) -> Iterator[None]:
    """Whatever a foreign reader raises becomes one ValueError that names the file."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{file} {otherwise} ({why}); {AGAIN}") from error
