"""Dense checkpoint files of other systems, opened without their values and read one leaf at a time."""

import abc
import contextlib
import difflib
import hashlib
import json
import math
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax._paths import leaf_path
from btc_jax._typing import PyTree

_DTYPES = {
    **{"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16, "BOOL": jnp.bool_},
    **{"I64": jnp.int64, "I32": jnp.int32, "I16": jnp.int16, "I8": jnp.int8, "F8_E4M3": jnp.float8_e4m3fn},
    **{"U64": jnp.uint64, "U32": jnp.uint32, "U16": jnp.uint16, "U8": jnp.uint8, "F8_E5M2": jnp.float8_e5m2},
}
_DTYPES = {name: np.dtype(kind) for name, kind in _DTYPES.items()}
"""The dtypes that are read, by their safetensors names."""

_MAX_HEADER = 100_000_000  # bytes: the cap of safetensors itself
_MAX_DEFLATE = 1032  # deflate shrinks no further: a member of a zip that says so lies
_AGAIN = "save or download it again"
_KINDS = (
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
        for file in self._files():
            stat, name = file.stat(), os.fsencode(os.path.relpath(file, self.file.parent))
            digest.update(b"%d:%b %d %d\n" % (len(name), name, stat.st_size, stat.st_mtime_ns))
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Lets go of the file; `read` is an error afterwards."""
        self._by_path = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _files(self) -> Sequence[Path]:
        return [self.file]

    @abc.abstractmethod
    def _scan(self) -> Iterable[SourceLeaf]:
        """The leaves of `self.file`."""

    @abc.abstractmethod
    def _read(self, leaf: SourceLeaf) -> np.ndarray: ...


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a dense checkpoint of another system. Its leaves are known at once; `Source.read` gives the values of one.

    Read are: a safetensors file; a Hugging Face folder of them, or its `*.safetensors.index.json`; the `.npz` of
    `numpy.savez`, never with pickles; the item or step folder of an Orbax checkpoint (needs the extra `orbax`).
    A Flax msgpack file is read too, but only as a whole: it takes its own size in memory until it is closed.

    Raises:
        FileNotFoundError: the path, or a shard that its index names, does not exist.
        ValueError: it is of no kind that is read, truncated, damaged, ambiguous, or holds a dtype that is not read.
        ImportError: an Orbax checkpoint, and the extra is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/net.npz", kernel=np.ones((2, 3), np.float32))
        ...     with open_source(f"{folder}/net.npz") as source:
        ...         print(source.leaves[0], source.read("kernel").sum())
        SourceLeaf(path='kernel', shape=(2, 3), dtype=dtype('float32')) 6.0
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; give {_KINDS}")
    return _open_folder(file) if file.is_dir() else _open_file(file)


def _open_file(file: Path) -> Source:
    kinds = {".safetensors": _Safetensors, ".npz": _Npz, ".msgpack": _Msgpack, ".json": _open_index}
    kind = file.is_file() and (kinds.get(file.suffix) or kinds.get(_suffix_by_content(file)))
    if not kind:
        raise ValueError(f"{file} is of an unknown kind; give {_KINDS}")
    return kind(file)


def _suffix_by_content(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER:
        return ".safetensors"
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return ".npz"
    return ".msgpack" if b"\x80" <= start[:1] <= b"\x8f" or start[:1] in (b"\xde", b"\xdf") else ""


def _open_folder(folder: Path) -> Source:
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder} holds {len(found)} files {pattern} and no index of them; open one by its name")
        if found:
            return _open_file(found[0])
    return _Orbax(_orbax_item(folder))


class _Safetensors(Source):
    """One safetensors file, or the shards of an index. Plain reads: no page of a mapping stays in memory."""

    def __init__(self, file: Path, shards: Sequence[Path] = ()):
        self._shards = shards
        self.places: dict[str, tuple[Path, int]] = {}
        super().__init__(file)

    def _files(self) -> Sequence[Path]:
        return [self.file, *self._shards]

    def _scan(self) -> Iterator[SourceLeaf]:
        for shard in self._shards or [self.file]:
            for leaf, offset in _read_header(shard):
                self.places[leaf.path] = shard, offset
                yield leaf

    def _read(self, leaf: SourceLeaf) -> np.ndarray:
        file, offset = self.places[leaf.path]
        values = np.empty(_nbytes(leaf), np.uint8)
        rest = values.data
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while rest:
                count = stream.readinto(rest)
                if not count:
                    raise ValueError(f"{file} ends inside of {leaf.path}: it was cut after it was opened; {_AGAIN}")
                rest = rest[count:]
        return values.view(leaf.dtype).reshape(leaf.shape)


def _open_index(index: Path) -> Source:
    """The shards that an index names. Leaves of a shard that the index forgot are read too: nothing gets lost."""
    text = index.read_bytes() if index.stat().st_size <= _MAX_HEADER else b""
    shard_of = _json(index, text).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files, so it is no safetensors index; {_AGAIN}")
    shards = {name: index.parent / name for name in sorted(set(shard_of.values()))}
    for name, file in shards.items():
        if name in ("", "..") or name != Path(name).name or "\\" in name:
            raise ValueError(f"{index} names the file {name!r}, but only plain names in its own folder are followed")
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {name!r}, which is missing; put it beside the index")
    source = _Safetensors(index, list(shards.values()))
    for path, name in shard_of.items():
        if path not in source.places or source.places[path][0].name != name:
            raise ValueError(f"{index} places {path!r} in {name}, which does not hold it; download both again")
    return source


def _read_header(file: Path) -> Iterator[tuple[SourceLeaf, int]]:
    """The leaves of a safetensors file with their offsets; together they must fill the file without a gap."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{file} is truncated or no safetensors: header {length}, file {size} bytes; {_AGAIN}")
        header = _json(file, stream.read(length))
    header.pop("__metadata__", None)
    position = 8 + length
    for begin, end, leaf in sorted(_entry(file, *item) for item in header.items()):
        if 8 + length + begin != position or end - begin != _nbytes(leaf):
            raise ValueError(f"{file}: {leaf.path} is said to lie at {begin}:{end}, which cannot be true; {_AGAIN}")
        if 8 + length + end > size:
            raise ValueError(f"{file} is truncated: {leaf.path} ends at {8 + length + end} of {size} bytes; {_AGAIN}")
        yield leaf, position
        position = 8 + length + end
    if position != size:
        raise ValueError(f"{file} has {size - position} bytes that belong to no tensor; {_AGAIN}")


def _entry(file: Path, path: str, entry: Any) -> tuple[int, int, SourceLeaf]:
    with _readable(file, f"describes {path!r} without a dtype, a shape or data_offsets"):
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        dtype = _DTYPES.get(dtype, f"{dtype!s:.40}")
    if type(begin) is not int or type(end) is not int:
        raise ValueError(f"{file}: {path!r} has data_offsets that are no integers; {_AGAIN}")
    return begin, end, _leaf(file, path, shape, dtype)


class _Npz(Source):
    """The `.npz` of `numpy.savez`, plain or compressed. Foreign byte orders are read as the machine's own."""

    def _scan(self) -> list[SourceLeaf]:
        with _readable(self.file, "is a damaged .npz file"):
            self._zip = zipfile.ZipFile(self.file)
        return [self._describe(member) for member in self._zip.infolist()]

    def _describe(self, member: zipfile.ZipInfo) -> SourceLeaf:
        path = member.filename.removesuffix(".npy")
        if path == member.filename:
            raise ValueError(
                f"{self.file} holds {path!r}, no array of numpy; a PyTorch file must be saved as .safetensors"
            )
        with _readable(self.file, f"is damaged at {path}"), self._zip.open(member) as stream:
            first = np.lib.format.read_magic(stream) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            start = stream.tell()
        if dtype.hasobject:
            raise ValueError(f"{self.file}: {path} is pickled, and pickles can run code; save it as numbers")
        if dtype.kind == "V":
            raise ValueError(f"{self.file}: {path} lost its dtype, as bfloat16 does in .npz; save it as .safetensors")
        leaf = _leaf(self.file, path, shape, dtype.newbyteorder("="))
        if start + _nbytes(leaf) != member.file_size or member.file_size > _MAX_DEFLATE * (member.compress_size + 1):
            raise ValueError(f"{self.file}: {path} has another size than {dtype}{list(shape)}; {_AGAIN}")
        return leaf

    def _read(self, leaf: SourceLeaf) -> np.ndarray:
        with _readable(self.file, f"is damaged at {leaf.path}"), self._zip.open(f"{leaf.path}.npy") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False).astype(leaf.dtype, copy=False)

    def close(self) -> None:
        super().close()
        self._zip.close()


class _Msgpack(Source):
    """The msgpack of `flax.serialization.to_bytes`. It has no index: all of it is in memory until it is closed."""

    def _scan(self) -> list[SourceLeaf]:
        from flax.serialization import msgpack_restore

        with _readable(self.file, "is no Flax msgpack file, or a damaged one"):
            paths, leaves, _ = _flat(msgpack_restore(self.file.read_bytes()))
            leaves = [np.asarray(leaf) for leaf in leaves]
        self._values = dict(zip(paths, leaves, strict=True))
        return [_leaf(self.file, path, leaf.shape, leaf.dtype) for path, leaf in zip(paths, leaves, strict=True)]

    def _read(self, leaf: SourceLeaf) -> np.ndarray:
        return self._values[leaf.path]

    def close(self) -> None:
        super().close()
        self._values = {}


class _Orbax(Source):
    """The folder of one item of an Orbax checkpoint: a tree of arrays."""

    def _scan(self) -> list[SourceLeaf]:
        try:
            import orbax.checkpoint
        except ImportError as error:
            raise ImportError(f"{self.file} is an Orbax checkpoint; to read it: pip install btc_jax[orbax]") from error
        self._orbax = orbax.checkpoint
        self._handler: Any = orbax.checkpoint.PyTreeCheckpointHandler()
        with _readable(self.file, "is a damaged Orbax checkpoint"):
            paths, self._found, self._tree = _flat(self._handler.metadata(self.file.absolute()).tree)
        return [self._describe(path, leaf) for path, leaf in zip(paths, self._found, strict=True)]

    def _describe(self, path: str, leaf: Any) -> SourceLeaf:
        dtype = getattr(leaf, "dtype", None)
        return _leaf(self.file, path, getattr(leaf, "shape", ()), type(leaf).__name__ if dtype is None else dtype)

    def _files(self) -> Sequence[Path]:
        return sorted(file for file in self.file.rglob("*") if file.is_file())

    def _read(self, leaf: SourceLeaf) -> np.ndarray:
        here = self.leaves.index(leaf)
        wanted = [self._orbax.PLACEHOLDER] * len(self.leaves)
        wanted[here] = self._found[here]
        how = [self._orbax.RestoreArgs(restore_type=np.ndarray)] * len(wanted)
        trees = map(self._tree.unflatten, (wanted, how))
        with _readable(self.file, f"is damaged at {leaf.path}"):
            found = self._handler.restore(self.file.absolute(), args=self._orbax.args.PyTreeRestore(*trees))
            return self._tree.flatten_up_to(found)[here]

    def close(self) -> None:
        super().close()
        self._handler.close()


def _orbax_item(folder: Path) -> Path:
    """The folder with the tree: the folder itself, or the only item of a step."""
    items = [file.parent for file in sorted(folder.glob("*/_METADATA"))]
    steps = [file.parent for file in sorted(folder.glob("*/_CHECKPOINT_METADATA"))]
    if folder.name.endswith(".orbax-checkpoint-tmp"):
        raise ValueError(f"{folder} is a save that Orbax did not finish; open a finished one")
    if (folder / "_METADATA").is_file():
        return folder
    if len(items) == 1:
        return items[0]
    if items or steps:
        names = ", ".join(file.name for file in (items or steps)[-5:])
        raise ValueError(f"{folder} holds {len(items or steps)} Orbax checkpoints; open one of them, such as {names}")
    if any((folder / name).exists() for name in ("_CHECKPOINT_METADATA", "manifest.ocdbt")):
        raise ValueError(f"{folder} is an Orbax checkpoint whose tree has no _METADATA file; save it as a tree again")
    raise ValueError(f"{folder} is a folder of an unknown kind; give {_KINDS}")


def _leaf(file: Path, path: str, shape: tuple[Any, ...], dtype: Any) -> SourceLeaf:
    """A leaf whose shape and dtype numpy can hold."""
    if not isinstance(dtype, np.dtype) or dtype not in _DTYPES.values():
        raise ValueError(f"{file}: {path!r} has dtype {dtype}; convert it to one of {', '.join(_DTYPES)}")
    whole = all(type(axis) is int and axis >= 0 for axis in shape) and len(shape) <= 64
    if not whole or math.prod(axis or 1 for axis in shape) * dtype.itemsize >= 2**63:
        raise ValueError(f"{file}: {path!r} has a shape that no array can have, {shape!s:.80}; {_AGAIN}")
    return SourceLeaf(path, tuple(shape), dtype)


def _nbytes(leaf: SourceLeaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _flat(tree: PyTree) -> tuple[list[str], list[Any], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [leaf_path(keys) for keys, _ in pairs], [leaf for _, leaf in pairs], structure


def _json(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} occurs twice")
        return dict(pairs)

    with _readable(file, "should hold a JSON object and does not"):
        return dict(json.loads(text.decode(), object_pairs_hook=unique))


@contextlib.contextmanager
def _readable(file: Path, otherwise: str) -> Iterator[None]:
    """Whatever a foreign reader raises becomes one ValueError that names the file."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{file} {otherwise} ({why}); {_AGAIN}") from error
